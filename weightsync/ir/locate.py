"""From memory back to meaning: which canonical elements a strided row of a buffer holds."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from weightsync.ir.manifest import Manifest
from weightsync.ir.pieces import hull_elements
from weightsync.ir.tables import MAX_DIMS, BoolArray, IntArray, all_dims, ranges, take_rows

__all__ = ["BLOCK_ROWS", "Locator", "locate_rows"]

BLOCK_ROWS: Final = 1 << 16  # rows at a time: temporaries of 2 MiB stay in the cache
_BEYOND: Final = 1 << 62  # wider than any offset


def locate_rows(
    manifest: Manifest,
    buffer: NDArray[Any],
    offset: IntArray,
    n: IntArray,
    stride: IntArray,
    tensor: NDArray[Any] | None = None,
) -> tuple[IntArray, IntArray, IntArray]:
    """Find the piece that holds each row, and the canonical elements that the row holds.

    Inverts offsets through the manifest's own pieces, so that each side tells for itself what its
    memory means. A row must lie inside one piece, its dims in canonical order.

    Args:
        manifest: The side whose buffers the rows address.
        buffer: Buffer of each row, `(R,)`, valid indices.
        offset: First element of each row, `(R,)`, in elements of the buffer.
        n: Counts per canonical dim, `(R, 4)`; no piece holds a row with one below 1.
        stride: Strides in elements per canonical dim, `(R, 4)`; ignored where n is 1.
        tensor: Tensor of each row, `(R,)`; needed where tensors share memory (aliases of a
            source), otherwise only a check. None: any tensor, or a constant.

    Returns:
        `(piece, lo, step)`: `(R,)`, `(R, 4)`, `(R, 4)`. Row element `i` is canonical element
        `lo + step * i` of tensor `pieces.tensor[piece]`. `piece` is -1 where no piece holds the
        row; its lo and step are then meaningless.

    Cost: one sort of the pieces, then about 0.3 us a row.
    """
    locator = Locator(manifest, with_tensor=tensor is not None)
    num_rows = len(offset)
    piece = np.full(num_rows, -1)
    lo, step = np.zeros((2, num_rows, MAX_DIMS), np.int64)
    for first in range(0, num_rows, BLOCK_ROWS):
        rows = slice(first, first + BLOCK_ROWS)
        wanted = None if tensor is None else tensor[rows]
        piece[rows], lo[rows], step[rows] = locator.locate(
            buffer[rows], wanted, offset[rows], n[rows], stride[rows]
        )
    return piece, lo, step


def _ascends(n: IntArray, stride: IntArray) -> BoolArray:
    """Whether some dim of each piece has a wider stride than one before it."""
    ascends = np.zeros(len(n), np.bool_)
    last = np.full(len(n), _BEYOND)
    for dim in range(MAX_DIMS):
        is_wide = n[:, dim] > 1
        ascends |= is_wide & (stride[:, dim] > last)
        last = np.where(is_wide, stride[:, dim], last)
    return ascends


class Locator:
    """The pieces of a manifest, sorted for `locate_rows`; for callers that go block by block.

    All groups (buffers, or tensors in buffers) lie one after the other on one line, so that one
    binary search finds the pieces near a row.
    """

    def __init__(self, manifest: Manifest, *, with_tensor: bool) -> None:
        pieces = manifest.pieces
        self._pieces = pieces
        self._num_buffers = max(len(manifest.buffers), 1)
        keys = self._key(pieces.buffer, pieces.tensor if with_tensor else None)
        self._keys, first, group = np.unique(keys, return_index=True, return_inverse=True)
        length = manifest.buffers.numel[pieces.buffer[first]]
        self._base = np.cumsum(length) - length
        self._length = length
        start = self._base[group] + pieces.offset
        self._order = np.argsort(start, kind="stable")
        # Nearly all groups are one piece, which no search is needed for.
        self._alone = np.where(np.bincount(group) == 1, first, -1)
        self._start = start[self._order]
        end = start + hull_elements(pieces.n, pieces.stride)
        self._reach = np.maximum.accumulate(end[self._order]) if len(end) else end
        # Dims from the widest stride to the narrowest: digits of an offset, most significant first.
        # A dim of one element gets a width that no offset reaches: its digit is 0 wherever it is.
        self._width = np.where(pieces.n > 1, pieces.stride, _BEYOND)
        turned = np.flatnonzero(_ascends(pieces.n, pieces.stride))  # transposes: few, if any
        self._places: IntArray | None = None  # of the dims among the digits; None: in their order
        if len(turned):
            digits = np.argsort(-self._width[turned], axis=1, kind="stable")
            self._width[turned] = np.take_along_axis(self._width[turned], digits, axis=1)
            self._places = np.tile(np.arange(MAX_DIMS), (len(pieces), 1))
            self._places[turned] = np.argsort(digits, axis=1, kind="stable")

    def _key(self, buffer: NDArray[Any], tensor: NDArray[Any] | None) -> IntArray:
        wide = buffer.astype(np.int64)
        return wide if tensor is None else wide + tensor.astype(np.int64) * self._num_buffers

    def locate(
        self,
        buffer: NDArray[Any],
        tensor: NDArray[Any] | None,
        offset: IntArray,
        n: IntArray,
        stride: IntArray,
    ) -> tuple[IntArray, IntArray, IntArray]:
        """Locate one block of rows; see `locate_rows`."""
        num_rows = len(offset)
        if not len(self._keys):
            lo, step = np.zeros((2, num_rows, MAX_DIMS), np.int64)
            return np.full(num_rows, -1), lo, step
        key = self._key(buffer, tensor)
        group = np.minimum(np.searchsorted(self._keys, key), len(self._keys) - 1)
        inside = (self._keys[group] == key) & (offset >= 0) & (offset < self._length[group])
        candidate = np.where(inside, self._alone[group], -1)
        near = np.flatnonzero(inside & (candidate < 0))
        place = self._base[group[near]] + offset[near]
        last = np.searchsorted(self._start, place, side="right")
        first = np.searchsorted(self._reach, place, side="right")
        # The piece that starts last before the row is nearly always it.
        candidate[near] = np.where(last > first, self._order[last - 1], -1)
        fits, lo, step = self._invert(np.maximum(candidate, 0), offset, n, stride)
        piece = np.where(fits, candidate, -1)
        # Interleaved pieces (gate and up rows) need a look at the others whose hulls contain it.
        missed = np.flatnonzero(~fits[near] & (last > first))
        others = last[missed] - 1 - first[missed]
        candidate = self._order[ranges(first[missed], others)]
        rows = np.repeat(near[missed], others)
        fits, at, steps = self._invert(
            candidate, offset[rows], take_rows(n, rows), take_rows(stride, rows)
        )
        hit = rows[fits]
        piece[hit], lo[hit], step[hit] = candidate[fits], at[fits], steps[fits]
        return piece, lo, step

    def _invert(
        self, candidate: IntArray, offset: IntArray, n: IntArray, stride: IntArray
    ) -> tuple[BoolArray, IntArray, IntArray]:
        """Turn offsets into indices of the candidate pieces; tell which rows lie inside them."""
        pieces = self._pieces
        piece_n, piece_step = take_rows(pieces.n, candidate), take_rows(pieces.step, candidate)
        width = take_rows(self._width, candidate)
        rest = offset - pieces.offset[candidate]
        index = np.empty_like(n)
        for dim in range(MAX_DIMS):
            if (width[:, dim] == _BEYOND).all():  # divisions are what costs here
                index[:, dim] = 0
                continue
            digit = rest // width[:, dim]
            rest -= digit * width[:, dim]
            index[:, dim] = digit
        if self._places is not None:
            index = np.take_along_axis(index, take_rows(self._places, candidate), axis=1)
        # Rows step over the elements of a piece: by its stride or a multiple of it.
        many = n > 1
        piece_stride = np.maximum(take_rows(pieces.stride, candidate), 1)
        if all_dims(~many | (stride == piece_stride)).all():  # as nearly always
            good = (~many | (piece_n > 1)) & (index >= 0) & (n >= 1) & (n <= piece_n - index)
            lo = take_rows(pieces.lo, candidate) + piece_step * index
            return all_dims(good) & (rest == 0), lo, np.where(many, piece_step, 1)
        factor = np.where(many, stride // piece_stride, 1)
        # Division, not a product, tells whether the row ends inside: rows may hold any numbers.
        good = (~many | ((factor >= 1) & (factor * piece_stride == stride) & (piece_n > 1))) & (
            (index >= 0) & (n >= 1) & (n - 1 <= (piece_n - 1 - index) // np.maximum(factor, 1))
        )
        lo = take_rows(pieces.lo, candidate) + piece_step * index
        return all_dims(good) & (rest == 0), lo, np.where(many, piece_step * factor, 1)
