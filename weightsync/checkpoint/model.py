"""What a new checkpoint will look like: its tensors, its files and who writes them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from weightsync.checkpoint.files import INDEX_NAME, SINGLE_NAME, read_checkpoint
from weightsync.checkpoint.header import format_header
from weightsync.errors import ConfigError
from weightsync.ir.builder import ManifestBuilder
from weightsync.ir.dtypes import Dtype
from weightsync.ir.manifest import Manifest
from weightsync.planners.rules.canonical import canonical_dtypes, canonical_tensors
from weightsync.planners.rules.config import ModelConfig
from weightsync.planners.rules.layout import named_dtype

__all__ = ["Entry", "FilesLayout", "ModelFiles", "NewFile"]

# Of a checkpoint's small files: configurations, tokenizers, templates, licences, code.
_SIDE_SUFFIXES: Final = {".json", ".txt", ".jinja", ".model", ".tiktoken", ".md", ".py"}
_MAX_SIDE_BYTES: Final = 64 << 20
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
        config: Content of `config.json`; None copies it from `like`.
        like: Folder whose small files are copied, or None.
        dtype: Of the weights, for `config.json`; None: as in `like`.
    """

    files: tuple[NewFile, ...]
    config: dict[str, Any] | None
    like: Path | None
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
            folder: Path | None = stored.folder
        else:
            assert config is not None
            content, folder = _content(config), None
            wanted = Dtype.BF16 if wanted is None else wanted
            content.pop("quantization_config", None)  # what is written is not quantized
            own = canonical_dtypes(content)
            entries = [
                Entry(name, own.get(name, wanted), shape)
                for name, shape in canonical_tensors(content).items()
            ]
        if not entries:
            raise ConfigError("a checkpoint without tensors cannot be written")
        return cls(_cut(entries, world_size, max_file_bytes), content, folder, wanted)

    def files_of(self, rank: int) -> list[NewFile]:
        """The files that a rank writes."""
        return [file for file in self.files if file.rank == rank]

    def write_side_files(self, folder: Path) -> None:
        """Put everything but the weights into a folder: configuration, index, copies."""
        if self.like is not None:
            for path in sorted(self.like.iterdir()):
                if _is_side_file(path):
                    shutil.copyfile(path, folder / path.name)
        content = self.config if self.config is not None else _json(folder / "config.json")
        if content is not None and self.dtype is not None:
            named = [key for key in ("dtype", "torch_dtype") if key in content]
            for key in named if named else ["dtype"]:
                content = {**content, key: _CONFIG_DTYPES[self.dtype]}
            _write_json(folder / "config.json", content)
        if len(self.files) > 1:
            weight_map = {e.name: file.name for file in self.files for e in file.entries}
            total = sum(entry.nbytes for entry in self.expected.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_json(folder / INDEX_NAME, index)


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
    content = _json(path / "config.json" if path.is_dir() else path)
    if content is None:
        raise ConfigError(f"model config {path} is no JSON object", path=path)
    return content


def _is_side_file(path: Path) -> bool:
    return (
        path.is_file()
        and path.suffix in _SIDE_SUFFIXES
        and not path.name.endswith(".index.json")
        and path.stat().st_size <= _MAX_SIDE_BYTES
    )


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"model config {path} cannot be read: {error}", path=path) from error
    return content if isinstance(content, dict) else None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
