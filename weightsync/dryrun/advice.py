"""What the limits mean, and what to change to go faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from weightsync.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from weightsync.dryrun.report import PlanReport

__all__ = ["LIMITS", "advice"]

LIMITS: Final[dict[str, str]] = {
    "receiver": "the busiest sink's NICs take in all that it needs",
    "receiver_dedup": "the busiest node's NICs take in what its sinks need, once for all of them",
    "unique": "what all GPUs of a replica need, counted once, over all their NICs",
    "source": "every byte leaves some holder once",
    "sender": "holders send every copy that the plan sends",
    "cut": "the narrowest network between trainers and rollouts",
    "h2d": "PCIe of one trainer GPU",
    "host_memory": "the memory of one host",
    "nvlink": "links inside a node of sinks pass on what came in once",
    "encode": "packing, casting and quantizing on one source",
    "digest": "digests on one rank",
    "message": "writes of one source, each at its fixed cost",
}
"""What each limit is about, by name."""

_MANY: Final = 1.15  # a number this much larger than another is worth a word


def advice(report: PlanReport) -> list[str]:
    """Say what limits an update and what would make it faster; one sentence or two each."""
    found = [*_fixed(report), *_limiting(report), *_memory(report), *_gateways(report)]
    return found if _is_fixed(report) else [*found, *_waiting(report)]


def _is_fixed(report: PlanReport) -> bool:
    return report.fixed_s is not None and report.fixed_s > report.prediction.predicted_s / 2


def _fixed(report: PlanReport) -> Iterator[str]:
    if report.fixed_s is not None and _is_fixed(report):
        prediction = report.prediction
        messages_s = prediction.open_s + prediction.commit_s
        yield (
            "Per-write, per-bucket and per-message overhead, not bandwidth, limits this update: if "
            f"its bytes cost nothing, it would take {format_seconds(report.fixed_s)}, not "
            f"{format_seconds(prediction.predicted_s)}. {format_seconds(messages_s)} of that are "
            f"messages between the coordinator and {_num_ranks(report):,} ranks and its journal, "
            "before the first write and after the last; fewer ranks need fewer, but each of them "
            "moves more bytes. Compare degrees by dry runs."
        )


def _limiting(report: PlanReport) -> Iterator[str]:
    limits, name = report.limits, report.limits.limiting
    seconds = format_seconds(limits.physical_limit_s)
    is_fixed = _is_fixed(report)
    ways = "" if is_fixed and name != "message" else " " + _WAYS_OUT[name](report)
    yield (
        f"The physical limit is that of {name}: {LIMITS[name]}, in {seconds} at the rates of data "
        f"sheets.{ways}"
    )
    if is_fixed:
        return
    counted = {key.removesuffix("_s"): value for key, value in limits.counted().items()}
    del counted[name]
    following = max(counted, key=lambda key: counted[key])
    if counted[following] > limits.physical_limit_s / _MANY:
        yield (
            f"Close to it is {following} with {format_seconds(counted[following])}: "
            f"{LIMITS[following]}. Change both."
        )
    dedup = limits.receiver_dedup_s
    # Where the plan was free to, it has worked out that nothing is gained.
    is_told_not_to = report.plan.options.node_dedup == "off"
    if name == "receiver" and limits.receiver_s > dedup * _MANY and is_told_not_to:
        yield (
            "GPUs of one node need much in common. Sent once to each node and passed on inside it, "
            f"NICs would need {format_seconds(dedup)}: rollout.node_dedup=auto does so where that "
            "is faster. This plan sends it to each GPU."
        )


def _waiting(report: PlanReport) -> Iterator[str]:
    prediction, attainable = report.prediction, report.attainable.physical_limit_s
    if prediction.wire_s > attainable * _MANY:
        yield (
            f"Bytes are predicted to be on the wire {prediction.wire_s / attainable:.2f} times as "
            f"long as the attainable limit ({format_seconds(attainable)}): stages, or senders of "
            "one sink, wait for each other. Smaller transport.bucket_bytes mix them more finely; a "
            "larger transport.staging_bytes lets more of them run at once."
        )
    if prediction.commit_s > prediction.predicted_s * (_MANY - 1):
        yield (
            f"The decision takes {format_seconds(prediction.commit_s)} of it: the coordinator "
            f"hears and tells {_num_ranks(report):,} ranks several times, at "
            f"{format_seconds(report.cluster.control_message_s)} a message "
            "(cluster.control_message_s) and "
            f"{format_seconds(report.cluster.control_round_trip_s)} a round trip."
        )


def _num_ranks(report: PlanReport) -> int:
    return len(report.plan.source.ranks) + len(report.plan.sink.ranks)


def _gateways(report: PlanReport) -> Iterator[str]:
    if number := report.prediction.num_gateways:
        yield (
            f"Predicted with {number} gateways, processes that hold the ranks' connections for the "
            f"coordinator: start the job with gateways={number}."
        )


def _memory(report: PlanReport) -> Iterator[str]:
    room = report.cluster.gpu_memory_bytes
    staged = int(report.memory.sink_total("staged").max())
    served = int(report.memory.sink_weights.max())
    if served > room:
        yield (
            f"A sink's weights ({format_bytes(served)}) exceed a GPU of {report.cluster.name} "
            f"({format_bytes(room)}): raise rollout.tp or rollout.ep, or set rollout.encoding."
        )
    elif report.rollout["mode"] == "staged" and staged > room:
        yield (
            f"Staged mode needs {format_bytes(staged)} on a sink, a GPU of {report.cluster.name} "
            f"has {format_bytes(room)}: raise rollout.tp or rollout.ep, or take "
            "rollout.mode=in_place and its pause."
        )
    source = int(report.memory.source_total.max())
    if source > room and not report.trainer["offloaded"]:
        yield (
            f"A source needs {format_bytes(source)}, a GPU of {report.cluster.name} has "
            f"{format_bytes(room)}: cut the model over more ranks, or say trainer.offloaded=true."
        )


def _fewer_bytes(report: PlanReport) -> str:
    if report.rollout.get("encoding") is not None or report.rollout.get("quantized"):
        return ""
    return " rollout.encoding (fp8_block; mxfp4 for gpt-oss) sends far fewer bytes."


def _copies(report: PlanReport) -> str:
    """Name the trainer's degree of copies, if it has one."""
    keys = () if report.trainer["kind"] == "zero3" else ("replicate", "dp")  # its dp cuts
    return next((f" (trainer.{key})" for key in keys if key in report.trainer), "")


