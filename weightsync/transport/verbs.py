"""Fabric `verbs`: hosts with RDMA NICs (InfiniBand, RoCEv2), by libibverbs.

Sources write into the sink's memory with reliable connections, one per pair of NIC ports; nothing
of the sink's processor is on the way but one thread per port that reads which writes have arrived.
What one side has more ports of is used all the same: paths share the others. A port that fails is
fenced, its writes go over the others, and it is tried again.

The ends meet over TCP: with a key per exported target, which the descriptor carries. libibverbs is
loaded when the first engine is opened.

The fence resets the sink's queue pairs and takes the memory's keys away. It waits for no peer.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass

from weightsync.errors import ConfigError
from weightsync.transport.base import Engine
from weightsync.transport.native import _native, near_options

__all__ = ["RdmaPort", "open_verbs", "rdma_ports", "verbs_problem"]

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class RdmaPort:
    """A port of an RDMA device, as the kernel shows it.

    Attributes:
        device: Such as "mlx5_0".
        port: From 1 on.
        is_active: It can be used now.
        state: Such as "ACTIVE" or "DOWN".
        link_layer: "InfiniBand" or "Ethernet".
        gbit_per_s: Speed of the link; 0 when unknown.
        numa_node: Where it is attached; -1 when unknown.
        interface: Its network interface; "" on InfiniBand.
        pci_address: Such as "0000:17:00.0"; "" for a device of software.
        gpus: Address and distance of each GPU, nearest first. Distances are those of `nvidia-smi
            topo`: "PIX" (one PCIe switch), "PXB" (several), "PHB" (one host bridge), "NODE" (one
            NUMA node), "SYS" (across nodes).
        gids: Its addresses: index, text and type of each.
        gid_index: The one that `open_verbs` takes unless told otherwise; -1 when none fits.
    """

    device: str
    port: int
    is_active: bool
    state: str
    link_layer: str
    gbit_per_s: float
    numa_node: int
    interface: str
    pci_address: str
    gpus: tuple[tuple[str, str], ...]
    gids: tuple[tuple[int, str, str], ...]
    gid_index: int

    @property
    def name(self) -> str:
        """What `open_verbs` takes, such as "mlx5_0:1"."""
        return f"{self.device}:{self.port}"


def rdma_ports(sysfs: str = "/sys") -> list[RdmaPort]:
    """The RDMA ports of this host; needs no libibverbs and no rights.

    Args:
        sysfs: Where the kernel shows them.

    Returns:
        All ports, sorted; empty when there is no device.
    """
    return [
        RdmaPort(**{**facts, "gids": tuple(facts["gids"]), "gpus": tuple(facts["gpus"])})
        for facts in _native.rdma_ports(sysfs)
    ]


def verbs_problem() -> str | None:
    """Why no verbs engine can be opened on this host, or None; for skips and `doctor`."""
    problem: str = _native.verbs_problem()
    if problem:
        return problem
    ports = rdma_ports()
    if not ports:
        return "no RDMA device (/sys/class/infiniband is empty)"
    if not any(port.is_active for port in ports):
        return "no RDMA port is active"
    return None


def open_verbs(
    *,
    name: str | None = None,
    devices: Sequence[str] | None = None,
    addresses: Sequence[str] | None = None,
    gid_index: int | None = None,
    pkey: int = 0xFFFF,
    traffic_class: int = 0,
    service_level: int = 0,
    mtu_bytes: int | None = None,
    timeout: int = 14,
    retry_count: int = 7,
    relaxed_ordering: bool = True,
    near: str | None = None,
    near_threads: int | None = None,
) -> Engine:
    """Open an engine on this host's RDMA NICs: one rail, and one thread, per port.

    Args:
        name: For messages; None makes one from the process id.
        devices: Ports such as "mlx5_0" or "mlx5_0:1", each a rail; None takes all active ones.
        addresses: Numeric addresses of this host where sources knock; None is loopback, which only
            this host reaches. Whoever knocks must know the key in a target's descriptor.
        gid_index: Of every port; None takes RoCEv2 over IPv4, else over IPv6, else InfiniBand's.
        pkey: Partition key; must be in every port's table.
        traffic_class: Of RoCEv2 packets (DSCP << 2), for lossless queues of switches; 0 .. 255.
        service_level: 0 .. 15.
        mtu_bytes: 256 .. 4096, at most what the port runs with; None is that.
        timeout: An acknowledgement is awaited for 4.096 us * 2**timeout; 1 .. 31, 14 is 67 ms.
        retry_count: Retries before a path fails; 0 .. 7.
        relaxed_ordering: PCIe may place the bytes of a write in any order, which many hosts need
            for full speed. Arrivals come after their bytes all the same.
        near: Fabric for peers of this host, `local` or `cuda_ipc`; see docs/fabrics/mixed.md.
        near_threads: Its copying threads; None takes min(2, cores).

    Returns:
        The engine.

    Raises:
        ConfigError: No libibverbs, no such port, none active, or a port that cannot be set so.
        RailError: A device does not open.
    """
    for label, value, least, most in (
        ("gid_index", 0 if gid_index is None else gid_index, 0, 255),
        ("pkey", pkey, 1, 0xFFFF),
        ("traffic_class", traffic_class, 0, 255),
        ("service_level", service_level, 0, 15),
        ("timeout", timeout, 1, 31),
        ("retry_count", retry_count, 0, 7),
    ):
        if not least <= value <= most:
            raise ConfigError(f"{label}={value}: give {least} .. {most}")
    if devices is not None and not devices:
        raise ConfigError("devices: give at least one, or None for all active ports")
    return _native.open_verbs(
        f"verbs-{os.getpid()}-{next(_numbers)}" if name is None else name,
        [] if devices is None else list(devices),
        [] if addresses is None else list(addresses),
        -1 if gid_index is None else gid_index,
        pkey,
        traffic_class,
        service_level,
        0 if mtu_bytes is None else mtu_bytes,
        timeout,
        retry_count,
        relaxed_ordering,
        near_options(near, near_threads),
    )
