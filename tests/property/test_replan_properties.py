"""Planning again with a memory: after any events the plan is the one made from scratch."""

from __future__ import annotations

import dataclasses
import random

from hypothesis import event, given, settings
from hypothesis import strategies as st

from support import scaled
from support.encode_fleets import Fp8Fleet, Mxfp4Fleet
from support.hop_fleets import hop_options
from support.ranks import rank_bytes
from support.scenarios import random_scenario
from weightsync.ir import Manifest, Plan, PlanOptions
from weightsync.planners.planner import plan_transfer
from weightsync.planners.replan import PlanMemory

Members = list[tuple[str, bytes]]


class LivingFleet:
    """A fleet to which things happen; replicas that are not alike hold their ranks in reverse."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        kind = rng.choice([None, None, None, Fp8Fleet, Mxfp4Fleet])
        if kind is None:
            scenario = random_scenario(rng)
            source, sink = scenario.manifests()
            self.options = hop_options(rng, scenario.options, 2)
        else:
            source, sink = kind(rng).manifests()
            self.options = hop_options(rng, PlanOptions(chunk_bytes=rng.choice([512, 40_000])), 2)
        self.trainer, self.engine = rank_bytes(source), rank_bytes(sink)
        self.times = 1  # the trainer holds everything so often
        self.replicas = dict.fromkeys("abcd"[: rng.randint(1, 4)], False)

    def happen(self) -> str:
        """Let something happen; say what."""
        kinds = ["leave", "leave", "join", "join", "replace", "unlike", "trainer", "options"]
        kind = self.rng.choice(kinds)
        absent = sorted(set("abcd") - set(self.replicas))
        if kind == "leave" and len(self.replicas) > 1:
            del self.replicas[self.rng.choice(sorted(self.replicas))]
        elif kind == "join" and absent:
            self.replicas[self.rng.choice(absent)] = False
        elif kind == "unlike":
            self.replicas[self.rng.choice("abcd")] = True
        elif kind == "trainer":
            self.times = 3 - self.times
        elif kind == "options":
            roomier = self.options.bucket_bytes + self.rng.choice([-1, 0, 1])
            self.options = dataclasses.replace(self.options, bucket_bytes=max(roomier, 8))
        return kind  # a source that is replaced by an equal one changes nothing

    def members(self) -> tuple[Members, Members]:
        """Labels and manifests of both sides, as messages bring them."""
        trainer = self.trainer * self.times
        sources = [(f"source {rank}", data) for rank, data in enumerate(trainer)]
        sinks = [
            (f"sink {name}/{rank}", data)
            for name, is_reversed in sorted(self.replicas.items())
            for rank, data in enumerate(self.engine[::-1] if is_reversed else self.engine)
        ]
        return sources, sinks


def from_scratch(sources: Members, sinks: Members, options: PlanOptions) -> Plan:
    """The plan of manifests that were all read, merged and proven one by one."""
    source, sink = (
        Manifest.merge(side, [Manifest.from_bytes(data, ranks=(name,)) for name, data in members])
        for side, members in (("source", sources), ("sink", sinks))
    )
    return plan_transfer(source, sink, options)


@settings(max_examples=scaled(15, 2000), deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_plan_made_with_a_memory_is_the_plan_from_scratch(seed: int) -> None:
    rng = random.Random(seed)
    fleet = LivingFleet(rng)
    # Who chooses the shares, and who gets them; one keeps all, the other what fits.
    chooser, follower = PlanMemory(), PlanMemory(max_bytes=rng.choice([0, 10_000, 1 << 30]))
    for step in range(rng.randint(2, 5)):
        happened = fleet.happen() if step else "start"
        sources, sinks = fleet.members()
        expected = from_scratch(sources, sinks, fleet.options)
        held = chooser._prepared
        for memory, shares in ((chooser, None), (follower, expected.shares)):
            source, sink = memory.merge("source", sources), memory.merge("sink", sinks)
            plan = plan_transfer(source, sink, fleet.options, shares=shares, memory=memory)
            assert plan.digest == expected.digest
            assert plan.to_bytes() == expected.to_bytes()
            assert (plan.source.ranks, plan.sink.ranks) == (
                expected.source.ranks,
                expected.sink.ranks,
            )
            assert memory.nbytes <= memory.max_bytes
            plan.validate()
        event(f"{happened}: rows used again: {held is not None and held is chooser._prepared}")
