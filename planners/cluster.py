"""What a cluster can do: rates, sizes and overheads that limits and predictions are made of.

A description is read from a mapping with exactly these keys, such as a file of `configs/cluster/`,
whose comments say where each number comes from.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import numpy as np

from weightsync.errors import ConfigError
from weightsync.ir.tables import IntArray
from weightsync.units import GB

__all__ = ["Cluster", "Quality", "Rate"]

Quality = Literal["nominal", "attainable"]

_BITS: Final = 8


@dataclasses.dataclass(frozen=True)
class Rate:
    """A rate as the data sheet says it, and as well-made software was seen to reach.

    Attributes:
        nominal, attainable: In the unit of the field; `0 < attainable <= nominal`.
    """

    nominal: float
    attainable: float

    def of(self, quality: Quality) -> float:
        """Return one of the two."""
        return self.nominal if quality == "nominal" else self.attainable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """One kind of node and the network between nodes; trainers and rollouts have the same kind.

    Ranks of a side fill nodes one after the other: rank r is GPU `r % gpus_per_node` of node
    `r // gpus_per_node`. Either each GPU has `nics_per_node / gpus_per_node` rails of its own, or
    `gpus_per_node / nics_per_node` GPUs share one.

    Attributes:
        name: For reports.
        gpus_per_node, nics_per_node: One must divide the other.
        nic_gbit_per_s: Of one NIC, in each direction.
        ecmp_fraction: What is left of the attainable NIC rate when flows collide on uplinks; 1 on
            a fabric that does not hash flows.
        is_full_duplex: Whether a NIC sends and receives at full rate at once.
        is_gpu_direct: Whether NICs read and write GPU memory. If not, bytes pass through host
            memory and PCIe on both sides.
        cut_gbit_per_s: Narrowest cut between the trainers and the rollouts; None where the network
            between them does not block.
        h2d_gb_per_s: Host to GPU (or back), of one GPU.
        host_memory_gb_per_s: Weights that pass through the memory of one host, in either
            direction.
        nvlink_gb_per_s: GPU to GPU inside a node, of one GPU in each direction; the PCIe rate where
            there is no NVLink.
        hbm_gb_per_s: Memory of one GPU, bytes read plus bytes written.
        encode_gb_per_s: Packing, casting or quantizing on one GPU, bytes read plus bytes written.
            A kernel that is bound by memory needs `bytes / hbm`: 3 bytes per parameter from BF16
            to FP8 (frontier.md 2.4).
        digest_gb_per_s: Bytes digested by one rank.
        write_overhead_s: Time of one posting thread for one write (`o` of LogGP).
        posting_threads: Of one rank.
        message_gap_s: Least time between two writes on one NIC (`g` of LogGP).
        bucket_overhead_s: Fixed time of one bucket in each stage of the executor.
        latency_s: From a write leaving one NIC to its arrival, without queues.
        control_round_trip_s: Coordinator to member and back.
        control_message_s: Work on one message of the process that holds its stream: the
            coordinator, or one of its gateways.
        control_core_s: The coordinator's own part of it, where gateways do the other.
        journal_s: Until a decision is on the coordinator's disk.
        gpu_memory_bytes: Of one GPU.

    Raises:
        ConfigError: A value that describes no cluster.
    """

    name: str
    gpus_per_node: int
    nics_per_node: int
    nic_gbit_per_s: Rate
    ecmp_fraction: float
    is_full_duplex: bool
    is_gpu_direct: bool
    cut_gbit_per_s: Rate | None
    h2d_gb_per_s: Rate
    host_memory_gb_per_s: Rate
    nvlink_gb_per_s: Rate
    hbm_gb_per_s: Rate
    encode_gb_per_s: Rate
    digest_gb_per_s: Rate
    write_overhead_s: float
    posting_threads: int
    message_gap_s: float
    bucket_overhead_s: float
    latency_s: float
    control_round_trip_s: float
    control_message_s: float
    control_core_s: float
    journal_s: float
    gpu_memory_bytes: int

    def __post_init__(self) -> None:
        gpus, nics = self.gpus_per_node, self.nics_per_node
        if max(gpus, nics) % min(gpus, nics):
            raise ConfigError(
                f"cluster {self.name}: gpus_per_node={gpus} and nics_per_node={nics}: one must be "
                "a multiple of the other, so that each GPU knows its rails"
            )
        if not 0 < self.ecmp_fraction <= 1:
            raise ConfigError(
                f"cluster {self.name}: ecmp_fraction={self.ecmp_fraction} is not above 0 and at "
                "most 1; write 1 for a fabric that does not hash flows"
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, where: str) -> Cluster:
        """Read a description; every key must be there and none besides.

        Args:
            values: Keys as the attributes; a rate is a mapping `{nominal, attainable}`.
            where: File or option that the mapping came from, for messages.

        Raises:
            ConfigError: A missing or unknown key, or a value of the wrong kind; names both.
        """
        kinds = {f.name: str(f.type) for f in dataclasses.fields(cls)}
        _check_keys(values, set(kinds), where, "")
        read = {key: _READERS[kind](values[key], where, key) for key, kind in kinds.items()}
        return cls(**read)

    def port_of(self, num_ranks: int) -> IntArray:
        """Return the port of each rank of one side: all rails of a GPU, or the NIC it shares."""
        rank = np.arange(num_ranks)
        node, gpu = rank // self.gpus_per_node, rank % self.gpus_per_node
        sharing = self.gpus_per_node // self.ports_per_node
        port: IntArray = node * self.ports_per_node + gpu // sharing
        return port

    def node_of(self, num_ranks: int) -> IntArray:
        """Return the node of each rank of one side."""
        node: IntArray = np.arange(num_ranks) // self.gpus_per_node
        return node

    @property
    def ports_per_node(self) -> int:
        """Ports of one node: its GPUs, or the NICs they share."""
        return min(self.gpus_per_node, self.nics_per_node)

    @property
    def rails_per_port(self) -> int:
        """NICs of one port."""
        return max(self.nics_per_node // self.gpus_per_node, 1)

    def port_bytes_per_s(self, quality: Quality) -> float:
        """Return the rate of one port in one direction."""
        rate = self.nic_gbit_per_s.of(quality) * GB / _BITS * self.rails_per_port
        return rate * self.ecmp_fraction if quality == "attainable" else rate

    def cut_bytes_per_s(self, quality: Quality) -> float:
        """Return the rate between trainers and rollouts; infinite where nothing blocks."""
        if self.cut_gbit_per_s is None:
            return math.inf
        return self.cut_gbit_per_s.of(quality) * GB / _BITS

    @property
    def write_gap_s(self) -> float:
        """Least time between two writes of one rank, whichever of threads and NICs is slower."""
        return max(
            self.write_overhead_s / self.posting_threads, self.message_gap_s / self.rails_per_port
        )


def _check_keys(values: Any, wanted: set[str], where: str, inside: str) -> None:
    if not isinstance(values, Mapping):
        form = "{nominal: RATE, attainable: RATE}" if inside else "a mapping"
        raise ConfigError(f"{where}: {inside or 'a cluster'} must be {form}, not {values!r}")
    found = {str(key) for key in values}
    prefix = f"{inside}." if inside else ""
    for problem, keys in (("missing", wanted - found), ("unknown", found - wanted)):
        if keys:
            names = ", ".join(prefix + key for key in sorted(keys))
            raise ConfigError(
                f"{where}: {problem} key {names}; a cluster has exactly the keys of "
                "weightsync.planners.cluster.Cluster"
            )


def _number(value: Any, where: str, key: str, *, least: float = 0.0) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{where}: {key}={value!r} is not a number")
    if value < least:
        raise ConfigError(f"{where}: {key}={value!r} is below {least:g}")
    return float(value)


def _count(value: Any, where: str, key: str) -> int:
    number = _number(value, where, key, least=1)
    if number != int(number):
        raise ConfigError(f"{where}: {key}={value!r} is not a whole number")
    return int(number)


def _flag(value: Any, where: str, key: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{where}: {key}={value!r} is neither true nor false")
    return value


def _text(value: Any, where: str, key: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: {key}={value!r} is not a name")
    return value


def _rate(value: Any, where: str, key: str) -> Rate:
    _check_keys(value, {"nominal", "attainable"}, where, key)
    nominal, attainable = (
        _number(value[name], where, f"{key}.{name}") for name in ("nominal", "attainable")
    )
    if not 0 < attainable <= nominal:
        raise ConfigError(
            f"{where}: {key}: attainable={attainable:g} must be above 0 and at most "
            f"nominal={nominal:g}; change both"
        )
    return Rate(nominal, attainable)


def _maybe_rate(value: Any, where: str, key: str) -> Rate | None:
    return None if value is None else _rate(value, where, key)


_READERS: Final[dict[str, Callable[[Any, str, str], Any]]] = {
    "str": _text,
    "int": _count,
    "float": _number,
    "bool": _flag,
    "Rate": _rate,
    "Rate | None": _maybe_rate,
}
