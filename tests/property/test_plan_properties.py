"""Plans of random fleets: exact content, each byte once, budgets, balance, one digest."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from support import scaled
from support.hop_fleets import corrupted
from support.oracle import moves_exactly
from support.scenarios import random_scenario
from weightsync.errors import WeightSyncError
from weightsync.ir import Plan, Shares
from weightsync.planners.order import greedy_cuts
from weightsync.planners.planner import plan_transfer, solve_shares

seeds = st.integers(0, 2**32 - 1)


def _plan(seed: int) -> Plan:
    scenario = random_scenario(random.Random(seed))
    return plan_transfer(*scenario.manifests(), scenario.options)


def _slice_bytes(plan: Plan) -> int:
    """Return bytes that no slice of a box exceeds: what all sinks want of one index of a tensor."""
    pieces, sink = plan.sink.pieces, plan.sink
    of_tensor = np.flatnonzero(pieces.tensor >= 0)
    n, tensor = pieces.n[of_tensor], pieces.tensor[of_tensor]
    itemsize = sink.buffers.itemsize[pieces.buffer[of_tensor]]
    nbytes = n.prod(axis=1) * itemsize // n.min(axis=1, initial=1 << 40)
    total = np.zeros(len(sink.tensors), np.int64)
    np.add.at(total, tensor, nbytes)
    return int(total.max(initial=0))


@settings(max_examples=scaled(120, 5000))
@given(seeds)
def test_a_plan_moves_every_element_exactly_once_and_keeps_its_budgets(seed: int) -> None:
    plan = _plan(seed)
    assert moves_exactly(plan)
    chunks, options = plan.chunks, plan.options
    assert chunks.nbytes.max(initial=0) <= min(options.chunk_bytes, options.bucket_bytes)
    assert chunks.nbytes[chunks.is_packed].max(initial=0) <= options.slot_bytes
    assert plan.buckets.staging_bytes.max(initial=0) <= options.slot_bytes
    assert plan.buckets.nbytes.max(initial=0) <= options.bucket_bytes
    programs = [plan.program(rank) for rank in range(len(plan.source.ranks))]
    assert np.concatenate(programs).tolist() == list(range(len(plan.buckets)))
    inbound = [plan.inbound(rank) for rank in range(len(plan.sink.ranks))]
    assert sorted(np.concatenate(inbound).tolist()) == list(range(len(plan.buckets)))


@settings(max_examples=scaled(50, 2000))
@given(seeds)
def test_no_rank_sends_more_than_its_quotas_and_one_slice_for_each_shared_set(seed: int) -> None:
    plan = _plan(seed)
    shares = plan.shares
    load = plan.bytes_per_source()
    quota = np.zeros(len(load), np.int64)
    np.add.at(quota, shares.rank, shares.quota_bytes)
    sizes = np.bincount(shares.holder_set) if len(shares) else np.zeros(0, np.int64)
    shared = np.bincount(
        shares.rank[sizes[shares.holder_set] > 1], minlength=len(load)
    )  # only where a quota ends inside a box does the load differ
    assert (np.abs(load - quota) <= shared * _slice_bytes(plan)).all()
    assert load.max(initial=0) >= shares.bound_bytes - shared.max(initial=0) * _slice_bytes(plan)
    assert quota.max(initial=0) <= shares.bound_bytes + len(sizes)  # each even split rounds up
    assert load.sum() == plan.buckets.nbytes.sum() == quota.sum()


@settings(max_examples=scaled(30, 1000))
@given(seeds)
def test_the_order_of_declarations_does_not_matter(seed: int) -> None:
    scenario = random_scenario(random.Random(seed))
    source, sink = scenario.manifests()
    again, also = scenario.manifests(shuffle=random.Random(seed + 1))
    assert (source, sink) == (again, also)
    assert source.to_bytes() == again.to_bytes()
    plan = plan_transfer(source, sink, scenario.options)
    assert plan == plan_transfer(again, also, scenario.options)
    shares = Shares.from_bytes(solve_shares(source, sink).to_bytes())
    assert plan == plan_transfer(source, sink, scenario.options, shares=shares)
    assert plan == Plan.from_bytes(plan.to_bytes())


@settings(max_examples=scaled(70, 5000))
@given(seeds)
def test_a_corrupted_plan_is_refused_or_still_right(seed: int) -> None:
    plan = _plan(seed)
    if not len(plan.rows) or not len(plan.chunks):
        return
    rng = random.Random(seed)
    for _ in range(4):
        changed = corrupted(plan, rng)
        if changed.digest == plan.digest:  # the number drawn was the old one
            continue
        try:
            changed.validate()
        except WeightSyncError:
            continue
        assert moves_exactly(changed)


@settings(max_examples=scaled(12, 500))
@given(seeds, seeds)
def test_digests_are_equal_exactly_if_plans_are(first: int, second: int) -> None:
    plan, other = _plan(first), _plan(second)
    assert (plan.digest == other.digest) == (plan.to_bytes() == other.to_bytes())
    roomier = dataclasses.replace(plan.options, max_rows=plan.options.max_rows + 1)
    assert plan_transfer(plan.source, plan.sink, roomier) != plan
    assert plan_transfer(plan.source, plan.sink, plan.options) == plan


@settings(max_examples=scaled(100, 3000))
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 9)), max_size=30),
    st.integers(1, 20),
    st.integers(1, 20),
)
def test_runs_are_cut_as_late_as_limits_allow(
    items: list[tuple[bool, int, int]], most: int, also: int
) -> None:
    wanted: list[int] = []
    sums = (0, 0)
    for place, (begins, one, other) in enumerate(items):
        sums = sums[0] + one, sums[1] + other
        if begins or not place or sums[0] > most or sums[1] > also:
            wanted.append(place)
            sums = one, other
    is_first = np.array([begins or not place for place, (begins, *_) in enumerate(items)], bool)
    totals = [np.cumsum([0, *(item[k] for item in items)]) for k in (1, 2)]
    found = greedy_cuts(is_first, [(totals[0], most), (totals[1], also)])
    assert found.tolist() == wanted
