"""What a plan moves, as the few arrays that limits and predictions need.

Needs are counted in the contents of tensors, not in writes, so that a plan which sends something
once for several sinks (rows of kind HOP) has the same needs as one that sends it to each.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from weightsync.ir.manifest import Manifest
from weightsync.ir.pieces import CONSTANT, intersect_progressions
from weightsync.ir.plan import Plan
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
from weightsync.planners.choose import HolderSets, find_holder_sets
from weightsync.planners.classes import TensorClasses, classify
from weightsync.planners.intersect import find_boxes, intersect

__all__ = ["BucketWork", "Traffic", "bucket_work", "traffic_of"]


@dataclasses.dataclass(frozen=True)
class BucketWork:
    """What each bucket of a plan costs besides its bytes on the wire.

    Attributes:
        is_hop: A sink forwards it; `BucketTable.src_rank` is then a sink rank, `(B,)`.
        num_writes: Chunks, `(B,)`.
        read_bytes: Bytes read from the source's memory, in its own dtypes, `(B,)`.
        pack_bytes: Bytes read plus written by whatever packs, casts or encodes into staging,
            `(B,)`.
        digest_bytes: Bytes that the source digests in a pass of its own: what is not packed,
            `(B,)`.
    """

    is_hop: BoolArray
    num_writes: IntArray
    read_bytes: IntArray
    pack_bytes: IntArray
    digest_bytes: IntArray


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes on the wire of one plan, by who sends and who needs them. S sources, D sinks.

    A holder class is what the same set of sources holds (`Shares`): H classes, with their holders
    in `holder[holder_start[h] : holder_start[h + 1]]`.

    Attributes:
        pair_bytes: What the plan sends from each source to each sink, `(S, D)`.
        source_bytes: Its rows' sums, `(S,)`.
        source_writes: Writes of each source, `(S,)`.
        sink_writes: Writes that arrive at each sink, from sources and sinks, `(D,)`.
        read_bytes, pack_bytes, digest_bytes: As in `BucketWork`, of each source, `(S,)`.
        need_bytes: Bytes of each sink's weights: all but constants, `(D,)`.
        distinct_bytes: The same with what a sink stores twice (tied weights) counted once, `(D,)`.
        unique_bytes: Of all sinks together, what several need counted once: `W` for one replica or
            several equal ones.
        num_replicas: Equal replicas that the sinks are known to be; 1 where that is not known.
        node_bytes: Of each node of sinks, what several of its GPUs need counted once, `(nodes,)`.
        holder_start, holder: Holder classes; source ranks, ascending.
        class_bytes: Unique bytes of each class, `(H,)`.
        class_node_bytes: Counted once for each node that needs them, `(H,)`.
        class_copy_bytes: Counted for each place of a sink that needs them, `(H,)`.
        deduplicates: The plan has hops inside a node of sinks.
        relays: The plan has hops between nodes of sinks.
    """

    pair_bytes: IntArray
    source_bytes: IntArray
    source_writes: IntArray
    sink_writes: IntArray
    read_bytes: IntArray
    pack_bytes: IntArray
    digest_bytes: IntArray
    need_bytes: IntArray
    distinct_bytes: IntArray
    unique_bytes: int
    num_replicas: int
    node_bytes: IntArray
    holder_start: IntArray
    holder: IntArray
    class_bytes: IntArray
    class_node_bytes: IntArray
    class_copy_bytes: IntArray
    deduplicates: bool
    relays: bool


def bucket_work(plan: Plan) -> BucketWork:
    """Add up what the rows of each bucket of a valid plan cost.

    Cost: a few passes over the row columns.
    """
    rows, chunks, buckets = plan.rows, plan.chunks, plan.buckets
    own, copies = slice(plan.num_direct_rows), slice(plan.num_sent)
    itemsize = plan.sink.buffers.itemsize[rows.dst_buffer[copies]]  # hops read what sinks store
    itemsize[own] = plan.source.buffers.itemsize[rows.src_buffer[own]]
    nbytes = itemsize * volume_of(plan.nests.n)[rows.nest[copies]]
    read = _sum_ranges(nbytes, chunks.row_lo, chunks.row_hi)
    pack = np.where(chunks.is_packed, read + chunks.nbytes, 0)
    digest = np.where(chunks.is_packed, 0, chunks.nbytes)
    lo, hi = buckets.chunk_lo, buckets.chunk_hi
    return BucketWork(
        is_hop=np.arange(len(buckets)) >= plan.num_direct,
        num_writes=hi - lo,
        read_bytes=_sum_ranges(read, lo, hi),
        pack_bytes=_sum_ranges(pack, lo, hi),
        digest_bytes=_sum_ranges(digest, lo, hi),
    )


