"""Files as tensors: pages of the kernel's cache, which it may write back and drop as it likes."""

from __future__ import annotations

import mmap
import os
import warnings
from pathlib import Path
from typing import Final

import torch

from weightsync.checkpoint.header import StoredTensor
from weightsync.errors import CheckpointError
from weightsync.live.sites import TORCH_DTYPES

__all__ = ["create_mapped", "map_file", "same_bytes", "view"]

_COMPARE_BYTES: Final = 16 << 20


def map_file(path: Path) -> mmap.mmap:
    """Maps a file for reading; whoever writes to it ends the process.

    Raises:
        CheckpointError: It cannot be read or mapped.
    """
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be mapped: {error}", path=path) from error


def create_mapped(path: Path, nbytes: int, head: bytes) -> mmap.mmap:
    """Makes a new file of its final size, with its first bytes, and maps it for writing.

    Its blocks are taken at once: a disk that is full says so here, not by a signal later.

    Args:
        path: Must not exist.
        nbytes: Final length.
        head: Its first bytes.

    Raises:
        CheckpointError: There is no room, or the file cannot be made.
    """
    try:
        with path.open("xb+") as file:
            file.write(head)
            file.flush()
            os.posix_fallocate(file.fileno(), 0, nbytes)
            return mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_WRITE)
    except OSError as error:
        raise CheckpointError(
            f"{path}: {nbytes} bytes cannot be written: {error.strerror}", path=path
        ) from error


def view(mapped: mmap.mmap, tensor: StoredTensor, first: int, count: int) -> torch.Tensor:
    """Rows of a stored tensor as a tensor over the file's pages; no copy.

    Args:
        mapped: Of its file; kept alive by the result.
        tensor: Where it lies.
        first: First row.
        count: Number of rows; a scalar has one.

    Returns:
        `(count, *shape[1:])`, dense.
    """
    row_bytes = tensor.nbytes // tensor.num_rows
    with warnings.catch_warnings():
        # PyTorch knows no read-only tensors and says so; nobody writes to a source.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        flat = torch.frombuffer(
            mapped,
            dtype=TORCH_DTYPES[tensor.dtype],
            count=row_bytes * count // tensor.dtype.itemsize,
            offset=tensor.offset_bytes + first * row_bytes,
        )
    return flat.view(count, *tensor.shape[1:])


def same_bytes(
    mapped: mmap.mmap, tensor: StoredTensor, other_map: mmap.mmap, other: StoredTensor
) -> bool:
    """Whether two stored tensors are equal bit for bit. Reads both, piece by piece."""
    if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
        return False
    with memoryview(mapped) as first, memoryview(other_map) as second:
        for start in range(0, tensor.nbytes, _COMPARE_BYTES):
            size = min(_COMPARE_BYTES, tensor.nbytes - start)
            a, b = tensor.offset_bytes + start, other.offset_bytes + start
            if first[a : a + size] != second[b : b + size]:
                return False
    return True
