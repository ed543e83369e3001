"""Cut chunks into buckets and put the buckets of every source in their order of sending."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from weightsync.ir.manifest import Manifest
from weightsync.ir.plan import BucketTable, PlanOptions
from weightsync.ir.tables import BoolArray, IntArray, expand, starts_of, sum_by

if TYPE_CHECKING:
    from weightsync.planners.lower import Lowered

__all__ = ["cut_buckets", "greedy_cuts"]

_SIZES = 64  # powers of two that byte counts lie between


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
    replica = np.repeat(np.arange(count), len(begin))
    begin, end = np.tile(begin, count), np.tile(end, count)
    to_rank = dst_rank[begin] + replica * len(sink.ranks)
    order = _interleaved(src_rank[begin], to_rank, nbytes[end] - nbytes[begin])
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


def _interleaved(src: IntArray, dst: IntArray, nbytes: IntArray) -> IntArray:
    """Order the buckets of each source so that all pairs advance in proportion to their bytes.

    If every pair sends at `its bytes / the time of the busiest port`, no port is ever above its
    rate and all finish with it (the fluid schedule of an open shop, Gonzalez and Sahni 1976).
    Buckets are that schedule in steps: a pair's are spread evenly over the time from 0 to 1, each
    pair's from an own phase on. Phases come from the place of a pair among those of like size, of
    its source and of its sink, like the cells of a Latin square: a source serves its sinks in turn
    while the sources of a sink take turns, too.

    Args:
        src: Source of each bucket, `(N,)`.
        dst: Its sink; buckets of one pair are in their order.
        nbytes: Its bytes.

    Returns:
        The order, sorted by source, `(N,)`.
    """
    num_dst = int(dst.max(initial=0)) + 1
    pairs, pair = np.unique(src * num_dst + dst, return_inverse=True)
    total = sum_by(pair, nbytes, len(pairs))
    of_src, of_dst = np.divmod(pairs, num_dst)
    by_pair = np.argsort(pair, kind="stable")
    before = np.empty_like(nbytes)
    before[by_pair] = _before(pair[by_pair], nbytes[by_pair])
    # Pairs of like sizes share the time among themselves: the few large ones of a source take turns
    # all the time, the many small ones come one by one.
    size = np.frexp(total.astype(np.float64))[1].astype(np.int64)
    place_src = _places(of_src * _SIZES + size, of_dst)
    place_dst = _places(of_dst * _SIZES + size, of_src)
    phase = (place_src - place_dst) % 1.0
    when = (before + phase[pair] * nbytes) / total[pair]
    return np.lexsort((dst, when, src))


def _before(group: IntArray, values: IntArray) -> IntArray:
    """Return the sum of the values before each in its group; rows are sorted by group."""
    starts = starts_of(values)[:-1]
    return starts - starts[np.searchsorted(group, group)]


def _places(group: IntArray, key: IntArray) -> NDArray[np.float64]:
    """Return each row's place in its group by a key, as a fraction of the group's length."""
    order = np.lexsort((key, group))
    ranked = group[order]
    place = np.empty(len(group))
    first = np.searchsorted(ranked, ranked)
    count = np.searchsorted(ranked, ranked, side="right") - first
    place[order] = (np.arange(len(group)) - first) / count
    return place
