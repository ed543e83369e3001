"""Measure the constants of limits and predictions on a running fleet.

What can be measured alone is measured alone: rates, latency, a round trip, a decision on disk. Two
constants are fixed costs of the executor and of the protocol that never occur alone: for these,
jobs of hardly any bytes are run, and the constant is what makes the prediction of such a job equal
its measured time. No other layout has a part in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, Final

from weightsync.calibrate import rates
from weightsync.errors import ConfigError, IntegrityError
from weightsync.fleet.fleet import Fleet, JobSpec
from weightsync.ir.plan import Plan, PlanOptions
from weightsync.planners.cluster import Cluster, Rate
from weightsync.planners.predict import predict
from weightsync.units import GB, KIB, MIB

__all__ = ["Calibration", "Wiring", "calibrate", "solve"]

_PINGS: Final = 200
_ROUND_TRIPS: Final = 50
_SMALL_WRITES: Final = 4096
_VERSIONS: Final = 5
_BIG_WRITE: Final = 512 * KIB
_BITS: Final = 8

# A dense model of 0.4 MB: what a job of it takes are messages and fixed costs.
_TINY: Final[dict[str, Any]] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": False,
}
_MANY_BUCKET_BYTES: Final = 2 * KIB
_CORE_SHARE: Final = 0.3  # of a message's cost that gateways do not take off the coordinator


_HOW: Final = {
    "name": "of this calibration",
    "gpus_per_node": "ranks of a node, as they were told",
    "nics_per_node": "addresses of all ranks of a node",
    "ecmp_fraction": "one path between any two hosts",
    "is_full_duplex": "not measured",
    "is_gpu_direct": "weights lie in the memory that the fabric reads and writes",
    "cut_gbit_per_s": "no narrower place is known",
    "h2d_gb_per_s": "not used: nothing crosses PCIe; as a copy",
    "host_memory_gb_per_s": "not used: the fabric reaches the weights; as a copy",
    "nvlink_gb_per_s": "between ranks of a node: a copy in host memory",
    "hbm_gb_per_s": "measured: copy, bytes read plus written; nominal: the best run",
    "encode_gb_per_s": "measured: packing of runs of 2 KiB, bytes read plus written",
    "digest_gb_per_s": "measured: digest kernel on one thread",
    "write_overhead_s": f"measured: {_SMALL_WRITES} writes of 8 bytes",
    "posting_threads": "the executor's",
    "message_gap_s": "sockets have no limit of their own",
    "latency_s": f"measured: half of the median of {_PINGS} rounds of 8 bytes",
    "control_round_trip_s": f"measured: median of {_ROUND_TRIPS} calls of the coordinator",
    "journal_s": "measured: one record of the journal",
    "gpu_memory_bytes": "of the host, shared by its ranks",
}


@dataclasses.dataclass(frozen=True)
class Wiring:
    """What is known of the hosts without measuring.

    Attributes:
        name: Of the cluster.
        ranks_per_node: Ranks that form a node.
        rails: NICs of each rank.
        nic_gbit_per_s: Nominal rate of one; None where nobody says: then what was measured.
        nic_source: Where that number comes from.
        memory_bytes: Of one rank.
        wire_bytes: To measure the rate of a rank's rails with.
    """

    name: str
    ranks_per_node: int
    rails: int
    nic_gbit_per_s: float | None
    nic_source: str
    memory_bytes: int
    wire_bytes: int = 64 * MIB


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Measured constants.

    Attributes:
        cluster: All of them, as predictions take them.
        how: How each came about, by the name of the cluster's field.
    """

    cluster: Cluster
    how: Mapping[str, str]


