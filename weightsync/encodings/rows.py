"""Builders of the tables that the kernels of `weightsync._native` take.

Every row is a strided box with dims padded in front to four. Addresses are absolute and are never
checked: whoever builds a row keeps its memory alive for the call.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from weightsync.errors import ConfigError
from weightsync.ir.tables import MAX_DIMS

__all__ = ["digest_rows", "fill_rows", "pack_keys", "pack_rows"]

I64 = npt.NDArray[np.int64]


def pack_rows(
    src_addresses: npt.ArrayLike,
    dst_addresses: npt.ArrayLike,
    src_dtype: npt.ArrayLike,
    dst_dtype: npt.ArrayLike,
    n: npt.ArrayLike,
    src_stride_bytes: npt.ArrayLike,
    dst_stride_bytes: npt.ArrayLike,
) -> I64:
    """Table of strided copies, as `weightsync._native.pack` takes it.

    Args:
        src_addresses: (R,) absolute addresses.
        dst_addresses: (R,) absolute addresses.
        src_dtype: (R,) or one: numbers of `Dtype`.
        dst_dtype: (R,) or one: numbers of `Dtype`.
        n: (R, 4) number of elements, dims padded in front.
        src_stride_bytes: (R, 4) distance of neighbours.
        dst_stride_bytes: (R, 4) distance of neighbours.

    Returns:
        (R, 16) int64, C-contiguous.
    """
    columns = (src_addresses, dst_addresses, src_dtype, dst_dtype)
    return _table(columns, (n, src_stride_bytes, dst_stride_bytes))


def fill_rows(
    addresses: npt.ArrayLike,
    dtype: npt.ArrayLike,
    n: npt.ArrayLike,
    stride_bytes: npt.ArrayLike,
) -> I64:
    """Table of constant boxes, as `weightsync._native.fill` and `check_fill` take it.

    Args:
        addresses: (R,) absolute addresses.
        dtype: (R,) or one: numbers of `Dtype`.
        n: (R, 4) number of elements, dims padded in front.
        stride_bytes: (R, 4) distance of neighbours.

    Returns:
        (R, 10) int64, C-contiguous. The codes go beside it, see `weightsync.ir.dtypes.fill_code`.
    """
    return _table((addresses, dtype), (n, stride_bytes))


def digest_rows(
    addresses: npt.ArrayLike,
    itemsize: npt.ArrayLike,
    seeds: npt.ArrayLike,
    lo: npt.ArrayLike,
    step: npt.ArrayLike,
    n: npt.ArrayLike,
    stride_bytes: npt.ArrayLike,
) -> I64:
    """Table of boxes in memory, as `weightsync._native.digest` takes it.

    Element i of row r is element lo[r] + step[r] * i of its tensor and lies at
    addresses[r] + sum(stride_bytes[r] * i).

    Args:
        addresses: (R,) absolute addresses.
        itemsize: (R,) or one number: bytes per code, 1, 2, 4 or 8.
        seeds: (R,) or one number: see `tensor_seed`.
        lo: (R, 4) canonical index of the first element, dims padded in front.
        step: (R, 4) canonical distance of neighbours, at least 1.
        n: (R, 4) number of elements.
        stride_bytes: (R, 4) distance of neighbours in memory.

    Returns:
        (R, 19) int64, C-contiguous.
    """
    return _table((addresses, itemsize, seeds), (lo, step, n, stride_bytes))


def pack_keys(seeds: npt.ArrayLike, lo: npt.ArrayLike, step: npt.ArrayLike) -> I64:
    """Canonical side of pack rows, as `weightsync._native.pack_digest` takes it.

    Args:
        seeds: (R,) see `tensor_seed`.
        lo: (R, 4) canonical index of the first element of each row, dims as in the pack row.
        step: (R, 4) canonical distance of neighbours, at least 1.

    Returns:
        (R, 9) int64, C-contiguous.
    """
    return _table((seeds,), (lo, step))


def _table(columns: Sequence[npt.ArrayLike], dims: Sequence[npt.ArrayLike]) -> I64:
    wide = [np.asarray(part, dtype=np.int64) for part in dims]
    if any(part.ndim != 2 or part.shape != (wide[0].shape[0], MAX_DIMS) for part in wide):
        shapes = ", ".join(str(part.shape) for part in wide)
        raise ConfigError(f"dims columns must all have the shape (rows, {MAX_DIMS}), not {shapes}")
    table = np.empty((wide[0].shape[0], len(columns) + MAX_DIMS * len(wide)), dtype=np.int64)
    for at, column in enumerate(columns):
        table[:, at] = column
    for at, part in enumerate(wide):
        first = len(columns) + MAX_DIMS * at
        table[:, first : first + MAX_DIMS] = part
    return table
