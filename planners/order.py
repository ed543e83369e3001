"""Cut chunks into buckets and put the buckets of every source in their order of sending."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from weightsync.ir.manifest import Manifest
from weightsync.ir.plan import BucketTable, PlanOptions
from weightsync.ir.tables import BoolArray, IntArray, expand, starts_of

if TYPE_CHECKING:
    from weightsync.planners.lower import Lowered

__all__ = ["cut_buckets", "greedy_cuts"]


def greedy_cuts(is_first: BoolArray, limits: Sequence[tuple[IntArray, int]]) -> IntArray:
    """Cut runs of elements greedily into parts that keep all limits.

    Args:
        is_first: Where a run starts, `(N,)`; a part never reaches over the start of a run.
        limits: `(totals, limit)` pairs: prefix sums `(N + 1,)` and the most that a part may sum
            up to. An element above a limit becomes a part by itself.

    Returns:
        First element of every part, ascending.

    Cost: one vectorised step over all runs per part of the longest run.
    """
    num = len(is_first)
    run_start = np.flatnonzero(is_first)
    run_end = np.append(run_start[1:], num)[np.cumsum(is_first) - 1]
    following = run_end
    for totals, limit in limits:
        reach = np.searchsorted(totals, totals[:-1] + limit, side="right") - 1
        following = np.minimum(following, reach)
    following = np.maximum(following, np.arange(1, num + 1))
    begins = np.zeros(num, np.bool_)
    frontier = run_start
    while len(frontier):
        begins[frontier] = True
        advanced = following[frontier]
        frontier = advanced[advanced < run_end[frontier]]
    return np.flatnonzero(begins)


def cut_buckets(
    lowered: Lowered, sink: Manifest, count: int, options: PlanOptions
) -> tuple[BucketTable, IntArray, IntArray]:
    """Cut the chunks of each (source, sink) pair into buckets and order the buckets.

    A source starts with a different sink than its neighbours (source s with sink s mod S) and then
    takes turns, one bucket for each sink, so that all sinks fill evenly and none is swamped.

    Args:
        lowered: Chunks of whole source ranks, sorted by source and sink memory.
        sink: Merged manifest of one replica.
        count: Replicas; each gets the same chunks.
        options: Budgets.

    Returns:
        The buckets of all replicas, whose chunk ranges refer to the new order of chunks; that
        order: indices into the chunks of `lowered`; and the replica of each.
    """
    dst_rank = sink.buffers.rank[lowered.dst_buffer].astype(np.int64)
    src_rank = lowered.src_rank
    changes = np.ones(len(src_rank), np.bool_)
    changes[1:] = (src_rank[1:] != src_rank[:-1]) | (dst_rank[1:] != dst_rank[:-1])
    nbytes = starts_of(lowered.nbytes)
    staging = starts_of(np.where(lowered.is_packed, lowered.nbytes, 0))
    ones = np.arange(len(src_rank) + 1)
    limits = [
        (nbytes, options.bucket_bytes),
        (staging, options.slot_bytes),
        (ones, options.max_chunks_per_bucket),
    ]
    begin = greedy_cuts(changes, limits)
    end = np.append(begin[1:], len(src_rank))
    pair = np.cumsum(changes)[begin]
    turn = np.arange(len(begin)) - np.searchsorted(pair, pair)  # position inside the pair
    replica = np.repeat(np.arange(count), len(begin))
    begin, end, turn = (np.tile(column, count) for column in (begin, end, turn))
    to_rank = dst_rank[begin] + replica * len(sink.ranks)
    rotated = (to_rank - src_rank[begin]) % (len(sink.ranks) * count)
    order = np.lexsort((rotated, turn, src_rank[begin]))
    begin, end, replica, to_rank = begin[order], end[order], replica[order], to_rank[order]
    owner, local = expand(end - begin)
    chunk_start = starts_of(end - begin)
    table = BucketTable(
        src_rank=src_rank[begin].astype(np.int32),
        dst_rank=to_rank.astype(np.int32),
        chunk_lo=chunk_start[:-1],
        chunk_hi=chunk_start[1:],
        nbytes=nbytes[end] - nbytes[begin],
        staging_bytes=staging[end] - staging[begin],
    )
    return table, begin[owner] + local, replica[owner]
