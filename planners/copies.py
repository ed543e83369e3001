"""Copies: strided N-D copies on their way from regions to plan rows, and how they are split."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from weightsync.errors import PlanBudgetError
from weightsync.ir.tables import MAX_DIMS, BoolArray, IntArray, Table, expand, volume_of

__all__ = ["CopyTable", "Cuts", "runs", "split", "take_dims"]


@dataclasses.dataclass(frozen=True, eq=False)
class CopyTable(Table):
    """Strided copies; columns as in `RowTable` and `NestTable` of `weightsync.ir.plan`."""

    tensor: NDArray[np.int32]
    src_buffer: NDArray[np.int32]
    dst_buffer: NDArray[np.int32]
    src_offset: IntArray
    dst_offset: IntArray
    n: IntArray
    src_stride: IntArray
    dst_stride: IntArray

    COLUMNS: ClassVar[dict[str, tuple[Any, int]]] = {
        "tensor": (np.int32, 0),
        "src_buffer": (np.int32, 0),
        "dst_buffer": (np.int32, 0),
        "src_offset": (np.int64, 0),
        "dst_offset": (np.int64, 0),
        "n": (np.int64, MAX_DIMS),
        "src_stride": (np.int64, MAX_DIMS),
        "dst_stride": (np.int64, MAX_DIMS),
    }


@dataclasses.dataclass(frozen=True)
class Cuts:
    """How to split copies: along each dim at multiples of `every`, counted from `-phase`.

    Attributes:
        every: Largest part per dim, >= 1, `(R, 4)`.
        phase: Elements by which the first part is shorter, `0 <= phase < every`, `(R, 4)`.
    """

    every: IntArray
    phase: IntArray


def take_dims(values: NDArray[Any], order: IntArray) -> NDArray[Any]:
    """Return the columns of each row in the given order, `(R, 4)`."""
    return np.take_along_axis(values, order, axis=1)


def runs(n: IntArray, *strides: IntArray) -> tuple[BoolArray, IntArray]:
    """Find the dims, innermost first, over which memory is one contiguous run on all sides.

    Args:
        n: Counts, innermost dim first, `(R, 4)`.
        *strides: Strides of each side in the same order; ignored where n is 1.

    Returns:
        `(inside, length)`: which dims the run spans, `(R, 4)`, and its elements, `(R,)`.
    """
    length = np.ones(len(n), np.int64)
    inside = np.zeros(n.shape, np.bool_)
    unbroken = np.ones(len(n), np.bool_)
    for dim in range(MAX_DIMS):
        for stride in strides:
            unbroken &= (n[:, dim] == 1) | (stride[:, dim] == length)
        inside[:, dim] = unbroken
        length = np.where(unbroken, length * n[:, dim], length)
    return inside, length


def split(copies: CopyTable, cuts: Cuts, max_rows: int, names: Sequence[str]) -> CopyTable:
    """Split copies along their dims; the parts of a copy follow one another in row-major order.

    Args:
        copies: What to split.
        cuts: Where.
        max_rows: Budget.
        names: Names of the tensors, for the message.

    Raises:
        PlanBudgetError: More than `max_rows` parts; nothing was made.
    """
    parts = (cuts.phase + copies.n - 1) // cuts.every + 1
    count = volume_of(parts)
    total = int(np.sum(count, dtype=np.float64))
    if total > max_rows:
        worst = int(count.argmax())
        name = names[int(copies.tensor[worst])]
        raise PlanBudgetError(
            f"contiguous runs shatter tensors like {name} into {total} rows, more than max_rows "
            f"({max_rows}); one region of it, {copies.n[worst].tolist()}, makes {count[worst]}: "
            "let source and sink shard the same dim, or raise max_rows",
            tensor=name,
            rows=total,
            budget=max_rows,
        )
    if total == len(copies):
        return copies
    owner, local = expand(count)
    n, every, phase = copies.n[owner], cuts.every[owner], cuts.phase[owner]
    src_stride, dst_stride = copies.src_stride[owner], copies.dst_stride[owner]
    src_offset, dst_offset = copies.src_offset[owner], copies.dst_offset[owner]
    for dim in range(MAX_DIMS - 1, -1, -1):
        of_dim = parts[owner, dim]
        if (of_dim == 1).all():
            continue
        part = local % of_dim
        local //= of_dim
        begin = np.maximum(part * every[:, dim] - phase[:, dim], 0)
        n[:, dim] = np.minimum((part + 1) * every[:, dim] - phase[:, dim], n[:, dim]) - begin
        src_offset += begin * src_stride[:, dim]
        dst_offset += begin * dst_stride[:, dim]
    single = n == 1
    src_stride[single] = 0
    dst_stride[single] = 0
    return CopyTable(
        tensor=copies.tensor[owner],
        src_buffer=copies.src_buffer[owner],
        dst_buffer=copies.dst_buffer[owner],
        src_offset=src_offset,
        dst_offset=dst_offset,
        n=n,
        src_stride=src_stride,
        dst_stride=dst_stride,
    )
