"""Who passes on, by the formulas, worked out by hand; where nodes are; how evenly they share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from weightsync.ir import Manifest, ManifestBuilder, Plan, PlanOptions
from weightsync.ir.repeat import find_replicas, repeat_ranks
from weightsync.planners.planner import plan_transfer
from weightsync.planners.sharing import Needs, choose_hops, node_of_ranks

GB = 10**9


def _options(**changes: Any) -> PlanOptions:
    return PlanOptions(**({"relays": "auto", "bucket_bytes": 1 << 20} | changes))


def _fleet(sources: int, replicas: int, sinks: int, need: int) -> tuple[Needs, Needs]:
    """Return what ports carry directly and with relays, all sinks needing other bytes."""
    total = replicas * sinks * need
    direct = Needs(source=total // sources, sink=need)
    relayed = Needs(source=total // sources // replicas, sink=need, relayed=need)
    return direct, relayed


def test_relays_are_pointless_where_sources_keep_up() -> None:
    direct, relayed = _fleet(sources=256, replicas=4, sinks=32, need=30 * GB)
    found = choose_hops(_options(), direct, None, relayed, None, 4)
    assert (found.relays, found.direct, found.gain) == (False, 30 * GB, 1.0)


def test_relays_help_few_sources_with_many_sinks() -> None:
    # 64 sources and 512 sinks: sources need 8 times as long as sinks do.
    direct, relayed = _fleet(sources=64, replicas=16, sinks=32, need=30 * GB)
    found = choose_hops(_options(), direct, None, relayed, None, 16)
    assert found.relays
    assert found.direct == 240 * GB
    # Half a need to leave the sources, then all but a sixteenth from other replicas, and a bucket.
    assert found.planned == 15 * GB + 30 * GB * 15 / 16 + 15 * (1 << 20)
    assert 5 < found.gain < 8


def test_nodes_gather_over_links_that_are_fast_enough() -> None:
    direct = Needs(source=2 * GB, sink=8 * GB)
    shared = Needs(source=GB, sink=GB, neighbours=7 * GB, group=8)
    for ratio, expected in ((8.0, True), (1.0, False), (0.1, False)):
        found = choose_hops(_options(node_link_ratio=ratio), direct, shared, None, None, 1)
        assert found.node_dedup is expected
        on = choose_hops(
            _options(node_link_ratio=ratio, node_dedup="on"), direct, shared, None, None, 1
        )
        assert on.node_dedup
        assert on.planned == pytest.approx(GB + (7 * GB + 7 * (1 << 20)) / ratio)
    off = choose_hops(_options(node_dedup="off"), direct, shared, None, None, 1)
    assert not off.node_dedup


def test_a_gain_of_less_than_rounding_is_none() -> None:
    direct = Needs(source=GB, sink=104 * GB)
    shared = Needs(source=GB, sink=100 * GB, neighbours=4 * GB, group=2)
    found = choose_hops(_options(node_link_ratio=1000.0), direct, shared, None, None, 1)
    assert not found.node_dedup


def test_replicas_fill_nodes_by_themselves() -> None:
    sink = _whole("sink", [f"sink a/{rank}" for rank in range(3)] + ["sink b/0", "sink b/1"], 4)
    assert node_of_ranks(sink, 2).tolist() == [0, 0, 1, 2, 2]
    assert node_of_ranks(sink, 8).tolist() == [0, 0, 0, 1, 1]
    assert node_of_ranks(sink, 1).tolist() == [0, 1, 2, 3, 4]


def _whole(side: Any, labels: list[str], size: int) -> Manifest:
    made = []
    for label in labels:
        builder = ManifestBuilder(side, label)
        for name in ("v", "w"):
            builder.tensor(name, (size, 3))
            builder.buffer(name, "BF16", size * 3)
            builder.place(name, name, (size, 3))
        made.append(builder.build())
    return Manifest.merge(side, made)


def test_equal_replicas_are_found_by_their_labels() -> None:
    one = _whole("sink", ["sink 0/0", "sink 0/1"], 5)
    twice = repeat_ranks(one, [[f"sink {i}/{rank}" for rank in range(2)] for i in range(2)])
    merged = Manifest.from_bytes(twice.to_bytes(), ranks=twice.ranks)
    found = find_replicas(merged)
    assert found == merged
    assert found.repeats is not None
    base, count = found.repeats
    assert (base, count) == (one, 2)
    other = _whole("sink", ["sink 1/0"], 5)
    assert find_replicas(Manifest.merge("sink", [one, other])).repeats is None
    larger = Manifest.merge("sink", [_whole("sink", ["sink 0/0"], 5), other])
    assert find_replicas(larger).repeats is not None
    assert find_replicas(one).repeats is None  # there is only one


def _shared_plan(ranks: int) -> Plan:
    sink = _whole("sink", [f"sink 0/{rank}" for rank in range(ranks)], 1000)
    options = PlanOptions(ranks_per_node=ranks, node_dedup="on", bucket_bytes=600)
    return plan_transfer(_whole("source", ["source 0"], 1000), sink, options)


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_what_a_node_shares_comes_over_all_its_nics_alike(ranks: int) -> None:
    plan = _shared_plan(ranks)
    own = slice(plan.num_direct)
    received = np.bincount(plan.buckets.dst_rank[own], weights=plan.buckets.nbytes[own])
    assert received.sum() == 12_000  # each byte once
    assert received.max() - received.min() <= 2 * 6  # a row of three elements at either end
    assert plan.bytes_per_sink().tolist() == [12_000] * ranks
    passed_on = plan.bytes_per_forwarder()
    assert passed_on.tolist() == [int(nbytes) * (ranks - 1) for nbytes in received]
