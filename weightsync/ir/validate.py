"""A plan proves itself: recomputed from its tables and manifests, with no planner code.

`validate_structure` proves the budgets, the consistency of rows, chunks and buckets, and that every
sink byte is written exactly once. `validate_content` proves that each row moves the elements it
claims: both sides locate the row in their own pieces and must agree.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightsync.errors import CoverageError, PlanBudgetError, PlanError
from weightsync.ir.cover import covers_once
from weightsync.ir.dtypes import CAST_TABLE
from weightsync.ir.encoded import made_rows
from weightsync.ir.hops import check_hops
from weightsync.ir.locate import BLOCK_ROWS, Locator
from weightsync.ir.manifest import Manifest
from weightsync.ir.pieces import CONSTANT, hull_elements
from weightsync.ir.plan import Plan, RowKind
from weightsync.ir.tables import (
    BoolArray,
    IntArray,
    all_dims,
    any_dim,
    owners,
    unique_rows,
    volume_of,
)

__all__ = [
    "check_constants",
    "check_nests",
    "check_tiling",
    "validate_content",
    "validate_structure",
]


# MAX rows have a table of their own.
_KINDS = (RowKind.COPY, RowKind.CONST, RowKind.ENCODE, RowKind.HOP)


def validate_structure(plan: Plan) -> None:
    """Prove budgets, consistency of the tables and exact cover of every sink byte.

    Raises:
        CoverageError: A sink byte is written never or twice; names the sink and a tensor.
        PlanBudgetError: A chunk or bucket exceeds the plan's own options.
        PlanError: The tables contradict each other or the manifests.
    """
    check_nests(plan)
    _check_rows(plan)
    check_tiling(plan)
    _check_ranks(plan)
    _check_chunks(plan)
    _check_budgets(plan)
    check_constants(plan)
    _check_maxima(plan)
    check_hops(plan)
    _check_cover(plan)


def validate_content(plan: Plan) -> None:
    """Prove that every row that is sent moves the same canonical elements on both sides.

    Expects a plan that passed `validate_structure`.

    Raises:
        PlanError: A row lies in no piece of its tensor, or the two sides disagree.
    """
    rows = plan.rows
    own, copies = plan.num_direct_rows, plan.num_sent
    src, dst = Locator(plan.encoded.source, with_tensor=True), Locator(plan.sink, with_tensor=True)
    blocks = [(src, first, own) for first in range(0, own, BLOCK_ROWS)]
    blocks += [(dst, first, copies) for first in range(own, copies, BLOCK_ROWS)]
    for sender, first, end in blocks:
        at = slice(first, min(first + BLOCK_ROWS, end))
        tensor, nest = rows.tensor[at], plan.nest_of(at)
        src_piece, src_lo, src_step = sender.locate(
            rows.src_buffer[at],
            tensor if sender is dst else plan.tensor_in_source[tensor],
            rows.src_offset[at],
            nest.n,
            nest.src_stride,
        )
        _refuse(plan, src_piece < 0, "reads what no piece of its sender holds", first)
        dst_piece, dst_lo, dst_step = dst.locate(
            rows.dst_buffer[at], tensor, rows.dst_offset[at], nest.n, nest.dst_stride
        )
        _refuse(plan, dst_piece < 0, "writes where no piece of its tensor is", first)
        differs = (src_lo != dst_lo) | (src_step != dst_step)
        _refuse(plan, any_dim(differs), "reads other elements of the tensor than it writes", first)


def _refuse(plan: Plan, bad: BoolArray, fault: str, first: int = 0) -> None:
    """Raise PlanError for the first bad row, naming tensor and ranks; `bad` starts at `first`."""
    for row in first + np.flatnonzero(bad)[:1]:
        rows = plan.rows
        tensor, src, dst = (int(c[row]) for c in (rows.tensor, rows.src_buffer, rows.dst_buffer))
        name = plan.sink.tensors.names[tensor] if 0 <= tensor < len(plan.sink.tensors) else None
        sender = plan.sink if rows.kind[row] == RowKind.HOP else plan.source
        labels = [
            side.ranks[int(side.buffers.rank[b])] if 0 <= b < len(side.buffers) else None
            for side, b in ((sender, src), (plan.sink, dst))
        ]
        raise PlanError(
            f"row {row} ({name or 'constant'}, {labels[0] or 'no source'} to "
            f"{labels[1] or 'no sink'}) {fault}; the plan was changed or is a bug of the planner",
            tensor=name,
            rank=labels[1],
            side="sink",
            source=labels[0],
            row=int(row),
        )


def check_nests(plan: Plan) -> None:
    """Check that every row has counts and strides, that these are canonical, and each there once.

    Everything else that looks at a plan may take this for granted.
    """
    nests, nest = plan.nests, plan.rows.nest
    _refuse(plan, _outside(nest, len(nests)), "has no counts and strides")
    first, _ = unique_rows([nests.n, nests.src_stride, nests.dst_stride])
    if len(first) < len(nests) or not np.bincount(nest, minlength=len(nests)).all():
        raise PlanError("counts and strides are listed twice, or such that no row has")
    _refuse(plan, any_dim(nests.n < 1)[nest], "has no elements")
    single = (nests.n == 1) & ((nests.src_stride != 0) | (nests.dst_stride != 0))
    negative = (nests.src_stride < 0) | (nests.dst_stride < 0)
    _refuse(plan, any_dim(single | negative)[nest], "has strides that are not canonical")


def _check_rows(plan: Plan) -> None:
    """Check kinds, indices and ranges of rows."""
    rows, source, sink = plan.rows, plan.source, plan.sink
    unknown = np.flatnonzero(~np.isin(rows.kind, _KINDS))
    if len(unknown):
        kind = int(rows.kind[unknown[0]])
        name = RowKind(kind).name if kind in set(RowKind) else str(kind)
        raise PlanError(f"row {unknown[0]} is of kind {name}, which no row of a plan has")
    copy = rows.kind != RowKind.CONST
    if (copy[1:] & ~copy[:-1]).any():
        raise PlanError("rows that the sink does by itself (CONST) must come after all others")
    is_hop = rows.kind == RowKind.HOP
    if (is_hop[:-1] & copy[1:] & ~is_hop[1:]).any():
        raise PlanError("rows that sinks pass on (HOP) must come after those that sources send")
    own = copy & ~is_hop
    _refuse(plan, _outside(rows.dst_buffer, len(sink.buffers)), "has no sink buffer")
    _refuse(plan, own & _outside(rows.src_buffer, len(source.buffers)), "has no source buffer")
    _refuse(plan, is_hop & _outside(rows.src_buffer, len(sink.buffers)), "has no sink to read from")
    _refuse(plan, copy & _outside(rows.tensor, len(sink.tensors)), "has no tensor")
    _refuse(plan, ~copy & ((rows.tensor != CONSTANT) | (rows.src_buffer != -1)), "is no constant")
    read, written = (
        _reach(plan.nests.n, s) for s in (plan.nests.src_stride, plan.nests.dst_stride)
    )
    leaves = _leaves(rows.dst_offset, written[rows.nest], rows.dst_buffer, sink)
    _refuse(plan, leaves, "leaves its sink buffer")
    for at, side in (own, source), (is_hop, sink):
        bad = np.zeros(len(rows), np.bool_)
        bad[at] = _leaves(rows.src_offset[at], read[rows.nest[at]], rows.src_buffer[at], side)
        _refuse(plan, bad, "leaves the buffer that it reads")
    if not own.any():
        return
    at = slice(0, int(np.count_nonzero(own)))
    src_buffer = rows.src_buffer[at]
    absent = plan.tensor_in_source[rows.tensor[at]] < 0
    _refuse(plan, absent, "is of a tensor that the source lacks")
    made = made_rows(plan.encoded, sink, rows.tensor[at], rows.dst_buffer[at])
    wrong = made != (rows.kind[at] == RowKind.ENCODE)
    _refuse(plan, wrong, "encodes what is to be copied, or copies what is to be encoded")
    pair = source.buffers.dtype[src_buffer], sink.buffers.dtype[rows.dst_buffer[at]]
    _refuse(plan, np.asarray(~CAST_TABLE[pair]) & ~made, "needs a cast that does not exist")


def _reach(n: IntArray, stride: IntArray) -> NDArray[np.float64]:
    """Return how far the last element is from the first; in floats, as it may overflow."""
    return np.asarray(((n - 1) * stride.astype(np.float64)).sum(axis=1))


def _leaves(
    offset: IntArray, reach: NDArray[np.float64], buffer: NDArray[Any], side: Manifest
) -> BoolArray:
    """Tell which rows leave their buffer."""
    return np.asarray((offset < 0) | (offset + reach >= side.buffers.numel[buffer]))


def check_tiling(plan: Plan) -> None:
    """Check that rows, chunks and buckets follow one another without gaps."""
    rows, chunks, buckets = plan.rows, plan.chunks, plan.buckets
    copies = int(np.count_nonzero(rows.kind != RowKind.CONST))
    ordered = bool((rows.chunk[copies:] == -1).all())
    tiled = _tiles(chunks.row_lo, chunks.row_hi, copies)
    tiled &= _tiles(buckets.chunk_lo, buckets.chunk_hi, len(chunks))
    if not (ordered and tiled):
        raise PlanError("rows, chunks and buckets do not follow one another without gaps")
    owner = owners(chunks.row_hi - chunks.row_lo)
    _refuse(plan, rows.chunk[:copies] != owner, "belongs to another chunk than it says")
    num_chunks = buckets.chunk_hi - buckets.chunk_lo
    bucket = owners(num_chunks)
    number = np.arange(len(chunks)) - np.repeat(buckets.chunk_lo, num_chunks)
    if not (np.array_equal(bucket, chunks.bucket) and np.array_equal(number, chunks.number)):
        raise PlanError("a chunk belongs to another bucket or place than it says")


def _check_ranks(plan: Plan) -> None:
    """Check that buckets are sorted by source, and hold rows of their own ranks only."""
    rows, chunks, buckets = plan.rows, plan.chunks, plan.buckets
    copies, own, direct = plan.num_sent, plan.num_direct_rows, plan.num_direct
    first = np.append(chunks.row_lo[buckets.chunk_lo], copies)[direct]
    if first != own:
        raise PlanError("a bucket has rows of a source and rows that a sink passes on")
    known = ~_outside(buckets.dst_rank, len(plan.sink.ranks))
    for part, side in (slice(direct), plan.source), (slice(direct, None), plan.sink):
        senders = buckets.src_rank[part]
        known[part] &= ~_outside(senders, len(side.ranks))
        known[:1] &= not (np.diff(senders) < 0).any()
    if not known.all():
        raise PlanError("a bucket has an unknown rank, or buckets are not sorted by sender")
    row_bucket = chunks.bucket[rows.chunk[:copies]]
    src_buffer = rows.src_buffer[:copies]
    src_rank = np.concatenate(
        [plan.source.buffers.rank[src_buffer[:own]], plan.sink.buffers.rank[src_buffer[own:]]]
    )
    wrong_source = src_rank != buckets.src_rank[row_bucket]
    wrong_sink = plan.sink.buffers.rank[rows.dst_buffer[:copies]] != buckets.dst_rank[row_bucket]
    _refuse(plan, wrong_source | wrong_sink, "is in a bucket of other ranks")


def _check_chunks(plan: Plan) -> None:
    """Check that each chunk is exactly the destination range of its rows."""
    rows, chunks, sink = plan.rows, plan.chunks, plan.sink
    copies = len(rows) if not len(chunks) else int(chunks.row_hi[-1])
    if not len(chunks):
        return
    chunk, buffer, nest = rows.chunk[:copies], rows.dst_buffer[:copies], rows.nest[:copies]
    volume, hull = volume_of(plan.nests.n), hull_elements(plan.nests.n, plan.nests.dst_stride)
    itemsize = sink.buffers.itemsize[buffer]
    _refuse(plan, buffer != buffer[chunks.row_lo[chunk]], "is in a chunk of another buffer")
    start = sink.arena_offset_bytes[buffer] + rows.dst_offset[:copies] * itemsize
    end = start + hull[nest] * itemsize
    range_end = chunks.dst_offset + chunks.nbytes
    _refuse(plan, (start < chunks.dst_offset[chunk]) | (end > range_end[chunk]), "leaves its chunk")
    nbytes = np.add.reduceat(volume[nest] * itemsize, chunks.row_lo)
    short = np.flatnonzero(nbytes != chunks.nbytes)
    if len(short):
        raise PlanError(
            f"chunk {short[0]} is {chunks.nbytes[short[0]]} bytes but its rows {nbytes[short[0]]}"
        )
    own = slice(plan.num_direct_rows)
    direct = ~chunks.is_packed[chunk[own]]
    straight = all_dims(plan.nests.src_stride == plan.nests.dst_stride) & (hull == volume)
    same = plan.source.buffers.dtype[rows.src_buffer[own]] == sink.buffers.dtype[buffer[own]]
    same &= rows.kind[own] == RowKind.COPY
    _refuse(
        plan,
        direct & ~(straight[nest[own]] & same),
        "is not contiguous on both sides, yet not packed",
    )
    chunk = chunk[own]
    alone = (chunks.row_hi - chunks.row_lo == 1)[chunk]
    _refuse(plan, direct & ~alone, "shares a chunk that is not packed")


def _check_budgets(plan: Plan) -> None:
    """Check chunks and buckets against the options and their own sums."""
    chunks, buckets, options = plan.chunks, plan.buckets, plan.options
    if not len(buckets):
        return
    staged = np.where(chunks.is_packed, chunks.nbytes, 0)
    nbytes = np.add.reduceat(chunks.nbytes, buckets.chunk_lo)
    staging = np.add.reduceat(staged, buckets.chunk_lo)
    if not (
        np.array_equal(nbytes, buckets.nbytes) and np.array_equal(staging, buckets.staging_bytes)
    ):
        raise PlanError("a bucket's bytes are not the sum of its chunks")
    for what, value, limit in (
        ("bytes of a chunk", chunks.nbytes, options.write_bytes),
        ("bytes of a packed chunk", staged, options.packed_bytes),
        ("bytes of a bucket", nbytes, options.bucket_bytes),
        ("staging bytes of a bucket", staging, options.slot_bytes),
        ("chunks of a bucket", buckets.chunk_hi - buckets.chunk_lo, options.max_chunks_per_bucket),
        ("rows", np.array([len(plan.rows)]), options.max_rows),
    ):
        if int(value.max()) > limit:
            raise PlanBudgetError(f"{what}: {int(value.max())}, but the options allow {limit}")


def check_constants(plan: Plan) -> None:
    """Check that CONST rows are exactly the sink's constant pieces; expects `check_nests`."""
    rows, pieces = plan.rows, plan.sink.pieces
    first = plan.num_sent
    piece = rows.src_offset[first:]
    expected = np.flatnonzero(pieces.tensor == CONSTANT)
    if not np.array_equal(np.sort(piece), expected):
        raise PlanError("the constant rows are not the constants of the sink's manifest")
    nest = plan.nest_of(slice(first, None))
    for column, of_piece in (
        (rows.dst_buffer[first:], pieces.buffer),
        (rows.dst_offset[first:], pieces.offset),
        (nest.n, pieces.n),
        (nest.dst_stride, pieces.stride),
    ):
        if not np.array_equal(column, of_piece[piece]):
            raise PlanError("a constant row differs from its piece in the sink's manifest")