def traffic_of(plan: Plan, gpus_per_node: int, work: BucketWork | None = None) -> Traffic:
    """Describe what a plan moves.

    Args:
        plan: A plan.
        gpus_per_node: Sink ranks of one node; ranks fill nodes in order.
        work: `bucket_work(plan)`, if it is there already.

    Cost: that of classifying and intersecting both manifests once more (their representatives
    only), and a pass over the rows.
    """
    work = bucket_work(plan) if work is None else work
    num_sources, num_sinks = len(plan.source.ranks), len(plan.sink.ranks)
    buckets = plan.buckets
    own = ~work.is_hop
    src, dst = buckets.src_rank.astype(np.int64), buckets.dst_rank.astype(np.int64)
    pair = sum_by((src * num_sinks + dst)[own], buckets.nbytes[own], num_sources * num_sinks)
    hop_stays = src[~own] // gpus_per_node == dst[~own] // gpus_per_node

    def of_source(values: IntArray) -> IntArray:
        return sum_by(src[own], values[own], num_sources)

    contents = _Contents.of(plan)
    node = np.arange(num_sinks) // gpus_per_node
    num_nodes = int(node.max(initial=-1)) + 1
    by_rank, by_node = contents.group_bytes(np.arange(num_sinks)), contents.group_bytes(node)
    by_all = contents.group_bytes(np.zeros(num_sinks, np.int64))
    return Traffic(
        pair_bytes=pair.reshape(num_sources, num_sinks),
        source_bytes=of_source(buckets.nbytes),
        source_writes=of_source(work.num_writes),
        sink_writes=sum_by(dst, work.num_writes, num_sinks),
        read_bytes=of_source(work.read_bytes),
        pack_bytes=of_source(work.pack_bytes),
        digest_bytes=of_source(work.digest_bytes),
        need_bytes=_need_bytes(plan.sink),
        distinct_bytes=sum_by(by_rank.group, by_rank.nbytes, num_sinks),
        unique_bytes=int(by_all.nbytes.sum()),
        num_replicas=1 if plan.sink.repeats is None else plan.sink.repeats[1],
        node_bytes=sum_by(by_node.group, by_node.nbytes, num_nodes),
        holder_start=contents.sets.start,
        holder=contents.sets.rank,
        class_bytes=contents.class_bytes(by_all),
        class_node_bytes=contents.class_bytes(by_node),
        class_copy_bytes=contents.sets.nbytes,
        deduplicates=bool(hop_stays.any()),
        relays=bool((~hop_stays).any()),
    )


def _sum_ranges(values: IntArray, lo: IntArray, hi: IntArray) -> IntArray:
    """Return `values[lo[i] : hi[i]].sum()` of each range, exactly."""
    total = starts_of(values)
    return total[hi] - total[lo]


def _need_bytes(sink: Manifest) -> IntArray:
    pieces = sink.pieces
    used = pieces.tensor != CONSTANT
    buffer = pieces.buffer[used]
    nbytes = volume_of(pieces.n[used]) * sink.buffers.itemsize[buffer]
    return sum_by(sink.buffers.rank[buffer], nbytes, len(sink.ranks))


@dataclasses.dataclass(frozen=True)
class _Grouped:
    """Unique bytes of each pair of a source box and a group of sinks, over all tensors."""

    box: IntArray
    group: IntArray
    nbytes: IntArray