def calibrate(
    fleet: Fleet, wiring: Wiring, on_step: Callable[[str], None] = lambda text: None
) -> Calibration:
    """Measure everything; some 10 to 30 s.

    Args:
        fleet: Started; needs a source and a sink. Messages are measured with all of its processes.
        wiring: What is known.
        on_step: Called with what is measured next.

    Raises:
        WeightSyncError: A process failed.
    """
    cluster = _alone(fleet, wiring, on_step)
    on_step("many buckets")
    tiny = _tiny(1, 1, PlanOptions())
    few_s = _update_s(fleet, tiny)
    many = _tiny(1, 1, PlanOptions(bucket_bytes=_MANY_BUCKET_BYTES, chunk_bytes=_MANY_BUCKET_BYTES))
    many_s = _update_s(fleet, many)
    # Messages of both jobs are the same, so the difference is of buckets alone.
    plans = tiny.plan(), many.plan()
    overhead_s = solve(
        lambda value: _difference(cluster, plans, bucket_overhead_s=value), many_s - few_s
    )
    cluster = dataclasses.replace(cluster, bucket_overhead_s=overhead_s)
    num_more = len(plans[1].buckets) - len(plans[0].buckets)
    on_step("a fleet without bytes")
    spec = _tiny(len(fleet.sources), len(fleet.sinks), PlanOptions())
    plan, seconds = spec.plan(), _update_s(fleet, spec)
    message_s = solve(
        lambda value: (
            predict(plan, dataclasses.replace(cluster, control_message_s=value)).predicted_s
        ),
        seconds,
    )
    how = {
        **_HOW,
        "nic_gbit_per_s": _nic_text(wiring),
        "bucket_overhead_s": f"fitted: {num_more} buckets more from one source to one sink",
        "control_message_s": f"fitted: {len(fleet.sources)} sources publish hardly any bytes to "
        f"{len(fleet.sinks)} sinks in {seconds * 1e3:.1f} ms",
        "control_core_s": f"{_CORE_SHARE} of control_message_s, as scripts/bench/control.py finds",
    }
    cluster = dataclasses.replace(
        cluster, control_message_s=message_s, control_core_s=_CORE_SHARE * message_s
    )
    return Calibration(cluster, how)


def _nic_text(wiring: Wiring) -> str:
    rate = "payload of one source to one sink"
    if wiring.nic_gbit_per_s is None:
        return f"measured: {rate}, no better number is known"
    return f"{wiring.nic_source}; attainable: {rate}"


def _alone(fleet: Fleet, wiring: Wiring, on_step: Callable[[str], None]) -> Cluster:
    """Measure what can be measured alone; the two constants that are fitted are 0."""
    on_step("copies and digests")
    copy, pack, digest = rates.copy_rate(), rates.pack_rate(), rates.digest_rate()
    on_step("a decision on disk")
    journal_s = rates.journal_s(fleet.folder)
    on_step("the wire")
    nic, write_overhead_s, latency_s = _wire(fleet, wiring)
    on_step("messages")
    tiny = _tiny(1, 1, PlanOptions())
    url = fleet.open_job(tiny)
    trips = fleet.do(fleet.sources[0], "round_trip", job=url, count=_ROUND_TRIPS)["seconds"]
    fleet.close_job()
    return Cluster(
        name=wiring.name,
        gpus_per_node=wiring.ranks_per_node,
        nics_per_node=wiring.ranks_per_node * wiring.rails,
        nic_gbit_per_s=nic,
        ecmp_fraction=1.0,
        is_full_duplex=True,
        is_gpu_direct=True,
        cut_gbit_per_s=None,
        h2d_gb_per_s=copy,
        host_memory_gb_per_s=copy,
        nvlink_gb_per_s=Rate(copy.nominal / 2, copy.attainable / 2),
        hbm_gb_per_s=copy,
        encode_gb_per_s=pack,
        digest_gb_per_s=digest,
        write_overhead_s=write_overhead_s,
        posting_threads=1,
        message_gap_s=0.0,
        bucket_overhead_s=0.0,
        latency_s=latency_s,
        control_round_trip_s=median(trips),
        control_message_s=0.0,
        control_core_s=0.0,
        journal_s=journal_s,
        gpu_memory_bytes=wiring.memory_bytes,
    )


