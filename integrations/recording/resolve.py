"""From the writes into a storage to boxes of canonical tensors: affine maps, composed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weightsync.errors import LayoutError
from weightsync.integrations.recording.writes import (
    Dim,
    Fill,
    Index,
    RecordedPiece,
    Storage,
    Write,
)

__all__ = ["fills_of", "pieces_of", "whole_fill"]

# Loaders that scatter single elements would make a plan of single elements.
_MAX_SPLIT = 4096


def pieces_of(storage: Storage) -> list[RecordedPiece]:
    """The canonical content of a storage; later writes hide earlier ones of the same region."""
    found: dict[tuple[int, tuple[tuple[int, int], ...]], list[RecordedPiece]] = {}
    for write in storage.writes:
        region = (write.dst_offset, tuple((dim.n, dim.dst) for dim in write.dims))
        found.pop(region, None)
        if math.prod(n for n, _ in region[1]) == storage.numel:
            found.clear()
        if write.source is None:
            continue
        found[region] = list(_through_write(write, write.source))
    return [piece for pieces in found.values() for piece in pieces]


def _through_write(write: Write, source: Storage) -> Iterator[RecordedPiece]:
    for dims, src_offset, dst_offset in _conformed(write, source.shape):
        start = _digits(src_offset, source.shape)
        along: dict[int, Dim] = {}
        steps: dict[int, int] = {}
        strides = _dense(source.shape)
        for dim in dims:
            axis = _axis(dim.src, strides)
            along[axis], steps[axis] = dim, dim.src // strides[axis]
        axes = range(len(source.shape))
        box = _Box(
            start,
            tuple(along[a].n if a in along else 1 for a in axes),
            tuple(steps.get(a, 1) for a in axes),
            dst_offset,
            tuple(along[a].dst if a in along else 0 for a in axes),
        )
        if source.tensor:
            yield RecordedPiece(source.tensor, box.lo, box.n, box.step, box.offset, box.stride)
        else:
            for piece in pieces_of(source):
                yield from _through(piece, source.shape, box)


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
    strides = _dense(shape)
    start = list(_digits(piece.offset, shape))
    lo, n, step = list(piece.lo), list(piece.n), list(piece.step)
    moved = [0] * len(n)
    offset = box.offset
    used: set[int] = set()
    for k, (count, stride) in enumerate(zip(piece.n, piece.stride, strict=True)):
        if count == 1:
            continue
        axis = _axis(stride, strides)
        jump = stride // strides[axis]
        if axis in used or start[axis] + (count - 1) * jump >= shape[axis]:
            raise LayoutError(
                f"the engine's loader reshapes a copy of {piece.tensor} before placing it; this "
                "cannot be recorded",
                tensor=piece.tensor,
            )
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


def _conformed(write: Write, shape: Index) -> Iterator[tuple[tuple[Dim, ...], int, int]]:
    """Cuts a copy so that every dim of it runs along one dim of the source's shape.

    Yields:
        Dims, first element of the source, first element of the destination.
    """
    strides = _dense(shape)
    digits = _digits(write.src_offset, shape)
    dims: list[Dim] = []
    for dim in write.dims:
        dims += _split(dim, strides, shape, digits)
    taken: dict[int, Dim] = {}
    loose: list[Dim] = []
    for dim in sorted(dims, key=lambda dim: -dim.n):
        axis = _axis(dim.src, strides) if dim.src else -1
        if axis < 0 or axis in taken:
            loose.append(dim)
        else:
            taken[axis] = dim
    if math.prod(dim.n for dim in loose) > _MAX_SPLIT:
        raise LayoutError(
            f"the engine's loader scatters a tensor of shape {shape} in more than {_MAX_SPLIT} "
            "pieces; this cannot be recorded"
        )
    offsets = [(write.src_offset, write.dst_offset)]
    for dim in loose:
        offsets = [
            (src + i * dim.src, dst + i * dim.dst) for src, dst in offsets for i in range(dim.n)
        ]
    for src_offset, dst_offset in offsets:
        yield tuple(taken.values()), src_offset, dst_offset


def _split(dim: Dim, strides: Index, shape: Index, digits: Index) -> list[Dim]:
    """Cuts a dim of a view that runs over several dims of the tensor below it."""
    if dim.src == 0:
        return [dim]
    axis = _axis(dim.src, strides)
    step = dim.src // strides[axis]
    room = -(-(shape[axis] - digits[axis]) // step)
    if dim.n <= room:
        return [dim]
    if digits[axis] or shape[axis] % step or dim.n % room:
        raise LayoutError(
            f"the engine's loader takes elements of a tensor of shape {shape} across the end of "
            "its rows; this cannot be recorded"
        )
    inner = Dim(room, dim.src, dim.dst)
    outer = Dim(dim.n // room, dim.src * room, dim.dst * room)
    return [inner, *_split(outer, strides, shape, digits)]


def _axis(stride: int, strides: Index) -> int:
    """The dim of a dense tensor that a stride runs along: the widest that divides it."""
    for axis, dense in enumerate(strides):
        if dense <= stride and stride % dense == 0:
            return axis
    raise LayoutError(
        f"the engine's loader takes every {stride}th element of a tensor with strides {strides}; "
        "this cannot be recorded"
    )


def _dense(shape: Index) -> Index:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _digits(offset: int, shape: Index) -> Index:
    found = []
    for stride in _dense(shape):
        found.append(offset // stride)
        offset %= stride
    return tuple(found)


# ---- what no canonical tensor fills ----


def fills_of(storage: Storage, shape: Index, pieces: Sequence[RecordedPiece]) -> Iterator[Fill]:
    """Boxes that no piece covers, with the value that the engine leaves there."""
    if sum(piece.volume for piece in pieces) >= storage.numel:
        return
    boxes = [_covered(piece, shape) for piece in pieces]
    cuts = [
        sorted({0, size, *(b[0][d] for b in boxes), *(b[0][d] + b[1][d] for b in boxes)})
        for d, size in enumerate(shape)
    ]
    taken = torch.zeros([len(c) - 1 for c in cuts], dtype=torch.bool, device="cpu")
    place = [{start: i for i, start in enumerate(c)} for c in cuts]
    for lo, n in boxes:
        taken[
            tuple(
                slice(place[d][a], place[d][a + k])
                for d, (a, k) in enumerate(zip(lo, n, strict=True))
            )
        ] = True
    strides = _dense(shape)
    values = [write for write in storage.writes if write.source is None]
    for cell in _free_boxes(taken):
        lo = tuple(cuts[d][a] for d, (a, _) in enumerate(cell))
        n = tuple(cuts[d][b] - cuts[d][a] for d, (a, b) in enumerate(cell))
        offset = sum(a * s for a, s in zip(lo, strides, strict=True))
        value = storage.background if storage.background is not None else 0.0
        for write in values:
            if _reaches(write, offset):
                if write.value is None:
                    raise LayoutError(
                        "the engine's loader fills a part of it with values of its own that are "
                        "no constant; this cannot be recorded"
                    )
                value = write.value
        yield Fill(
            offset, n, tuple(0 if k == 1 else s for k, s in zip(n, strides, strict=True)), value
        )


def whole_fill(storage: Storage | None, shape: Index) -> tuple[Fill, ...]:
    """The one value of a tensor that the loader leaves alone, where that is known."""
    if storage is None or storage.shape != shape:
        return ()
    value = storage.background
    for write in storage.writes:
        if math.prod(dim.n for dim in write.dims) != storage.numel:
            return ()
        value = write.value
    return () if value is None else (Fill(0, shape, _dense(shape), value),)


def _covered(piece: RecordedPiece, shape: Index) -> tuple[Index, Index]:
    """The box of a parameter's index space that a piece fills without gaps."""
    strides = _dense(shape)
    lo = list(_digits(piece.offset, shape))
    n = [1] * len(shape)
    for count, stride in sorted(zip(piece.n, piece.stride, strict=True), key=lambda d: d[1]):
        if count == 1:
            continue
        for axis in reversed(range(len(shape))):
            # Several dims of the tensor may run along one dim of the parameter, one inside another.
            if stride == strides[axis] * n[axis] and n[axis] * count <= shape[axis]:
                n[axis] *= count
                break
        else:
            raise LayoutError(
                f"the engine's loader leaves gaps between elements of {piece.tensor}, and nobody "
                "fills them; this cannot be recorded",
                tensor=piece.tensor,
            )
    return tuple(lo), tuple(n)


def _free_boxes(taken: Tensor) -> Iterator[list[tuple[int, int]]]:
    """Cuts the cells that are free into boxes; half-open ranges per dim."""
    free = ~taken
    while bool(free.any()):
        first = [int(i) for i in free.nonzero()[0]]
        box = [(i, i + 1) for i in first]
        for dim in reversed(range(free.ndim)):
            while box[dim][1] < free.shape[dim]:
                wider = [*box]
                wider[dim] = (box[dim][1], box[dim][1] + 1)
                if not bool(free[tuple(slice(a, b) for a, b in wider)].all()):
                    break
                box[dim] = (box[dim][0], box[dim][1] + 1)
        free[tuple(slice(a, b) for a, b in box)] = False
        yield box


def _reaches(write: Write, element: int) -> bool:
    rest = element - write.dst_offset
    for dim in sorted(write.dims, key=lambda dim: -dim.dst):
        index = min(rest // dim.dst, dim.n - 1) if dim.dst else 0
        if index < 0:
            return False
        rest -= index * dim.dst
    return rest == 0
