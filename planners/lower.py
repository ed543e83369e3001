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

from weightsync.ir.dtypes import ITEMSIZE
from weightsync.ir.encoded import Encoded, made_rows
from weightsync.ir.manifest import Manifest
from weightsync.ir.pieces import hull_elements
from weightsync.ir.plan import NestTable, PlanOptions
from weightsync.ir.tables import (
    MAX_DIMS,
    BoolArray,
    IntArray,
    all_dims,
    any_dim,
    distinct,
    starts_of,
    sum_by,
    take_rows,
    unique_rows,
    volume_of,
)
from weightsync.planners.copies import Copies, CopyTable, Cuts, runs, split, take_dims
from weightsync.planners.order import greedy_cuts

__all__ = ["Lowered", "Memory", "lower"]


@dataclasses.dataclass(frozen=True)
class Lowered:
    """Rows of some source ranks and their chunks, sorted by source rank and sink memory.

    Attributes:
        rows: Copies; chunk c owns rows `row_start[c] : row_start[c + 1]`.
        nests: Their counts and strides, each there once, in the order of the rows that have them.
        row_start: `(C + 1,)`.
        src_rank: Source rank of each chunk, `(C,)`.
        dst_buffer: Sink buffer of each chunk, `(C,)`.
        dst_offset: First element of each chunk, `(C,)`.
        nbytes: `(C,)`.
        is_packed: `(C,)`.
    """

    rows: CopyTable
    nests: NestTable
    row_start: IntArray
    src_rank: IntArray
    dst_buffer: IntArray
    dst_offset: IntArray
    nbytes: IntArray
    is_packed: BoolArray

    @classmethod
    def concat(cls, parts: Sequence[Lowered]) -> Lowered:
        """Join the parts of ascending source ranks."""
        copies = Copies.concat([Copies(part.rows, part.nests) for part in parts]).canonical()
        none = np.zeros(0, np.int64)
        starts = starts_of(np.concatenate([none, *(np.diff(part.row_start) for part in parts)]))
        names = ("src_rank", "dst_buffer", "dst_offset", "nbytes")
        columns = {n: np.concatenate([none, *(getattr(part, n) for part in parts)]) for n in names}
        is_packed = np.concatenate([none > 0, *(part.is_packed for part in parts)])
        return cls(copies.rows, copies.nests, starts, **columns, is_packed=is_packed)


def lower(copies: Copies, memory: Memory, options: PlanOptions) -> Lowered:
    """Turn copies of whole source ranks into rows and chunks.

    Args:
        copies: One per region and sender; all copies of the ranks concerned, in any order.
        memory: Where they read and write.
        options: Budgets.

    Raises:
        PlanBudgetError: The copies shatter into more than `options.max_rows` runs.

    Cost: a few sorts of the rows.
    """
    kinds = _Kinds.of_copies(copies, memory)
    # Most copies are one run of a good length; only the others need a closer look.
    nbytes = volume_of(kinds.n) * kinds.itemsize
    is_simple = kinds.is_straight & (nbytes <= options.write_bytes)
    is_simple &= nbytes >= options.direct_run_bytes
    every, is_direct = _direct_cuts(kinds, options)
    is_direct &= ~is_simple
    simple, direct = is_simple[kinds.of], is_direct[kinds.of]
    packed = ~(simple | direct)
    by_run = Cuts(kinds.of[direct], kinds.nest, every, np.zeros_like(every))
    parts = [
        copies.take(simple),
        split(copies.take(direct), by_run, options.max_rows, memory.names),
        _pack(copies.take(packed), kinds.take(packed), memory, options),
    ]
    return _join(parts, memory, options)


