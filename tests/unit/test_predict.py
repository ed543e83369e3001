"""Predictions worked out by hand: NICs carry 1 GB/s, so a megabyte takes a millisecond."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from support.clusters import cluster
from weightsync.errors import PlanBudgetError
from weightsync.ir import Manifest, ManifestBuilder, Plan, PlanOptions, RowKind
from weightsync.ir.repeat import repeat_ranks
from weightsync.planners.limits import limits_of
from weightsync.planners.planner import plan_transfer
from weightsync.planners.predict import STAGES, predict
from weightsync.planners.protocol import armed_s, gateways_for, in_turn
from weightsync.planners.traffic import traffic_of

MB = 500_000  # BF16 elements of a megabyte
MS = 1e-3


def _side(
    side: Any, ranks: Sequence[Mapping[str, int]], dtype: str, known: Mapping[str, int]
) -> Manifest:
    """Return a side whose ranks hold whole tensors; values are elements."""
    manifests = []
    for number, held in enumerate(ranks):
        builder = ManifestBuilder(side, f"{side} {number}")
        for name, size in known.items():
            builder.tensor(name, (size,))
        for name, size in held.items():
            builder.buffer(name, dtype, size)
            builder.place(name, name, (size,))
        manifests.append(builder.build())
    return Manifest.merge(side, manifests)


def _plan(
    sources: Sequence[Mapping[str, int]],
    sinks: Sequence[Mapping[str, int]],
    dtype: str = "BF16",
    **options: Any,
) -> Plan:
    known = {name: size for held in [*sources, *sinks] for name, size in held.items()}
    return plan_transfer(
        _side("source", sources, dtype, known),
        _side("sink", sinks, "BF16", known),
        PlanOptions(**options),
    )


def _wire(plan: Plan, **changes: Any) -> list[tuple[int, int, float, float]]:
    """Return source, sink, start and end on the wire of each bucket, in milliseconds."""
    found = predict(plan, cluster(**changes))
    number = STAGES.index("wire")
    columns = (found.source, found.sink, found.start_s[:, number], found.end_s[:, number])
    return [
        (int(s), int(d), round(a * 1e3, 6), round(b * 1e3, 6))
        for s, d, a, b in zip(*columns, strict=True)
    ]


def test_one_bucket_takes_its_bytes_over_the_rate() -> None:
    plan = _plan([{"a": MB}], [{"a": MB}])
    assert _wire(plan) == [(0, 0, 0, 1)]
    found = predict(plan, cluster(latency_s=0.25 * MS))
    assert found.wire_s == pytest.approx(1.25 * MS)
    # The source hears of the arrival 0.25 ms later, and only then says that it is done.
    assert found.predicted_s == pytest.approx(1.5 * MS)
    assert _wire(plan, ecmp_fraction=0.5) == [(0, 0, 0, 2)]
    assert _wire(plan, nics_per_node=2) == [(0, 0, 0, 0.5)]


def test_two_sources_share_the_port_of_a_sink() -> None:
    plan = _plan([{"a": MB}, {"b": MB}], [{"a": MB, "b": MB}])
    assert _wire(plan) == [(0, 0, 0, 2), (1, 0, 0, 2)]
    found = predict(plan, cluster())
    assert found.sink_utilisation.tolist() == pytest.approx([1])
    assert found.source_utilisation.tolist() == pytest.approx([0.5, 0.5])
    assert found.sink_port_bytes.tolist() == [2_000_000]
    assert found.busy_s("wire").tolist() == pytest.approx([2 * MS, 2 * MS])


def test_who_is_left_alone_gets_the_whole_port() -> None:
    plan = _plan([{"a": MB}, {"b": 3 * MB}], [{"a": MB, "b": 3 * MB}])
    assert _wire(plan) == [(0, 0, 0, 2), (1, 0, 0, 4)]


def test_what_a_crowded_port_leaves_goes_to_others() -> None:
    # Sink 0 is shared by three; source 2 has two thirds of its port left for sink 1.
    sources = [{"a": MB}, {"b": MB}, {"c": MB, "d": 2 * MB}]
    plan = _plan(sources, [{"a": MB, "b": MB, "c": MB}, {"d": 2 * MB}])
    assert sorted(_wire(plan)) == [(0, 0, 0, 3), (1, 0, 0, 3), (2, 0, 0, 3), (2, 1, 0, 3)]


def test_gpus_that_share_a_nic_share_its_rate() -> None:
    plan = _plan([{"a": MB}, {"b": MB}], [{"a": MB}, {"b": MB}])
    assert _wire(plan) == [(0, 0, 0, 1), (1, 1, 0, 1)]
    assert _wire(plan, gpus_per_node=2) == [(0, 0, 0, 2), (1, 1, 0, 2)]


def test_a_cut_is_shared_by_all() -> None:
    plan = _plan([{"a": MB}, {"b": MB}], [{"a": MB}, {"b": MB}])
    half = {"nominal": 4, "attainable": 4}
    assert _wire(plan, cut_gbit_per_s=half) == [(0, 0, 0, 4), (1, 1, 0, 4)]


def test_staging_for_one_bucket_ends_the_overlap() -> None:
    # F32 to BF16: 3 bytes per byte on the wire, so packing at 3 GB/s takes as long as the wire.
    plan = _plan([{"a": 4 * MB}], [{"a": 4 * MB}], "F32", bucket_bytes=1_000_000)
    assert len(plan.buckets) == 4
    rate = {"nominal": 3, "attainable": 3}
    slow = cluster(encode_gb_per_s=rate)
    assert predict(plan, slow).predicted_s == pytest.approx(5 * MS)
    assert predict(plan, slow, staging_bytes=1_000_000).predicted_s == pytest.approx(8 * MS)
    assert predict(plan, slow, staging_bytes=10**9).predicted_s == pytest.approx(5 * MS)
    assert predict(plan, slow).staging_bytes.tolist() == [8_000_000]
    with pytest.raises(PlanBudgetError, match=r"source 0 needs 1000000 bytes"):
        predict(plan, slow, staging_bytes=999_999)


def test_many_writes_cost_more_than_their_bytes() -> None:
    plan = _plan([{"a": MB}], [{"a": MB}], chunk_bytes=10_000, bucket_bytes=100_000)
    assert len(plan.chunks) == 100
    slow = cluster(write_overhead_s=1 * MS, posting_threads=2)
    # 100 writes at 0.5 ms; a bucket is on the wire when all its writes are posted.
    assert predict(plan, slow).predicted_s == pytest.approx(50.1 * MS)
    limits = limits_of(traffic_of(plan, 1), slow)
    assert limits.limiting == "message"
    assert limits.physical_limit_s == pytest.approx(50 * MS)


def test_offloaded_weights_pass_pcie_first() -> None:
    plan = _plan([{"a": 4 * MB}], [{"a": 4 * MB}], "F32", bucket_bytes=1_000_000)
    rate = {"nominal": 1, "attainable": 1}
    found = predict(plan, cluster(h2d_gb_per_s=rate), is_offloaded=True)
    # 2 ms a bucket upwards, the last one then needs 1 ms on the wire.
    assert found.predicted_s == pytest.approx(9 * MS)
    assert found.busy_s("read").tolist() == pytest.approx([8 * MS])
    shared = cluster(host_memory_gb_per_s=rate, gpus_per_node=2, nics_per_node=2)
    assert predict(plan, shared, is_offloaded=True).predicted_s == pytest.approx(17 * MS)


def test_without_gpudirect_bytes_go_through_the_host() -> None:
    plan = _plan([{"a": 4 * MB}], [{"a": 4 * MB}], bucket_bytes=1_000_000)
    rate = {"nominal": 2, "attainable": 2}
    found = predict(plan, cluster(is_gpu_direct=False, h2d_gb_per_s=rate))
    assert found.predicted_s == pytest.approx(4.5 * MS)
    assert found.pause_s == pytest.approx(2 * MS)  # up to the GPU when the version is adopted


def test_a_sink_digests_one_bucket_after_the_other() -> None:
    plan = _plan([{"a": 4 * MB}], [{"a": 4 * MB}], "F32", bucket_bytes=1_000_000)
    rate = {"nominal": 0.5, "attainable": 0.5}
    found = predict(plan, cluster(digest_gb_per_s=rate))
    # Packed chunks are digested while they are packed; the sink needs 2 ms for each bucket.
    assert found.end_s[:, STAGES.index("verify")].tolist() == pytest.approx(
        [3 * MS, 5 * MS, 7 * MS, 9 * MS]
    )
    assert found.predicted_s == pytest.approx(9 * MS)
    direct = _plan([{"a": 4 * MB}], [{"a": 4 * MB}], bucket_bytes=1_000_000)
    # What is not packed costs the source a pass as well.
    assert predict(direct, cluster(digest_gb_per_s=rate)).predicted_s == pytest.approx(11 * MS)


def test_items_wait_for_those_before_them_in_their_lane() -> None:
    lane, arrival = np.array([1, 0, 1, 1]), np.array([5.0, 0.0, 0.0, 1.0])
    done = in_turn(lane, arrival, np.array([1.0, 2.0, 3.0, 1.0]), 2)
    assert done.tolist() == [6, 2, 3, 4]


def test_opening_and_deciding_take_round_trips_messages_and_a_disk() -> None:
    plan = _plan([{"a": MB}], [{"a": MB}, {"a": MB}])
    where = cluster(
        control_round_trip_s=2.0, control_message_s=0.1, control_core_s=0.01, journal_s=5.0
    )
    found = predict(plan, where)
    # Publish there (1.0), handled (0.1), two Arms (0.2), the last one there and Armed back (2.0),
    # handled after the other one (0.1), Write (0.1), which is on its way (1.0).
    begin = 4.5
    assert armed_s(1, 2, where) == pytest.approx(begin)
    assert found.start_s[0, 0] == pytest.approx(begin)
    # WritesDone there (1.0), handled (0.1), two pairs sorted (0.0002), two Expects (0.2), the last
    # one there (1.0), its vote (1.0 + 0.1), journal (5.0), one source told (0.1), which is on
    # its way (1.0).
    end = begin + 2 * MS + 9.5002
    assert found.predicted_s == pytest.approx(end)
    assert found.commit_s == pytest.approx(9.5002)
    # Two round trips, four messages of two sinks, and a copy of no cost.
    assert found.pause_s == pytest.approx(4.8)
    assert predict(plan, where, mode="in_place").pause_s == pytest.approx(end)


@pytest.mark.parametrize(
    ("num_gateways", "message_s", "round_trip_s"), [(0, 0.4, 2.0), (2, 0.2, 2.8), (8, 0.1, 2.8)]
)
def test_gateways_work_beside_each_other_and_the_coordinator(
    num_gateways: int, message_s: float, round_trip_s: float
) -> None:
    plan = _plan([{"a": MB}], [{"a": MB}])
    costs = {"control_round_trip_s": 2.0, "control_message_s": 0.4, "control_core_s": 0.1}
    found = predict(plan, cluster(**costs), num_gateways=num_gateways)
    costs |= {"control_round_trip_s": round_trip_s, "control_message_s": message_s}
    same = predict(plan, cluster(**costs), num_gateways=0)
    assert found.predicted_s == pytest.approx(same.predicted_s)
    assert found.num_gateways == num_gateways


def test_large_jobs_have_gateways() -> None:
    assert [gateways_for(num) for num in (2, 127, 128, 384, 5000)] == [0, 0, 3, 8, 64]
    assert predict(_plan([{"a": MB}], [{"a": MB}]), cluster()).num_gateways == 0


def test_each_bucket_has_a_fixed_cost_in_each_stage() -> None:
    plan = _plan([{"a": MB}], [{"a": MB}])
    found = predict(plan, cluster(bucket_overhead_s=1.0))
    assert found.predicted_s == pytest.approx(3 + 1 * MS)  # cast, write, verify
    assert [found.busy_s(stage)[0] for stage in STAGES] == pytest.approx([0, 1, 1, 1 * MS, 1])


def test_staged_weights_are_copied_inside_the_gpu() -> None:
    plan = _plan([{"a": MB}], [{"a": MB}])
    rate = {"nominal": 2, "attainable": 2}
    assert predict(plan, cluster(hbm_gb_per_s=rate)).pause_s == pytest.approx(1 * MS)


def test_a_plan_without_buckets_is_decided_at_once() -> None:
    plan = _plan([{"a": MB}], [{}])
    assert len(plan.buckets) == 0
    found = predict(plan, cluster(control_round_trip_s=1.0))
    assert found.predicted_s == pytest.approx(2 + 1)  # no Expect: votes and WritesDone meet
    assert found.wire_s == 0
    assert found.start_s.shape == (0, len(STAGES))


def _with_hop(plan: Plan, bucket: int, sink: int) -> Plan:
    """Let a sink forward a bucket that a source would have sent."""
    rows, buckets = plan.rows, plan.buckets
    chunk = int(buckets.chunk_lo[bucket])
    kind = rows.kind.copy()
    kind[int(plan.chunks.row_lo[chunk]) : int(plan.chunks.row_hi[chunk])] = RowKind.HOP
    rank = buckets.src_rank.copy()
    rank[bucket] = sink
    return dataclasses.replace(
        plan,
        rows=dataclasses.replace(rows, kind=kind),
        buckets=dataclasses.replace(buckets, src_rank=rank),
    )


def test_limits_follow_the_strategy_of_the_plan() -> None:
    plan = _plan([{"a": MB}], [{"a": MB}, {"a": MB}])
    assert plan.buckets.dst_rank.tolist() == [0, 1]
    direct = traffic_of(plan, 2)
    assert (direct.deduplicates, direct.relays) == (False, False)
    passed_on = _with_hop(plan, 1, 0)
    for gpus, strategy in ((2, "node_dedup"), (1, "relay")):
        traffic = traffic_of(passed_on, gpus)
        assert traffic.source_bytes.tolist() == [1_000_000]
        assert traffic.need_bytes.tolist() == [1_000_000, 1_000_000]
        where = cluster(gpus_per_node=gpus, nics_per_node=gpus)
        limits = limits_of(traffic, where)
        assert limits.strategy == strategy
        # One copy leaves the source; a node of two receives it over two NICs.
        assert limits.sender_s == pytest.approx(1 * MS)
        assert limits.physical_limit_s == pytest.approx(1 * MS)
        before = limits_of(traffic_of(plan, gpus), where)
        assert before.physical_limit_s == pytest.approx(2 * MS)
        assert before.limiting == "sender"


HALF_NODE = {"gpus_per_node": 2, "nics_per_node": 2}


def test_a_node_receives_what_it_shares_once_and_gathers_it_over_its_links() -> None:
    rules: dict[str, Any] = {"ranks_per_node": 2, "node_dedup": "on", "bucket_bytes": 500_000}
    plan = _plan([{"a": MB}], [{"a": MB}, {"a": MB}], **rules)
    assert plan.bytes_per_source().tolist() == [1_000_000]
    links = {"nominal": 0.25, "attainable": 0.25}
    # Half a megabyte to each sink, one after the other's turn: the source's NIC is what they share.
    assert _wire(plan, **HALF_NODE, nvlink_gb_per_s=links) == [
        (0, 0, pytest.approx(0), pytest.approx(1)),
        (0, 1, pytest.approx(0), pytest.approx(1)),
        (1, 1, pytest.approx(1), pytest.approx(3)),  # sink 0 is the first behind one source
        (2, 0, pytest.approx(1), pytest.approx(3)),
    ]
    found = predict(plan, cluster(**HALF_NODE, nvlink_gb_per_s=links))
    assert found.is_local.tolist() == [False, False, True, True]
    assert found.link_bytes.tolist() == [500_000, 500_000]
    assert found.sink_port_bytes.tolist() == [500_000, 500_000]
    assert found.relay_port_bytes.tolist() == [0, 0]


def _replicas(count: int, **options: Any) -> Plan:
    source = _side("source", [{"a": MB}], "BF16", {"a": MB})
    sink = _side("sink", [{"a": MB}], "BF16", {"a": MB})
    sink = repeat_ranks(sink, [[f"sink {i}/0"] for i in range(count)])
    return plan_transfer(source, sink, PlanOptions(**options))


@pytest.mark.parametrize(("is_full_duplex", "after"), [(True, 0.25), (False, 0.25)])
def test_relays_send_over_the_nics_of_sinks(is_full_duplex: bool, after: float) -> None:
    plan = _replicas(4, relays="on", bucket_bytes=250_000)
    found = predict(plan, cluster(is_full_duplex=is_full_duplex))
    assert found.source_port_bytes.tolist() == [1_000_000]
    assert found.relay_port_bytes.tolist() == [750_000] * 4
    assert found.sink_port_bytes.tolist() == [1_000_000] * 4
    # The source gives each replica a quarter in one millisecond; each then passes its own on to
    # three while it receives from three.
    assert found.wire_s >= (1 + after) * MS
    assert found.predicted_s < predict(_replicas(4), cluster()).predicted_s
    assert found.predicted_s == pytest.approx(1.75 * MS if is_full_duplex else 2.5 * MS)


def test_only_deduplicated_plans_count_the_limits_of_nodes() -> None:
    where = cluster()
    plan = _replicas(4, relays="on", bucket_bytes=250_000)
    limits = limits_of(traffic_of(plan, 1), where)
    assert (limits.strategy, limits.deduplicates) == ("relay", False)
    assert {"receiver_s", "receiver_dedup_s"} & limits.counted().keys() == {"receiver_s"}
