"""Cut chunks into buckets and put the buckets of every source in their order of sending."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from weightsync.ir.manifest import Manifest
from weightsync.ir.plan import BucketTable, PlanOptions
from weightsync.ir.tables import BoolArray, IntArray, expand, owners, ranges, starts_of, sum_by

if TYPE_CHECKING:
    from weightsync.planners.fans import Fans
    from weightsync.planners.lower import Lowered

__all__ = ["Cut", "cut_buckets", "greedy_cuts"]

_SIZES = 64  # powers of two that byte counts lie between


def greedy_cuts(is_first: BoolArray, limits: Sequence[tuple[IntArray, int]]) -> IntArray:
    """Cut runs of elements greedily into parts that keep all limits.

    Args:
        is_first: Where a run starts, `(N,)`; a part never reaches over the start of a run.
        limits: `(totals, limit)` pairs: prefix sums `(N + 1,)` and the most that a part may sum
            up to. An element above a limit becomes a part by itself.

    Returns:
        First element of every part, ascending.

    Cost: one vectorised step over all runs, of 10 us or more, per part of the longest run.
    """
    num = len(is_first)
    begins = np.zeros(num, np.bool_)
    frontier = np.flatnonzero(is_first)  # where a part begins in each run that is not at its end
    end = np.append(frontier[1:], num)
    while len(frontier):
        begins[frontier] = True
        following = end
        for totals, limit in limits:
            reach = np.searchsorted(totals, totals[frontier] + limit, side="right") - 1
            following = np.minimum(following, reach)
        following = np.maximum(following, frontier + 1)
        goes_on = following < end
        frontier, end = following[goes_on], end[goes_on]
    return np.flatnonzero(begins)


@dataclasses.dataclass(frozen=True)
class Cut:
    """The buckets of a plan as copies of those that one replica would get from sources alone.

    Attributes:
        table: The buckets, those of sources first.
        order: Chunk of `Lowered` that each chunk of the plan is a copy of, `(C,)`.
        bucket: Bucket of each chunk of the plan, ascending, `(C,)`.
        sender, replica: Replica that passes each bucket on (-1: a source sends it), and that
            receives it, `(B,)`.
        target: Which of a chunk's fan each bucket goes to; -1: to the sink of the chunk, `(B,)`.
        edges: Pairs of buckets (before, after), `(E, 2)`.
    """

    table: BucketTable
    order: IntArray
    bucket: NDArray[np.int32]
    sender: IntArray
    replica: IntArray
    target: IntArray
    edges: NDArray[np.int32]


def cut_buckets(
    lowered: Lowered,
    sink: Manifest,
    count: int,
    options: PlanOptions,
    fan: IntArray | None = None,
    fans: Fans | None = None,
    is_relayed: BoolArray | None = None,
    pair_bytes: IntArray | None = None,
) -> Cut:
    """Cut the chunks of each (source, sink) pair into buckets, add hops and order all.

    A bucket holds only chunks that are passed on to the same sinks, so that each of its hops is one
    bucket more, of the same chunks, and waits for one bucket only.

    Args:
        lowered: Chunks of whole source ranks, sorted by source and sink memory.
        sink: Merged manifest of one replica.
        count: Replicas; each gets the same chunks.
        options: Budgets.
        fan: The fan of each chunk; -1: none. None: no chunk has one.
        fans: Where else chunks go.
        is_relayed: Chunks that sources send to one replica only, `(C,)`. None: no chunk.
        pair_bytes: What each source sends to each sink of one replica, `(S, ranks)`, where chunks
            are those of one source only: its buckets take their turns among those of all, and
            hops, which are not its own, are left out.
    """
    num = len(lowered.src_rank)
    fan = np.full(num, -1) if fan is None else fan
    is_relayed = np.zeros(num, np.bool_) if is_relayed is None else is_relayed
    dst_rank = sink.buffers.rank[lowered.dst_buffer].astype(np.int64)
    src_rank, kind = lowered.src_rank, is_relayed.astype(np.int64)
    line = np.arange(num)
    if fans is not None and len(fans.buffer):
        kind += 2 * np.where(fan >= 0, fans.ranks[fan] + 1, 0)
    if kind.any():
        # What is passed on goes first: nothing is left to do when the last byte is there.
        line = np.lexsort((lowered.dst_offset, lowered.dst_buffer, -kind, dst_rank, src_rank))
        src_rank, dst_rank, kind = src_rank[line], dst_rank[line], kind[line]
    changes = np.ones(num, np.bool_)
    changes[1:] = (src_rank[1:] != src_rank[:-1]) | (dst_rank[1:] != dst_rank[:-1])
    changes[1:] |= kind[1:] != kind[:-1]
    nbytes = starts_of(lowered.nbytes[line])
    staging = starts_of(np.where(lowered.is_packed, lowered.nbytes, 0)[line])
    ones = np.arange(num + 1)
    limits = [
        (nbytes, options.bucket_bytes),
        (staging, options.slot_bytes),
        (ones, options.max_chunks_per_bucket),
    ]
    begin = greedy_cuts(changes, limits)
    base = _Base(
        begin=begin,
        end=np.append(begin[1:], num),
        src_rank=src_rank[begin],
        dst_rank=dst_rank[begin],
        nbytes=np.diff(np.append(nbytes[begin], nbytes[-1])),
        staging=np.diff(np.append(staging[begin], staging[-1])),
        is_relayed=kind[begin] % 2 > 0,
        fan=fan[line[begin]],
    )
    if pair_bytes is not None:
        fans, pair_bytes = None, np.tile(pair_bytes, count)
    return _arrange(base, line, len(sink.ranks), count, fans, pair_bytes)


@dataclasses.dataclass(frozen=True)
class _Base:
    """Buckets as one replica would get them from sources alone, `(N,)` each."""

    begin: IntArray
    end: IntArray
    src_rank: IntArray
    dst_rank: IntArray
    nbytes: IntArray
    staging: IntArray
    is_relayed: BoolArray
    fan: IntArray


@dataclasses.dataclass(frozen=True)
class _Hops:
    """Buckets that are passed on; `parent` numbers the direct buckets, then these."""

    base: IntArray
    parent: IntArray
    sender: IntArray
    replica: IntArray
    target: IntArray


def _arrange(
    base: _Base,
    line: IntArray,
    num_ranks: int,
    count: int,
    fans: Fans | None,
    pair_bytes: IntArray | None,
) -> Cut:
    """Give the buckets to the replicas, add those that are passed on, and order all."""
    of, replica = _receivers(base, count)
    to_rank = base.dst_rank[of] + replica * num_ranks
    order, when = _interleaved(base.src_rank[of], to_rank, base.nbytes[of], pair_bytes)
    of, replica, to_rank, when = of[order], replica[order], to_rank[order], when[order]
    direct = len(of)
    hops = _hops(base, of, replica, count, fans)
    when = np.concatenate([when, np.zeros(len(hops.base))])
    for _ in range(2):  # of hops of hops, too
        when[direct:] = when[hops.parent]
    from_rank = base.dst_rank[hops.base] + hops.sender * num_ranks
    hop_rank = base.dst_rank[hops.base].copy()
    if fans is not None and len(hops.base):
        fanned = np.flatnonzero(hops.target >= 0)
        entry = fans.start[base.fan[hops.base[fanned]]] + hops.target[fanned]
        hop_rank[fanned] = fans.target_rank[entry]
    hop_rank += hops.replica * num_ranks
    # Every sink begins with its next neighbour, so that those of a node take turns.
    turn = (hop_rank - from_rank) % max(num_ranks * count, 1)
    order = np.lexsort((turn, when[direct:], from_rank))
    place = np.arange(direct + len(order))
    place[direct + order] = direct + np.arange(len(order))
    base_of = np.concatenate([of, hops.base[order]])
    counts = base.end[base_of] - base.begin[base_of]
    chunk_start = starts_of(counts)
    none = np.full(direct, -1)
    table = BucketTable(
        src_rank=np.concatenate([base.src_rank[of], from_rank[order]]).astype(np.int32),
        dst_rank=np.concatenate([to_rank, hop_rank[order]]).astype(np.int32),
        chunk_lo=chunk_start[:-1],
        chunk_hi=chunk_start[1:],
        nbytes=base.nbytes[base_of],
        staging_bytes=np.where(np.arange(len(base_of)) < direct, base.staging[base_of], 0),
    )
    return Cut(
        table=table,
        order=line[ranges(base.begin[base_of], counts)],
        bucket=owners(counts),
        sender=np.concatenate([none, hops.sender[order]]),
        replica=np.concatenate([replica, hops.replica[order]]),
        target=np.concatenate([none, hops.target[order]]),
        edges=np.stack([place[hops.parent[order]], direct + np.arange(len(order))], axis=1).astype(
            np.int32
        ),
    )


def _receivers(base: _Base, count: int) -> tuple[IntArray, IntArray]:
    """Return `(bucket, replica)` of what sources send: to all replicas, or an even part to each."""
    everywhere = np.flatnonzero(~base.is_relayed)
    relayed = np.flatnonzero(base.is_relayed)
    relayed = relayed[np.argsort(base.dst_rank[relayed], kind="stable")]
    rank, nbytes = base.dst_rank[relayed], base.nbytes[relayed]
    before = _before(rank, nbytes)
    total = sum_by(rank, nbytes, int(rank.max(initial=-1)) + 1)[rank]
    part = (2 * before + nbytes) * count // (2 * np.maximum(total, 1))
    of = np.concatenate([np.tile(everywhere, count), relayed])
    replica = np.concatenate([np.repeat(np.arange(count), len(everywhere)), part])
    if len(relayed):  # in the order of the buckets, replica by replica
        order = np.lexsort((of, replica))
        of, replica = of[order], replica[order]
    return of, replica


def _hops(base: _Base, of: IntArray, replica: IntArray, count: int, fans: Fans | None) -> _Hops:
    """Relay buckets to the same rank of the other replicas, then fan out inside each node."""
    number = np.arange(len(of))
    relayed = np.flatnonzero(base.is_relayed[of])
    owner, step = expand(np.full(len(relayed), count - 1))
    parent = number[relayed[owner]]
    relays = _Hops(
        base=of[parent],
        parent=parent,
        sender=replica[parent],
        replica=(replica[parent] + 1 + step) % count,
        target=np.full(len(parent), -1),
    )
    arrived = np.concatenate([of, relays.base])
    at = np.concatenate([replica, relays.replica])
    fan = base.fan[arrived]
    if fans is None or not len(fans.buffer):
        return relays
    num = np.where(fan >= 0, np.diff(fans.start)[fan], 0)
    parent, local = expand(num)
    fanned = _Hops(arrived[parent], parent, at[parent], at[parent], local)
    return _Hops(
        *(
            np.concatenate([getattr(relays, f.name), getattr(fanned, f.name)])
            for f in dataclasses.fields(_Hops)
        )
    )


def _interleaved(
    src: IntArray, dst: IntArray, nbytes: IntArray, pair_bytes: IntArray | None = None
) -> tuple[IntArray, NDArray[np.float64]]:
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
        pair_bytes: Bytes of all pairs, `(S, D)`, where buckets are those of some sources only.

    Returns:
        The order, sorted by source, and when each bucket's turn is, from 0 to 1, `(N,)` each.
    """
    num_dst = int(dst.max(initial=0)) + 1 if pair_bytes is None else pair_bytes.shape[1]
    pairs, pair = np.unique(src * num_dst + dst, return_inverse=True)
    total = sum_by(pair, nbytes, len(pairs))
    if pair_bytes is None:
        phase = _phases(pairs, total, num_dst)
    else:
        known = np.flatnonzero(pair_bytes)
        phase = _phases(known, pair_bytes.reshape(-1)[known], num_dst)
        phase = phase[np.searchsorted(known, pairs)]
    by_pair = np.argsort(pair, kind="stable")
    before = np.empty_like(nbytes)
    before[by_pair] = _before(pair[by_pair], nbytes[by_pair])
    when = (before + phase[pair] * nbytes) / total[pair]
    return np.lexsort((dst, when, src)), when


def _phases(pairs: IntArray, total: IntArray, num_dst: int) -> NDArray[np.float64]:
    """Return when each pair has its first turn, as a fraction of the time between two of them.

    Pairs of like sizes share the time among themselves: the few large ones of a source take turns
    all the time, the many small ones come one by one.

    Args:
        pairs: `source * num_dst + sink`, ascending, `(P,)`.
        total: Bytes of each, `(P,)`.
        num_dst: Sinks.
    """
    of_src, of_dst = np.divmod(pairs, num_dst)
    size = np.frexp(total.astype(np.float64))[1].astype(np.int64)
    place_src = _places(of_src * _SIZES + size, of_dst)
    place_dst = _places(of_dst * _SIZES + size, of_src)
    return (place_src - place_dst) % 1.0


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
