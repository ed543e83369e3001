"""Planning again after somebody left or joined: what of the last plan can be used.

A job plans anew whenever its members change, and most of what a plan is made of does not: a replica
that leaves takes nothing away from what the sources hold and one replica needs of it. `PlanMemory`
keeps that of the last plan, and `plan_transfer` asks it before it makes a thing again:

==================  ======================================================  ======================
kept                what it depends on                                      used again
==================  ======================================================  ======================
merged manifests    serialised manifests of the ranks                       while they are equal
`Placement`         content of the sources and of one replica, options      while all are equal
`Prepared`          a placement, options, and who was elected to send what  while all are equal
a proof             the digest of the plan of one replica                   for an equal digest
==================  ======================================================  ======================

Nothing is used because of where it came from: inputs are compared byte for byte, or by sha256,
and what follows from equal inputs is equal, since every stage is a pure function. So a plan that is
made with a memory is the plan that is made without one, row by row. What depends on the number of
replicas is always made again: quotas and the election, buckets and their order, the tables of the
plan, and the proof that all replicas get the same.

What a job gains:

* Of equal replicas (labels alike up to the last `/`) some leave, come back or join: all but the
  above is used again, if the holders keep their parts. They do, but for rounding: quotas grow with
  the number of replicas (`choose`), and if a cut between two holders falls elsewhere, or hops begin
  to pay or cease to, copies are lowered and proven again.
* Replicas that are not alike, or sources that changed: plans are made from scratch. Of unlike
  replicas that stay only the manifests are kept.
* The same members, restarted: the caller keeps the whole plan (`weightsync.service.planning`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from weightsync.ir.manifest import Manifest, Side
from weightsync.ir.plan import MaxTable, Plan, PlanOptions
from weightsync.ir.repeat import relabelled, repeat_ranks
from weightsync.ir.tables import BoolArray, IntArray
from weightsync.ir.validate_replicas import prove
from weightsync.planners.choose import Election
from weightsync.planners.fans import Fans
from weightsync.planners.lower import Lowered
from weightsync.planners.outline import Outline, Placement
from weightsync.planners.sharing import Sharing
from weightsync.units import GIB

__all__ = ["PlanMemory", "Prepared"]

MAX_BYTES: Final = 1 * GIB

Members = Sequence[tuple[str, bytes]]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The rows of one replica before they get their buckets.

    Attributes:
        lowered: Chunks and rows to one replica.
        fan: The fan of each chunk; -1: none, `(C,)`.
        is_relayed: Chunks that one replica passes on to the others, `(C,)`.
        fans: Where else chunks go.
        maxima: Maxima that sources exchange before they encode.
        num_copies: Copies before they were spread and split.
    """

    lowered: Lowered
    fan: IntArray
    is_relayed: BoolArray
    fans: Fans
    maxima: MaxTable
    num_copies: int

    def fits(self, count: int, options: PlanOptions) -> bool:
        """Whether making it for so many replicas would have kept `max_rows`."""
        rows = np.diff(self.lowered.row_start)
        num_rows = int((rows * np.where(self.is_relayed, 1, count)).sum())
        return max(num_rows, self.num_copies * count) <= options.max_rows


