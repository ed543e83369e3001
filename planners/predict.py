"""How long a plan takes on a cluster: a discrete-event model of the executor.

Buckets go in the order of each source's program through the executor's stages (`sending`), share
ports and cuts fairly while they are on the wire (`fairness`), are digested at their sink, passed on
from there if the plan says so, and the coordinator decides. Nothing is drawn at random: equal
arguments give equal predictions.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from weightsync.errors import PlanBudgetError
from weightsync.ir.plan import STAGED_BUCKETS, Plan
from weightsync.ir.tables import BoolArray, IntArray, sum_by
from weightsync.planners.cluster import Cluster, Quality
from weightsync.planners.protocol import (
    armed_s,
    decided_s,
    gateways_for,
    in_turn,
    pause_s,
    through_gateways,
)
from weightsync.planners.sending import ForwardingSender, Sender, StageWork
from weightsync.planners.traffic import BucketWork, bucket_work
from weightsync.planners.wire import Wire
from weightsync.units import GB

__all__ = ["STAGES", "Prediction", "predict"]

Floats = NDArray[np.float64]
Mode = Literal["staged", "in_place"]

STAGES: Final = ("read", "cast", "write", "wire", "verify")
_MAX_EXACT: Final = 4000  # plans with more buckets take several events in one step
_STEPS: Final = 2000  # about so many steps then


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the model says; a prediction, not a measurement.

    Times count from the moment in which all sources have called publish.

    Attributes:
        predicted_s: Until every source knows that the version is committed.
        open_s: The part of it before the first write.
        commit_s: The part of it after the last byte was verified.
        pause_s: How long a sink generates nothing: the copy of staged weights over the live ones
            and the round trips around it; in place the whole transfer.
        wire_s: From the first write on the wire to the last arrival.
        source: Sender of each bucket: a source rank, or the number of sources plus the sink that
            passes it on, `(B,)`.
        sink: Sink of each bucket, `(B,)`.
        is_local: Buckets that a sink passes on inside its node, over no NIC, `(B,)`.
        start_s, end_s: When each bucket was in each of `STAGES`, `(B, 5)`. The last one is at the
            sink, the others are at the sender.
        staging_bytes: Budget of each source, `(S,)`.
        source_port_bytes, sink_port_bytes: Bytes out of the ports of sources, and into those of
            sinks, `(ports,)`.
        relay_port_bytes, link_bytes: Bytes that sinks pass on over each port, `(ports,)`, and that
            each receives inside its node, `(sinks,)`.
        source_utilisation, sink_utilisation: Share of what each port could have carried in
            `wire_s`, `(ports,)`.
        rails_per_port: NICs that a port consists of; each carries an equal share.
        num_gateways: Processes that hold the ranks' connections; 0: the coordinator does.
    """

    predicted_s: float
    open_s: float
    commit_s: float
    pause_s: float
    wire_s: float
    source: IntArray
    sink: IntArray
    is_local: BoolArray
    start_s: Floats
    end_s: Floats
    staging_bytes: IntArray
    source_port_bytes: IntArray
    sink_port_bytes: IntArray
    relay_port_bytes: IntArray
    link_bytes: IntArray
    source_utilisation: Floats
    sink_utilisation: Floats
    rails_per_port: int
    num_gateways: int

    @property
    def nic_bytes(self) -> int:
        """Bytes that cross a NIC: all but what sinks pass on inside a node."""
        return int(self.source_port_bytes.sum() + self.relay_port_bytes.sum())

    def busy_s(self, stage: str) -> Floats:
        """Return the seconds that each sender, or sink, spent in a stage; flows overlap.

        Args:
            stage: One of `STAGES`.
        """
        number = STAGES.index(stage)
        rank = self.sink if stage == "verify" else self.source
        spent = (self.end_s - self.start_s)[:, number]
        return np.asarray(np.bincount(rank, weights=spent), np.float64)


@dataclasses.dataclass(frozen=True)
class _Rates:
    """Bytes per second of everything that a bucket passes."""

    egress: float
    ingress: float
    link: float
    cut: float
    upload: float
    encode: float
    digest: float

    @classmethod
    def of(cls, cluster: Cluster, quality: Quality, is_offloaded: bool) -> _Rates:
        port = cluster.port_bytes_per_s(quality)
        host = cluster.host_memory_gb_per_s.of(quality) * GB
        if not cluster.is_gpu_direct:  # what NICs carry passes through host memory
            port = min(port, host / cluster.ports_per_node)
        upload = cluster.h2d_gb_per_s.of(quality) * GB
        if is_offloaded or not cluster.is_gpu_direct:
            upload = min(upload, host / cluster.gpus_per_node)
        return cls(
            egress=port,
            ingress=port,
            link=cluster.nvlink_gb_per_s.of(quality) * GB,
            cut=cluster.cut_bytes_per_s(quality),
            upload=upload,
            encode=cluster.encode_gb_per_s.of(quality) * GB,
            digest=cluster.digest_gb_per_s.of(quality) * GB,
        )


