"""Column tables: the one representation of manifests and plans.

A table is a frozen set of equally long numpy columns. Columns about tensor dims have shape
`(rows, MAX_DIMS)` and are front-padded, so that the last column is always the innermost dim.
Everything here is vectorised; nothing loops over rows in Python.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from weightsync.errors import LayoutError

__all__ = [
    "MAX_DIMS",
    "BoolArray",
    "IntArray",
    "Table",
    "all_dims",
    "any_dim",
    "distinct",
    "expand",
    "front_pad",
    "owners",
    "ranges",
    "starts_of",
    "sum_by",
    "take_rows",
    "unique_rows",
    "unique_runs",
    "volume_of",
]

MAX_DIMS = 4  # experts, heads, rows, columns: no checkpoint tensor of a language model has more

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: the usual odd multiplier


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Base of all tables. Subclasses are frozen dataclasses and declare `COLUMNS`.

    `COLUMNS` maps each field to `(dtype, width)`; width 0 is a one-dimensional column. Columns are
    converted once, made contiguous and read-only; a wrong length or shape is a LayoutError.
    """

    COLUMNS: ClassVar[dict[str, tuple[Any, int]]] = {}

    def __post_init__(self) -> None:
        length = -1
        for name, (dtype, width) in self.COLUMNS.items():
            column = np.asarray(getattr(self, name))
            if column.dtype != dtype:
                column = column.astype(dtype, casting="same_kind" if column.size else "unsafe")
            column = np.ascontiguousarray(column).view()
            length = column.shape[0] if length < 0 and column.ndim else length
            if column.shape != ((length, width) if width else (length,)):
                raise LayoutError(
                    f"column {name} of {type(self).__name__} has shape {column.shape}; "
                    f"expected {length} rows" + (f" of {width}" if width else "")
                )
            column.setflags(write=False)
            object.__setattr__(self, name, column)

    def __len__(self) -> int:
        return len(getattr(self, next(iter(self.COLUMNS))))

    def take(self, index: NDArray[Any] | slice) -> Self:
        """Return the rows selected by an index array, mask or slice."""
        if isinstance(index, slice):
            return type(self)(**{name: getattr(self, name)[index] for name in self.COLUMNS})
        if index.dtype == np.bool_:
            if len(index) != len(self):
                raise IndexError(f"a mask of {len(index)} rows for a table of {len(self)}")
            index = np.flatnonzero(index)
        return type(self)(**{name: take_rows(getattr(self, name), index) for name in self.COLUMNS})

    @classmethod
    def concat(cls, tables: Sequence[Self]) -> Self:
        """Return the rows of all tables, one table after the other."""
        if not tables:
            return cls.empty()
        return cls(
            **{name: np.concatenate([getattr(t, name) for t in tables]) for name in cls.COLUMNS}
        )

    @classmethod
    def empty(cls) -> Self:
        """Return a table without rows."""
        return cls(
            **{
                name: np.zeros((0, width) if width else 0, dtype)
                for name, (dtype, width) in cls.COLUMNS.items()
            }
        )


def front_pad(values: Sequence[Sequence[int]], fill: int) -> IntArray:
    """Return tuples of 0..4 ints as a `(rows, MAX_DIMS)` table, padded in front with `fill`.

    Raises:
        LayoutError: A tuple is longer than MAX_DIMS.
    """
    if max(map(len, values), default=0) > MAX_DIMS:
        raise LayoutError(f"more than {MAX_DIMS} dims: {next(v for v in values if len(v) > 4)}")
    pads = tuple((fill,) * k for k in range(MAX_DIMS, -1, -1))
    flat = [(*pads[len(v)], *v) for v in values]
    return np.array(flat, np.int64).reshape(-1, MAX_DIMS)


def take_rows(column: NDArray[Any], index: NDArray[Any]) -> NDArray[Any]:
    """Return `column[index]`, of an `(R, 4)` column five times as fast as numpy's own indexing.

    Args:
        column: `(R,)` or `(R, 4)`.
        index: Integers.
    """
    return np.take(column, index, axis=0)


def any_dim(mask: BoolArray) -> BoolArray:
    """Return `mask.any(axis=1)` of an `(R, 4)` mask; numpy's own is slow along so short an axis."""
    return np.asarray(np.ascontiguousarray(mask).view(np.uint32)[:, 0] != 0)


def all_dims(mask: BoolArray) -> BoolArray:
    """Return `mask.all(axis=1)` of an `(R, 4)` mask."""
    return np.asarray(np.ascontiguousarray(mask).view(np.uint32)[:, 0] == 0x01010101)


def volume_of(n: IntArray) -> IntArray:
    """Return the number of elements of boxes with counts `(R, 4)`."""
    return n[:, 0] * n[:, 1] * n[:, 2] * n[:, 3]


