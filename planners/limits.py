"""The physical limits of a plan on a cluster, and which resource sets them."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from weightsync.ir.tables import IntArray, sum_by
from weightsync.planners.bounds import (
    cut_s,
    held_s,
    message_s,
    nvlink_s,
    relay_s,
    slowest_s,
)
from weightsync.planners.cluster import Cluster, Quality
from weightsync.planners.traffic import Traffic
from weightsync.units import GB

__all__ = ["Limits", "Strategy", "limits_of"]

Strategy = Literal["direct", "node_dedup", "relay"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Seconds that each resource needs at least, and which of them counts.

    Attributes:
        strategy: What the plan does: "direct" (each sink is written by sources), "node_dedup" (what
            the sinks of a node share crosses the network once), "relay" (sinks of other nodes pass
            on what they received).
        deduplicates: Whether sinks of a node pass on to each other.
        receiver_s: The sink port with the most bytes: `max_j D_j / d_j`.
        receiver_dedup_s: The node with the most distinct bytes over all its NICs:
            `max_v U_v / B_v`. Counts instead of `receiver_s` where the plan deduplicates.
        unique_s: What the sinks of a replica need, counted once, over all their NICs: `W / sum d`.
            No strategy comes below it.
        source_s: Every byte leaves some holder once: `max_X |X| / sum of e over H(X)`.
        sender_s: As `source_s` for what the strategy sends: all copies of each byte (direct), one
            for each node (node_dedup), the bound for relays (relay).
        cut_s: Through the narrowest cut between trainers and rollouts.
        h2d_s: PCIe of one source's GPU: offloaded weights, or what is sent where NICs do not reach
            GPUs.
        host_memory_s: The memory of one host, for the same bytes.
        nvlink_s: Inside a node of sinks, after deduplication. Counts only then.
        encode_s: Packing, casting and quantizing on one source.
        digest_s: Digests on one rank.
        message_s: Writes of one source, each at its fixed cost.
    """

    strategy: Strategy
    deduplicates: bool
    receiver_s: float
    receiver_dedup_s: float
    unique_s: float
    source_s: float
    sender_s: float
    cut_s: float
    h2d_s: float
    host_memory_s: float
    nvlink_s: float
    encode_s: float
    digest_s: float
    message_s: float

    def counted(self) -> dict[str, float]:
        """Return the limits that hold for the strategy planned, by name."""
        unused = {"receiver_s"} if self.deduplicates else {"receiver_dedup_s", "nvlink_s"}
        unused.add("unique_s")  # never above what receivers need
        return {name: value for name, value in self.by_name().items() if name not in unused}

    def by_name(self) -> dict[str, float]:
        """Return all limits by name."""
        names = [f.name for f in dataclasses.fields(self) if f.name.endswith("_s")]
        return {name: getattr(self, name) for name in names}

    @property
    def physical_limit_s(self) -> float:
        """The largest limit of the strategy planned."""
        return max(self.counted().values())

    @property
    def limiting(self) -> str:
        """Name of that limit without its unit, such as "receiver"; the first of equals."""
        counted = self.counted()
        return max(counted, key=lambda name: counted[name]).removesuffix("_s")


def limits_of(
    traffic: Traffic,
    cluster: Cluster,
    quality: Quality = "nominal",
    *,
    is_offloaded: bool = False,
) -> Limits:
    """Return every lower bound of a plan on a cluster.

    Args:
        traffic: What the plan moves; made for the cluster's `gpus_per_node`.
        cluster: What the cluster can do.
        quality: Rates of the data sheets, or those that good software attains.
        is_offloaded: The sources' weights are in host memory.
    """
    strategy: Strategy = "direct"
    if traffic.relays or traffic.deduplicates:
        strategy = "relay" if traffic.relays else "node_dedup"
    num_sources, num_sinks = traffic.pair_bytes.shape
    out_port, in_port = cluster.port_of(num_sources), cluster.port_of(num_sinks)
    rate = cluster.port_bytes_per_s(quality)
    out_rates, in_rates = np.full(_count(out_port), rate), np.full(_count(in_port), rate)
    need = traffic.need_bytes
    port_need = sum_by(in_port, need, len(in_rates))
    port_node = np.arange(len(in_rates)) // cluster.ports_per_node
    num_ports = np.bincount(port_node, minlength=len(traffic.node_bytes))
    classes = traffic.holder_start, out_port[traffic.holder], out_rates
    sent = traffic.class_copy_bytes if strategy == "direct" else traffic.class_node_bytes
    if strategy == "relay":
        duplex = cluster.is_full_duplex
        sender_s = relay_s(
            traffic.unique_bytes, port_need, out_rates, in_rates, is_full_duplex=duplex
        )
    else:
        sender_s = held_s(sent, *classes)
    pcie, host = _through_host(traffic, cluster, is_offloaded)
    return Limits(
        strategy=strategy,
        deduplicates=traffic.deduplicates,
        receiver_s=slowest_s(port_need, rate),
        receiver_dedup_s=slowest_s(traffic.node_bytes / np.maximum(num_ports, 1), rate),
        unique_s=traffic.num_replicas * traffic.unique_bytes / max(float(in_rates.sum()), rate),
        source_s=held_s(traffic.class_bytes, *classes),
        sender_s=sender_s,
        cut_s=cut_s(
            int(sent.sum()),
            traffic.unique_bytes,
            cluster.cut_bytes_per_s(quality),
            has_relays=strategy == "relay",
        ),
        h2d_s=slowest_s(pcie, cluster.h2d_gb_per_s.of(quality) * GB),
        host_memory_s=slowest_s(host, cluster.host_memory_gb_per_s.of(quality) * GB),
        nvlink_s=nvlink_s(
            traffic.distinct_bytes,
            cluster.node_of(num_sinks),
            traffic.node_bytes,
            cluster.nvlink_gb_per_s.of(quality) * GB,
        ),
        encode_s=slowest_s(traffic.pack_bytes, cluster.encode_gb_per_s.of(quality) * GB),
        digest_s=slowest_s(
            np.concatenate([traffic.digest_bytes, need]), cluster.digest_gb_per_s.of(quality) * GB
        ),
        message_s=message_s(traffic.source_writes, cluster.write_gap_s),
    )


def _through_host(
    traffic: Traffic, cluster: Cluster, is_offloaded: bool
) -> tuple[IntArray, IntArray]:
    """Return the bytes over the PCIe of each source and through the memory of each host.

    Offloaded weights go up to the GPU that packs them, and from there straight to the NIC. Where
    NICs do not reach GPUs, what is sent lies in host memory at both ends; a sink copies it to its
    GPU when it adopts the version, which is part of the pause and not of the transfer.
    """
    none, pcie, sent = np.zeros(0, np.int64), traffic.source_bytes, traffic.source_bytes
    received = traffic.need_bytes
    if cluster.is_gpu_direct:
        pcie = sent = traffic.read_bytes if is_offloaded else none
        received = none
    elif is_offloaded:
        pcie = none
    hosts = []
    for load in (sent, received):
        node = cluster.node_of(len(load))
        hosts.append(sum_by(node, load, _count(node)))
    return pcie, np.concatenate(hosts)


def _count(number: IntArray) -> int:
    """Return how many there are, from the numbers of all."""
    return int(number.max(initial=-1)) + 1
