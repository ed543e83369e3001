"""Predictions against an independent model, the physical limits and themselves."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support import scaled
from support.clusters import cluster, random_cluster
from support.fluid import water_filling
from support.scenarios import random_scenario
from support.threads_model import Bucket, ThreadsModel
from weightsync.ir import Plan
from weightsync.ir.plan import QUEUE_DEPTH
from weightsync.planners.fairness import max_min_rates
from weightsync.planners.limits import limits_of
from weightsync.planners.planner import plan_transfer
from weightsync.planners.predict import STAGES, Prediction, predict
from weightsync.planners.sending import Sender, StageWork
from weightsync.planners.traffic import traffic_of
from weightsync.planners.wire import Wire

seeds = st.integers(0, 2**32 - 1)


def _plan(seed: int) -> Plan:
    scenario = random_scenario(random.Random(seed))
    return plan_transfer(*scenario.manifests(), scenario.options)


@settings(max_examples=scaled(100, 5000))
@given(seeds)
def test_shares_are_those_of_filling_all_at_once(seed: int) -> None:
    rng = random.Random(seed)
    sides = [rng.randint(1, 6) for _ in range(rng.randint(1, 3))]
    first = np.cumsum([0, *sides])
    ports = [
        [int(first[side]) + rng.randrange(size) for side, size in enumerate(sides)]
        for _ in range(rng.randint(0, 15))
    ]
    capacity = [rng.choice([1, 2, rng.randint(1, 50)]) for _ in range(sum(sides))]
    columns = np.array(ports, np.int64).reshape(-1, len(sides))
    found = max_min_rates(columns, np.array(capacity, float))
    assert found.tolist() == pytest.approx([float(r) for r in water_filling(ports, capacity)])


@settings(max_examples=scaled(50, 2000))
@given(seeds)
def test_senders_behave_like_threads_with_queues(seed: int) -> None:
    rng = random.Random(seed)
    num_sources, num_sinks = rng.randint(1, 3), rng.randint(1, 3)
    slow = rng.choice([0.0, 0.1, 3.0])  # how long stages take beside the wire
    programs = [
        [
            Bucket(
                read_s=rng.choice([0.0, rng.uniform(0, slow)]),
                cast_s=rng.uniform(0, slow),
                write_s=rng.uniform(0, slow),
                staging_bytes=rng.choice([0, rng.randint(1, 10)]),
                ports=(source, num_sources + rng.randrange(num_sinks)),
                nbytes=rng.randint(1, 10),
            )
            for _ in range(rng.randint(0, 9))
        ]
        for source in range(num_sources)
    ]
    budgets = [max([1, *(b.staging_bytes for b in p)]) + rng.randint(0, 10) for p in programs]
    capacity = [rng.randint(1, 4) for _ in range(num_sources + num_sinks)]
    ack_s, begin_s = rng.choice([0.0, 0.5]), rng.uniform(0, 1)
    ThreadsModel(programs, budgets, capacity, ack_s=ack_s, begin_s=begin_s, depth=QUEUE_DEPTH).run()
    senders = [
        Sender(
            StageWork(
                *(np.array([getattr(b, f"{s}_s") for b in p]) for s in ("read", "cast", "write")),
                staging_bytes=np.array([b.staging_bytes for b in p], np.int64),
                budget_bytes=budget,
            ),
            begin_s,
        )
        for p, budget in zip(programs, budgets, strict=True)
    ]
    buckets = [b for p in programs for b in p]
    wire = Wire(
        senders,
        np.repeat(np.arange(num_sources), [len(p) for p in programs]),
        np.array([b.ports[1] for b in buckets], np.int64),
        np.array([b.ports for b in buckets], np.int64).reshape(-1, 2),
        np.array([b.nbytes for b in buckets], np.int64),
        np.array(capacity, float),
        ack_s=ack_s,
    )
    wire.run()
    assert wire.start_s.tolist() == pytest.approx([b.start_s for b in buckets])
    assert wire.end_s.tolist() == pytest.approx([b.end_s for b in buckets])
    found = [t for sender in senders for t in sender.complete_s]
    assert found == pytest.approx([b.complete_s for b in buckets])


def _check_ports(plan: Plan, prediction: Prediction, rate: float, ports: np.ndarray) -> None:
    """No port carries more than its rate while any of its buckets is on the wire."""
    wire = STAGES.index("wire")
    for port in np.unique(ports):
        mine = ports == port
        spans = sorted(
            zip(
                prediction.start_s[mine, wire].tolist(),
                prediction.end_s[mine, wire].tolist(),
                strict=True,
            )
        )
        busy, until = 0.0, 0.0
        for start, end in spans:
            busy += max(0.0, end - max(start, until))
            until = max(until, end)
        assert plan.buckets.nbytes[mine].sum() <= rate * busy * (1 + 1e-6)


@settings(max_examples=scaled(60, 3000))
@given(seeds, st.booleans())
def test_no_prediction_beats_a_limit_or_a_port(seed: int, offloaded: bool) -> None:
    plan, where = _plan(seed), random_cluster(random.Random(seed))
    found = predict(plan, where, is_offloaded=offloaded)
    traffic = traffic_of(plan, where.gpus_per_node)
    limits = limits_of(traffic, where, "attainable", is_offloaded=offloaded)
    assert found.predicted_s >= limits.physical_limit_s * (1 - 1e-9)
    nominal = limits_of(traffic, where, is_offloaded=offloaded).physical_limit_s
    assert nominal <= limits.physical_limit_s * (1 + 1e-9)
    assert (
        found.source_port_bytes.sum() == found.sink_port_bytes.sum() == traffic.source_bytes.sum()
    )
    rate = where.port_bytes_per_s("attainable")
    _check_ports(plan, found, rate, where.port_of(len(plan.source.ranks))[found.source])
    _check_ports(plan, found, rate, where.port_of(len(plan.sink.ranks))[found.sink])
    assert 0 <= found.commit_s <= found.predicted_s
    # Every bucket goes through the stages in order.
    assert (found.start_s <= found.end_s * (1 + 1e-9)).all()
    assert (found.end_s[:, :-1] <= found.start_s[:, 1:] * (1 + 1e-9)).all()


@settings(max_examples=scaled(10, 300))
@given(seeds)
def test_equal_arguments_give_equal_predictions(seed: int) -> None:
    plan, where = _plan(seed), random_cluster(random.Random(seed))
    first, second = predict(plan, where), predict(_plan(seed), where)
    assert first.predicted_s == second.predicted_s
    assert (first.start_s == second.start_s).all()
    assert (first.end_s == second.end_s).all()


def _idle_senders(source: np.ndarray) -> list[Sender]:
    """Senders that post whatever they may at once."""
    senders = []
    for num in np.bincount(source).tolist():
        no_time = np.zeros(num)
        work = StageWork(no_time, no_time, no_time, np.zeros(num, np.int64), 1)
        senders.append(Sender(work, 0.0))
    return senders


@settings(max_examples=scaled(5, 100))
@given(seeds)
def test_taking_events_together_changes_little(seed: int) -> None:
    rng = random.Random(seed)
    num_sources, num_sinks, num = rng.randint(2, 10), rng.randint(2, 10), rng.randint(20, 60)
    source = np.repeat(np.arange(num_sources), num)
    sink = (source + np.arange(len(source)) % num) % num_sinks
    nbytes = np.array([rng.randint(80, 100) for _ in source])
    ports = np.stack([source, num_sources + sink], axis=1)
    capacity = np.ones(num_sources + num_sinks)
    ends = []
    for step_s in (0.0, 0.5):
        senders = _idle_senders(source)
        wire = Wire(senders, source, sink, ports, nbytes, capacity, ack_s=0.0, step_s=step_s)
        wire.run()
        ends.append(wire.end_s.max())
    assert ends[1] == pytest.approx(ends[0], rel=0.03)


@pytest.mark.parametrize("step_s", [0.0, 0.3, 7.0, 1000.0])
@pytest.mark.parametrize("num_sinks", [1, 3])
def test_a_bucket_keeps_its_time_within_a_step(step_s: float, num_sinks: int) -> None:
    source, sink = np.zeros(30, np.int64), np.arange(30) % num_sinks
    ports = np.stack([source, 1 + sink], axis=1)
    # The sinks are a hundred times as fast: the source alone decides.
    capacity = np.array([1.0] + [100.0] * num_sinks)
    senders = _idle_senders(source)
    nbytes = np.full(30, 2)
    wire = Wire(senders, source, sink, ports, nbytes, capacity, ack_s=0.0, step_s=step_s)
    wire.run()
    assert wire.end_s.max() == pytest.approx(60, rel=0.0 if num_sinks == 1 else 0.2, abs=1e-6)


def test_the_description_for_tests_costs_nothing_but_the_wire() -> None:
    plan = _plan(3)
    found = predict(plan, cluster())
    assert found.predicted_s == pytest.approx(found.wire_s, rel=1e-6)