@dataclasses.dataclass(frozen=True)
class _Contents:
    """What sinks want of what sources hold: regions of the representatives of tensor classes."""

    box: IntArray
    lo: IntArray
    n: IntArray
    step: IntArray
    nbytes: IntArray
    sets: HolderSets
    rank: IntArray  # sink rank of each region
    dtype: IntArray  # sinks that store another dtype want other bytes
    times: IntArray  # tensors that each region stands for

    @classmethod
    def of(cls, plan: Plan) -> _Contents:
        # Replicas that are alike want the same: what is found of one is repeated for the others.
        sink, count = plan.sink.repeats or (plan.sink, 1)
        encoded, source = plan.encoded, plan.encoded.source
        classes: TensorClasses = classify(source, sink, plan.tensor_in_source, encoded.table)
        boxes = find_boxes(classes, source, sink)
        found = intersect(classes, boxes, source, sink, encoded)
        of_all = dataclasses.replace(found, nbytes=found.nbytes * count)
        buffer = sink.pieces.buffer[found.piece]
        rank = sink.buffers.rank[buffer] + np.arange(count)[:, None] * len(sink.ranks)
        num_tensors = np.bincount(classes.of, minlength=len(classes.first))
        region = np.tile(np.arange(len(buffer)), count)
        return cls(
            box=found.box[region],
            lo=found.lo[region],
            n=found.n[region],
            step=found.step[region],
            nbytes=found.nbytes[region],
            sets=find_holder_sets(classes, boxes, of_all, np.zeros(len(classes.first), np.bool_)),
            rank=rank.reshape(-1).astype(np.int64),
            dtype=sink.buffers.dtype[buffer].astype(np.int64)[region],
            times=num_tensors[boxes.tclass[found.box]][region],
        )

    def group_bytes(self, group_of_rank: IntArray) -> _Grouped:
        """Return the bytes of each box that the sinks of each group want, overlaps counted once."""
        group = group_of_rank[self.rank]
        wanted, inverse = unique_rows([self.box, group, self.dtype])
        volume = union_volumes(inverse, len(wanted), self.lo, self.n, self.step)
        itemsize = self.nbytes[wanted] // volume_of(self.n[wanted])
        return _Grouped(self.box[wanted], group[wanted], volume * itemsize * self.times[wanted])

    def class_bytes(self, grouped: _Grouped) -> IntArray:
        return sum_by(self.sets.of[grouped.box], grouped.nbytes, len(self.sets.nbytes))


def union_volumes(
    group: IntArray, num_groups: int, lo: IntArray, n: IntArray, step: IntArray
) -> IntArray:
    """Return the number of distinct elements in each group of stepped boxes.

    Args:
        group: Group of each box, `(Q,)`.
        num_groups: Groups are 0 .. num_groups - 1.
        lo: First elements, `(Q, 4)`.
        n: Counts, `(Q, 4)`.
        step: Steps, `(Q, 4)`.

    Cost: equal boxes, the usual case, cost a sort; groups in which unequal boxes overlap a loop.
    """
    first, _ = unique_rows([group, lo, n, step])
    order = first[np.argsort(group[first], kind="stable")]
    group, lo, n, step = group[order], lo[order], n[order], step[order]
    ends = np.searchsorted(group, np.arange(num_groups + 1))
    total = _sum_ranges(volume_of(n), ends[:-1], ends[1:])
    for number in _overlapping(group, ends, lo, n, step):
        mine = slice(ends[number], ends[number + 1])
        total[number] = _union(lo[mine], n[mine], step[mine])
    return total


def _overlapping(
    group: IntArray, ends: IntArray, lo: IntArray, n: IntArray, step: IntArray
) -> list[int]:
    """Return the groups in which some boxes share elements; boxes are sorted by group."""
    a, local = expand(ends[group + 1] - np.arange(len(group)) - 1)
    b = a + 1 + local
    *_, shared, _ = intersect_progressions(lo[a], n[a], step[a], lo[b], n[b], step[b])
    hit = all_dims(shared > 0)
    found: list[int] = np.unique(group[a[hit]]).tolist()
    return found


def _union(lo: IntArray, n: IntArray, step: IntArray) -> int:
    """Count the distinct elements of a few stepped boxes.

    Indices of a dim that the same boxes contain are alike; the boxes then are blocks of a small
    grid of such kinds.
    """
    inside, sizes = [], []
    for dim in range(MAX_DIMS):
        ends = lo[:, dim] + (n[:, dim] - 1) * step[:, dim] + 1
        index = np.arange(lo[:, dim].min(), ends.max())
        past = index[None, :] - lo[:, dim, None]
        member = (past >= 0) & (index < ends[:, None]) & (past % step[:, dim, None] == 0)
        kinds, counts = np.unique(member, axis=1, return_counts=True)
        inside.append(kinds)
        sizes.append(counts)
    grid = np.zeros([len(s) for s in sizes], np.bool_)
    for box in range(len(lo)):
        grid[np.ix_(*(kinds[box] for kinds in inside))] = True
    weight = sizes[0]
    for size in sizes[1:]:
        weight = weight[..., None] * size
    return int(weight[grid].sum())
