"""What sinks have in common, and whether they pass it on to each other (hops).

Two ways, which combine. *Node deduplication*: what several sinks of a node store alike goes to one
of them, which passes it on to the others; what they share is spread evenly, so that the NICs of all
of them carry it. *Relays*: of equal replicas each receives an even part from the sources and passes
it on to the same rank of the others. A plan with hops is never made for its own sake: `choose_hops`
compares what the busiest port carries.

Terms: D_j bytes that sink j needs; L the largest load of a source when holders share the work as
evenly as they can; v a node of g sinks, U_v what they need with what they share counted once; R
replicas; N what the busiest NIC of a sink carries (D_j, or U_v / g) and P the part of it that is
relayed; m the largest bucket. All times are in bytes over one NIC (divide by its rate): sources and
sinks have equal NICs, sending and receiving at once, and a sink receives from its node `ratio`
(`node_link_ratio`) times as fast as from its NIC.

    direct       T = max(L, max_j D_j)
    node dedup   T = max(L', max_v U_v / g) + max_v (sum of D_j in v - U_v) / (g ratio)
                     + (g - 1) m / ratio
    relays       T = max(L'', N - P (R - 1) / R) + P (R - 1) / R + (R - 1) m

L' counts what a node shares once, L'' what replicas share too. The first terms are the port bounds
of Gonzalez and Sahni (1976), which rounds attain. The second are all-gathers, inside a node and
over replicas: scatter and all-gather attains the bound `max(W / sum e, max D / d)` of Mundinger,
Weber and Weiss (2008) for equal NICs. Buckets are passed on while others come, so that the larger
of the two terms is the limit; the sum is what is compared, as if one followed the other, since an
unlucky order may come close to that. The last term is the last bucket, which goes to g - 1 or R - 1
others after it has arrived; of a chain to one it is what `(k + p - 2)(a + b m)` adds for k buckets
and p = 3.

It follows that with equal NICs relays help only if sources are the slower side: R G D > sum of what
S sources send in that time, `R * G * b_r > S * b_s`.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np

from weightsync.ir.manifest import Manifest
from weightsync.ir.plan import PlanOptions, Shares
from weightsync.ir.tables import BoolArray, IntArray, expand, starts_of, sum_by, unique_rows
from weightsync.planners import choose
from weightsync.planners.classes import TensorClasses
from weightsync.planners.intersect import Boxes, Regions

__all__ = ["HopChoice", "Needs", "Sharing", "choose_hops", "direct_only", "node_of_ranks", "share"]

_LEAST_GAIN: Final = 1.05  # less than that rounding and the order of buckets may take away


@dataclasses.dataclass(frozen=True)
class Sharing:
    """Regions that several sinks of a node store alike.

    Attributes:
        start: Places of region q are `start[q] : start[q + 1]`, `(Q + 1,)`.
        piece: Sink piece (of the representative) of each place, `(P,)`.
        rank: Its rank; ascending and unique in a region, `(P,)`.
        is_relayed: Boxes whose regions one replica receives and passes on, `(B,)`.
    """

    start: IntArray
    piece: IntArray
    rank: IntArray
    is_relayed: BoolArray

    @property
    def is_used(self) -> bool:
        """Whether any sink passes anything on."""
        return len(self.piece) > len(self.start) - 1 or bool(self.is_relayed.any())


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes that ports carry in one way of sending, in bytes of one NIC.

    Attributes:
        source: The busiest source, L.
        sink: The busiest NIC of a sink.
        neighbours: What the busiest sink receives from its node.
        group: Most sinks of a node that share something.
        relayed: What one NIC of a sink carries of what replicas pass on.
    """

    source: int
    sink: int
    neighbours: int = 0
    group: int = 1
    relayed: int = 0


@dataclasses.dataclass(frozen=True)
class HopChoice:
    """What `choose_hops` decided and why; times in bytes over one NIC.

    Attributes:
        node_dedup, relays: What the plan does.
        direct, planned: Predicted times of sending everything directly, and as planned.
    """

    node_dedup: bool
    relays: bool
    direct: float
    planned: float

    @property
    def gain(self) -> float:
        """How many times faster than direct the plan is predicted to be."""
        return self.direct / self.planned if self.planned else 1.0


