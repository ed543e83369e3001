"""Pieces: affine maps from boxes of a canonical tensor to memory, and their algebra.

A piece holds the elements `lo + step * i` (per dim, `0 <= i < n`) of one tensor at the buffer
elements `offset + sum(stride * i)`. Intersecting two pieces gives a piece again: per dim two
arithmetic progressions meet in an arithmetic progression.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from weightsync.ir.tables import MAX_DIMS, BoolArray, IntArray, Table, take_rows, volume_of

__all__ = [
    "CONSTANT",
    "PieceTable",
    "hull_elements",
    "intersect_progressions",
    "is_nested",
    "is_sorted",
    "sorted_pieces",
]

CONSTANT = -1  # tensor number of pieces that hold a constant instead of weights


@dataclasses.dataclass(frozen=True, eq=False)
class PieceTable(Table):
    """All pieces of a manifest, one per row; see the module docstring.

    Attributes:
        tensor: Index into the manifest's tensors, or CONSTANT.
        buffer: Index into the manifest's buffers.
        lo, n, step: Box of the tensor, `(P, 4)`, in elements; step is 1 where n is 1.
        offset: First buffer element.
        stride: Buffer elements per step of `i`, `(P, 4)`; 0 where n is 1.
        fill: Value of a constant piece; 0.0 for others.
    """

    tensor: NDArray[np.int32]
    buffer: NDArray[np.int32]
    lo: IntArray
    n: IntArray
    step: IntArray
    offset: IntArray
    stride: IntArray
    fill: NDArray[np.float64]

    COLUMNS: ClassVar[dict[str, tuple[Any, int]]] = {
        "tensor": (np.int32, 0),
        "buffer": (np.int32, 0),
        "lo": (np.int64, MAX_DIMS),
        "n": (np.int64, MAX_DIMS),
        "step": (np.int64, MAX_DIMS),
        "offset": (np.int64, 0),
        "stride": (np.int64, MAX_DIMS),
        "fill": (np.float64, 0),
    }

    @property
    def volume(self) -> IntArray:
        """Elements of each piece."""
        return volume_of(self.n)


def sorted_pieces(*parts: PieceTable) -> PieceTable:
    """Return all pieces in canonical order: by tensor, buffer, box, then place in memory.

    Cost: a sort by one key, and of pieces that share tensor and buffer by all. Columns are joined
    one by one, so that beside the parts and the result only one is in memory.
    """
    tables = parts or (PieceTable.empty(),)

    def column(name: str) -> NDArray[Any]:
        columns = [getattr(table, name) for table in tables]
        return columns[0] if len(columns) == 1 else np.concatenate(columns)

    def taken(rows: IntArray) -> PieceTable:
        return PieceTable(**{name: take_rows(column(name), rows) for name in PieceTable.COLUMNS})

    place = (column("tensor").astype(np.int64) << 32) | column("buffer")
    order = np.argsort(place, kind="stable")
    place = place[order]
    same = np.zeros(len(place) + 1, np.bool_)
    same[1:-1] = place[1:] == place[:-1]
    tied = np.flatnonzero(same[1:] | same[:-1])
    if len(tied):
        rows = order[tied]
        order[tied] = rows[np.lexsort(_sort_keys(taken(rows)))]
    return taken(order)


def _sort_keys(pieces: PieceTable) -> list[NDArray[Any]]:
    """Return the keys of the canonical order, least significant first, as `np.lexsort` wants."""
    place = (pieces.tensor.astype(np.int64) << 32) | pieces.buffer
    minor = [c for name in ("stride", "step", "n") for c in getattr(pieces, name).T[::-1]]
    keys: list[NDArray[Any]] = [*minor, pieces.offset, *pieces.lo.T[::-1], place]
    # Padding makes many columns constant, and sorting by those only costs time.
    return [k for k in keys[:-1] if len(k) and k.min() != k.max()] + keys[-1:]


def is_sorted(pieces: PieceTable) -> bool:
    """Whether pieces are in canonical order."""
    keys = _sort_keys(pieces)
    ascending = np.ones(max(len(keys[-1]) - 1, 0), np.bool_)
    for key in keys:
        before, after = key[:-1], key[1:]
        ascending = (before < after) | ((before == after) & ascending)
    return bool(ascending.all())


def hull_elements(n: IntArray, stride: IntArray) -> IntArray:
    """Return the length of each row's bounding interval in memory, in elements; n >= 1."""
    length = np.ones(len(n), np.int64)
    for dim in range(MAX_DIMS):
        length += (n[:, dim] - 1) * stride[:, dim]
    return length