class Memory:
    """Where copies read and write: element sizes, and all sink buffers on one line.

    Args:
        encoded: The sources.
        sink: Merged manifest.

    Attributes:
        src_rank: Rank of each source buffer.
        dst_dtype, itemsize: `Dtype` and bytes of an element of each sink buffer.
        cells, cell_of: As in `Encoded`.
        names: Of the sink's tensors.
    """

    def __init__(self, encoded: Encoded, sink: Manifest) -> None:
        source = encoded.source
        self._encoded, self._sink = encoded, sink
        self._src_dtype, self.dst_dtype = source.buffers.dtype, sink.buffers.dtype
        self.src_rank = source.buffers.rank.astype(np.int64)
        self.itemsize = sink.buffers.itemsize
        self.names = sink.tensors.names
        # One unused element after each buffer keeps neighbours in different buffers apart.
        base = starts_of(sink.buffers.numel + 1)
        self._base, self._length = base[:-1], int(base[-1])
        self.cells, self.cell_of = encoded.cells, encoded.cell_of

    def line(self, rows: CopyTable) -> IntArray:
        """Return where each copy's destination starts, on one line per source rank."""
        rank = self.src_rank[rows.src_buffer]
        rank -= rank.min(initial=0)
        return rank * self._length + self._base[rows.dst_buffer] + rows.dst_offset

    def keeps_dtype(self, rows: CopyTable) -> BoolArray:
        """Whether each copy is neither cast nor encoded."""
        same = self._src_dtype[rows.src_buffer] == self.dst_dtype[rows.dst_buffer]
        if len(self._encoded.table):
            same &= ~made_rows(self._encoded, self._sink, rows.tensor, rows.dst_buffer)
        return np.asarray(same)


def _is_straight(nests: NestTable) -> BoolArray:
    """Whether copies of each nest are one contiguous run on both sides."""
    straight = all_dims(nests.src_stride == nests.dst_stride)
    straight &= hull_elements(nests.n, nests.dst_stride) == volume_of(nests.n)
    return straight