def predict(
    plan: Plan,
    cluster: Cluster,
    quality: Quality = "attainable",
    *,
    work: BucketWork | None = None,
    staging_bytes: int | None = None,
    is_offloaded: bool = False,
    mode: Mode = "staged",
    num_gateways: int | None = None,
) -> Prediction:
    """Predict one update.

    Args:
        plan: The plan as it is executed.
        cluster: What the cluster can do.
        quality: Rates to go by.
        work: `bucket_work(plan)`, if it is there already.
        staging_bytes: Budget of each source; None takes eight of its largest buckets, as a source
            does.
        is_offloaded: The sources' weights are in host memory.
        mode: Whether versions land beside the live weights or in them.
        num_gateways: Of the job; None takes as many as its ranks do well with.

    Raises:
        PlanBudgetError: A bucket needs more staging than the budget.

    Cost: 7 us a bucket on one core, 40 us in small plans. Plans of more than 4000 buckets are
    worked out in about 2000 steps (see `Wire`). Eight times as many change what is predicted by
    0.01 to 0.2 percent; smaller plans differ from an exact run by about 1 percent: so much as
    rounding does there, since equal buckets meet in many ties.
    """
    work = bucket_work(plan) if work is None else work
    num_sources, num_sinks = len(plan.source.ranks), len(plan.sink.ranks)
    rates = _Rates.of(cluster, quality, is_offloaded)
    if num_gateways is None:
        num_gateways = gateways_for(num_sources + num_sinks)
    cluster = through_gateways(cluster, num_gateways)
    begin_s = armed_s(num_sources, num_sinks, cluster)
    stages = _stage_seconds(plan, work, cluster, rates, is_offloaded)
    budgets = _budgets(plan, staging_bytes)
    programs = _programs(plan)
    senders: list[Sender] = []
    for number, mine in enumerate(programs):
        tasks = StageWork(
            read_s=stages[0][mine],
            cast_s=stages[1][mine],
            write_s=stages[2][mine],
            staging_bytes=plan.buckets.staging_bytes[mine],
            budget_bytes=int(budgets[number]) if number < num_sources else 0,
        )
        is_source = number < num_sources
        senders.append(Sender(tasks, begin_s) if is_source else ForwardingSender(tasks))
    sender, is_local = plan.sender, _is_local(plan, cluster)
    wire = _wire(plan, cluster, rates, senders, is_local)
    wire.run()
    arrival = wire.end_s + cluster.latency_s
    dst, nbytes = plan.buckets.dst_rank.astype(np.int64), plan.buckets.nbytes
    verify = cluster.bucket_overhead_s + nbytes / rates.digest
    verified = in_turn(dst, arrival, verify, num_sinks)
    verify_end = float(verified.max(initial=begin_s))
    written = [each.complete_s[-1] if len(each) else begin_s for each in senders]
    predicted_s = decided_s(plan, cluster, np.array(written), verified, begin_s)
    entered = [np.zeros(len(dst)) for _ in range(3)]
    for each, mine in zip(senders, programs, strict=True):
        order = [mine.start + each.bucket_at(position) for position in range(len(each))]
        for column, stage in zip(entered, ("read", "cast", "write"), strict=True):
            column[order] = getattr(each, f"{stage}_start_s")
    start = np.stack([*entered, wire.start_s, verified - verify], axis=1)
    left = [begin + spent for begin, spent in zip(entered, stages, strict=True)]
    end = np.stack([*left, wire.end_s, verified], axis=1)
    wire_s = float(arrival.max() - wire.start_s.min()) if len(dst) else 0.0
    out_port, in_port = cluster.port_of(num_sources), cluster.port_of(num_sinks)
    own, nic = slice(plan.num_direct), ~is_local
    relayed = np.flatnonzero(nic)[plan.num_direct :]
    ports = [
        sum_by(port[rank], carried, int(port.max(initial=-1)) + 1)
        for port, rank, carried in (
            (out_port, plan.buckets.src_rank[own], nbytes[own]),
            (in_port, dst[nic], nbytes[nic]),
            (in_port, plan.buckets.src_rank[relayed], nbytes[relayed]),
        )
    ]
    capacity = max(rates.egress * wire_s, 1e-300)
    return Prediction(
        predicted_s=predicted_s,
        open_s=begin_s,
        commit_s=predicted_s - verify_end,
        pause_s=pause_s(plan, cluster, quality) if mode == "staged" else predicted_s,
        wire_s=wire_s,
        source=sender,
        sink=dst,
        is_local=is_local,
        start_s=start,
        end_s=end,
        staging_bytes=budgets,
        source_port_bytes=ports[0],
        sink_port_bytes=ports[1],
        relay_port_bytes=ports[2],
        link_bytes=sum_by(dst[is_local], nbytes[is_local], num_sinks),
        source_utilisation=ports[0] / capacity,
        sink_utilisation=ports[1] / capacity,
        rails_per_port=cluster.rails_per_port,
        num_gateways=num_gateways,
    )


