"""The small files of a checkpoint: JSON, and what in a folder belongs to one at all."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from weightsync.errors import CheckpointError, ConfigError

__all__ = [
    "CONFIG_NAME",
    "INDEX_NAME",
    "SINGLE_NAME",
    "read_json",
    "require_free",
    "side_files",
    "write_json",
]

CONFIG_NAME: Final = "config.json"
INDEX_NAME: Final = "model.safetensors.index.json"
SINGLE_NAME: Final = "model.safetensors"
MAX_JSON_BYTES: Final = 256 << 20
_MAX_SIDE_BYTES: Final = 64 << 20
# Of a checkpoint's small files: configurations, tokenizers, templates, licences, code.
_SIDE_SUFFIXES: Final = {".json", ".txt", ".jinja", ".model", ".tiktoken", ".md", ".py"}
# What has such a name belongs to a checkpoint, whatever else lies beside it.
_KNOWN_NAMES: Final = {
    CONFIG_NAME, "generation_config.json", "chat_template.jinja", "chat_template.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json",
}  # fmt: skip
# What trainers leave beside the weights; it says how training stands, not what the model is.
_TRAINER_NAMES: Final = {
    "trainer_state.json", "training_args.json", "all_results.json", "train_results.json",
    "eval_results.json", "test_results.json", "predict_results.json", "zero_to_fp32.py",
}  # fmt: skip


def read_json(
    path: Path, error: type[CheckpointError] | type[ConfigError] = CheckpointError
) -> dict[str, Any]:
    """Reads a JSON object of at most 256 MiB. Blocks on the disk.

    Args:
        path: The file.
        error: What to raise: whose fault a bad file is.

    Raises:
        CheckpointError: It cannot be read, is too large or no JSON object; or `error` instead.
    """
    try:
        with path.open("rb") as file:  # the size of what is no regular file shows by reading only
            blob = file.read(MAX_JSON_BYTES + 1)
        if len(blob) > MAX_JSON_BYTES:
            raise error(f"{path}: more than {MAX_JSON_BYTES} bytes", path=path)
        content = json.loads(blob.decode("utf-8"))
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror}", path=path) from cause
    except (ValueError, RecursionError) as cause:  # RecursionError: brackets all the way down
        raise error(f"{path} is no JSON: {cause}", path=path) from cause
    if not isinstance(content, dict):
        raise error(f"{path} is no JSON object", path=path)
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a small file that people read, too."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def side_files(path: Path) -> tuple[Path, ...]:
    """The small files that a new checkpoint like this one gets copies of. Blocks on the disk.

    Args:
        path: A folder or an index: everything small in its folder belongs to it but the state of a
            trainer. Or a single safetensors file: beside it may lie anything, so only the known
            names of configurations, tokenizers and templates are taken.

    Raises:
        CheckpointError: The folder cannot be read.
    """
    try:
        is_folder = path.is_dir()
        is_whole = is_folder or path.name.endswith(".json")
        beside = sorted((path if is_folder else path.parent).iterdir())
        return tuple(p for p in beside if (is_whole or _is_known(p.name)) and _is_side_file(p))
    except OSError as error:
        raise CheckpointError(
            f"the small files of {path} cannot be listed: {error.strerror}", path=path
        ) from error


def require_free(path: Path, *, overwrite: bool, side_names: Collection[str] = ()) -> None:
    """Checks that a folder may be made here: only a checkpoint is replaced, and nothing beside it.

    Args:
        path: Where.
        overwrite: Whether a checkpoint may be replaced.
        side_names: Small files of the new one; old ones of these names are meant to go.

    Raises:
        ConfigError: It is no folder, or not to be replaced, or something in it would be lost that
            is not part of a checkpoint; names it.
        CheckpointError: It cannot be looked at.
    """
    try:
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise ConfigError(f"{path} is there and no folder; name another", path=path)
        found = sorted(path.iterdir()) if path.is_dir() else []
        folders = {child for child in found if child.is_dir()}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be looked at: {error.strerror}", path=path) from error
    if not found:
        return
    if not overwrite:
        raise ConfigError(
            f"{path} is there already; name another, or replace it (overwrite=True, --force)",
            path=path,
        )
    weights = [child for child in found if child.suffix == ".safetensors"]
    is_indexed = any(child.name == INDEX_NAME for child in found)
    if not weights or (len(weights) > 1 and not is_indexed):
        what = f"{len(weights)} of them without {INDEX_NAME}" if weights else "no *.safetensors"
        raise ConfigError(
            f"{path} is no checkpoint ({what}), so it is not replaced; name another", path=path
        )
    for child in found:
        is_part = child in weights or child.name == INDEX_NAME or child.name in side_names
        if child in folders or not (is_part or _is_known(child.name)):
            raise ConfigError(
                f"{path} is not replaced: {child.name!r:.80} in it is no part of a checkpoint and "
                "would be lost; move it away, or name another folder",
                path=path,
            )


def _is_known(name: str) -> bool:
    return name in _KNOWN_NAMES or name.endswith(".tiktoken")


def _is_side_file(path: Path) -> bool:
    return (
        path.suffix in _SIDE_SUFFIXES
        and path.name not in _TRAINER_NAMES
        and not path.name.endswith(".index.json")
        and path.is_file()
        and path.stat().st_size <= _MAX_SIDE_BYTES
    )
