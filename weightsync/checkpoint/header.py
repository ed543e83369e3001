"""The header of one safetensors file, read with suspicion and written with care.

A file is 8 bytes of length N (little endian), N bytes of JSON, then the tensors' bytes. The JSON
gives every tensor `dtype`, `shape` and `data_offsets`, counted from the end of the header; tensors
must cover the rest of the file without gap or overlap, so that a file hides nothing.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from weightsync.errors import CheckpointError
from weightsync.ir.dtypes import Dtype

__all__ = ["StoredTensor", "format_header", "parse_header", "read_header"]

_LENGTH_BYTES: Final = 8
# The limit of the safetensors library: 100 MB describe about a million tensors.
MAX_HEADER_BYTES: Final = 100_000_000
_MAX_DIMS: Final = 32
_MAX_NAME: Final = 80  # characters of a foreign name that a message repeats
_METADATA: Final = "__metadata__"
# Headers are padded with spaces, so that tensors start on a line of the cache.
_ALIGN_BYTES: Final = 64


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in a file.

    Args:
        name: As the checkpoint spells it.
        dtype: Of its elements.
        shape: May be empty: a scalar.
        path: The file.
        offset_bytes: Of its first byte, from the beginning of the file.
        nbytes: Its length; dense and row-major.
    """

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    path: Path
    offset_bytes: int
    nbytes: int

    @property
    def num_rows(self) -> int:
        """Elements along the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1


def read_header(path: Path) -> tuple[StoredTensor, ...]:
    """Reads and checks the header of a file; reads nothing else of it. Blocks on the disk.

    Args:
        path: A `.safetensors` file.

    Returns:
        Its tensors, in the order of their bytes.

    Raises:
        CheckpointError: The file cannot be read, is truncated, or its header is not true.
    """
    try:
        # A pipe must not be waited for: it would never be a safetensors file.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path} is no regular file", path=path)
            size = status.st_size
            if size < _LENGTH_BYTES:
                raise CheckpointError(
                    f"{path}: {size} bytes are no safetensors file; was it truncated?", path=path
                )
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: a header of {length} bytes is beyond {MAX_HEADER_BYTES}; this is no "
                    "safetensors file",
                    path=path,
                )
            if length > size - _LENGTH_BYTES:
                raise CheckpointError(
                    f"{path}: the header has {length} bytes, the file {size}; was it truncated?",
                    path=path,
                )
            return parse_header(file.read(length), path, size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", path=path) from error


def parse_header(header: bytes, path: Path, file_bytes: int) -> tuple[StoredTensor, ...]:
    """Checks the JSON of a header against the size of its file. Pure.

    Args:
        header: The JSON, without the 8 bytes before it.
        path: Of the file, for messages and results.
        file_bytes: Length of the whole file.

    Returns:
        Its tensors, in the order of their bytes.

    Raises:
        CheckpointError: It is no such JSON, or what it says cannot be; names file and tensor.
    """
    content = _parse_json(header, path)
    metadata = content.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: {_METADATA} must map strings to strings", path=path)
    start = _LENGTH_BYTES + len(header)
    found = sorted(
        (_tensor(name, entry, path, start) for name, entry in content.items()),
        key=lambda tensor: (tensor.offset_bytes, tensor.nbytes),
    )
    end = start
    for tensor in found:
        if tensor.offset_bytes != end:
            what = "overlaps the tensor before it" if tensor.offset_bytes < end else "leaves a gap"
            raise _lie(path, tensor.name, f"its data_offsets {what}")
        end += tensor.nbytes
        if end > file_bytes:
            raise _lie(
                path,
                tensor.name,
                f"it ends at byte {end}, the file at {file_bytes}; was it truncated?",
            )
    if end != file_bytes:
        raise CheckpointError(
            f"{path}: {file_bytes - end} bytes after the last tensor belong to none", path=path
        )
    return tuple(found)


def format_header(tensors: Iterable[tuple[str, Dtype, tuple[int, ...]]]) -> tuple[bytes, list[int]]:
    """Makes the beginning of a file, up to the first tensor's first byte.

    Args:
        tensors: Name, dtype and shape of each, in the order of their bytes. Larger items first,
            or some will not be aligned.

    Returns:
        The bytes (length and header; padded to a multiple of 64), and the offset of every tensor
        from the beginning of the file, and as a last entry the length of the file.
    """
    # What transformers asks for before it loads a file.
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    end, offsets = 0, [0]
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [start, end]}
        offsets.append(end)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    length = -(-(_LENGTH_BYTES + len(text)) // _ALIGN_BYTES) * _ALIGN_BYTES
    head = (length - _LENGTH_BYTES).to_bytes(_LENGTH_BYTES, "little") + text
    return head.ljust(length), [length + offset for offset in offsets]


def _parse_json(header: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{path}: the header has {twice!r:.{_MAX_NAME}} twice", path=path)
        return made

    if not header.startswith(b"{"):
        raise CheckpointError(f"{path}: the header does not begin with an object", path=path)
    try:
        content = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets all the way down
        raise CheckpointError(f"{path}: the header is no JSON: {error}", path=path) from error
    assert isinstance(content, dict)  # it begins with a brace
    return content


def _tensor(name: str, entry: Any, path: Path, start: int) -> StoredTensor:
    if not name or not name.isprintable():  # half a surrogate pair could not even be told to a peer
        raise CheckpointError(f"{path}: {name!r:.{_MAX_NAME}} is no name of a tensor", path=path)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _lie(path, name, "dtype, shape and data_offsets are needed, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in Dtype.__members__:
        raise _lie(path, name, f"its dtype {dtype!r:.40} is none of {', '.join(Dtype.__members__)}")
    if not _are_counts(shape) or len(shape) > _MAX_DIMS:
        raise _lie(path, name, f"its shape {shape!r:.80} is no list of sizes")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise _lie(path, name, f"its data_offsets {offsets!r:.80} are no pair of offsets")
    first, end = offsets
    nbytes = math.prod(shape) * Dtype[dtype].itemsize
    if end - first != nbytes:
        raise _lie(
            path, name, f"{dtype} of shape {shape} has {nbytes} bytes, its data_offsets span "
            f"{end - first}",
        )  # fmt: skip
    return StoredTensor(name, Dtype[dtype], tuple(shape), path, start + first, nbytes)


def _are_counts(value: Any) -> bool:
    # bool is an int in Python; "a shape of true" is a broken file all the same.
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


def _lie(path: Path, name: str, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: tensor {name[:_MAX_NAME]}: {what}", path=path, tensor=name)