@dataclasses.dataclass(frozen=True)
class _Kinds:
    """Which copies are lowered alike: those of one nest, with elements of one size at the sink.

    Attributes:
        of: Kind of each copy, `(R,)`.
        nest: `(K,)`.
        n, src_stride, dst_stride: Of the nest, `(K, 4)`.
        itemsize: Bytes of an element at the sink, `(K,)`.
        keeps_dtype: Whether they are neither cast nor encoded, `(K,)`.
        is_straight: Whether they are contiguous on both sides, too, `(K,)`.
        cell: Elements of codes that share a scale, `(K, 4)`.
        order: Dims from the narrowest stride at the sink to the widest, `(K, 4)`.
    """

    of: IntArray
    nest: IntArray
    n: IntArray
    src_stride: IntArray
    dst_stride: IntArray
    itemsize: IntArray
    keeps_dtype: BoolArray
    is_straight: BoolArray
    cell: IntArray
    order: IntArray

    @classmethod
    def of_copies(cls, copies: Copies, memory: Memory) -> _Kinds:
        rows, nests = copies.rows, copies.nests
        # What matters besides the nest: type and cell at the sink, and whether the type is kept.
        dtype, num_cells = memory.dst_dtype[rows.dst_buffer].astype(np.int64), len(memory.cells)
        trait = (dtype * num_cells + memory.cell_of[rows.tensor]) * 2 + memory.keeps_dtype(rows)
        traits, trait = distinct(trait, int(trait.max(initial=-1)) + 1)
        keys, of = distinct(
            rows.nest.astype(np.int64) * len(traits) + trait, len(nests) * len(traits)
        )
        nest, number = np.divmod(keys, max(len(traits), 1))
        mine_traits = traits[number]
        dtype, cell = np.divmod(mine_traits // 2, num_cells)
        keeps_dtype = mine_traits % 2 > 0
        mine = nests.take(nest)
        return cls(
            of=of,
            nest=nest,
            n=mine.n,
            src_stride=mine.src_stride,
            dst_stride=mine.dst_stride,
            itemsize=ITEMSIZE[dtype],
            keeps_dtype=keeps_dtype,
            is_straight=_is_straight(mine) & keeps_dtype,
            cell=memory.cells[cell],
            order=np.argsort(np.where(mine.n > 1, mine.dst_stride, 0), axis=1, kind="stable"),
        )

    def take(self, mask: BoolArray) -> _Kinds:
        """Return the kinds of some of the copies, with those that none of them is of."""
        return dataclasses.replace(self, of=self.of[mask])


def _canonical(values: IntArray, order: IntArray) -> IntArray:
    """Bring values back from the given order of dims to that of the tensors, `(K, 4)`."""
    return take_dims(values, np.argsort(order, axis=1, kind="stable"))


def _direct_cuts(kinds: _Kinds, options: PlanOptions) -> tuple[IntArray, BoolArray]:
    """Decide which copies are written run by run, straight from source memory, and cut those."""
    n = take_dims(kinds.n, kinds.order)
    strides = take_dims(kinds.src_stride, kinds.order), take_dims(kinds.dst_stride, kinds.order)
    inside, length = runs(n, *strides)
    is_direct = (length * kinds.itemsize >= options.direct_run_bytes) & kinds.keeps_dtype
    every = _every(n, inside, options.write_bytes // kinds.itemsize)
    return _canonical(every, kinds.order), is_direct


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


def _pack(copies: Copies, kinds: _Kinds, memory: Memory, options: PlanOptions) -> Copies:
    """Split copies so that packed chunks can be made of them.

    Afterwards every set of rows with overlapping hulls fills its hull and fits a chunk.
    """
    cuts = _aligned_cuts(copies, kinds, memory, options)
    copies = split(copies, cuts, options.max_rows, memory.names)
    place = memory.line(copies.rows)
    line = np.argsort(place, kind="stable")
    copies, place = copies.take(line), place[line]
    rows, nests = copies.rows, copies.nests
    end = place + take_rows(hull_elements(nests.n, nests.dst_stride), rows.nest)
    first = _first_of_clusters(place, end)
    cluster = np.cumsum(first) - 1
    heads = np.flatnonzero(first)
    filled = sum_by(cluster, take_rows(volume_of(nests.n), rows.nest), len(heads))
    hull = (np.maximum.reduceat(end, heads) if len(heads) else end[heads]) - place[heads]
    limit = options.packed_bytes // memory.itemsize[rows.dst_buffer[heads]]
    sparse = ~((filled == hull) & (filled <= limit))[cluster]
    if not sparse.any():
        return copies
    # Others write between these rows: every contiguous destination run is a chunk by itself.
    loose = copies.take(sparse)
    kinds = _Kinds.of_copies(loose, memory)
    n = take_dims(kinds.n, kinds.order)
    inside, _ = runs(n, take_dims(kinds.dst_stride, kinds.order))
    every = _canonical(_every(n, inside, options.packed_bytes // kinds.itemsize), kinds.order)
    cuts = Cuts(kinds.of, kinds.nest, every, np.zeros_like(every))
    pieces = split(loose, cuts, options.max_rows, memory.names)
    return Copies.concat([copies.take(~sparse), pieces])


def _aligned_cuts(copies: Copies, kinds: _Kinds, memory: Memory, options: PlanOptions) -> Cuts:
    """Cut copies so that each part's hull fits a packed chunk.

    Copies that interleave with the same period (gate and up rows) are cut at the same places, or
    parts of one would straddle parts of the other: cuts lie at multiples of a common block,
    counted from the first of all copies of that period.
    """
    n, stride = take_dims(kinds.n, kinds.order), take_dims(kinds.dst_stride, kinds.order)
    inside, _ = runs(n, stride)
    limit = options.packed_bytes // kinds.itemsize
    cell = take_dims(kinds.cell, kinds.order)
    every = _whole_cells(_every(n, inside, limit), n, cell)
    # The block is cut along the outermost dim whose period fits: dims outside go one by one,
    # dims inside stay whole. If the run alone fills the limit, `_every` has cut it already.
    fits = (n > 1) & (stride <= limit[:, None])
    block = np.where(any_dim(fits), MAX_DIMS - 1 - fits[:, ::-1].argmax(axis=1), 0)
    each = np.arange(len(n))
    is_wide = ~inside[each, block] & fits[each, block]
    wide = np.flatnonzero(is_wide)
    dim, period = block[wide], stride[wide, block[wide]]
    every[wide] = np.where(np.arange(MAX_DIMS) < dim[:, None], n[wide], 1)
    every[wide, dim] = limit[wide] // period
    every[wide] = _whole_cells(every[wide], n[wide], cell[wide])
    canonical = _canonical(every, kinds.order)
    mine = np.flatnonzero(is_wide[kinds.of])
    if not len(mine):
        return Cuts(kinds.of, kinds.nest, canonical, np.zeros_like(canonical))
    kind, rows = kinds.of[mine], copies.rows.take(mine)
    step = stride[kind, block[kind]]
    _, group = unique_rows([memory.src_rank[rows.src_buffer], rows.dst_buffer, step])
    origin = np.full(int(group.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(origin, group, rows.dst_offset)
    shorter = (rows.dst_offset - origin[group]) // step % every[kind, block[kind]]
    # A cut for each kind and each phase that one of its copies has.
    first, cut = unique_rows([kind, shorter])
    of = kinds.of.copy()
    of[mine] = len(n) + cut
    like = np.concatenate([each, kind[first]])
    phase = np.zeros((len(like), MAX_DIMS), np.int64)
    phase[len(n) + np.arange(len(first)), block[kind[first]]] = shorter[first]
    return Cuts(of, kinds.nest[like], canonical[like], _canonical(phase, kinds.order[like]))


def _first_of_clusters(place: IntArray, end: IntArray) -> BoolArray:
    """Mark the first row of every set of rows whose hulls overlap; rows are sorted by place."""
    first = np.ones(len(place), np.bool_)
    if len(place):
        first[1:] = place[1:] >= np.maximum.accumulate(end)[:-1]
    return first


def _join(parts: list[Copies], memory: Memory, options: PlanOptions) -> Lowered:
    """Sort all rows by destination and gather them into chunks.

    Args:
        parts: Direct rows, direct rows, rows to be packed.
        memory: Where copies read and write.
        options: Budgets.
    """
    copies = Copies.concat(parts)
    may_pack = np.arange(len(copies)) >= len(copies) - len(parts[-1])
    place = memory.line(copies.rows)
    order = np.argsort(place, kind="stable")
    copies, place, may_pack = copies.take(order).canonical(), place[order], may_pack[order]
    rows, nests = copies.rows, copies.nests
    end = place + take_rows(hull_elements(nests.n, nests.dst_stride), rows.nest)
    first = np.flatnonzero(_first_of_clusters(place, end))
    start = place[first]
    nbytes = take_rows(volume_of(nests.n), rows.nest) * memory.itemsize[rows.dst_buffer]
    total = starts_of(nbytes)[np.append(first, len(rows))]
    end = np.maximum.reduceat(end, first) if len(first) else start
    # Packed clusters that touch are joined into chunks up to the limit.
    alone = np.ones(len(first), np.bool_)
    alone[1:] = (start[1:] != end[:-1]) | ~may_pack[first[1:]] | ~may_pack[first[:-1]]
    begins = greedy_cuts(alone, [(total, options.packed_bytes)])
    row_start = np.append(first[begins], len(rows))
    head = row_start[:-1]
    single = np.diff(row_start) == 1
    straight = _is_straight(nests)[rows.nest[head]] & memory.keeps_dtype(rows.take(head))
    return Lowered(
        rows=rows,
        nests=nests,
        row_start=row_start,
        src_rank=memory.src_rank[rows.src_buffer[head]],
        dst_buffer=rows.dst_buffer[head].astype(np.int64),
        dst_offset=rows.dst_offset[head],
        nbytes=np.diff(np.append(total[:-1][begins], total[-1])),
        is_packed=~(single & straight),
    )
