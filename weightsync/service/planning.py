"""The one way in which coordinator and members make the plan of a binding.

Every party plans from the same manifests, options and shares and must reach the same digest,
so the wire never carries a plan.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from weightsync.errors import ConfigError, EncodingError
from weightsync.ir.manifest import Manifest, Side
from weightsync.ir.plan import Plan, PlanOptions, Shares
from weightsync.planners.planner import plan_transfer
from weightsync.service import weightsync_pb2 as pb

__all__ = ["PlanCache", "Planned", "make_plan", "read_options"]


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


def make_plan(
    sources: Sequence[tuple[str, bytes]],
    sinks: Sequence[tuple[str, bytes]],
    options: PlanOptions,
    shares: bytes = b"",
) -> Planned:
    """Merge the members' manifests and plan the transfer between them.

    Args:
        sources: Label and serialised manifest of every source rank, by rank.
        sinks: The same of every sink rank, by sink index.
        options: Budgets.
        shares: Choice of holders that somebody else has made; empty: choose here.

    Raises:
        LayoutError, PlanError: The sides do not match, or a budget is too small.
        ConfigError: Bytes that are no manifest.
        EncodingError: Sinks store tensors by a recipe that sources do not hold them in.
    """
    chosen = Shares.from_bytes(shares) if shares else None
    plan = plan_transfer(_merge("source", sources), _merge("sink", sinks), options, shares=chosen)
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


def _merge(side: Side, members: Sequence[tuple[str, bytes]]) -> Manifest:
    manifests = [Manifest.from_bytes(data, ranks=(label,)) for label, data in members]
    return Manifest.merge(side, manifests)


class PlanCache:
    """Plans of bindings, made anew only when a manifest or an option changed."""

    def __init__(self) -> None:
        self._key: bytes = b""
        self._plan: Plan | None = None

    def plan(self, message: pb.Bind) -> Plan:
        """The plan of a binding message. Raises what `make_plan` raises."""
        digest = hashlib.sha256(message.options_json.encode() + message.shares)
        for member in (*message.sources, *message.sinks):
            for part in (member.label.encode(), member.manifest):
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
            digest.update(b"|")
        key = digest.digest()
        if self._plan is None or key != self._key:
            self._plan = make_plan(
                [(m.label, m.manifest) for m in message.sources],
                [(m.label, m.manifest) for m in message.sinks],
                read_options(message.options_json),
                message.shares,
            ).plan
            self._key = key
        return self._plan
