"""What a copy of a copy brings: boxes of canonical tensors through affine maps, composed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from weightsync.errors import LayoutError
from weightsync.integrations.recording.fills import fills_of
from weightsync.integrations.recording.writes import (
    Copy,
    Dim,
    Fill,
    Index,
    RecordedPiece,
    Storage,
    dense,
    digits_of,
)

__all__ = ["carry"]

# Loaders that scatter single elements would make a plan of single elements.
_MAX_SPLIT = 4096

T = TypeVar("T")


def carry(copy: Copy, source: Storage) -> tuple[tuple[RecordedPiece, ...], tuple[Fill, ...]]:
    """What a copy brings from a storage, as it is now.

    Returns:
        Boxes of canonical tensors, and the constants beside them, in the target.

    Raises:
        LayoutError: It is no set of strided boxes, or of too many.
    """
    boxes = list(_boxes(copy, source.shape))
    held = source.all_pieces
    if source.is_whole:
        whole = (
            RecordedPiece(held[0].tensor, box.lo, box.n, box.step, box.offset, box.stride)
            for box in boxes
        )
        return tuple(whole), ()
    pieces = [part for piece in held for part in _moved(piece, source.shape, boxes)]
    if sum(piece.volume for piece in pieces) == math.prod(dim.n for dim in copy.dims):
        return tuple(pieces), ()
    fills = [
        Fill(part.offset, part.n, part.stride, fill.value)
        for fill in fills_of(source)
        for part in _moved(_as_piece(fill), source.shape, boxes)
    ]
    return tuple(pieces), tuple(fills)


def _as_piece(fill: Fill) -> RecordedPiece:
    origin = (0,) * len(fill.n)
    return RecordedPiece("", origin, fill.n, (1,) * len(fill.n), fill.offset, fill.stride)


def _moved(piece: RecordedPiece, shape: Index, boxes: Sequence[_Box]) -> Iterator[RecordedPiece]:
    """Where the boxes of a copy bring a piece of its source."""
    for part in _aligned(piece, shape):
        for box in boxes:
            yield from _through(part, shape, box)


def _boxes(copy: Copy, shape: Index) -> Iterator[_Box]:
    """A copy as boxes of its source's index space."""
    strides = dense(shape)
    for dims, src_offset, dst_offset in _conformed(copy, shape):
        along = {_axis(dim.src, strides): dim for dim in dims}
        axes = range(len(shape))
        yield _Box(
            digits_of(src_offset, shape),
            tuple(along[a].n if a in along else 1 for a in axes),
            tuple(along[a].src // strides[a] if a in along else 1 for a in axes),
            dst_offset,
            tuple(along[a].dst if a in along else 0 for a in axes),
        )


def _aligned(piece: RecordedPiece, shape: Index) -> Iterator[RecordedPiece]:
    """Cuts a piece so that every dim of it runs along one dim of the tensor that it lies in."""
    strides = dense(shape)
    what = f"reshapes a copy of {piece.tensor or 'a constant'} into"
    return _cut_up(piece, lambda part: _cut_piece(part, shape, strides), what)


def _cut_up(whole: T, cut: Callable[[T], list[T] | None], what: str) -> Iterator[T]:
    """Cuts, and cuts what comes of it, until `cut` finds nothing to cut; in order."""
    rest = [whole]
    num_done = 0
    while rest:
        part = rest.pop()
        smaller = cut(part)
        if smaller is None:
            num_done += 1
            yield part
        else:
            rest += reversed(smaller)
        if num_done + len(rest) > _MAX_SPLIT:
            raise LayoutError(
                f"the engine's loader {what} more than {_MAX_SPLIT} pieces; this cannot be recorded"
            )


def _cut_piece(piece: RecordedPiece, shape: Index, strides: Index) -> list[RecordedPiece] | None:
    start = digits_of(piece.offset, shape)
    taken: set[int] = set()
    for k in sorted(range(len(piece.n)), key=lambda k: -piece.n[k]):
        n = piece.n[k]
        if n == 1:
            continue
        axis = _axis(piece.stride[k], strides)
        room = -(-(shape[axis] - start[axis]) // (piece.stride[k] // strides[axis]))
        if axis in taken:
            room = 1
        elif n <= room:
            taken.add(axis)
            continue
        count = min(room, n - 1)
        return [_sub(piece, k, 0, count), _sub(piece, k, count, n - count)]
    return None


def _sub(piece: RecordedPiece, k: int, first: int, n: int) -> RecordedPiece:
    """The elements `first ... first + n - 1` along a dim of a piece."""
    return RecordedPiece(
        piece.tensor,
        _replaced(piece.lo, k, piece.lo[k] + piece.step[k] * first),
        _replaced(piece.n, k, n),
        piece.step if n > 1 else _replaced(piece.step, k, 1),
        piece.offset + piece.stride[k] * first,
        piece.stride if n > 1 else _replaced(piece.stride, k, 0),
    )


def _replaced(values: Index, k: int, value: int) -> Index:
    return (*values[:k], value, *values[k + 1 :])


@dataclass(frozen=True, slots=True)
class _Box:
    """A box of a storage's index space, and where its elements go."""

    lo: Index
    n: Index
    step: Index
    offset: int
    stride: Index


def _through(piece: RecordedPiece, shape: Index, box: _Box) -> Iterator[RecordedPiece]:
    """What of a piece of an intermediate tensor is copied on, and where to."""
    strides = dense(shape)
    start = list(digits_of(piece.offset, shape))
    lo, n, step = list(piece.lo), list(piece.n), list(piece.step)
    moved = [0] * len(n)
    offset = box.offset
    used: set[int] = set()
    for k, (count, stride) in enumerate(zip(piece.n, piece.stride, strict=True)):
        if count == 1:
            continue
        axis = _axis(stride, strides)
        jump = stride // strides[axis]
        used.add(axis)
        # i with start + jump * i = lo + step * u, 0 <= u < n
        hits = [
            i
            for i in range(min(count, box.step[axis]))
            if (start[axis] + jump * i - box.lo[axis]) % box.step[axis] == 0
        ]
        if not hits:
            return
        period = 1
        while (jump * period) % box.step[axis]:
            period += 1
        first = hits[0]
        while first < count and start[axis] + jump * first < box.lo[axis]:
            first += period
        end = box.lo[axis] + (box.n[axis] - 1) * box.step[axis]
        last = min(count - 1, (end - start[axis]) // jump)
        if first > last:
            return
        lo[k] += step[k] * first
        n[k] = (last - first) // period + 1
        step[k] *= period
        offset += (start[axis] + jump * first - box.lo[axis]) // box.step[axis] * box.stride[axis]
        moved[k] = jump * period // box.step[axis] * box.stride[axis]
    for axis in range(len(shape)):
        if axis in used:
            continue
        away = start[axis] - box.lo[axis]
        if away % box.step[axis] or not 0 <= away // box.step[axis] < box.n[axis]:
            return
        offset += away // box.step[axis] * box.stride[axis]
    yield RecordedPiece(
        piece.tensor,
        tuple(lo),
        tuple(n),
        tuple(1 if c == 1 else s for c, s in zip(n, step, strict=True)),
        offset,
        tuple(0 if c == 1 else s for c, s in zip(n, moved, strict=True)),
    )


_Cut = tuple[list[Dim], int, int]


def _conformed(copy: Copy, shape: Index) -> Iterator[_Cut]:
    """Cuts a copy so that every dim of it runs along one dim of the source's shape.

    Yields:
        Dims, first element of the source, first element of the destination.
    """
    strides = dense(shape)
    whole = (list(copy.dims), copy.src_offset, copy.dst_offset)
    what = f"scatters a tensor of shape {shape} in"
    return _cut_up(whole, lambda part: _cut(part, shape, strides), what)


def _cut(part: _Cut, shape: Index, strides: Index) -> list[_Cut] | None:
    """Cuts at the first dim that runs along no dim of the shape alone; None if all do."""
    dims, src, dst = part
    digits = digits_of(src, shape)
    taken: set[int] = set()
    for dim in sorted(dims, key=lambda dim: -dim.n):
        others = [other for other in dims if other is not dim]
        axis = _axis(dim.src, strides) if dim.src else -1
        if axis < 0 or axis in taken:  # one element read often, or two dims along one
            if dim.n > _MAX_SPLIT:
                raise LayoutError(
                    f"the engine's loader scatters a tensor of shape {shape} in more than "
                    f"{_MAX_SPLIT} pieces; this cannot be recorded"
                )
            return [(others, src + i * dim.src, dst + i * dim.dst) for i in range(dim.n)]
        taken.add(axis)
        step = dim.src // strides[axis]
        room = -(-(shape[axis] - digits[axis]) // step)
        if dim.n <= room:
            continue
        # Beyond the end of a row: whole rows make two dims of one, what is left is cut off.
        is_aligned = digits[axis] < step and shape[axis] % step == 0
        if is_aligned and dim.n % room == 0:
            inner = Dim(room, dim.src, dim.dst)
            outer = Dim(dim.n // room, dim.src * room, dim.dst * room)
            return [([*others, inner, outer], src, dst)]
        first = dim.n - dim.n % room if is_aligned else room
        return [
            ([*others, *_dim(first, dim)], src, dst),
            ([*others, *_dim(dim.n - first, dim)], src + first * dim.src, dst + first * dim.dst),
        ]
    return None


def _dim(n: int, like: Dim) -> list[Dim]:
    return [Dim(n, like.src, like.dst)] if n > 1 else []


def _axis(stride: int, strides: Index) -> int:
    """The dim of a dense tensor that a stride runs along: the widest that divides it."""
    for axis, own in enumerate(strides):
        if own <= stride and stride % own == 0:
            return axis
    raise LayoutError(
        f"the engine's loader takes every {stride}th element of a tensor with strides {strides}; "
        "this cannot be recorded"
    )