def _programs(plan: Plan) -> list[slice]:
    """Return the buckets of each sender; sinks are among them only where any passes on."""
    num = len(plan.source.ranks)
    if plan.num_direct < len(plan.buckets):
        num += len(plan.sink.ranks)
    first = np.searchsorted(plan.sender, np.arange(num + 1)).tolist()
    return [slice(a, b) for a, b in itertools.pairwise(first)]


def _is_local(plan: Plan, cluster: Cluster) -> BoolArray:
    """Return which buckets stay inside a node of sinks."""
    node = cluster.node_of(len(plan.sink.ranks))
    local = np.zeros(len(plan.buckets), np.bool_)
    hops = slice(plan.num_direct, None)
    local[hops] = node[plan.buckets.src_rank[hops]] == node[plan.buckets.dst_rank[hops]]
    return local


def _stage_seconds(
    plan: Plan, work: BucketWork, cluster: Cluster, rates: _Rates, is_offloaded: bool
) -> tuple[Floats, Floats, Floats]:
    """Return how long each bucket takes to read, to cast and to post, `(B,)` each.

    Reading moves bytes over PCIe where they are on the wrong side of it: up to the GPU that packs
    offloaded weights, or down to the host whose NICs do not reach GPUs.
    """
    over_pcie = np.zeros(len(plan.buckets), np.int64)
    if is_offloaded and cluster.is_gpu_direct:
        over_pcie = work.read_bytes
    elif not is_offloaded and not cluster.is_gpu_direct:
        over_pcie = plan.buckets.nbytes
    over_pcie = np.where(work.is_hop, 0, over_pcie)  # what sinks receive lies where NICs reach it
    overhead = cluster.bucket_overhead_s
    cast: Floats = overhead + work.pack_bytes / rates.encode + work.digest_bytes / rates.digest
    post = np.asarray(overhead + work.num_writes * cluster.write_gap_s, np.float64)
    return over_pcie / rates.upload, cast, post


def _budgets(plan: Plan, staging_bytes: int | None) -> IntArray:
    """Return the staging of each source."""
    largest = np.zeros(len(plan.source.ranks), np.int64)
    own = slice(plan.num_direct)
    np.maximum.at(largest, plan.buckets.src_rank[own], plan.buckets.staging_bytes[own])
    if staging_bytes is None:
        return STAGED_BUCKETS * largest
    for rank in np.flatnonzero(largest > staging_bytes)[:1]:
        raise PlanBudgetError(
            f"a bucket of {plan.source.ranks[rank]} needs {largest[rank]} bytes of staging, the "
            f"budget is {staging_bytes}; raise staging_bytes or plan with a smaller slot_bytes",
            missing_bytes=int(largest[rank]) - staging_bytes,
        )
    return np.full(len(largest), staging_bytes)


def _wire(
    plan: Plan, cluster: Cluster, rates: _Rates, senders: list[Sender], is_local: BoolArray
) -> Wire:
    """Lay out the ports: NICs of both sides, links inside nodes, and the cut if there is one.

    Each bucket leaves by a port and arrives by one: out of a source's NIC and into a sink's, and
    what is passed on over both directions of the links inside a node, or of sinks' NICs. A NIC that
    cannot send and receive at once is one port for both.
    """
    buckets, num_sinks = plan.buckets, len(plan.sink.ranks)
    src, dst = buckets.src_rank, buckets.dst_rank
    is_hop = np.arange(len(buckets)) >= plan.num_direct
    out_port, in_port = cluster.port_of(len(plan.source.ranks)), cluster.port_of(num_sinks)
    num_out, num_in = (int(p.max(initial=-1)) + 1 for p in (out_port, in_port))
    capacity = [rates.egress] * num_out + [rates.ingress] * num_in
    leave = out_port[np.where(is_hop, 0, src)] if num_out else src.astype(np.int64)
    arrive = num_out + in_port[dst]
    if is_hop.any():
        relay = len(capacity) if cluster.is_full_duplex else num_out
        capacity += [rates.egress] * num_in * cluster.is_full_duplex
        link = len(capacity)
        capacity += [rates.link] * 2 * num_sinks
        sender = np.where(is_hop, src, 0)
        leave = np.where(is_hop, relay + in_port[sender], leave)
        leave = np.where(is_local, link + sender, leave)
        arrive = np.where(is_local, link + num_sinks + dst, arrive)
    ports = [leave, arrive]
    if math.isfinite(rates.cut):
        # What is passed on does not cross it: that passes a port which is never full.
        ports.append(len(capacity) + is_hop.astype(np.int64))
        capacity += [rates.cut, sum(capacity)]
    capacities = np.array(capacity)
    step_s = 0.0
    if len(buckets) > _MAX_EXACT:
        loads = sum(sum_by(port, buckets.nbytes, len(capacity)) for port in ports)
        step_s = float((loads / capacities).max()) / _STEPS
    return Wire(
        senders,
        plan.sender,
        dst.astype(np.int64),
        np.stack(ports, axis=1),
        buckets.nbytes,
        capacities,
        ack_s=2 * cluster.latency_s,
        step_s=step_s,
        edges=plan.edges,
        ready_s=cluster.latency_s + cluster.bucket_overhead_s,
    )
