"""What planning again reuses, told by what is called; what it must not take for known."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from support.chaos.worker import SinkLayout, SourceLayout
from weightsync.errors import LayoutError, PlanBudgetError, PlanError
from weightsync.ir import Manifest, Plan, PlanOptions, validate
from weightsync.ir.validate_replicas import prove
from weightsync.planners import outline, planner
from weightsync.planners.planner import plan_transfer
from weightsync.planners.replan import PlanMemory
from weightsync.service import planning
from weightsync.service import weightsync_pb2 as pb
from weightsync.service.manifests import deflate, fill_bind
from weightsync.service.planning import PlanCache, PlanMaker, make_plan

Members = list[tuple[str, bytes]]

OPTIONS = PlanOptions(bucket_bytes=4096, chunk_bytes=1024)
# Two halves, each held by two ranks.
SOURCES = [(f"source {r}", SourceLayout().manifest(r % 2).to_bytes()) for r in range(4)]
PLACING = {"Placement.of", "classify", "find_boxes", "intersect"}
ROWS = {"stamp", "lower"}
PROOF = {"validate_structure", "validate_content"}
ALL = {"from_bytes"} | PLACING | ROWS | PROOF


def sinks(**replicas: int) -> Members:
    """Members of replicas of so many ranks."""
    return [
        (f"sink {name}/{rank}", SinkLayout(size).manifest(rank).to_bytes())
        for name, size in replicas.items()
        for rank in range(size)
    ]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts calls of the expensive stages."""
    counted: Counter[str] = Counter()

    def count(owner: Any, name: str, label: str = "") -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            counted[label or name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    count(Manifest, "from_bytes")
    count(outline.Placement, "of", "Placement.of")
    for name in ("classify", "find_boxes", "intersect", "stamp"):
        count(outline, name)
    count(planner, "lower")
    for name in PROOF:
        count(validate, name)
    return counted


def replanned(memory: PlanMemory, members: Members, **changes: Any) -> Plan:
    """Plan with a memory; the plan must be that of a memory that has seen nothing."""
    options = dataclasses.replace(OPTIONS, **changes)
    return make_plan(SOURCES, members, options, memory=memory).plan


def scratch(members: Members, **changes: Any) -> Plan:
    return make_plan(SOURCES, members, dataclasses.replace(OPTIONS, **changes)).plan


def called(calls: Counter[str]) -> set[str]:
    """What was called since this was asked last."""
    found = set(calls)
    calls.clear()
    return found


@pytest.mark.parametrize("hops", [{}, {"ranks_per_node": 2, "node_dedup": "on"}])
def test_a_replica_that_leaves_or_joins_costs_neither_matching_nor_rows_nor_proof(
    calls: Counter[str], hops: dict[str, Any]
) -> None:
    memory = PlanMemory()
    replanned(memory, sinks(a=2, b=2, c=2), **hops)
    assert calls["from_bytes"] == len(SOURCES) + 2  # of three equal replicas one is read
    assert called(calls) == ALL
    kept = memory.nbytes
    for names in ({"b": 2, "c": 2}, {"c": 2}, {"a": 2, "b": 2, "c": 2, "d": 2}):
        plan = replanned(memory, sinks(**names), **hops)
        assert not called(calls)
        assert memory.nbytes == kept  # does not grow with replicas
        expected = scratch(sinks(**names), **hops)
        assert called(calls) == ALL
        assert plan.to_bytes() == expected.to_bytes()
        assert plan.sink.ranks == expected.sink.ranks


def test_what_changed_is_made_again(calls: Counter[str]) -> None:
    memory = PlanMemory()
    replanned(memory, sinks(a=2, b=2))
    called(calls)
    replanned(memory, sinks(a=2, b=2, c=1))  # an unlike one: both kinds are read and merged
    assert called(calls) == ALL
    replanned(memory, sinks(a=2, c=1))
    assert called(calls) == ALL - {"from_bytes"}  # only the manifests are known
    replanned(memory, sinks(a=2, c=1), bucket_bytes=2048)
    assert called(calls) == ALL - {"from_bytes"}
    replanned(memory, sinks(a=2))
    called(calls)
    others = [(label, data) for (label, _), (_, data) in zip(SOURCES, SOURCES[::-1], strict=True)]
    make_plan(others, sinks(a=2), OPTIONS, memory=memory)
    assert called(calls) == ALL
    # Other quotas of the same holders elect others: only that is made again.
    plan = scratch(sinks(a=2))
    memory = PlanMemory()
    plan_transfer(plan.source, plan.sink, OPTIONS, memory=memory)
    called(calls)
    shares = plan.shares
    quota = shares.quota_bytes.copy()
    of_first = np.flatnonzero(shares.holder_set == shares.holder_set[0])
    assert len(of_first) > 1
    quota[of_first] = 0
    quota[of_first[-1]] = shares.quota_bytes[of_first].sum()
    moved = dataclasses.replace(shares, quota_bytes=quota)
    other = plan_transfer(plan.source, plan.sink, OPTIONS, shares=moved, memory=memory)
    assert called(calls) == ROWS | PROOF
    assert other == plan_transfer(plan.source, plan.sink, OPTIONS, shares=moved) != plan


def test_relays_are_proven_whole(calls: Counter[str]) -> None:
    memory, hops = PlanMemory(), {"relays": "on"}
    replanned(memory, sinks(a=2, b=2, c=2), **hops)
    called(calls)
    plan = replanned(memory, sinks(a=2, c=2), **hops)
    assert called(calls) == PROOF
    assert plan.to_bytes() == scratch(sinks(a=2, c=2), **hops).to_bytes()


def test_memory_is_bounded(calls: Counter[str]) -> None:
    members, fewer = sinks(a=2, b=2), sinks(a=2)
    unbounded = PlanMemory()
    replanned(unbounded, members)
    rows = PlanMemory(max_bytes=unbounded.nbytes - 1)
    nothing = PlanMemory(max_bytes=0)
    for memory, again in ((rows, ROWS), (nothing, ALL)):
        replanned(memory, members)
        assert memory.nbytes <= memory.max_bytes
        called(calls)
        replanned(memory, fewer)
        assert called(calls) == again
    unbounded.forget()
    assert unbounded.nbytes == 0
    called(calls)
    replanned(unbounded, fewer)
    assert called(calls) == ALL


def test_budgets_hold_for_plans_that_reuse_rows() -> None:
    members = sinks(a=2, b=2)
    limit = len(scratch(members).rows)
    for hops in ({}, {"relays": "on"}):
        memory = PlanMemory()
        replanned(memory, sinks(a=2), max_rows=limit, **hops)
        replanned(memory, members, max_rows=limit, **hops)
        with pytest.raises(PlanBudgetError) as mine:
            replanned(memory, sinks(a=2, b=2, c=2, d=2), max_rows=limit, **hops)
        with pytest.raises(PlanBudgetError) as theirs:
            scratch(sinks(a=2, b=2, c=2, d=2), max_rows=limit, **hops)
        assert str(mine.value) == str(theirs.value)
        assert replanned(memory, members, max_rows=limit, **hops) == scratch(
            members, max_rows=limit, **hops
        )


def test_a_known_proof_does_not_cover_a_plan_that_was_changed() -> None:
    plan = scratch(sinks(a=2, b=2))
    known = prove(plan, "")
    assert prove(plan, known) == known != ""
    assert prove(scratch(sinks(b=2, c=2, d=2)), known) == known
    assert prove(scratch(sinks(a=1, b=1)), known) != known
    rows, sent = plan.rows, np.arange(plan.num_sent)
    half = len(plan.sink.buffers) // 2
    moved = np.flatnonzero((rows.dst_buffer[sent] < half) & (rows.src_offset[sent] > 0))[0]
    like = rows.dst_buffer[sent] == rows.dst_buffer[moved] + half
    twin = np.flatnonzero(like & (rows.dst_offset[sent] == rows.dst_offset[moved]))
    for taken, words in (([moved], "otherwise than replica 0"), ([moved, *twin], "reads")):
        offset = rows.src_offset.copy()
        offset[taken] -= 1
        wrong = dataclasses.replace(plan, rows=dataclasses.replace(rows, src_offset=offset))
        with pytest.raises(PlanError, match=words):
            prove(wrong, known)


def test_members_that_contradict_each_other_are_refused_as_without_a_memory() -> None:
    memory = PlanMemory()
    one = sinks(a=2)
    with pytest.raises(LayoutError, match="unique"):
        memory.merge("sink", [*one, *one])
    with pytest.raises(LayoutError, match="is a sink, not a source"):
        memory.merge("source", one)
    # Ranks of one replica that do not lie side by side are no replica.
    mixed = [one[0], ("sink b/0", one[0][1]), one[1], ("sink b/1", one[1][1])]
    assert memory.merge("sink", mixed).repeats is None
    assert memory.merge("sink", sinks(a=2, b=2)).repeats is not None
    assert memory.merge("sink", []) == Manifest.merge("sink", [])


def test_a_job_plans_again_only_what_changed(
    calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Counter[int] = Counter()
    real = make_plan
    monkeypatch.setattr(
        planning, "make_plan", lambda *a, **k: (made.update([len(a[1])]), real(*a, **k))[1]
    )
    maker, cache = PlanMaker(), PlanCache()
    for number, members in enumerate([sinks(a=2, b=2), sinks(a=2), sinks(a=2, b=2)]):
        wire = [[(label, deflate(data)) for label, data in side] for side in (SOURCES, members)]
        agreed = maker.agree(*wire, OPTIONS)
        expected = real(SOURCES, members, OPTIONS)
        assert agreed.digest == expected.plan.digest
        assert (agreed.shares, agreed.options_json) == (expected.shares, expected.options_json)
        assert agreed.hops == expected.hops
        called(calls)
        bind = pb.Bind(epoch=number, options_json=agreed.options_json, shares=agreed.shares)
        fill_bind(bind, *wire)
        plan = cache.plan(bind)
        assert plan.to_bytes() == expected.plan.to_bytes()
        assert called(calls) == (set() if number else ALL)
        # Processes that were replaced by others with the same manifests.
        before = made.total()
        bind.epoch += 10
        assert cache.plan(bind) is plan
        assert maker.agree(*map(list, wire), OPTIONS) is agreed
        assert made.total() == before
    assert made == {4: 4, 2: 2}