def solve(predicted: Callable[[float], float], wanted: float, most: float = 1.0) -> float:
    """Return the constant at which a prediction that grows with it is `wanted`.

    Args:
        predicted: The prediction as a function of the constant, in seconds.
        wanted: The measured time.
        most: Largest constant.

    Returns:
        A number from 0 to `most`, to 0.1 us; 0 where even free would be predicted slower.

    Raises:
        ConfigError: Even `most` is predicted faster than was measured.
    """
    low, high = 0.0, most
    if predicted(low) >= wanted:
        return low
    if predicted(high) < wanted:
        raise ConfigError(
            f"{wanted:.3f} s were measured, which no constant up to {most:g} s explains; is this "
            "machine busy with other work?"
        )
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (middle, high) if predicted(middle) < wanted else (low, middle)
    return (low + high) / 2


def _difference(cluster: Cluster, plans: tuple[Plan, Plan], **constants: float) -> float:
    few, many = (
        predict(plan, dataclasses.replace(cluster, **constants)).predicted_s  # type: ignore[arg-type]
        for plan in plans
    )
    return many - few


def _update_s(fleet: Fleet, spec: JobSpec) -> float:
    """Return the median time of some versions of a job; the first one binds and is left out."""
    fleet.open_job(spec)
    took = [fleet.publish(version).seconds for version in range(1, _VERSIONS + 2)]
    problems = fleet.check()
    fleet.close_job()
    if problems:
        raise IntegrityError(f"calibration moved wrong bytes: {problems[0]}")
    return median(took[1:])


def _wire(fleet: Fleet, wiring: Wiring) -> tuple[Rate, float, float]:
    """Return the rate of a NIC, the cost of a small write, and the latency."""
    source, sink = fleet.sources[0], fleet.sinks[0]
    rows = max(2, wiring.wire_bytes // _BIG_WRITE)
    rates_ = []
    for _ in range(2):
        seconds = _written(fleet, rows, _BIG_WRITE)
        rates_.append(rows * _BIG_WRITE * _BITS / seconds / GB / wiring.rails)
    attained = median(rates_)
    nominal = attained if wiring.nic_gbit_per_s is None else wiring.nic_gbit_per_s
    small_s = median(_written(fleet, _SMALL_WRITES, 8) for _ in range(3))
    exported = fleet.do(sink, "export", nbytes=4096, rows=1)["descriptor"]
    answers = fleet.do(source, "link", descriptor=exported, nbytes=4096)["descriptor"]
    sink.send("pong", descriptor=answers, count=_PINGS)
    fleet.wait(sink, "armed")
    pings = fleet.do(source, "ping", count=_PINGS)["seconds"]
    fleet.wait(sink, "pong")
    fleet.do(source, "unlink")
    fleet.do(sink, "unexport")
    latency_s = median(pings) / 2
    per_write_s = max(0.0, small_s - latency_s) / _SMALL_WRITES
    return Rate(nominal, min(attained, nominal)), per_write_s, latency_s


def _written(fleet: Fleet, rows: int, nbytes: int) -> float:
    """Return the seconds that `rows` writes of `nbytes` take from one source to one sink."""
    source, sink = fleet.sources[0], fleet.sinks[0]
    exported = fleet.do(sink, "export", nbytes=rows * nbytes, rows=rows)["descriptor"]
    fleet.do(source, "link", descriptor=exported, nbytes=rows * nbytes)
    sink.send("receive")
    fleet.wait(sink, "armed")
    source.send("write", rows=rows, nbytes=nbytes)
    started = float(fleet.wait(source, "write")["start"])
    ended = float(fleet.wait(sink, "receive")["end"])
    fleet.do(source, "unlink")
    fleet.do(sink, "unexport")
    return ended - started


def _tiny(sources: int, sinks: int, options: PlanOptions) -> JobSpec:
    return JobSpec(
        source={
            "rule": "fsdp2",
            "model": _TINY,
            "degrees": {"fsdp": sources, "dtype": "BF16"},
        },
        sink={"rule": "vllm", "model": _TINY, "degrees": {"tp": 1}},
        sources=sources,
        replicas=sinks,
        ranks=1,
        options=options,
    )
