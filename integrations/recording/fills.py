"""What no canonical tensor fills: the constants that the engine leaves in a parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from weightsync.errors import LayoutError
from weightsync.integrations.recording.writes import (
    Fill,
    Index,
    RecordedPiece,
    Storage,
    dense,
    digits_of,
)

__all__ = ["fills_of", "whole_fill"]

_TAKEN = -1  # a cell of a parameter that holds weights


def fills_of(storage: Storage, shape: Index, pieces: Sequence[RecordedPiece]) -> Iterator[Fill]:
    """Boxes that no piece covers, with the value that the engine leaves there."""
    if sum(piece.volume for piece in pieces) >= storage.numel:
        return
    boxes = [
        _covered(piece.offset, zip(piece.n, piece.stride, strict=True), shape, piece.tensor)
        for piece in pieces
    ]
    values = list(_constants(storage))
    # Constants need not end where weights do.
    edges = boxes + [_covered(offset, dims, shape, "a constant") for offset, dims, _ in values]
    cuts = [
        sorted({0, size, *(b[0][d] for b in edges), *(b[0][d] + b[1][d] for b in edges)})
        for d, size in enumerate(shape)
    ]
    place = [{start: i for i, start in enumerate(c)} for c in cuts]
    # Which value is in each cell between cuts: the last that was written, or none that matters.
    known: list[float | None] = [0.0 if storage.background is None else storage.background]
    cells = torch.zeros([len(c) - 1 for c in cuts], dtype=torch.int64, device="cpu")
    for (_, _, value), box in zip(values, edges[len(boxes) :], strict=True):
        if value not in known:
            known.append(value)
        cells[_slices(box, place)] = known.index(value)
    for box in boxes:
        cells[_slices(box, place)] = _TAKEN
    strides = dense(shape)
    for cell, index in _even_boxes(cells):
        fill = known[index]
        if fill is None:
            raise LayoutError(
                "the engine's loader fills a part of it with values of its own that are no "
                "constant; this cannot be recorded"
            )
        lo = tuple(cuts[d][a] for d, (a, _) in enumerate(cell))
        n = tuple(cuts[d][b] - cuts[d][a] for d, (a, b) in enumerate(cell))
        offset = sum(a * s for a, s in zip(lo, strides, strict=True))
        yield Fill(
            offset, n, tuple(0 if k == 1 else s for k, s in zip(n, strides, strict=True)), fill
        )


_Constant = tuple[int, Iterable[tuple[int, int]], float | None]


def _constants(storage: Storage) -> Iterator[_Constant]:
    """Offset, dims and value of what was written that is no weight, oldest first."""
    for write in storage.writes:
        for fill in write.fills:
            yield fill.offset, zip(fill.n, fill.stride, strict=True), fill.value
        if not (write.fills or write.pieces):
            yield write.offset, write.dims, None


def _slices(box: tuple[Index, Index], place: Sequence[dict[int, int]]) -> tuple[slice, ...]:
    """The cells of a box."""
    return tuple(slice(at[lo], at[lo + n]) for at, lo, n in zip(place, *box, strict=True))


def whole_fill(storage: Storage | None, shape: Index) -> tuple[Fill, ...]:
    """The one value of a tensor that the loader leaves alone, where that is known."""
    if storage is None or storage.shape != shape:
        return ()
    value = storage.background
    for write in storage.writes:
        if write.volume != storage.numel:
            return ()
        value = write.fills[0].value if write.fills and not write.pieces else None
    return () if value is None else (Fill(0, shape, dense(shape), value),)


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
