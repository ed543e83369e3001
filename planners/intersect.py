"""Intersect what sources hold with what sinks need, for one representative per class.

Boxes are the distinct sets of elements that sources hold (replicas hold the same box); regions are
the overlaps of boxes and sink pieces. Both are stepped boxes in canonical element indices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final

import numpy as np

from weightsync.errors import DtypeMismatchError
from weightsync.ir.dtypes import CAST_TABLE, Dtype
from weightsync.ir.encoded import Encoded, made_rows
from weightsync.ir.manifest import Manifest
from weightsync.ir.pieces import intersect_progressions
from weightsync.ir.tables import (
    MAX_DIMS,
    BoolArray,
    IntArray,
    all_dims,
    expand,
    starts_of,
    sum_by,
    unique_rows,
    volume_of,
)
from weightsync.planners.classes import TensorClasses
from weightsync.planners.faults import gap_error, overlap_error

__all__ = ["Boxes", "Held", "Regions", "find_boxes", "intersect", "join"]

_BLOCK: Final = 1 << 18  # candidate pairs at a time: bounds memory where many do not intersect


@dataclasses.dataclass(frozen=True)
class Held:
    """Boxes with an owner: rows of stepped boxes, each of one class.

    Attributes:
        tclass: Class, `(H,)`.
        piece: Piece that holds the box (maybe only a part of the piece), `(H,)`.
        lo, n, step: `(H, 4)`.
    """

    tclass: IntArray
    piece: IntArray
    lo: IntArray
    n: IntArray
    step: IntArray

    def take(self, index: IntArray) -> Held:
        """Return the rows of an index array."""
        return Held(*(getattr(self, f.name)[index] for f in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class Boxes:
    """Distinct boxes that sources hold, sorted by class; boxes of one class are disjoint.

    Attributes:
        tclass: Class, `(B,)`.
        lo, n, step: `(B, 4)`.
        member_start: Members of box b are `member_start[b] : member_start[b + 1]`, `(B + 1,)`.
        member_piece: Source piece (of the representative) that holds the box, `(M,)`.
        member_rank: Its rank, `(M,)`; ascending and unique inside a box.
        class_start: Boxes of class c are `class_start[c] : class_start[c + 1]`, `(C + 1,)`.
    """

    tclass: IntArray
    lo: IntArray
    n: IntArray
    step: IntArray
    member_start: IntArray
    member_piece: IntArray
    member_rank: IntArray
    class_start: IntArray


@dataclasses.dataclass(frozen=True)
class Regions:
    """Overlaps of boxes and sink pieces of the representatives, sorted by box, then sink piece.

    Attributes:
        box: Box, `(Q,)`.
        piece: Sink piece (of the representative), `(Q,)`.
        lo, n, step: `(Q, 4)`.
        nbytes: Bytes on the wire, to all replicas: elements in the sink's dtype, `(Q,)`.
        class_start: Regions of class c are `class_start[c] : class_start[c + 1]`, `(C + 1,)`.
    """

    box: IntArray
    piece: IntArray
    lo: IntArray
    n: IntArray
    step: IntArray
    nbytes: IntArray
    class_start: IntArray


def find_boxes(classes: TensorClasses, source: Manifest, sink: Manifest) -> Boxes:
    """Find the distinct boxes of the sources and who holds them.

    Source pieces that overlap without being equal are cut at each other's borders first.

    Raises:
        LayoutError: Two pieces interleave with different steps, so that no cut separates them.
    """
    pieces = source.pieces
    tclass, piece = classes.representatives(side="source")
    held = Held(tclass, piece, pieces.lo[piece], pieces.n[piece], pieces.step[piece])
    shape = sink.tensors.shape[classes.tensor[classes.first]]
    first, box = _distinct(held)
    pairs = _overlaps(held.take(first), shape)
    if len(pairs[0]):
        clashing = np.zeros(len(first), np.bool_)
        clashing[np.concatenate(pairs)] = True
        held = _cut(held, clashing[box], shape)
        first, box = _distinct(held)
        pairs = _overlaps(held.take(first), shape)
        for a, b in zip(*pairs, strict=True):
            pair = held.take(first[[a, b]])
            tensor = int(classes.tensor[classes.first[pair.tclass[0]]])
            raise overlap_error(tensor, pair.piece, pair.lo, pair.n, pair.step, source, sink)
    rank = source.buffers.rank[pieces.buffer[held.piece]]
    order = np.lexsort((held.piece, rank, box))
    box, rank = box[order], rank[order]
    # A rank that holds a box twice (aliases) sends from its first piece.
    keep = np.ones(len(order), np.bool_)
    keep[1:] = (box[1:] != box[:-1]) | (rank[1:] != rank[:-1])
    unique = held.take(first)
    return Boxes(
        tclass=unique.tclass,
        lo=unique.lo,
        n=unique.n,
        step=unique.step,
        member_start=starts_of(np.bincount(box[keep], minlength=len(first))),
        member_piece=held.piece[order[keep]],
        member_rank=rank[keep].astype(np.int64),
        class_start=np.searchsorted(unique.tclass, np.arange(len(classes.first) + 1)),
    )


def intersect(
    classes: TensorClasses, boxes: Boxes, source: Manifest, sink: Manifest, encoded: Encoded
) -> Regions:
    """Intersect boxes with sink pieces; prove that every sink piece is covered exactly.

    Raises:
        CoverageError: A sink needs elements that no source holds; names what is uncovered.
        DtypeMismatchError: No cast leads from a holder's dtype to a sink's.
    """
    pieces = sink.pieces
    tclass, piece = classes.representatives(side="sink")
    needed = Held(tclass, piece, pieces.lo[piece], pieces.n[piece], pieces.step[piece])
    held = Held(boxes.tclass, np.arange(len(boxes.tclass)), boxes.lo, boxes.n, boxes.step)
    shape = sink.tensors.shape[classes.tensor[classes.first]]
    a, b, lo, n, step = join(held, needed, shape)
    order = np.lexsort((b, a))
    a, b, lo, n, step = a[order], b[order], lo[order], n[order], step[order]
    volume = volume_of(n)
    short = sum_by(b, volume, len(piece)) != volume_of(needed.n)
    for row in np.flatnonzero(short)[:1]:
        mine = b == row
        raise gap_error(sink, int(piece[row]), lo[mine], n[mine], step[mine])
    buffer = pieces.buffer[piece[b]]
    _check_casts(boxes, a, piece[b], sink, encoded)
    return Regions(
        box=a,
        piece=piece[b],
        lo=lo,
        n=n,
        step=step,
        nbytes=volume * sink.buffers.itemsize[buffer],
        class_start=np.searchsorted(a, boxes.class_start),
    )


def _distinct(held: Held) -> tuple[IntArray, IntArray]:
    """Find equal boxes; the distinct ones keep the order of the rows, hence of the classes."""
    return unique_rows([held.tclass, held.lo, held.n, held.step])


def _overlaps(boxes: Held, shape: IntArray) -> tuple[IntArray, IntArray]:
    """Return the pairs of distinct boxes of one class that share elements."""
    a, b, *_ = join(boxes, boxes, shape, only_later=True)
    return a, b


def join(
    held: Held, needed: Held, shape: IntArray, *, only_later: bool = False
) -> tuple[IntArray, IntArray, IntArray, IntArray, IntArray]:
    """Intersect all pairs of one class: indices of both sides and the boxes `lo, n, step`."""
    found = []
    for a, b in _candidates(held, needed, shape):
        if only_later:
            later = a < b
            a, b = a[later], b[later]
        lo, n, step = intersect_progressions(
            held.lo[a], held.n[a], held.step[a], needed.lo[b], needed.n[b], needed.step[b]
        )
        hit = all_dims(n > 0)
        found.append((a[hit], b[hit], lo[hit], n[hit], step[hit]))
    if not found:
        none, boxes = np.zeros(0, np.int64), np.zeros((0, MAX_DIMS), np.int64)
        return none, none, boxes, boxes, boxes
    a, b, lo, n, step = (np.concatenate(columns) for columns in zip(*found, strict=True))
    return a, b, lo, n, step


def _candidates(held: Held, needed: Held, shape: IntArray) -> Iterator[tuple[IntArray, IntArray]]:
    """Yield pairs that may intersect, block by block.

    All classes lie one after the other on one line, each along its most discriminating dim. Sorted
    by start, the intervals that meet `[lo, hi)` are those that start before `hi`, from the first
    one at which the running maximum of ends passes `lo`.
    """
    # Which dim tells most apart depends on both sides; count the candidates of each.
    dims = [d for d in range(MAX_DIMS) if held.lo[:, d].any() or needed.lo[:, d].any()] or [3]
    lines = [_Line(held, needed, starts_of(shape[:, d])[:-1], np.full(len(shape), d)) for d in dims]
    if len(lines) > 1:
        per_class = np.stack([sum_by(needed.tclass, line.count, len(shape)) for line in lines])
        best = np.array(dims)[per_class.argmin(axis=0)]
        extent = shape[np.arange(len(shape)), best]
        lines = [_Line(held, needed, starts_of(extent)[:-1], best)]
    line = lines[0]
    total = np.cumsum(line.count)
    first = 0
    while first < len(total):
        done = total[first - 1] if first else 0
        last = max(int(np.searchsorted(total, done + _BLOCK, side="right")), first + 1)
        owner, local = expand(line.count[first:last])
        yield line.order[line.first[first + owner] + local], first + owner
        first = last


class _Line:
    """Both sides as intervals on one line; for each needed box its candidates in sorted order."""

    def __init__(self, held: Held, needed: Held, base: IntArray, dim: IntArray) -> None:
        held_lo, held_hi = self._interval(held, base, dim)
        needed_lo, needed_hi = self._interval(needed, base, dim)
        self.order = np.argsort(held_lo, kind="stable")
        starts = held_lo[self.order]
        reach = np.maximum.accumulate(held_hi[self.order]) if len(starts) else held_hi
        self.first = np.searchsorted(reach, needed_lo, side="right")
        self.count = np.searchsorted(starts, needed_hi, side="left") - self.first

    @staticmethod
    def _interval(boxes: Held, base: IntArray, dim: IntArray) -> tuple[IntArray, IntArray]:
        rows, column = np.arange(len(boxes.tclass)), dim[boxes.tclass]
        lo, n, step = (c[rows, column] for c in (boxes.lo, boxes.n, boxes.step))
        start = base[boxes.tclass] + lo
        return start, start + (n - 1) * step + 1


def _cut(held: Held, clashing: BoolArray, shape: IntArray) -> Held:
    """Cut boxes at the borders of those of their class that overlap others, dim by dim.

    Only dims with step 1 are cut; boxes that still overlap afterwards cannot be separated.
    """
    for dim in range(MAX_DIMS):
        base = starts_of(shape[:, dim] + 1)[:-1][held.tclass]
        lo = base + held.lo[:, dim]
        hi = lo + (held.n[:, dim] - 1) * held.step[:, dim] + 1
        points = np.unique(np.concatenate([lo[clashing], hi[clashing]]))
        first = np.searchsorted(points, lo, side="right")
        count = np.searchsorted(points, hi, side="left") - first
        count = np.where(clashing & (held.step[:, dim] == 1), np.maximum(count, 0), 0) + 1
        owner, local = expand(count)
        begin = np.where(local > 0, points[np.maximum(first[owner] + local - 1, 0)], lo[owner])
        is_last = local == count[owner] - 1
        following = points[np.minimum(first[owner] + local, len(points) - 1)]
        end = np.where(is_last, hi[owner], following)
        is_cut = count[owner] > 1
        held, clashing = held.take(owner), clashing[owner]
        held.lo[:, dim] = np.where(is_cut, begin - base[owner], held.lo[:, dim])
        held.n[:, dim] = np.where(is_cut, end - begin, held.n[:, dim])
    return held


def _check_casts(
    boxes: Boxes, box: IntArray, sink_piece: IntArray, sink: Manifest, encoded: Encoded
) -> None:
    """Check that every holder's dtype can be cast to the dtype of every sink that wants it."""
    source, pieces = encoded.source, sink.pieces
    made = made_rows(encoded, sink, pieces.tensor[sink_piece], pieces.buffer[sink_piece])
    box, sink_piece = box[~made], sink_piece[~made]
    if not len(box):
        return
    dtype = source.buffers.dtype[source.pieces.buffer[boxes.member_piece]].astype(np.int64)
    held = np.bitwise_or.reduceat(1 << dtype, boxes.member_start[:-1])
    allowed = (CAST_TABLE.T * (1 << np.arange(len(Dtype)))).sum(axis=1)
    wanted = sink.buffers.dtype[sink.pieces.buffer[sink_piece]]
    for row in np.flatnonzero(held[box] & ~allowed[wanted])[:1]:
        members = slice(int(boxes.member_start[box[row]]), int(boxes.member_start[box[row] + 1]))
        bad = members.start + int(np.flatnonzero(~CAST_TABLE[dtype[members], wanted[row]])[0])
        piece = int(sink_piece[row])
        name = sink.tensors.names[int(sink.pieces.tensor[piece])]
        src_rank = source.ranks[int(boxes.member_rank[bad])]
        dst_rank = sink.ranks[int(sink.buffers.rank[sink.pieces.buffer[piece]])]
        src, dst = Dtype(int(dtype[bad])).name, Dtype(int(wanted[row])).name
        raise DtypeMismatchError(
            f"tensor {name}: {src_rank} holds {src} but {dst_rank} needs {dst}, and no cast leads "
            "there; change the sink's dtype or convert on the source",
            tensor=name,
            source=src_rank,
            sink=dst_rank,
            src_dtype=src,
            dst_dtype=dst,
        )
