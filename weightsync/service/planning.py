"""The one way in which coordinator and members make the plan of a binding.

Every party plans from the same manifests, options and shares and must reach the same digest,
so the wire never carries a plan.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from weightsync.errors import ConfigError, EncodingError
from weightsync.ir.plan import Plan, PlanOptions, Shares
from weightsync.planners.planner import plan_transfer
from weightsync.planners.replan import PlanMemory
from weightsync.service import weightsync_pb2 as pb
from weightsync.service.manifests import inflate, members_of

__all__ = [
    "Agreement",
    "PlanCache",
    "PlanMaker",
    "Planned",
    "make_plan",
    "plan_key",
    "read_options",
]

Members = Sequence[tuple[str, bytes]]


@dataclass(frozen=True)
class Planned:
    """A plan and what others need to make the same."""

    plan: Plan
    shares: bytes
    options_json: str

    @property
    def hops(self) -> dict[int, set[int]]:
        """Sinks that pass on what they received, by index, and to whom."""
        buckets = self.plan.buckets
        found: dict[int, set[int]] = {}
        passed_on = slice(self.plan.num_direct, None)
        pairs = zip(
            buckets.src_rank[passed_on].tolist(), buckets.dst_rank[passed_on].tolist(), strict=True
        )
        for sink, other in set(pairs):
            found.setdefault(sink, set()).add(other)
        return found


@dataclass(frozen=True)
class Agreement:
    """What a coordinator tells of a plan, so that it need not keep the plan.

    Attributes:
        digest: Of the plan.
        shares: The choice of holders, for members to plan with.
        options_json: Its options.
        hops: Sinks that pass on what they received, by index, and to whom.
    """

    digest: str
    shares: bytes
    options_json: str
    hops: dict[int, set[int]]


def make_plan(
    sources: Members,
    sinks: Members,
    options: PlanOptions,
    shares: bytes = b"",
    memory: PlanMemory | None = None,
) -> Planned:
    """Merge the members' manifests and plan the transfer between them.

    Args:
        sources: Label and serialised manifest of every source rank, by rank.
        sinks: The same of every sink rank, by sink index.
        options: Budgets.
        shares: Choice of holders that somebody else has made; empty: choose here.
        memory: What is left of the plan before; see `weightsync.planners.replan`. The result is the
            same with and without.

    Raises:
        LayoutError, PlanError: The sides do not match, or a budget is too small.
        ConfigError: Bytes that are no manifest.
        EncodingError: Sinks store tensors by a recipe that sources do not hold them in.
    """
    chosen = Shares.from_bytes(shares) if shares else None
    reader = PlanMemory() if memory is None else memory
    source, sink = reader.merge("source", sources), reader.merge("sink", sinks)
    del reader
    plan = plan_transfer(source, sink, options, shares=chosen, memory=memory)
    if len(plan.encoded.table):
        name = plan.sink.tensors.names[int(plan.encoded.table.codes[0])]
        raise EncodingError(
            f"{len(plan.encoded.table)} tensors, {name} the first, must be encoded on the way, "
            "and this release does not encode yet: plan it with `weightsync plan`, publish "
            "tensors that are quantized already, or serve BF16",
            tensor=name,
        )
    return Planned(
        plan, plan.shares.to_bytes(), json.dumps(dataclasses.asdict(options), sort_keys=True)
    )


def read_options(text: str) -> PlanOptions:
    """Plan options from the wire.

    Raises:
        ConfigError: Unknown keys or bad values; the coordinator runs another version.
    """
    try:
        fields = json.loads(text)
        fields["ignore_extra"] = tuple(fields["ignore_extra"])
        return PlanOptions(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"unknown plan options {text[:200]!r}: {error}") from error


def plan_key(sources: Members, sinks: Members, options: PlanOptions, shares: bytes) -> bytes:
    """Hash of all that a plan depends on."""
    digest = hashlib.sha256(repr(options).encode() + shares)
    for side in (sources, sinks):
        for label, manifest in side:
            for part in (label.encode(), manifest):
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
        digest.update(b"|")
    return digest.digest()


class PlanMaker:
    """Makes the plans of a coordinator, one after the other; safe from any thread.

    Keeps what the last plan was made of (`PlanMemory`) and what was told of it, not the plan.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._memory = PlanMemory()
        self._last: tuple[bytes, Agreement] | None = None

    def agree(self, sources: Members, sinks: Members, options: PlanOptions) -> Agreement:
        """What to tell of the plan between these members; else as `make_plan`.

        Args:
            sources: Label and deflated manifest of every source rank, by rank.
            sinks: The same of every sink rank, by sink index.
            options: Budgets.
        """
        key = plan_key(sources, sinks, options, b"")
        with self._lock:
            if self._last is None or self._last[0] != key:
                whole = inflate(sources), inflate(sinks)
                planned = make_plan(*whole, options, memory=self._memory)
                told = planned.shares, planned.options_json, planned.hops
                self._last = key, Agreement(planned.plan.digest, *told)
            return self._last[1]


class PlanCache:
    """Plans of a member's bindings, made anew only when a manifest or an option changed.

    Keeps the last plan, and what it was made of (`PlanMemory`): a replica that leaves or comes back
    costs a part of a plan only.
    """

    def __init__(self) -> None:
        self._memory = PlanMemory()
        self._last: tuple[bytes, Plan] | None = None

    def plan(self, message: pb.Bind) -> Plan:
        """The plan of a binding message. Raises what `make_plan` raises."""
        sources, sinks = members_of(message)
        options = read_options(message.options_json)
        key = plan_key(sources, sinks, options, message.shares)
        if self._last is None or self._last[0] != key:
            self._last = None  # its memory is better used for the new one
            whole = inflate(sources), inflate(sinks)
            self._last = key, make_plan(*whole, options, message.shares, self._memory).plan
        return self._last[1]
