"""Copies: strided N-D copies on their way from regions to plan rows, and how they are split.

Millions of copies have some hundred different counts and strides. So each names its loop nest by
number, and what depends on the nest alone is worked out once for all copies that have it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from weightsync.errors import PlanBudgetError
from weightsync.ir.plan import NestTable
from weightsync.ir.tables import (
    MAX_DIMS,
    BoolArray,
    IntArray,
    Table,
    distinct,
    expand,
    starts_of,
    take_rows,
    unique_rows,
    volume_of,
)

__all__ = ["Copies", "CopyTable", "Cuts", "runs", "split", "take_dims", "unique_nests"]


@dataclasses.dataclass(frozen=True, eq=False)
class CopyTable(Table):
    """Where copies begin on both sides; columns as in `RowTable` of `weightsync.ir.plan`."""

    tensor: NDArray[np.int32]
    src_buffer: NDArray[np.int32]
    dst_buffer: NDArray[np.int32]
    src_offset: IntArray
    dst_offset: IntArray
    nest: NDArray[np.int32]

    COLUMNS: ClassVar[dict[str, tuple[Any, int]]] = {
        "tensor": (np.int32, 0),
        "src_buffer": (np.int32, 0),
        "dst_buffer": (np.int32, 0),
        "src_offset": (np.int64, 0),
        "dst_offset": (np.int64, 0),
        "nest": (np.int32, 0),
    }


@dataclasses.dataclass(frozen=True)
class Copies:
    """Some copies and their nests, which are not in any order; a nest may be there twice.

    Attributes:
        rows: The copies; `rows.nest` are rows of `nests`.
        nests: Counts and strides.
    """

    rows: CopyTable
    nests: NestTable

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: NDArray[Any]) -> Copies:
        """Return the copies selected by an index array or mask, with all nests."""
        return Copies(self.rows.take(index), self.nests)

    @classmethod
    def concat(cls, parts: Sequence[Copies]) -> Copies:
        """Return the copies of all parts, one part after the other."""
        start = starts_of(np.array([len(part.nests) for part in parts], np.int64))
        rows = [
            dataclasses.replace(part.rows, nest=part.rows.nest + np.int32(shift))
            for part, shift in zip(parts, start[:-1].tolist(), strict=True)
        ]
        return cls(CopyTable.concat(rows), NestTable.concat([part.nests for part in parts]))

    def canonical(self) -> Copies:
        """Return the same copies, each nest once, in the order of the copies that have them."""
        nests, number = unique_nests(self.nests)
        nest = take_rows(number, self.rows.nest)
        num = len(nest)
        first = np.full(len(nests), num)
        first[nest[::-1]] = np.arange(num - 1, -1, -1)  # the last one written is the first row
        order = np.argsort(first, kind="stable")[: np.count_nonzero(first < num)]
        place = np.zeros(len(nests), np.int32)
        place[order] = np.arange(len(order), dtype=np.int32)
        rows = dataclasses.replace(self.rows, nest=take_rows(place, nest))
        return Copies(rows, nests.take(order))


def unique_nests(nests: NestTable) -> tuple[NestTable, IntArray]:
    """Return each nest once, numbered by its first row, and the number of every row, `(N,)`."""
    first, number = unique_rows([nests.n, nests.src_stride, nests.dst_stride])
    return nests.take(first), number


@dataclasses.dataclass(frozen=True)
class Cuts:
    """How to split copies: along each dim at multiples of `every`, counted from `-phase`.

    Attributes:
        of: The cut of each copy, `(R,)`.
        nest: The nest of the copies that each cut is for, `(K,)`.
        every: Largest part per dim, >= 1, `(K, 4)`.
        phase: Elements by which the first part is shorter, `0 <= phase < every`, `(K, 4)`.
    """

    of: IntArray
    nest: IntArray
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


def split(copies: Copies, cuts: Cuts, max_rows: int, names: Sequence[str]) -> Copies:
    """Split copies along their dims; the parts of a copy follow one another in row-major order.

    Args:
        copies: What to split.
        cuts: Where.
        max_rows: Budget.
        names: Names of the tensors, for the message.

    Raises:
        PlanBudgetError: More than `max_rows` parts; nothing was made.
    """
    used, of = distinct(cuts.of, len(cuts.nest))
    nests = copies.nests.take(cuts.nest[used])
    every, phase = cuts.every[used], cuts.phase[used]
    parts = (phase + nests.n - 1) // every + 1
    count = volume_of(parts)
    of_row = take_rows(count, of)
    total = int(np.sum(of_row, dtype=np.float64))
    if total > max_rows:
        worst = int(of_row.argmax())
        name = names[int(copies.rows.tensor[worst])]
        n = nests.n[of[worst]].tolist()
        raise PlanBudgetError(
            f"contiguous runs shatter tensors like {name} into {total} rows, more than max_rows "
            f"({max_rows}); one region of it, {n}, makes {of_row[worst]}: "
            "let source and sink shard the same dim, or raise max_rows",
            tensor=name,
            rows=total,
            budget=max_rows,
        )
    if total == len(copies):
        return copies
    made, src_shift, dst_shift = _parts(nests, every, phase, parts)
    made, nest = unique_nests(made)
    owner, local = expand(of_row)
    part = take_rows(starts_of(count), take_rows(of, owner)) + local
    rows = copies.rows.take(owner)
    return Copies(
        dataclasses.replace(
            rows,
            src_offset=rows.src_offset + take_rows(src_shift, part),
            dst_offset=rows.dst_offset + take_rows(dst_shift, part),
            nest=take_rows(nest.astype(np.int32), part),
        ),
        made,
    )


def _parts(
    nests: NestTable, every: IntArray, phase: IntArray, parts: IntArray
) -> tuple[NestTable, IntArray, IntArray]:
    """Return the nest of every part of every nest, and how far on it begins on both sides."""
    owner, local = expand(volume_of(parts))
    whole = nests.take(owner)
    every, phase = take_rows(every, owner), take_rows(phase, owner)
    n, src_stride, dst_stride = whole.n.copy(), whole.src_stride.copy(), whole.dst_stride.copy()
    src_shift, dst_shift = np.zeros((2, len(owner)), np.int64)
    for dim in range(MAX_DIMS - 1, -1, -1):
        of_dim = parts[owner, dim]
        if (of_dim == 1).all():
            continue
        part = local % of_dim
        local //= of_dim
        begin = np.maximum(part * every[:, dim] - phase[:, dim], 0)
        n[:, dim] = np.minimum((part + 1) * every[:, dim] - phase[:, dim], n[:, dim]) - begin
        src_shift += begin * src_stride[:, dim]
        dst_shift += begin * dst_stride[:, dim]
    single = n == 1
    src_stride[single] = 0
    dst_stride[single] = 0
    return NestTable(n=n, src_stride=src_stride, dst_stride=dst_stride), src_shift, dst_shift
