"""Lower copies to rows and chunks: what is written straight, what is packed, and how it is cut.

A chunk is one contiguous destination range. Long runs are written straight from source memory.
Everything else is packed: copies that together fill a range of the destination (rows of gate and up
that interleave, column slices, transposes, casts) become one packed chunk; a copy whose destination
others interleave with is cut into its destination runs; neighbours are joined up to the limit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from weightsync.ir.encoded import Encoded, made_rows
from weightsync.ir.manifest import Manifest
from weightsync.ir.pieces import hull_elements
from weightsync.ir.plan import PlanOptions
from weightsync.ir.tables import (
    MAX_DIMS,
    BoolArray,
    IntArray,
    all_dims,
    any_dim,
    starts_of,
    sum_by,
    unique_rows,
    volume_of,
)
from weightsync.planners.copies import CopyTable, Cuts, runs, split, take_dims
from weightsync.planners.order import greedy_cuts

__all__ = ["Lowered", "lower"]


@dataclasses.dataclass(frozen=True)
class Lowered:
    """Rows of some source ranks and their chunks, sorted by source rank and sink memory.

    Attributes:
        rows: Copies; chunk c owns rows `row_start[c] : row_start[c + 1]`.
        row_start: `(C + 1,)`.
        src_rank: Source rank of each chunk, `(C,)`.
        dst_buffer: Sink buffer of each chunk, `(C,)`.
        dst_offset: First element of each chunk, `(C,)`.
        nbytes: `(C,)`.
        is_packed: `(C,)`.
    """

    rows: CopyTable
    row_start: IntArray
    src_rank: IntArray
    dst_buffer: IntArray
    dst_offset: IntArray
    nbytes: IntArray
    is_packed: BoolArray

    @classmethod
    def concat(cls, parts: Sequence[Lowered]) -> Lowered:
        """Join the parts of ascending source ranks."""
        if not parts:
            none = np.zeros(0, np.int64)
            return cls(CopyTable.empty(), starts_of(none), none, none, none, none, none > 0)
        starts = starts_of(np.concatenate([np.diff(part.row_start) for part in parts]))
        names = [f.name for f in dataclasses.fields(cls) if f.name not in ("rows", "row_start")]
        columns = {n: np.concatenate([getattr(part, n) for part in parts]) for n in names}
        return cls(CopyTable.concat([part.rows for part in parts]), starts, **columns)


def lower(copies: CopyTable, encoded: Encoded, sink: Manifest, options: PlanOptions) -> Lowered:
    """Turn copies of whole source ranks into rows and chunks.

    Args:
        copies: One per region and sender; all copies of the ranks concerned, in any order.
        encoded: The sources.
        sink: Merged manifest.
        options: Budgets.

    Raises:
        PlanBudgetError: The copies shatter into more than `options.max_rows` runs.

    Cost: a few sorts of the rows.
    """
    memory = _Memory(encoded, sink)
    nbytes = memory.nbytes(copies)
    # Most copies are one run of a good length; only the others need a closer look.
    simple = memory.is_straight(copies) & (nbytes <= options.write_bytes)
    simple &= nbytes >= options.direct_run_bytes
    rest = copies.take(~simple)
    order = np.argsort(np.where(rest.n > 1, rest.dst_stride, 0), axis=1, kind="stable")
    by_run, is_direct = _direct_cuts(rest, order, memory, options)
    direct = [
        copies.take(simple),
        split(rest.take(is_direct), by_run, options.max_rows, memory.names),
    ]
    packed = _pack(rest.take(~is_direct), order[~is_direct], memory, options)
    return _join([*direct, packed], memory, options)


class _Memory:
    """Where copies read and write: element sizes, and all sink buffers on one line."""

    def __init__(self, encoded: Encoded, sink: Manifest) -> None:
        source = encoded.source
        self._encoded, self._sink = encoded, sink
        self.src_dtype, self.dst_dtype = source.buffers.dtype, sink.buffers.dtype
        self.src_rank = source.buffers.rank.astype(np.int64)
        self.itemsize = sink.buffers.itemsize
        self.names = sink.tensors.names
        # One unused element after each buffer keeps neighbours in different buffers apart.
        base = starts_of(sink.buffers.numel + 1)
        self._base, self._length = base[:-1], int(base[-1])

    def line(self, copies: CopyTable) -> IntArray:
        """Return where each copy's destination starts, on one line per source rank."""
        rank = self.src_rank[copies.src_buffer]
        rank -= rank.min(initial=0)
        return rank * self._length + self._base[copies.dst_buffer] + copies.dst_offset

    def nbytes(self, copies: CopyTable) -> IntArray:
        """Return the bytes of each copy in the sink's dtype."""
        return volume_of(copies.n) * self.itemsize[copies.dst_buffer]

    def keeps_dtype(self, copies: CopyTable) -> BoolArray:
        """Whether each copy is neither cast nor encoded."""
        same = self.src_dtype[copies.src_buffer] == self.dst_dtype[copies.dst_buffer]
        if len(self._encoded.table):
            same &= ~made_rows(self._encoded, self._sink, copies.tensor, copies.dst_buffer)
        return np.asarray(same)

    def cells(self, copies: CopyTable) -> IntArray:
        """Elements of codes that share a scale, of each copy, `(R, 4)`."""
        return self._encoded.cell[copies.tensor]

    def is_straight(self, copies: CopyTable) -> BoolArray:
        """Whether each copy is one contiguous run on both sides, without a cast."""
        straight = all_dims(copies.src_stride == copies.dst_stride)
        straight &= hull_elements(copies.n, copies.dst_stride) == volume_of(copies.n)
        return np.asarray(straight & self.keeps_dtype(copies))


