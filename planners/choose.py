"""Choose which holder sends what: min-max load over the source ranks, exact in integers.

Everything that is held by the same set of ranks is interchangeable, so the choice is solved on
holder sets: how many bytes of each set each of its ranks sends (`Shares`, a small table). Then the
boxes of a set are laid out on a line, the quotas cut the line, and a box in which a cut falls is
split along its outermost dim. Every box, or part of one, has one sender for all sinks that want it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, connected_components, maximum_flow

from weightsync.errors import PlanError
from weightsync.ir.plan import Shares
from weightsync.ir.tables import BoolArray, IntArray, expand, starts_of, sum_by, unique_runs
from weightsync.planners.classes import TensorClasses
from weightsync.planners.intersect import Boxes, Regions

__all__ = ["Election", "HolderSets", "check_shares", "elect", "find_holder_sets", "solve"]

_MAX_FLOW = 2**31 - 2  # scipy's maximum_flow counts in 32 bits


@dataclasses.dataclass(frozen=True)
class HolderSets:
    """Distinct sets of ranks that hold boxes, numbered by first use.

    Attributes:
        of: Holder set of each box, `(B,)`.
        start: Ranks of set h are `rank[start[h] : start[h + 1]]`, ascending, `(H + 1,)`.
        rank: `(E,)`.
        nbytes: Bytes on the wire that some rank of the set must send, `(H,)`.
        box_nbytes: The same of each box, of one tensor, `(B,)`.
    """

    of: IntArray
    start: IntArray
    rank: IntArray
    nbytes: IntArray
    box_nbytes: IntArray


@dataclasses.dataclass(frozen=True)
class Election:
    """The sender of every box of every tensor.

    An item is one box of one tensor: item `item_start[t] + i` is box i (of its class) of tensor t.

    Attributes:
        item_start: `(T + 1,)`.
        member: Chosen member (index into `Boxes.member_*`) of each item; -1 where the item is
            split, `(I,)`.
        part_item, part_member: The parts of split items, sorted by item, `(S,)`.
        part_lo, part_hi: Their ranges of indices along `part_dim`, `(S,)`.
        part_dim: Outermost dim of the box with more than one element, `(S,)`.
    """

    item_start: IntArray
    member: IntArray
    part_item: IntArray
    part_member: IntArray
    part_lo: IntArray
    part_hi: IntArray
    part_dim: IntArray


def find_holder_sets(
    classes: TensorClasses, boxes: Boxes, regions: Regions, is_scales: BoolArray
) -> HolderSets:
    """Group boxes by who holds them and sum up what must be sent.

    Args:
        classes: The wanted tensors.
        boxes: What sources hold.
        regions: What sinks need of them.
        is_scales: Classes of scales, `(C,)`: they go with their codes, and count as nothing.
    """
    counts = np.diff(boxes.member_start)
    first, of = unique_runs(counts, [boxes.member_rank])
    owner, local = expand(counts[first])
    box_nbytes = sum_by(regions.box, regions.nbytes, len(counts))
    box_nbytes[is_scales[boxes.tclass]] = 0
    num_tensors = np.bincount(classes.of, minlength=len(classes.first))
    return HolderSets(
        of=of,
        start=starts_of(counts[first]),
        rank=boxes.member_rank[boxes.member_start[first[owner]] + local],
        nbytes=sum_by(of, box_nbytes * num_tensors[boxes.tclass], len(first)),
        box_nbytes=box_nbytes,
    )


def solve(sets: HolderSets) -> Shares:
    """Choose quotas that minimise the largest load, then the second largest, and so on.

    Holder sets C whose ranks together are R force some rank of R to send `bytes(C) / |R|` or more.
    Try the average over everything; if the flow does not fit, the minimum cut separates a crowded
    part, which is forced above the average, from a part that fits below it: solve both alone.

    Returns:
        Quotas of all ranks of all sets. `bound_bytes` is the largest forced load, rounded up.

    Cost: at most two flows per distinct load level; none for a set that shares no rank with
    another, which is the usual case.
    """
    num_sets = len(sets.nbytes)
    owner = np.repeat(np.arange(num_sets), np.diff(sets.start))
    quota = np.zeros(len(sets.rank), np.int64)
    bound = 0
    # Edges (set, rank) of independent problems, and whether their sets have no other ranks.
    stack = [(edges, True) for edges in _components(sets, owner)]
    while stack:
        edges, is_closed = stack.pop()
        if (owner[edges] == owner[edges[0]]).all():
            total = int(sets.nbytes[owner[edges[0]]])
            quota[edges] = np.diff(np.arange(len(edges) + 1) * total // len(edges))
        else:
            quota[edges], crowded, busy = _flow(owner[edges], sets.rank[edges], sets.nbytes)
            if crowded.any():
                stack += [(edges[crowded], is_closed), (edges[~crowded & ~busy], False)]
                continue
        if is_closed:
            bound = max(bound, -(-int(quota[edges].sum()) // len(np.unique(sets.rank[edges]))))
    ids = owner.astype(np.int32), sets.rank.astype(np.int32)
    return Shares(*ids, quota, bound_bytes=bound)


def _components(sets: HolderSets, owner: IntArray) -> list[IntArray]:
    """Split the edges (set, rank) into parts that share no rank; leave out sets without bytes."""
    edges = np.flatnonzero(sets.nbytes[owner])
    if not len(edges):
        return []
    num_nodes = len(sets.nbytes) + int(sets.rank.max()) + 1
    ends = (owner[edges], len(sets.nbytes) + sets.rank[edges])
    graph = csr_array((np.ones(len(edges), np.int8), ends), shape=(num_nodes, num_nodes))
    _, component = connected_components(graph, directed=False)
    part = component[ends[0]]
    edges = edges[np.argsort(part, kind="stable")]
    return np.split(edges, np.cumsum(np.bincount(part)[np.unique(part)])[:-1])


def _flow(
    owner: IntArray, rank: IntArray, nbytes: IntArray
) -> tuple[IntArray, BoolArray, BoolArray]:
    """Send everything with no rank above the average load, or find what does not fit.

    Args:
        owner: Holder set of each edge.
        rank: Rank of each edge.
        nbytes: Bytes of every holder set.

    Returns:
        Per edge: the bytes sent over it; whether its set is crowded (all False if everything
        fits); whether its rank serves a crowded set. The bytes mean nothing if any is crowded.
    """
    set_ids, c = np.unique(owner, return_inverse=True)
    rank_ids, r = np.unique(rank, return_inverse=True)
    num_sets, num_ranks = len(set_ids), len(rank_ids)
    total: list[int] = nbytes[set_ids].tolist()
    # Capacities are 32-bit: sets count in fractions of all bytes, rounded up. Fractions, since
    # twice the replicas are twice the bytes of every set: who sends which part stays the same.
    most, every = _MAX_FLOW - num_sets, sum(total)
    units = np.array([-(-of_set * most // every) for of_set in total], np.int64)
    average = -(-int(units.sum()) // num_ranks)
    start, end = 0, num_sets + num_ranks + 1
    tails = np.concatenate([np.full(num_sets, start), 1 + c, 1 + num_sets + np.arange(num_ranks)])
    heads = np.concatenate([1 + np.arange(num_sets), 1 + num_sets + r, np.full(num_ranks, end)])
    # One more than a set has: edges between sets and ranks are never what limits the flow.
    limits = np.concatenate([units, units[c] + 1, np.full(num_ranks, average)]).astype(np.int32)
    graph = csr_array((limits, (tails, heads)), shape=(end + 1, end + 1))
    result = maximum_flow(graph, start, end)
    crowded = np.zeros(end + 1, np.bool_)
    if result.flow_value < units.sum():
        residual = csr_array(graph - result.flow)
        residual.eliminate_zeros()
        reached = breadth_first_order(residual, start, return_predecessors=False)
        crowded[reached] = True
    sent = np.asarray(result.flow[1 + c, 1 + num_sets + r]).astype(np.int64).reshape(-1)
    return _to_bytes(sent, c, units, total), crowded[1 + c], crowded[1 + num_sets + r]


def _to_bytes(sent: IntArray, owner: IntArray, units: IntArray, total: list[int]) -> IntArray:
    """Convert flow units to bytes; if all was sent, the edges of each set sum to its bytes."""
    order = np.argsort(owner, kind="stable")
    until = np.cumsum(sent[order])
    before = np.concatenate([[0], until])[np.searchsorted(owner[order], owner[order])]
    limit = np.array(total, object)[owner[order]]  # Python's integers: products pass 64 bits
    upper = (until - before) * limit // units[owner[order]]
    lower = (until - sent[order] - before) * limit // units[owner[order]]
    result = np.empty_like(sent)
    result[order] = (upper - lower).astype(np.int64)
    return result


def check_shares(shares: Shares, sets: HolderSets) -> None:
    """Check that shares solved elsewhere are about these holder sets.

    Raises:
        PlanError: They were solved for other manifests.
    """
    owner = np.repeat(np.arange(len(sets.nbytes)), np.diff(sets.start))
    if not (
        np.array_equal(shares.holder_set, owner)
        and np.array_equal(shares.rank, sets.rank)
        and (shares.quota_bytes >= 0).all()
        and np.array_equal(sum_by(owner, shares.quota_bytes, len(sets.nbytes)), sets.nbytes)
    ):
        raise PlanError(
            "the shares were solved for other manifests: their holder sets or bytes differ; "
            "solve them again from the manifests of this binding"
        )


def elect(
    classes: TensorClasses,
    boxes: Boxes,
    regions: Regions,
    sets: HolderSets,
    shares: Shares,
    cell: IntArray,
) -> Election:
    """Give every box of every tensor a sender, so that each rank sends its quotas.

    A rank's load differs from the sum of its quotas by at most one slice of a box (one cell along
    its outermost dim) for each holder set in which it shares.

    Args:
        classes: The wanted tensors.
        boxes: What sources hold.
        regions: What sinks need of them.
        sets: Who holds the same boxes.
        shares: Quotas of the ranks.
        cell: Elements that stay together, of each class, `(C, 4)`.
    """
    num_boxes = np.diff(boxes.class_start)[classes.of]
    tensor, local = expand(num_boxes)
    box = boxes.class_start[classes.of[tensor]] + local
    line = np.argsort(sets.of[box], kind="stable")  # by holder set, then tensor, then box
    nbytes = sets.box_nbytes[box[line]]
    end = np.cumsum(nbytes)
    start = end - nbytes
    quota_end = np.cumsum(shares.quota_bytes)
    # The holder at a position of the line is the first whose quota ends beyond it; past the last
    # byte of a set lies nothing, so boxes that nobody wants go to any holder of theirs.
    last = sets.start[sets.of[box[line]] + 1] - 1
    first_edge = np.minimum(np.searchsorted(quota_end, start, side="right"), last)
    last_edge = np.searchsorted(quota_end, np.maximum(end - 1, start), side="right")
    last_edge = np.maximum(np.minimum(last_edge, last), first_edge)
    base = boxes.member_start[box[line]] - sets.start[sets.of[box[line]]]
    is_split = last_edge > first_edge
    member = np.empty(len(box), np.int64)
    member[line] = np.where(is_split, -1, base + first_edge)
    split = np.flatnonzero(is_split)
    parts = _split(
        boxes,
        regions,
        box[line[split]],
        (last_edge - first_edge)[split],
        first_edge[split],
        quota_end,
        start[split],
        cell[boxes.tclass[box[line[split]]]],
    )
    owner, part, lo, hi, dim = parts
    item = line[split[owner]]
    order = np.argsort(item, kind="stable")
    return Election(
        item_start=starts_of(num_boxes),
        member=member,
        part_item=item[order],
        part_member=(base[split[owner]] + first_edge[split[owner]] + part)[order],
        part_lo=lo[order],
        part_hi=hi[order],
        part_dim=dim[order],
    )


def _split(
    boxes: Boxes,
    regions: Regions,
    box: IntArray,
    num_cuts: IntArray,
    first_edge: IntArray,
    quota_end: IntArray,
    start: IntArray,
    cell: IntArray,
) -> tuple[IntArray, IntArray, IntArray, IntArray, IntArray]:
    """Cut boxes along their outermost dim where quotas end, to the nearest index or cell.

    Returns:
        `(owner, part, lo, hi, dim)` of all non-empty parts: position in `box`, number of the part,
        index range and dim.
    """
    dim = (boxes.n[box] > 1).argmax(axis=1)
    length = boxes.n[box, dim]
    cut, number = expand(num_cuts)  # cut `number` of item `cut`
    target = quota_end[first_edge[cut] + number] - start[cut]
    # Bytes wanted below index k: each region is a progression along the dim; sum what lies below.
    region_start = np.searchsorted(regions.box, box)
    num_regions = np.searchsorted(regions.box, box, side="right") - region_start
    probe, local = expand(num_regions[cut])
    region, along = region_start[cut[probe]] + local, dim[cut[probe]]
    count, step = regions.n[region, along], regions.step[region, along]
    lo, slice_nbytes = regions.lo[region, along], regions.nbytes[region] // count
    box_lo, box_step = boxes.lo[box, dim][cut[probe]], boxes.step[box, dim][cut[probe]]

    def below(k: IntArray) -> IntArray:
        limit = box_lo + box_step * k[probe]
        return sum_by(probe, slice_nbytes * np.clip(-((lo - limit) // step), 0, count), len(cut))

    low, high = np.zeros_like(target), length[cut]
    while (low < high).any():  # bisect for the last k with below(k) <= target
        middle = (low + high + 1) // 2
        fits = below(middle) <= target
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    up = np.minimum(low + 1, length[cut])
    index = np.where(below(up) - target < target - below(low), up, low)
    origin, rows = boxes.lo[box, dim][cut], np.arange(len(box))
    size = np.where(boxes.step[box, dim] == 1, cell[rows, dim], 1)[cut]
    nearest = (origin + index + size // 2) // size * size - origin
    index = np.where(size > 1, np.clip(nearest, 0, length[cut]), index)
    # Parts between consecutive cuts; those that vanish by rounding are dropped.
    owner, part = expand(num_cuts + 1)
    border = starts_of(num_cuts)[owner] + part
    padded = np.append(index, 0)
    begin = np.where(part > 0, padded[border - 1], 0)
    finish = np.where(part < num_cuts[owner], padded[border], length[owner])
    keep = finish > begin
    return owner[keep], part[keep], begin[keep], finish[keep], dim[owner[keep]]