def sum_by(group: NDArray[Any], values: IntArray, num_groups: int) -> IntArray:
    """Return the sum of int64 values per group, exactly, `(num_groups,)`."""
    total = np.zeros(num_groups, np.int64)
    np.add.at(total, group, values)
    return total


def starts_of(counts: IntArray) -> IntArray:
    """Return exclusive prefix sums: where each run of `counts` starts; one entry more than runs."""
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


def distinct(values: NDArray[Any], size: int) -> tuple[IntArray, IntArray]:
    """Find the different values of many small ones; as `np.unique`, without a sort.

    Args:
        values: From 0 to `size - 1`, `(R,)`.
        size: An array of so many elements is made.

    Returns:
        `(found, number)`: the different values, ascending, and which of them each is, `(R,)`.
    """
    number = np.zeros(size, np.int64)
    number[values] = 1
    found = np.flatnonzero(number)
    number[found] = np.arange(len(found))
    return found, take_rows(number, values)


def expand(counts: IntArray) -> tuple[IntArray, IntArray]:
    """Return `(owner, local)` of the elements of runs with the given lengths.

    `expand([2, 0, 1])` is `([0, 0, 2], [0, 1, 0])`.
    """
    starts = starts_of(counts)
    owner = np.repeat(np.arange(len(counts)), counts)
    local = np.arange(starts[-1])
    local -= starts[owner]
    return owner, local


def ranges(start: IntArray, counts: IntArray) -> IntArray:
    """Return the numbers from `start[i]` on, `counts[i]` of them, one range after the other.

    `ranges([7, 1, 4], [2, 0, 1])` is `[7, 8, 4]`.
    """
    end = np.cumsum(counts)
    numbers = np.repeat(start - (end - counts), counts)
    numbers += np.arange(len(numbers))
    return numbers


def owners(counts: IntArray) -> NDArray[np.int32]:
    """Return the number of the run that each element is in, of runs with the given lengths."""
    return np.repeat(np.arange(len(counts), dtype=np.int32), counts)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit values in place (the finaliser of splitmix64)."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def _row_hash(columns: Sequence[NDArray[Any]]) -> NDArray[np.uint64]:
    """Return one 64-bit hash per row of integer columns (1-D, or 2-D of some width)."""
    total = np.zeros(len(columns[0]), np.uint64)
    factor = 1
    for column in columns:
        for part in column.T if column.ndim == 2 else (column,):
            factor = factor * int(_MIX) % 2**64
            total += part.astype(np.uint64) * np.uint64(factor)
            total ^= total >> np.uint64(29)
    return _mixed(total)


def unique_rows(columns: Sequence[NDArray[Any]]) -> tuple[IntArray, IntArray]:
    """Find equal rows. Unequal rows never share a class: the hash proposes, the columns decide.

    Args:
        columns: Integer columns of equal length, 1-D or `(R, 4)`.

    Returns:
        `(first, inverse)`: a representative row of each class, and the class of each row.
        Classes are numbered by their first row, so the result does not depend on the hash.

    Cost: one sort of 64-bit keys and two passes over the columns.
    """
    keys = _row_hash(columns)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    source = first[inverse]
    same = np.ones(len(keys), np.bool_)
    for column in columns:
        equal = column == column[source]
        same &= all_dims(equal) if equal.ndim == 2 else equal
    return _number_by_first(np.where(same, source, np.arange(len(keys))))


def unique_runs(counts: IntArray, columns: Sequence[NDArray[Any]]) -> tuple[IntArray, IntArray]:
    """Find equal runs of rows: like `unique_rows`, for lists of rows instead of rows.

    Args:
        counts: Length of each run; runs follow one another in the columns.
        columns: Integer columns with `counts.sum()` rows.

    Returns:
        `(first, inverse)` over runs, numbered by first appearance.
    """
    starts = starts_of(counts)
    owner, local = expand(counts)
    keys = _row_hash([counts])
    if len(owner):
        hashes = _mixed(_row_hash(columns) + local.astype(np.uint64) * _MIX)
        filled = np.flatnonzero(counts)
        keys[filled] ^= np.add.reduceat(hashes, starts[filled])
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    source = first[inverse]
    same = counts == counts[source]
    if len(owner):
        twin = np.where(same[owner], starts[source[owner]] + local, np.arange(len(owner)))
        for column in columns:
            equal = column == column[twin]
            rows_equal = all_dims(equal) if equal.ndim == 2 else equal
            same[owner[~rows_equal]] = False
    return _number_by_first(np.where(same, source, np.arange(len(counts))))


def _number_by_first(source: IntArray) -> tuple[IntArray, IntArray]:
    """Number classes given by the index of a representative in order of first appearance."""
    is_first = source == np.arange(len(source))
    number = np.cumsum(is_first) - 1
    return np.flatnonzero(is_first), number[source]