def _check_maxima(plan: Plan) -> None:
    """Check that maxima are of cells that exist, between two sources."""
    table, tensors = plan.maxima, plan.sink.tensors
    if not len(table):
        return
    is_scale = np.zeros(len(tensors), np.bool_)
    is_scale[plan.encoded.table.scales] = True
    ranks = np.stack([table.src_rank, table.dst_rank])
    known = ~_outside(table.tensor, len(tensors)) & ~_outside(ranks, len(plan.source.ranks)).any(0)
    inside = known & is_scale[np.where(known, table.tensor, 0)] & (ranks[0] != ranks[1])
    beyond = (
        table.lo + (table.n - 1) * table.step >= tensors.shape[np.where(known, table.tensor, 0)]
    )
    inside &= ~any_dim((table.lo < 0) | (table.n < 1) | (table.step < 1) | beyond)
    for row in np.flatnonzero(~inside)[:1]:
        raise PlanError(f"row {row} of the maxima names an unknown source, or cells that are none")


def _check_cover(plan: Plan) -> None:
    """Check that every element of every sink buffer is written exactly once."""
    rows, sink = plan.rows, plan.sink
    owner = rows.dst_buffer.astype(np.int64)
    n, stride = plan.nests.n, plan.nests.dst_stride
    good = covers_once(owner, rows.dst_offset, n, stride, sink.buffers.numel, rows.nest)
    for buffer in np.flatnonzero(~good)[:1]:
        written = int(volume_of(n)[rows.nest[owner == buffer]].sum())
        rank = sink.ranks[int(sink.buffers.rank[buffer])]
        of_buffer = sink.pieces.tensor[sink.pieces.buffer == buffer]
        tensors = [sink.tensors.names[t] for t in of_buffer[of_buffer != CONSTANT][:1]]
        raise CoverageError(
            f"{rank}: rows write {written} elements of buffer {sink.buffers.names[buffer]}, which "
            f"has {sink.buffers.numel[buffer]}; each must be written exactly once",
            tensor=tensors[0] if tensors else None,
            rank=rank,
            side="sink",
        )


def _outside(index: NDArray[Any], length: int) -> BoolArray:
    return np.asarray((index < 0) | (index >= length))


def _tiles(lo: IntArray, hi: IntArray, length: int) -> bool:
    """Whether non-empty ranges follow one another from 0 to length."""
    bounds = np.append(lo, length)
    return bool(bounds[0] == 0 and (hi == bounds[1:]).all() and (hi > lo).all())
