"""What a new checkpoint will look like: its tensors, its files and who writes them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from weightsync.checkpoint.files import read_checkpoint
from weightsync.checkpoint.header import format_header
from weightsync.checkpoint.side import (
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    read_json,
    side_files,
    write_json,
)
from weightsync.errors import CheckpointError, ConfigError
from weightsync.ir.builder import ManifestBuilder
from weightsync.ir.dtypes import Dtype
from weightsync.ir.manifest import Manifest
from weightsync.planners.rules.canonical import canonical_dtypes, canonical_tensors
from weightsync.planners.rules.config import ModelConfig
from weightsync.planners.rules.layout import named_dtype

__all__ = ["Entry", "FilesLayout", "ModelFiles", "NewFile"]

_CONFIG_DTYPES: Final = {Dtype.BF16: "bfloat16", Dtype.F16: "float16", Dtype.F32: "float32"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to store."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class NewFile:
    """A file to write: its name, its tensors in the order of their bytes, who writes it."""

    name: str
    entries: tuple[Entry, ...]
    rank: int

    def head(self) -> tuple[bytes, list[int]]:
        """Its first bytes and the tensors' offsets; see `format_header`."""
        return format_header((e.name, e.dtype, e.shape) for e in self.entries)


@dataclass(frozen=True)
class ModelFiles:
    """All files of a checkpoint to write; the same on every rank that is given the same.

    Args:
        files: With weights.
        config: Content of `config.json`; None: a copy.
        copies: Small files of another checkpoint that this one gets, too.
        dtype: Of the weights, for `config.json`; None: as in `like`.
    """

    files: tuple[NewFile, ...]
    config: dict[str, Any] | None
    copies: tuple[Path, ...]
    dtype: Dtype | None
    expected: dict[str, Entry] = field(init=False, repr=False)
    """Every tensor by name."""

    def __post_init__(self) -> None:
        entries = {entry.name: entry for file in self.files for entry in file.entries}
        object.__setattr__(self, "expected", entries)

    @classmethod
    def of(
        cls,
        config: ModelConfig | Mapping[str, Any] | str | Path | None,
        like: str | Path | None,
        dtype: str | Dtype | None,
        world_size: int,
        max_file_bytes: int,
    ) -> ModelFiles:
        """Decides on files; see `CheckpointSink`.

        Raises:
            ConfigError: Not exactly one of `config` and `like`, or arguments that make no sense.
            CheckpointError: `like` is no sound checkpoint.
        """
        if (config is None) == (like is None):
            raise ConfigError("a new checkpoint needs either config or like, to know its tensors")
        wanted = None if dtype is None else named_dtype(dtype)
        content: dict[str, Any] | None = None
        if like is not None:
            stored = read_checkpoint(like)
            model = stored.known_config()
            found, _ = stored.canonical(model)
            own = canonical_dtypes(model) if model is not None else {}
            entries = [
                Entry(t.name, t.dtype if wanted is None or t.name in own else wanted, t.shape)
                for t in found.values()
            ]
            copies = side_files(Path(like))
        else:
            assert config is not None
            content, copies = _content(config), ()
            wanted = Dtype.BF16 if wanted is None else wanted
            content.pop("quantization_config", None)  # what is written is not quantized
            own = canonical_dtypes(content)
            entries = [
                Entry(name, own.get(name, wanted), shape)
                for name, shape in canonical_tensors(content).items()
            ]
        if not entries:
            raise ConfigError("a checkpoint without tensors cannot be written")
        return cls(_cut(entries, world_size, max_file_bytes), content, copies, wanted)

    def files_of(self, rank: int) -> list[NewFile]:
        """The files that a rank writes."""
        return [file for file in self.files if file.rank == rank]

    def side_names(self) -> frozenset[str]:
        """Names of everything but the weights and their index."""
        return frozenset((CONFIG_NAME, *(path.name for path in self.copies)))

    def write_side_files(self, folder: Path) -> None:
        """Put everything but the weights into a folder: configuration, index, copies.

        Raises:
            CheckpointError: A copy cannot be made, or there is no room.
        """
        try:
            for path in self.copies:
                shutil.copyfile(path, folder / path.name)
            self._write_config(folder / CONFIG_NAME)
            if len(self.files) > 1:
                weight_map = {e.name: file.name for file in self.files for e in file.entries}
                total = sum(entry.nbytes for entry in self.expected.values())
                index = {"metadata": {"total_size": total}, "weight_map": weight_map}
                write_json(folder / INDEX_NAME, index)
        except OSError as error:
            raise CheckpointError(
                f"the small files of the checkpoint cannot be written: {error}", path=folder
            ) from error

    def _write_config(self, path: Path) -> None:
        """The configuration that was given or copied, with the dtype of what is written."""
        content = self.config
        if content is None and path.exists():
            content = read_json(path)
        if content is None or self.dtype is None:
            return
        named = [key for key in ("dtype", "torch_dtype") if key in content]
        for key in named if named else ["dtype"]:
            content = {**content, key: _CONFIG_DTYPES[self.dtype]}
        write_json(path, content)


@dataclass(frozen=True)
class FilesLayout:
    """Every rank holds whole tensors: those of the files that it writes."""

    model: ModelFiles

    def manifest(self, rank: int) -> Manifest:
        """See `Layout`."""
        builder = ManifestBuilder("sink", f"sink {rank}")
        for file in self.model.files_of(rank):
            for entry in file.entries:
                if not entry.nbytes:
                    continue
                shape = entry.shape if entry.shape else (1,)
                builder.tensor(entry.name, shape)
                builder.buffer(entry.name, entry.dtype, math.prod(shape))
                builder.place(entry.name, entry.name, shape)
        return builder.build()


def _cut(entries: list[Entry], world_size: int, max_file_bytes: int) -> tuple[NewFile, ...]:
    """Tensors in order, a new file where one is full; each file to the rank with least to do."""
    if max_file_bytes < 1:
        raise ConfigError(f"max_file_bytes={max_file_bytes}: at least 1")
    total = sum(entry.nbytes for entry in entries)
    limit = min(max_file_bytes, -(-total // world_size))
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    if len(groups) < world_size:
        raise ConfigError(f"{world_size} ranks cannot share {len(groups)} file(s); take fewer")
    sizes = [sum(entry.nbytes for entry in group) for group in groups]
    load, rank_of = [0] * world_size, [0] * len(groups)
    for index in sorted(range(len(groups)), key=lambda i: (-sizes[i], i)):
        rank_of[index] = min(range(world_size), key=lambda r: (load[r], r))
        load[rank_of[index]] += max(1, sizes[index])
    names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    if len(groups) == 1:
        names = [SINGLE_NAME]
    return tuple(
        # Large items first, as safetensors does, so that every tensor is aligned.
        NewFile(name, tuple(sorted(group, key=lambda e: -e.dtype.itemsize)), rank)
        for name, group, rank in zip(names, groups, rank_of, strict=True)
    )


def _content(config: ModelConfig | Mapping[str, Any] | str | Path) -> dict[str, Any]:
    if isinstance(config, ModelConfig):
        raise ConfigError("config.json is written too: pass its path or content, no ModelConfig")
    if isinstance(config, Mapping):
        return dict(config)
    path = Path(config)
    return read_json(path / CONFIG_NAME if path.is_dir() else path, ConfigError)