class PlanMemory:
    """Keeps what the last plan was made of; see the module. One thread at a time.

    Give it to `plan_transfer`, and to `merge` the serialised manifests. It never changes a result,
    only what it costs.

    Args:
        max_bytes: Most bytes of arrays that stay in memory between two plans; what is more is
            forgotten, rows first.

    Memory: the merged manifests, which the plan has, too; boxes and regions of one tensor of each
    kind; the rows of one replica, about 80 bytes each. Kimi-K2 from 256 sources to replicas of 32
    ranks: 0.2 GiB, however many replicas there are. Plans are not kept.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self._merged: dict[Side, dict[bytes, Manifest]] = {"source": {}, "sink": {}}
        self._placed: tuple[Placement, PlanOptions] | None = None
        self._prepared: tuple[Election, Sharing, Prepared] | None = None
        self._proof: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays that are kept."""
        merged = [made for of_side in self._merged.values() for made in of_side.values()]
        return _nbytes([*merged, self._placed, self._prepared], set())

    def forget(self) -> None:
        """Keep nothing."""
        self._merged = {"source": {}, "sink": {}}
        self._placed = self._prepared = None
        self._proof = ""

    def merge(self, side: Side, members: Members) -> Manifest:
        """Join the manifests of one side; equal replicas of sinks are read and checked once.

        Args:
            side: Whose they are.
            members: Label and serialised manifest of every rank, by rank.

        Returns:
            What `Manifest.merge` makes of them; of equal sink replicas it has `repeats`.

        Raises:
            ConfigError: Bytes that are no manifest.
            LayoutError: Manifests that contradict themselves or each other.
        """
        labels = [label for label, _ in members]
        if len(set(labels)) < len(labels) or not all(labels) or not members:
            return _read(side, members)  # is refused
        parts = [members] if side == "source" else _replicas(members)
        keys = _keys(parts)
        before, self._merged[side] = self._merged[side], {}
        found = []
        for key, part in zip(keys, parts, strict=True):
            made = self._merged[side].get(key, before.get(key))
            if made is None:
                made = _read(side, part)
            self._merged[side][key] = made
            found.append(relabelled(made, [label for label, _ in part]))
        if len(found) == 1:
            return found[0]
        if len(self._merged[side]) == 1:
            return repeat_ranks(found[0], [part.ranks for part in found])
        return Manifest.merge(side, found)

    # ---- what plan_transfer asks ----

    def place(self, source: Manifest, sink: Manifest, options: PlanOptions) -> Placement:
        """Match both sides, as `Placement.of`; forget all that is of others."""
        if self._placed is not None:
            placed, former = self._placed
            if former == options and source.ranks == placed.source.ranks:
                alike = _same(placed.source, source) and _same(placed.sink, sink)
                if alike and len(placed.sink.ranks) == len(sink.ranks):
                    return placed
        self._placed = self._prepared = None
        placed = Placement.of(source, sink, options)
        self._placed = placed, options
        return placed

    def prepared(self, outline: Outline, make: Callable[[Outline], Prepared]) -> Prepared:
        """Return what `make` makes of an outline that was made with this memory."""
        election, sharing = outline.election, outline.inputs.sharing
        if self._prepared is not None:
            *before, prepared = self._prepared
            alike = _same(before, [election, sharing])
            if alike and prepared.fits(outline.inputs.count, outline.options):
                return prepared
        self._prepared = None
        prepared = make(outline)
        self._prepared = election, sharing, prepared
        return prepared

    def prove(self, plan: Plan) -> None:
        """Validate a plan, but for a proof that was made already.

        Sound, because nothing is taken from the plan's origin: a plan of equal replicas is valid if
        its tables follow one another, its constants are right, all replicas get what the first
        gets, and the plan of the first is valid. The former three are checked of every plan. The
        latter is a question about the tables of that plan, both manifests and the options, which
        its digest stands for; who gets a bucket first is no part of it. Plans in which replicas
        pass on to each other are proven whole each time.

        Raises:
            What `Plan.validate` raises.
        """
        self._proof = prove(plan, self._proof)

    def settle(self) -> None:
        """Forget what is too large to be kept until the next plan."""
        if self.nbytes > self.max_bytes:
            self._prepared = None
        if self.nbytes > self.max_bytes:
            self.forget()


def _read(side: Side, members: Members) -> Manifest:
    manifests = [Manifest.from_bytes(data, ranks=(label,)) for label, data in members]
    return Manifest.merge(side, manifests)


def _replicas(members: Members) -> list[Members]:
    """Return the ranks of each replica: those in a row whose labels are alike up to the last `/`.

    All in one where some replica's ranks do not lie side by side.
    """
    blocks = [
        (name, list(ranks))
        for name, ranks in itertools.groupby(members, lambda member: member[0].rpartition("/")[0])
    ]
    if len({name for name, _ in blocks}) < len(blocks):
        return [members]
    return [ranks for _, ranks in blocks]


def _keys(parts: Sequence[Members]) -> list[bytes]:
    """Return a hash of the manifests of each part; equal for parts whose ranks hold the same."""
    keys: list[bytes] = []
    first = [data for _, data in parts[0]]
    for number, part in enumerate(parts):
        own = [data for _, data in part]
        if number and own == first:  # comparing is faster than hashing: most replicas are alike
            keys.append(keys[0])
            continue
        digest = hashlib.sha256()
        for data in own:
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        keys.append(digest.digest())
    return keys


def _same(one: Any, other: Any) -> bool:
    """Whether two values of one kind have equal content; labels of ranks are not compared."""
    if one is other:
        return True
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, list):
        return all(_same(a, b) for a, b in zip(one, other, strict=True))
    if not dataclasses.is_dataclass(one):
        return bool(one == other)
    names = [field.name for field in dataclasses.fields(one)]
    if isinstance(one, Manifest):
        names = ["side", "tensors", "buffers", "pieces", "encodings"]
    return all(_same(getattr(one, name), getattr(other, name)) for name in names)


def _nbytes(value: Any, seen: set[int]) -> int:
    """Return the bytes of all arrays that a value holds, each counted once."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, np.ndarray):
        base = value.base
        return _nbytes(base, seen) if isinstance(base, np.ndarray) else value.nbytes
    if dataclasses.is_dataclass(value):
        return sum(_nbytes(part, seen) for part in vars(value).values())
    if isinstance(value, list | tuple) and value and not isinstance(value[0], str):
        return sum(_nbytes(part, seen) for part in value)
    return 0
