"""What a plan must hold for the rows that sinks pass on (HOP): part of the proof of a plan.

A sink may send only what it has received. Which of its buckets a hop reads follows from addresses:
every element of a sink buffer that is no constant is written by exactly one chunk (the plan's
cover), chunks are contiguous, and so the chunks that a row's memory range meets hold all that the
row reads. A hop must wait for all of their buckets; `Plan.edges` says for which it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from weightsync.errors import PlanError
from weightsync.ir.pieces import hull_elements
from weightsync.ir.tables import IntArray, all_dims, expand

if TYPE_CHECKING:
    from weightsync.ir.plan import Plan

__all__ = ["check_hops", "read_buckets"]


def check_hops(plan: Plan) -> None:
    """Prove that hops are copies between two sinks of what the sender has received before.

    Expects rows, chunks and buckets that follow one another and lie inside their buffers.

    Raises:
        PlanError: A hop converts, packs or moves what lies apart; reads a bucket that it does not
            wait for; or the edges are out of range, superfluous or form a cycle.

    Cost: a sort of all chunks and a pass over the HOP rows; nothing without them.
    """
    _check_range(plan)
    if plan.num_direct == len(plan.buckets):
        return
    _check_copies(plan)
    num = len(plan.buckets)
    before, after = plan.edges.astype(np.int64).T
    given = before * num + after
    sender = plan.buckets.src_rank[after]
    if (after < plan.num_direct).any() or (plan.buckets.dst_rank[before] != sender).any():
        raise PlanError("an edge lets a bucket wait that is no hop, or for what others receive")
    bucket, hop = read_buckets(plan)
    for row in np.flatnonzero(~np.isin(bucket * num + hop, given))[:1]:
        rank = plan.sink.ranks[int(plan.buckets.src_rank[hop[row]])]
        raise PlanError(
            f"bucket {hop[row]} passes on what {rank} receives in bucket {bucket[row]}, but does "
            "not wait for it; the plan was changed or is a bug of the planner",
            rank=rank,
        )
    names, compact = np.unique(plan.edges, return_inverse=True)
    pairs = compact.reshape(plan.edges.shape)
    ends = (pairs[:, 0], pairs[:, 1])
    graph = coo_array((np.ones(len(pairs), np.int8), ends), shape=(len(names), len(names)))
    num_components, _ = connected_components(graph.tocsr(), directed=True, connection="strong")
    if num_components != len(names):
        raise PlanError("the edges form a cycle: no order of buckets satisfies them")


def read_buckets(plan: Plan) -> tuple[IntArray, IntArray]:
    """Return pairs of a bucket and a hop that reads a part of it, each once, `(E,)` and `(E,)`."""
    rows, chunks, buckets, sink = plan.rows, plan.chunks, plan.buckets, plan.sink
    # The arenas of all sinks lie one after the other on one line.
    length = max((sink.arena_nbytes(r) for r in range(len(sink.ranks))), default=0) + 1
    start = buckets.dst_rank[chunks.bucket] * np.int64(length) + chunks.dst_offset
    order = np.argsort(start, kind="stable")
    start = start[order]
    end = np.maximum.accumulate(start + chunks.nbytes[order])
    hops = slice(plan.num_direct_rows, plan.num_sent)
    buffer = rows.src_buffer[hops]
    item = sink.buffers.itemsize[buffer]
    begin = sink.arena_offset_bytes[buffer] + rows.src_offset[hops] * item
    begin += sink.buffers.rank[buffer] * np.int64(length)
    until = begin + hull_elements(plan.nests.n, plan.nests.src_stride)[rows.nest[hops]] * item
    first = np.searchsorted(end, begin, side="right")
    count = np.searchsorted(start, until, side="left") - first
    owner, local = expand(np.maximum(count, 0))
    read = chunks.bucket[order[first[owner] + local]].astype(np.int64)
    hop = chunks.bucket[rows.chunk[hops]].astype(np.int64)[owner]
    pairs = np.unique(read * np.int64(len(buckets)) + hop)
    return np.asarray(pairs // len(buckets)), np.asarray(pairs % len(buckets))


def _check_range(plan: Plan) -> None:
    edges = plan.edges
    outside = (edges < 0) | (edges >= len(plan.buckets))
    if outside.any() or (edges[:, 0] == edges[:, 1]).any():
        raise PlanError("an edge names an unknown bucket or joins a bucket to itself")
    if len(edges) and plan.num_direct == len(plan.buckets):
        raise PlanError("an edge lets a bucket wait that is no hop, or for what others receive")


def _check_copies(plan: Plan) -> None:
    """Check that each hop chunk is one range of the sender's memory, moved as it is."""
    rows, chunks, sink = plan.rows, plan.chunks, plan.sink
    hops = slice(plan.num_direct_rows, plan.num_sent)
    src, dst, chunk = rows.src_buffer[hops], rows.dst_buffer[hops], rows.chunk[hops]
    item = sink.buffers.itemsize[dst]
    shift = sink.arena_offset_bytes[src] + rows.src_offset[hops] * item
    shift -= sink.arena_offset_bytes[dst] + rows.dst_offset[hops] * item
    head = chunks.row_lo[chunk] - hops.start
    same = (shift == shift[head]) & (src == src[head])
    same &= all_dims(plan.nests.src_stride == plan.nests.dst_stride)[rows.nest[hops]]
    same &= sink.buffers.dtype[src] == sink.buffers.dtype[dst]
    same &= sink.buffers.rank[src] != sink.buffers.rank[dst]
    same &= ~chunks.is_packed[chunk]
    for bad in np.flatnonzero(~same)[:1]:
        row = int(hops.start + bad)
        raise PlanError(
            f"row {row} passes on something else than a range of memory as it is, or to the sink "
            "that has it; the plan was changed or is a bug of the planner",
            row=row,
        )