def is_nested(n: IntArray, stride: IntArray) -> BoolArray:
    """Whether each stride steps over everything that smaller strides reach.

    Nested rows address every buffer element at most once, and an offset can be turned back into
    indices digit by digit. Every slice, transpose or permutation of a dense array is nested.

    Args:
        n: Counts, `(R, 4)`; dims with a count of 1 are ignored.
        stride: Strides, >= 0, `(R, 4)`.
    """
    order = np.argsort(np.where(n > 1, stride, 0), axis=1, kind="stable")
    counts = np.take_along_axis(n, order, axis=1)
    strides = np.take_along_axis(stride, order, axis=1)
    reach = np.zeros(len(n), np.int64)
    nested = np.ones(len(n), np.bool_)
    for dim in range(MAX_DIMS):
        wide = counts[:, dim] > 1
        nested &= ~wide | (strides[:, dim] > reach)
        reach += np.where(wide, (counts[:, dim] - 1) * strides[:, dim], 0)
    return nested


def _modular_inverse(value: IntArray, modulus: IntArray) -> IntArray:
    """Return the inverse of each value, coprime to its modulus (extended Euclid)."""
    old_r, r = modulus.copy(), value % modulus
    old_t, t = np.zeros_like(value), np.ones_like(value)
    while (running := r > 0).any():
        quotient = np.where(running, old_r // np.where(running, r, 1), 0)
        old_r, r = np.where(running, r, old_r), np.where(running, old_r - quotient * r, r)
        old_t, t = np.where(running, t, old_t), np.where(running, old_t - quotient * t, t)
    return old_t % modulus


def intersect_progressions(
    lo_a: IntArray, n_a: IntArray, step_a: IntArray, lo_b: IntArray, n_b: IntArray, step_b: IntArray
) -> tuple[IntArray, IntArray, IntArray]:
    """Intersect arithmetic progressions elementwise (Chinese remainder theorem).

    Args:
        lo_a: First elements; all arguments have the same shape.
        n_a: Counts, >= 1.
        step_a: Steps, 1 <= step < 2**31.
        lo_b: First elements of the others.
        n_b: Counts of the others.
        step_b: Steps of the others.

    Returns:
        `(lo, n, step)` of the intersections; n is 0 where they do not meet, step 1 where n <= 1.
    """
    lo = np.maximum(lo_a, lo_b)
    last = np.minimum(lo_a + (n_a - 1) * step_a, lo_b + (n_b - 1) * step_b)
    n = np.maximum(last - lo + 1, 0)
    stepped = np.nonzero(((step_a != 1) | (step_b != 1)) & (n > 0))
    step = np.ones_like(n)
    if len(stepped[0]):
        a, p, q = lo_a[stepped], step_a[stepped], step_b[stepped]
        gcd = np.gcd(p, q)
        shift = lo_b[stepped] - a
        lcm, q = p // gcd * q, q // gcd
        first = a + p * (shift // gcd % q * _modular_inverse(p // gcd, q) % q)
        first += -((first - lo[stepped]) // lcm) * lcm  # the first common element >= lo
        count = np.where(shift % gcd == 0, (last[stepped] - first) // lcm + 1, 0)
        lo[stepped], n[stepped] = first, np.maximum(count, 0)
        step[stepped] = np.where(count > 1, lcm, 1)
    return lo, n, step
