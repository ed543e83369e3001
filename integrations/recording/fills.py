"""What no canonical tensor fills: the constants that the engine leaves in a parameter."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from weightsync.errors import LayoutError
from weightsync.integrations.recording.writes import (
    Fill,
    Index,
    Storage,
    dense,
    digits_of,
)

__all__ = ["fills_of", "whole_fill"]

_TAKEN = -1  # a cell of a parameter that holds weights


def fills_of(storage: Storage) -> Iterator[Fill]:
    """Boxes that no weight covers, with the value there. What nobody set counts as zeros.

    That is of a storage that weights were copied to; in another one nobody knows it.

    Raises:
        LayoutError: They are no boxes: there are gaps between elements of a weight.
    """
    pieces, shape = storage.all_pieces, storage.shape
    if sum(piece.volume for piece in pieces) >= storage.numel:
        return
    boxes = [
        _covered(piece.offset, zip(piece.n, piece.stride, strict=True), shape, piece.tensor)
        for piece in pieces
    ]
    # Constants need not end where weights do.
    edges = boxes + [
        _covered(fill.offset, zip(fill.n, fill.stride, strict=True), shape, "a constant")
        for fill in storage.fills
    ]
    cuts = [
        sorted({0, size, *(b[0][d] for b in edges), *(b[0][d] + b[1][d] for b in edges)})
        for d, size in enumerate(shape)
    ]
    place = [{start: i for i, start in enumerate(c)} for c in cuts]
    # Which value is in each cell between cuts: the last that was written.
    unset = 0.0 if storage.is_loaded else math.nan
    known = {_key(unset): unset}
    cells = torch.zeros([len(c) - 1 for c in cuts], dtype=torch.int64, device="cpu")
    for fill, box in zip(storage.fills, edges[len(boxes) :], strict=True):
        key = _key(fill.value)
        known.setdefault(key, fill.value)
        cells[_slices(box, place)] = list(known).index(key)
    for box in boxes:
        cells[_slices(box, place)] = _TAKEN
    values = list(known.values())
    strides = dense(shape)
    for cell, index in _even_boxes(cells):
        lo = tuple(cuts[d][a] for d, (a, _) in enumerate(cell))
        n = tuple(cuts[d][b] - cuts[d][a] for d, (a, b) in enumerate(cell))
        offset = sum(a * s for a, s in zip(lo, strides, strict=True))
        stride = tuple(0 if k == 1 else s for k, s in zip(n, strides, strict=True))
        yield Fill(offset, n, stride, values[index])


def whole_fill(storage: Storage) -> tuple[Fill, ...]:
    """The one value of a tensor that holds no weights, where that is known."""
    try:
        fills = list(fills_of(storage))
    except LayoutError:
        return ()
    return tuple(fills) if len(fills) == 1 and not math.isnan(fills[0].value) else ()


def _key(value: float) -> bytes:
    """Tells zeros of either sign apart, and finds NaN equal to itself."""
    return struct.pack("<d", value)


def _slices(box: tuple[Index, Index], place: Sequence[dict[int, int]]) -> tuple[slice, ...]:
    """The cells of a box."""
    return tuple(slice(at[lo], at[lo + n]) for at, lo, n in zip(place, *box, strict=True))


def _covered(
    offset: int, dims: Iterable[tuple[int, int]], shape: Index, what: str
) -> tuple[Index, Index]:
    """The box of a parameter's index space that a piece, or a constant, fills without gaps."""
    strides = dense(shape)
    lo = list(digits_of(offset, shape))
    n = [1] * len(shape)
    for count, stride in sorted(dims, key=lambda d: d[1]):
        if count == 1:
            continue
        for axis in reversed(range(len(shape))):
            # Several dims of the tensor may run along one dim of the parameter, one inside another.
            if stride == strides[axis] * n[axis] and lo[axis] + n[axis] * count <= shape[axis]:
                n[axis] *= count
                break
        else:
            raise LayoutError(
                f"the engine's loader leaves gaps between elements of {what}, and nobody fills "
                "them; this cannot be recorded",
                tensor=what,
            )
    return tuple(lo), tuple(n)


def _even_boxes(cells: Tensor) -> Iterator[tuple[list[tuple[int, int]], int]]:
    """Cuts the cells that are not taken into boxes of one value; half-open ranges per dim."""
    rest = cells.clone()
    while bool((rest != _TAKEN).any()):
        first = [int(i) for i in (rest != _TAKEN).nonzero()[0]]
        value = int(rest[tuple(first)])
        box = [(i, i + 1) for i in first]
        for dim in reversed(range(rest.ndim)):
            while box[dim][1] < rest.shape[dim]:
                wider = [*box]
                wider[dim] = (box[dim][1], box[dim][1] + 1)
                if not bool((rest[tuple(slice(a, b) for a, b in wider)] == value).all()):
                    break
                box[dim] = (box[dim][0], box[dim][1] + 1)
        rest[tuple(slice(a, b) for a, b in box)] = _TAKEN
        yield box, value
