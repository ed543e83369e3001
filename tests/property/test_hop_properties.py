"""Plans in which sinks pass on what they received: exact content, acyclic, never slower."""

from __future__ import annotations

import dataclasses
import random
from unittest import mock

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from support import scaled
from support.clusters import cluster
from support.hop_fleets import corrupted, hop_options, replicated
from support.oracle import moves_exactly
from weightsync.errors import PlanError, WeightSyncError
from weightsync.ir import Manifest, Plan, cover, validate
from weightsync.planners import assemble
from weightsync.planners.cluster import Cluster
from weightsync.planners.planner import plan_transfer, solve_shares
from weightsync.planners.predict import predict

seeds = st.integers(0, 2**32 - 1)


def _planned(seed: int) -> Plan:
    rng = random.Random(seed)
    scenario, source, sink, count = replicated(rng)
    return plan_transfer(source, sink, hop_options(rng, scenario.options, count))


@settings(max_examples=scaled(120, 5000), deadline=None)
@given(seeds)
def test_what_is_passed_on_arrives_exactly_once(seed: int) -> None:
    plan = _planned(seed)
    assert moves_exactly(plan)
    hops = plan.buckets.take(slice(plan.num_direct, None))
    assert (np.bincount(plan.edges[:, 1], minlength=len(plan.buckets)) > 0).sum() == len(hops)
    assert hops.staging_bytes.sum() == 0
    assert plan.bytes_per_sink().sum() == (
        plan.bytes_per_source().sum() + plan.bytes_per_forwarder().sum()
    )
    own = [plan.program(rank) for rank in range(len(plan.source.ranks))]
    own += [plan.hops(rank) for rank in range(len(plan.sink.ranks))]
    assert np.concatenate(own).tolist() == list(range(len(plan.buckets)))
    if plan.options.node_dedup == "off" and plan.options.relays == "off":
        assert len(hops) == 0


@settings(max_examples=scaled(40, 1000), deadline=None)
@given(seeds, st.integers(1, 5))
def test_plans_are_made_and_proven_alike_in_blocks_of_any_size(seed: int, size: int) -> None:
    plan = _planned(seed)
    with (
        mock.patch.object(assemble, "_BLOCK", size),
        mock.patch.object(cover, "_BLOCK", size),
        mock.patch.object(validate, "BLOCK_ROWS", size),
    ):
        assert _planned(seed) == plan
        if plan.num_sent:
            row = seed % plan.num_sent
            with pytest.raises(PlanError, match=f"^row {row} "):
                validate.validate_content(_reads_one_further(plan, row))


def _reads_one_further(plan: Plan, row: int) -> Plan:
    """Let a row read one element further on: another element of the tensor, or none."""
    offset = plan.rows.src_offset.copy()
    offset[row] += 1
    return dataclasses.replace(plan, rows=dataclasses.replace(plan.rows, src_offset=offset))


@settings(max_examples=scaled(60, 2000), deadline=None)
@given(seeds)
def test_replicas_that_nobody_pointed_out_are_planned_the_same(seed: int) -> None:
    plan = _planned(seed)
    merged = Manifest.from_bytes(plan.sink.to_bytes(), ranks=plan.sink.ranks)
    assert merged.repeats is None
    assert plan_transfer(plan.source, merged, plan.options) == plan
    shares = solve_shares(plan.source, merged, plan.options)
    assert plan_transfer(plan.source, merged, plan.options, shares=shares) == plan
    assert Plan.from_bytes(plan.to_bytes()) == plan


@settings(max_examples=scaled(40, 1000), deadline=None)
@given(seeds)
def test_each_pair_begins_with_what_is_passed_on(seed: int) -> None:
    plan = _planned(seed)
    goes_on = np.zeros(len(plan.buckets), np.bool_)
    goes_on[plan.edges[:, 0]] = True
    for source, sink in set(zip(plan.buckets.src_rank, plan.buckets.dst_rank, strict=True)):
        of_pair = (plan.buckets.src_rank == source) & (plan.buckets.dst_rank == sink)
        of_pair[plan.num_direct :] = False
        ends = goes_on[of_pair].tolist()
        assert ends == sorted(ends, reverse=True)


@settings(max_examples=scaled(60, 4000), deadline=None)
@given(seeds)
def test_a_corrupted_plan_with_hops_is_refused_or_still_right(seed: int) -> None:
    plan = _planned(seed)
    if plan.num_direct == len(plan.buckets):
        return
    # Plans from elsewhere do not know which replicas are alike.
    sink = Manifest.from_bytes(plan.sink.to_bytes(), ranks=plan.sink.ranks)
    plan, rng = dataclasses.replace(plan, sink=sink), random.Random(seed)
    for _ in range(4):
        changed = corrupted(plan, rng)
        if changed.digest == plan.digest:
            continue
        try:
            changed.validate()
        except WeightSyncError:
            continue
        assert moves_exactly(changed)
    fewer = np.delete(plan.edges, rng.randrange(len(plan.edges)), axis=0)
    with pytest.raises(PlanError, match="does not wait for it"):
        dataclasses.replace(plan, edges=fewer).validate()


def _busiest_s(plan: Plan, where: Cluster) -> float:
    """Return what the busiest port of a plan needs, by its bytes alone."""
    num_sinks, nic = len(plan.sink.ranks), where.port_bytes_per_s("nominal")
    link = where.nvlink_gb_per_s.nominal * 1e9
    loads: dict[tuple[str, int], float] = {}
    node = where.node_of(num_sinks).tolist()
    for bucket in range(len(plan.buckets)):
        src, dst = int(plan.buckets.src_rank[bucket]), int(plan.buckets.dst_rank[bucket])
        nbytes = int(plan.buckets.nbytes[bucket])
        is_hop = bucket >= plan.num_direct
        if is_hop and node[src] == node[dst]:
            ports, rate = (("link out", src), ("link in", dst)), link
        else:
            ports, rate = (("relay" if is_hop else "source", src), ("sink", dst)), nic
        for port in ports:
            loads[port] = loads.get(port, 0.0) + nbytes / rate
    return max(loads.values(), default=0.0)


@settings(max_examples=scaled(80, 4000), deadline=None)
@given(seeds)
def test_what_is_chosen_by_the_formulas_is_never_slower_than_direct(seed: int) -> None:
    rng = random.Random(seed)
    scenario, source, sink, count = replicated(rng)
    size = len(sink.ranks) // count
    gpus = rng.choice([g for g in (1, 2, 4) if size % g == 0])
    ratio = rng.choice([0.25, 1.0, 8.0])
    rate = {"nominal": ratio, "attainable": ratio}
    where = cluster(gpus_per_node=gpus, nics_per_node=gpus, nvlink_gb_per_s=rate)
    direct = plan_transfer(source, sink, scenario.options)
    options = dataclasses.replace(
        scenario.options,
        ranks_per_node=gpus,
        node_dedup="auto",
        relays="auto",
        node_link_ratio=ratio,
    )
    chosen = plan_transfer(source, sink, options)
    event(f"hops: {chosen.num_direct < len(chosen.buckets)}")
    if chosen.num_direct == len(chosen.buckets):
        assert chosen.buckets.nbytes.tolist() == direct.buckets.nbytes.tolist()
        return
    assert _busiest_s(chosen, where) <= _busiest_s(direct, where) * (1 + 1e-9)
    assert predict(chosen, where).predicted_s <= predict(direct, where).predicted_s * (1 + 1e-9)