def _direct_cuts(
    copies: CopyTable, order: IntArray, memory: _Memory, options: PlanOptions
) -> tuple[Cuts, BoolArray]:
    """Decide which copies are written run by run, straight from source memory, and cut those."""
    n = take_dims(copies.n, order)
    strides = take_dims(copies.src_stride, order), take_dims(copies.dst_stride, order)
    inside, length = runs(n, *strides)
    itemsize = memory.itemsize[copies.dst_buffer]
    is_direct = (length * itemsize >= options.direct_run_bytes) & memory.keeps_dtype(copies)
    limit = options.write_bytes // itemsize
    every = _every(n[is_direct], inside[is_direct], limit[is_direct])
    return _cuts(every, np.zeros_like(every), order[is_direct]), is_direct


def _every(n: IntArray, inside: BoolArray, limit: IntArray) -> IntArray:
    """Cut runs into parts of nearly equal length up to the limit, and other dims one by one.

    Args:
        n: Counts, innermost dim first.
        inside: Dims that the run spans.
        limit: Most elements of a part.
    """
    every = np.ones_like(n)
    inner = np.ones(len(n), np.int64)
    for dim in range(MAX_DIMS):
        most = np.clip(limit // inner, 1, n[:, dim])
        parts = -(-n[:, dim] // most)
        every[:, dim] = np.where(inside[:, dim], -(-n[:, dim] // parts), 1)
        inner *= n[:, dim]
    return every


def _whole_cells(every: IntArray, n: IntArray, cell: IntArray) -> IntArray:
    """Cut between cells where parts are long enough: an encoder then reads each cell once."""
    return np.where((every < n) & (every >= cell), every // cell * cell, every)


def _cuts(every: IntArray, phase: IntArray, order: IntArray) -> Cuts:
    """Bring cuts from memory order back to canonical dims order."""
    back = np.argsort(order, axis=1, kind="stable")
    return Cuts(take_dims(every, back), take_dims(phase, back))


def _pack(copies: CopyTable, order: IntArray, memory: _Memory, options: PlanOptions) -> CopyTable:
    """Split copies so that packed chunks can be made of them.

    Afterwards every set of rows with overlapping hulls fills its hull and fits a chunk.
    """
    copies = split(
        copies, _aligned_cuts(copies, order, memory, options), options.max_rows, memory.names
    )
    place = memory.line(copies)
    line = np.argsort(place, kind="stable")
    copies, place = copies.take(line), place[line]
    hull = hull_elements(copies.n, copies.dst_stride)
    first = _first_of_clusters(place, hull)
    cluster = np.cumsum(first) - 1
    num_clusters = int(first.sum())
    filled = sum_by(cluster, volume_of(copies.n), num_clusters)
    start = place[first]
    end = np.maximum.reduceat(place + hull, np.flatnonzero(first)) if num_clusters else start
    limit = options.packed_bytes // memory.itemsize[copies.dst_buffer[first]]
    is_dense = (filled == end - start) & (filled <= limit)
    sparse = ~is_dense[cluster]
    if not sparse.any():
        return copies
    # Others write between these rows: every contiguous destination run is a chunk by itself.
    loose = copies.take(sparse)
    order = np.argsort(np.where(loose.n > 1, loose.dst_stride, 0), axis=1, kind="stable")
    n = take_dims(loose.n, order)
    inside, _ = runs(n, take_dims(loose.dst_stride, order))
    every = _every(n, inside, options.packed_bytes // memory.itemsize[loose.dst_buffer])
    pieces = split(loose, _cuts(every, np.zeros_like(every), order), options.max_rows, memory.names)
    return CopyTable.concat([copies.take(~sparse), pieces])


def _aligned_cuts(
    copies: CopyTable, order: IntArray, memory: _Memory, options: PlanOptions
) -> Cuts:
    """Cut copies so that each part's hull fits a packed chunk.

    Copies that interleave with the same period (gate and up rows) are cut at the same places, or
    parts of one would straddle parts of the other: cuts lie at multiples of a common block,
    counted from the first of all copies of that period.
    """
    n, stride = take_dims(copies.n, order), take_dims(copies.dst_stride, order)
    inside, _ = runs(n, stride)
    limit = options.packed_bytes // memory.itemsize[copies.dst_buffer]
    cell = take_dims(memory.cells(copies), order)
    every = _whole_cells(_every(n, inside, limit), n, cell)
    phase = np.zeros_like(every)
    # The block is cut along the outermost dim whose period fits: dims outside go one by one,
    # dims inside stay whole. If the run alone fills the limit, `_every` has cut it already.
    fits = (n > 1) & (stride <= limit[:, None])
    block = np.where(any_dim(fits), MAX_DIMS - 1 - fits[:, ::-1].argmax(axis=1), 0)
    rows = np.arange(len(n))
    wide = np.flatnonzero(~inside[rows, block] & fits[rows, block])
    if len(wide):
        dim, period = block[wide], stride[wide, block[wide]]
        rank = memory.src_rank[copies.src_buffer[wide]]
        _, group = unique_rows([rank, copies.dst_buffer[wide], period])
        origin = np.full(int(group.max()) + 1, np.iinfo(np.int64).max)
        np.minimum.at(origin, group, copies.dst_offset[wide])
        every[wide] = np.where(np.arange(MAX_DIMS) < dim[:, None], n[wide], 1)
        every[wide, dim] = limit[wide] // period
        every[wide] = _whole_cells(every[wide], n[wide], cell[wide])
        phase[wide, dim] = (copies.dst_offset[wide] - origin[group]) // period % every[wide, dim]
    return _cuts(every, phase, order)


def _first_of_clusters(place: IntArray, hull: IntArray) -> BoolArray:
    """Mark the first row of every set of rows whose hulls overlap; rows are sorted by place."""
    first = np.ones(len(place), np.bool_)
    if len(place):
        first[1:] = place[1:] >= np.maximum.accumulate(place + hull)[:-1]
    return first


def _join(parts: list[CopyTable], memory: _Memory, options: PlanOptions) -> Lowered:
    """Sort all rows by destination and gather them into chunks.

    Args:
        parts: Direct rows, direct rows, rows to be packed.
        memory: Where copies read and write.
        options: Budgets.
    """
    rows = CopyTable.concat(parts)
    may_pack = np.arange(len(rows)) >= len(rows) - len(parts[-1])
    place = memory.line(rows)
    order = np.argsort(place, kind="stable")
    rows, place, may_pack = rows.take(order), place[order], may_pack[order]
    hull = hull_elements(rows.n, rows.dst_stride)
    first = np.flatnonzero(_first_of_clusters(place, hull))
    start = place[first]
    nbytes = memory.nbytes(rows)
    total = starts_of(nbytes)[np.append(first, len(rows))]
    end = np.maximum.reduceat(place + hull, first) if len(first) else start
    # Packed clusters that touch are joined into chunks up to the limit.
    alone = np.ones(len(first), np.bool_)
    alone[1:] = (start[1:] != end[:-1]) | ~may_pack[first[1:]] | ~may_pack[first[:-1]]
    begins = greedy_cuts(alone, [(total, options.packed_bytes)])
    row_start = np.append(first[begins], len(rows))
    head = row_start[:-1]
    single = np.diff(row_start) == 1
    is_packed = ~(single & memory.is_straight(rows.take(head)))
    return Lowered(
        rows=rows,
        row_start=row_start,
        src_rank=memory.src_rank[rows.src_buffer[head]],
        dst_buffer=rows.dst_buffer[head].astype(np.int64),
        dst_offset=rows.dst_offset[head],
        nbytes=np.diff(np.append(total[:-1][begins], total[-1])),
        is_packed=is_packed,
    )
