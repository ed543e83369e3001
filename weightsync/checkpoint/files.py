"""A checkpoint folder: which files it has, which tensors they hold, what a model needs of them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from weightsync.checkpoint.header import StoredTensor, read_header
from weightsync.checkpoint.side import CONFIG_NAME, INDEX_NAME, SINGLE_NAME, read_json
from weightsync.errors import CheckpointError, ConfigError
from weightsync.planners.rules.canonical import canonical_tensors
from weightsync.planners.rules.config import SUPPORTED_MODELS, ConfigLike, ModelConfig, model_config
from weightsync.planners.rules.transformers import transformers_aliases

__all__ = ["StoredCheckpoint", "StoredTensor", "read_checkpoint"]

_MAX_FILE_NAME: Final = 255  # bytes; what Linux file systems take
_NAMES_SHOWN: Final = 4
_MAX_EXTRA_LAYERS: Final = 64
# Tables that old checkpoints stored and that every model computes; transformers drops them too.
_COMPUTED: Final = re.compile(r".*\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class StoredCheckpoint:
    """What a checkpoint holds, from its headers; none of its weights was read.

    Args:
        folder: Where it lies.
        files: Its safetensors files, sorted.
        tensors: By name, in the order of the files and of the bytes in them.
        config_path: Its `config.json`, or None.
    """

    folder: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]
    config_path: Path | None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def known_config(self) -> ModelConfig | None:
        """Reads the model's configuration.

        Returns:
            The configuration; None without a `config.json`, or for a model that no rule knows.

        Raises:
            CheckpointError: `config.json` is no JSON object, or makes no sense for its model.
        """
        if self.config_path is None:
            return None
        content = read_json(self.config_path)
        if content.get("model_type") not in SUPPORTED_MODELS:
            return None
        try:
            return ModelConfig.from_dict(content)
        except ConfigError as error:
            raise CheckpointError(f"{self.config_path}: {error}", path=self.config_path) from error

    def canonical(self, config: ConfigLike | None) -> tuple[dict[str, StoredTensor], list[str]]:
        """Checks that the checkpoint is one of a model, and picks the tensors to move.

        Args:
            config: The model; None takes every tensor as it is.

        Returns:
            The tensors by canonical name, and the names of those that are not moved: tables that
            every model computes, second names of tied weights, layers of multi-token prediction.

        Raises:
            CheckpointError: A tensor is missing, not part of the model, or of another shape.
            ConfigError: The model is not supported.
        """
        if config is None:
            return dict(self.tensors), []
        model = model_config(config)
        shapes = canonical_tensors(model, quantized=model.quantization is not None)
        aliases, extra_layers = transformers_aliases(model), self._extra_layers(model)
        found: dict[str, StoredTensor] = {}
        skipped: list[str] = []
        for name, tensor in self.tensors.items():
            if name in shapes:
                self._check_shape(tensor, shapes[name])
                found[name] = tensor
            elif name in aliases and aliases[name] in self.tensors:
                self._check_shape(tensor, shapes[aliases[name]])
                skipped.append(name)
            elif _COMPUTED.fullmatch(name) or name.startswith(extra_layers):
                skipped.append(name)
            else:
                raise CheckpointError(
                    f"{tensor.path}: {name} is not part of the {model.model_type} that its config "
                    "describes",
                    path=tensor.path,
                    tensor=name,
                )
        missing = [name for name in shapes if name not in found]
        if missing:
            shown = ", ".join(missing[:_NAMES_SHOWN])
            more = len(missing) - _NAMES_SHOWN
            raise CheckpointError(
                f"{self.folder} lacks {shown}{f' and {more} more' if more > 0 else ''}, which the "
                f"{model.model_type} of its config has",
                path=self.folder,
                tensor=missing[0],
            )
        return found, skipped

    def _extra_layers(self, model: ModelConfig) -> tuple[str, ...]:
        """Prefixes of the layers of multi-token prediction, which no engine serves weights from."""
        content = read_json(self.config_path) if self.config_path is not None else {}
        count = content.get("num_nextn_predict_layers")
        if not isinstance(count, int) or not 0 <= count <= _MAX_EXTRA_LAYERS:
            return ()
        return tuple(f"model.layers.{model.num_layers + i}." for i in range(count))

    def _check_shape(self, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.path}: {tensor.name} has shape {tensor.shape}, by its config {shape}",
                path=tensor.path,
                tensor=tensor.name,
            )


def read_checkpoint(path: str | Path) -> StoredCheckpoint:
    """Finds the files of a checkpoint and reads their headers, never weights. Blocks on the disk.

    Args:
        path: A folder with `model.safetensors.index.json` or a single `*.safetensors`; or such an
            index or file itself. Links are followed.

    Returns:
        What it holds.

    Raises:
        CheckpointError: There is no safetensors checkpoint, a file is missing, truncated or not
            what its header says, or index and files disagree; names file and tensor.
    """
    path = Path(path)
    try:
        folder, first = (path, _find(path)) if path.is_dir() else (path.parent, path)
        config = folder / CONFIG_NAME
        has_config = config.is_file()
    except OSError as error:  # no right to look, a name that is too long
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", path=path) from error
    if first.name.endswith(".json"):
        weight_map = _read_index(first)
        files = sorted({folder / name for name in weight_map.values()})
    else:
        weight_map, files = None, [first]
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in read_header(file):
            if tensor.name in tensors:
                raise CheckpointError(
                    f"{file}: tensor {tensor.name} is in {tensors[tensor.name].path.name} as well",
                    path=file,
                    tensor=tensor.name,
                )
            tensors[tensor.name] = tensor
    if weight_map is not None:
        _compare(first, weight_map, tensors)
    return StoredCheckpoint(folder, tuple(files), tensors, config if has_config else None)


def _find(folder: Path) -> Path:
    if (folder / INDEX_NAME).is_file():
        return folder / INDEX_NAME
    if (folder / SINGLE_NAME).is_file():
        return folder / SINGLE_NAME
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        why = f"{len(found)} safetensors files but no {INDEX_NAME}; name the file or add the index"
    elif any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        why = (
            "pickled weights only, which are never loaded; save the model again with "
            "save_pretrained(..., safe_serialization=True)"
        )
    else:
        why = f"no {INDEX_NAME} and no *.safetensors"
    raise CheckpointError(f"{folder} holds {why}", path=folder)


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: no weight_map from tensors to files", path=path)
    for name, file in weight_map.items():
        if not name.isprintable():  # half a surrogate pair could not even be told to a peer
            raise CheckpointError(f"{path}: {name!r:.80} is no name of a tensor", path=path)
        if not _is_file_name(file):
            raise CheckpointError(
                f"{path}: tensor {name} lies in {file!r:.80}, which is no name of a file beside "
                "the index",
                path=path,
                tensor=name,
            )
        beside = path.parent / file
        try:
            is_there = beside.is_file()
        except OSError as error:
            raise CheckpointError(
                f"{beside} cannot be read: {error.strerror}", path=beside, tensor=name
            ) from error
        if not is_there:
            raise CheckpointError(
                f"{path} names {file}, which is not there; was the download complete?",
                path=beside,
                tensor=name,
            )
    return weight_map


def _is_file_name(name: Any) -> bool:
    # Nothing outside of the folder is read, whatever an index asks for, and nothing is tried that a
    # message could not repeat.
    return (
        isinstance(name, str)
        and name not in ("", "..")
        and name.isprintable()
        and Path(name).name == name
        and len(os.fsencode(name)) <= _MAX_FILE_NAME
    )


def _compare(index: Path, weight_map: dict[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    for name, file in weight_map.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.path.name != file:
            raise CheckpointError(
                f"{index}: tensor {name} is not in {file}", path=index.parent / file, tensor=name
            )
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise CheckpointError(
                f"{tensor.path}: the index does not know tensor {name}",
                path=tensor.path,
                tensor=name,
            )