def choose_hops(
    options: PlanOptions,
    direct: Needs,
    deduplicated: Needs | None,
    relayed: Needs | None,
    relayed_deduplicated: Needs | None,
    replicas: int,
) -> HopChoice:
    """Decide who passes on; see the module for the formulas.

    Args:
        options: Rules ("on" overrules the formulas), bucket size and `node_link_ratio`.
        direct: Of sending everything to each sink.
        deduplicated: Of sending what a node shares once; None where no node shares anything.
        relayed: Of sending to each replica its part; None without equal replicas.
        relayed_deduplicated: Of both; None without either.
        replicas: R.
    """
    ratio = options.node_link_ratio
    choices = []
    for dedup, relay, needs in (
        (False, False, direct),
        (True, False, deduplicated),
        (False, True, relayed),
        (True, True, relayed_deduplicated),
    ):
        if needs is None:
            continue
        bucket = min(options.bucket_bytes, direct.sink)
        gathered = needs.relayed * (replicas - 1) / replicas
        time = max(float(needs.source), needs.sink - gathered) + gathered
        if dedup:
            time += (needs.neighbours + (needs.group - 1) * bucket) / ratio
        if relay:
            time += (replicas - 1) * bucket
        choices.append((time, dedup, relay))
    first = choices[0][0]
    for place, rule in ((1, options.node_dedup), (2, options.relays)):
        can = any(choice[place] for choice in choices)
        if rule == "off" or (rule == "on" and can):
            choices = [choice for choice in choices if choice[place] == (rule == "on")]
    best = min(choices)
    time, dedup, relay = best if choices[0][0] >= _LEAST_GAIN * best[0] else choices[0]
    return HopChoice(dedup, relay, first, time)