def _receiver(report: PlanReport) -> str:
    return (
        "Faster or more NICs at the rollouts, or replicas of more ranks (rollout.tp, for experts "
        "rollout.ep), so that each needs less; more trainers do not help." + _fewer_bytes(report)
    )


def _source(report: PlanReport) -> str:
    return (
        f"Some tensors are held by too few ranks: let more hold them{_copies(report)}, or cut them "
        "over more ranks." + _fewer_bytes(report)
    )


def _sender(report: PlanReport) -> str:
    ways = f"more ranks that hold the same{_copies(report)} or more trainer NICs"
    if report.rollout["replicas"] > 1:
        ways += ", fewer replicas at a time, or relays between them (rollout.relays=on)"
    return f"The sinks together need more than its holders can send sooner: {ways}." + _fewer_bytes(
        report
    )


def _cut(report: PlanReport) -> str:
    return "A wider network between trainers and rollouts (cluster.cut_gbit_per_s)." + _fewer_bytes(
        report
    )


def _h2d(report: PlanReport) -> str:
    if report.trainer["offloaded"]:
        return "Weights come up from host memory: keep them on the GPU, or use more source ranks."
    return "NICs do not reach GPU memory here: GPUDirect (cluster.is_gpu_direct) avoids the copy."


def _host_memory(report: PlanReport) -> str:
    return "Bytes pass through host memory: keep weights on GPUs, use GPUDirect, or more hosts."


def _nvlink(report: PlanReport) -> str:
    return (
        "What a node shares is passed on inside it, more slowly than NICs could bring it: "
        "rollout.node_dedup=off."
    )


def _encode(report: PlanReport) -> str:
    return "Cut the model over more trainer ranks, so that each packs and encodes less."


def _digest(report: PlanReport) -> str:
    return "Replicas or trainers of more ranks, so that each digests less."


def _message(report: PlanReport) -> str:
    return (
        "Writes are so small that per-write overhead, not bandwidth, limits: fewer or larger "
        "shards (lower degrees), or cluster.posting_threads."
    )


_WAYS_OUT: Final[dict[str, Callable[[PlanReport], str]]] = {
    "receiver": _receiver,
    "receiver_dedup": _receiver,
    "source": _source,
    "sender": _sender,
    "cut": _cut,
    "h2d": _h2d,
    "host_memory": _host_memory,
    "nvlink": _nvlink,
    "encode": _encode,
    "digest": _digest,
    "message": _message,
}