def node_of_ranks(sink: Manifest, ranks_per_node: int) -> IntArray:
    """Return the node of each sink rank, `(ranks,)`; nodes of different replicas are different.

    The replica is what stands before the last `/` of a rank's label; its ranks fill nodes in order.
    """
    names = [label.rpartition("/")[0] for label in sink.ranks]
    _, replica = np.unique(names, return_inverse=True)
    order = np.argsort(replica, kind="stable")
    place = np.empty(len(names), np.int64)
    place[order] = np.arange(len(names)) - np.searchsorted(replica[order], replica[order])
    _, node = unique_rows([replica.astype(np.int64), place // ranks_per_node])
    return node


def direct_only(boxes: Boxes, regions: Regions, sink: Manifest) -> Sharing:
    """Return a sharing in which each region is of the one sink that wants it."""
    return Sharing(
        start=np.arange(len(regions.piece) + 1),
        piece=regions.piece,
        rank=sink.buffers.rank[sink.pieces.buffer[regions.piece]].astype(np.int64),
        is_relayed=np.zeros(len(boxes.tclass), np.bool_),
    )


def share(
    boxes: Boxes, regions: Regions, sink: Manifest, node: IntArray
) -> tuple[Regions, Sharing]:
    """Keep one region of those that sinks of a node store alike, with the same strides.

    What is shared in part only, or stored in another way, is sent to each.

    Args:
        boxes: What sources hold.
        regions: What sinks need of them.
        sink: Merged manifest.
        node: Node of each sink rank, `(ranks,)`.

    Returns:
        The regions that remain, in their order, and who shares each.
    """
    pieces = sink.pieces
    buffer = pieces.buffer[regions.piece]
    rank = sink.buffers.rank[buffer].astype(np.int64)
    stride = pieces.stride[regions.piece] * (regions.step // pieces.step[regions.piece])
    dtype = sink.buffers.dtype[buffer].astype(np.int64)
    alike = [regions.box, node[rank], dtype, regions.lo, regions.n, regions.step]
    _, group = unique_rows([*alike, stride * (regions.n > 1)])
    # A rank that stores a tensor in two places passes on nothing to itself: the first place of each
    # rank is shared, and the second.
    order = np.lexsort((regions.piece, rank, group))
    key = group[order] * np.int64(len(sink.ranks)) + rank[order]
    number = np.empty(len(order), np.int64)
    number[order] = np.arange(len(order)) - np.searchsorted(key, key)
    first, group = unique_rows([group, number])
    order = np.lexsort((rank, group))
    kept = Regions(
        box=regions.box[first],
        piece=regions.piece[first],
        lo=regions.lo[first],
        n=regions.n[first],
        step=regions.step[first],
        nbytes=regions.nbytes[first],
        class_start=np.searchsorted(regions.box[first], boxes.class_start),
    )
    return kept, Sharing(
        start=starts_of(np.bincount(group, minlength=len(first))),
        piece=regions.piece[order],
        rank=rank[order],
        is_relayed=np.zeros(len(boxes.tclass), np.bool_),
    )


@dataclasses.dataclass(frozen=True)
class Way:
    """One way of sending: its regions with the bytes that sources send, holder sets and shares."""

    regions: Regions
    sharing: Sharing
    sets: choose.HolderSets
    shares: Shares
    needs: Needs


class Ways:
    """Makes ways of sending the same regions; `count` equal replicas of what `sink` describes."""

    def __init__(
        self,
        classes: TensorClasses,
        boxes: Boxes,
        regions: Regions,
        is_scales: BoolArray,
        sink: Manifest,
        count: int,
        options: PlanOptions,
    ) -> None:
        self._classes, self._boxes, self._is_scales = classes, boxes, is_scales
        self._sink, self._count, self._options = sink, count, options
        num_tensors = np.bincount(classes.of, minlength=len(classes.first))
        self._times = num_tensors[boxes.tclass]
        self._node = node_of_ranks(sink, options.ranks_per_node)
        self._plain = regions, direct_only(boxes, regions, sink)
        self._shared = share(boxes, regions, sink, self._node)

    def best(self) -> tuple[Way, HopChoice]:
        """Choose by the options; "on" is for whatever there is to share, which may be nothing."""
        options, can_relay = self._options, self._count > 1
        direct = self._way(*self._plain)
        ways: dict[tuple[bool, bool], Way | None] = {(False, False): direct}
        can_share = self._shared[1].is_used and options.node_dedup != "off"
        ways[True, False] = self._way(*self._shared) if can_share else None
        for dedup in (False, True):
            base = ways[dedup, False]
            usable = base is not None and can_relay and options.relays != "off"
            ways[dedup, True] = self._relayed(base) if usable and base is not None else None
        found = {key: way.needs for key, way in ways.items() if way is not None}
        choice = choose_hops(
            options,
            direct.needs,
            found.get((True, False)),
            found.get((False, True)),
            found.get((True, True)),
            self._count,
        )
        way = ways[choice.node_dedup, choice.relays]
        assert way is not None
        return way, choice

    def _relayed(self, base: Way) -> Way | None:
        """Let replicas pass on what their sources could not send to all in time.

        Holder classes are decided one by one: those with a holder that sends more than the busiest
        sink receives are relayed. With "on" all are.
        """
        load = sum_by(
            base.shares.rank, base.shares.quota_bytes, int(base.sets.rank.max(initial=-1)) + 1
        )
        crowded = load[base.sets.rank] > base.needs.sink
        owner = np.repeat(np.arange(len(base.sets.nbytes)), np.diff(base.sets.start))
        is_relayed = np.zeros(len(base.sets.nbytes), np.bool_)
        is_relayed[owner[crowded]] = True
        if self._options.relays == "on":
            is_relayed[:] = True
        if not is_relayed.any():
            return None
        sharing = dataclasses.replace(base.sharing, is_relayed=is_relayed[base.sets.of])
        plain = self._shared if len(sharing.piece) > len(sharing.start) - 1 else self._plain
        return self._way(plain[0], sharing)

    def _way(self, regions: Regions, sharing: Sharing) -> Way:
        times = np.where(sharing.is_relayed, 1, self._count)[regions.box]
        sent = dataclasses.replace(regions, nbytes=regions.nbytes * times)
        sets = choose.find_holder_sets(self._classes, self._boxes, sent, self._is_scales)
        shares = choose.solve(sets)
        load = sum_by(shares.rank, shares.quota_bytes, int(sets.rank.max(initial=-1)) + 1)
        most = int(load.max(initial=0))
        if sharing.is_used:
            most += self._slice_bytes(sets)
        return Way(sent, sharing, sets, shares, self._needs(regions, sharing, most))

    def _slice_bytes(self, sets: choose.HolderSets) -> int:
        """Return by how much a source may exceed its quota: a box is split between its slices."""
        n = self._boxes.n
        length = n[np.arange(len(n)), (n > 1).argmax(axis=1)]
        is_split = np.diff(sets.start)[sets.of] > 1
        return int((sets.box_nbytes // length)[is_split].max(initial=0))

    def _needs(self, regions: Regions, sharing: Sharing, source_bytes: int) -> Needs:
        """Add up what ports carry; what g sinks share is g parts, one over each NIC."""
        num_ranks = len(self._sink.ranks)
        places = np.diff(sharing.start)
        owner, local = expand(places)
        nbytes = (regions.nbytes * self._times[regions.box])[owner]
        part = nbytes * (local + 1) // places[owner] - nbytes * local // places[owner]
        relayed = np.where(sharing.is_relayed[regions.box][owner], part, 0)
        return Needs(
            source=source_bytes,
            sink=int(sum_by(sharing.rank, part, num_ranks).max(initial=0)),
            neighbours=int(sum_by(sharing.rank, nbytes - part, num_ranks).max(initial=0)),
            group=int(places.max(initial=1)),
            relayed=int(sum_by(sharing.rank, relayed, num_ranks).max(initial=0)),
        )
