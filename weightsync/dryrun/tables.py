"""A dry run for people: what moves, what limits it, what is predicted, and how to go faster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from weightsync.dryrun.advice import LIMITS, advice
from weightsync.dryrun.sides import is_neutral
from weightsync.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from weightsync.dryrun.report import PlanReport
    from weightsync.ir.tables import IntArray

__all__ = ["print_report", "side_text"]

_WORDS: Final = ("dtype", "encoding", "mode")


def print_report(report: PlanReport, console: Console) -> None:
    """Print a report as tables; every number has a unit and a word of explanation."""
    sink = {k: v for k, v in report.rollout.items() if k != "replicas"}
    replicas = report.rollout["replicas"]
    for name, value in (
        ("model", report.model),
        ("trainer", side_text(report.trainer)),
        ("rollout", f"{replicas} {'replica' if replicas == 1 else 'replicas'}: {side_text(sink)}"),
        ("cluster", report.cluster.name),
    ):
        console.print(Text.assemble((f"{name:<9}", "bold"), value), soft_wrap=True)
    for table in (_moves(report), _limits(report), _prediction(report), _memory(report)):
        console.print(table)
    for line in advice(report):
        console.print(Text("- " + line), soft_wrap=True)
    console.print(Text(f"plan digest {report.plan.digest}", "dim"), soft_wrap=True)


def side_text(values: Any) -> str:
    """One side in a line: its kind, its ranks and what is not as usual."""
    shown = [
        f"{key}={value}"
        for key, value in values.items()
        if key not in ("kind", "ranks") and "padding" not in key and not is_neutral(value)
        if key in _WORDS or not isinstance(value, str | list)
    ]
    ranks = values["ranks"]
    return f"{values['kind']} on {ranks} {'rank' if ranks == 1 else 'ranks'} " + " ".join(shown)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for name in columns:
        table.add_column(
            name,
            justify="left" if name in ("", "what") else "right",
            no_wrap=name != "what",
            style="dim" if name == "what" else "",
        )
    return table


def _moves(report: PlanReport) -> Table:
    plan = report.plan
    table = _table("What one version moves", "", "number", "what")
    total = format_bytes(int(plan.buckets.nbytes.sum()))
    table.add_row("bytes", total, "received by all sinks together")
    once = format_bytes(report.traffic.unique_bytes)
    table.add_row("unique bytes", once, "the same, what several sinks need is counted once")
    table.add_row("per source", _range(plan.bytes_per_source()), "sent by one trainer rank")
    table.add_row("per sink", _range(plan.bytes_per_sink()), "received by one rollout rank")
    if plan.num_direct < len(plan.buckets):
        passed_on = format_bytes(int(plan.bytes_per_forwarder().sum()))
        table.add_row("passed on", passed_on, "of all bytes: what sinks send to other sinks")
        over_nics = format_bytes(report.prediction.nic_bytes)
        table.add_row("over NICs", over_nics, "of all bytes: what does not stay inside a node")
    table.add_row("tensors", f"{len(plan.sink.tensors):,}", "of the checkpoint, scales included")
    table.add_row("regions", f"{plan.num_sent:,}", "strided copies between two ranks' memory")
    table.add_row("writes", f"{len(plan.chunks):,}", "one contiguous range at a sink each")
    table.add_row("buckets", f"{len(plan.buckets):,}", "staged and verified together")
    if len(plan.encoded.table):
        tensors = f"{len(plan.encoded.table):,}"
        table.add_row("encoded", tensors, "tensors that sources quantize on the way")
    seconds = format_seconds(report.plan_seconds)
    table.add_row("planned in", seconds, "measured here; each sink byte is written once, proven")
    return table


def _range(values: IntArray) -> str:
    low, high = format_bytes(int(values.min())), format_bytes(int(values.max()))
    return low if low == high else f"{low} to {high}"


def _limits(report: PlanReport) -> Table:
    """All limits; the one that counts is marked, those of other strategies are bracketed."""
    title = "Physical limits: seconds that each resource needs at least"
    table = _table(title, "", "data sheet", "attainable", "what")
    counted, attainable = report.limits.counted(), report.attainable.by_name()
    for name, seconds in report.limits.by_name().items():
        short = name.removesuffix("_s")
        is_limiting = short == report.limits.limiting
        values = seconds, attainable[name]
        cells = [format_seconds(value) if value else "-" for value in values]
        if name not in counted:
            cells = [f"({cell})" for cell in cells]  # of a strategy that the plan does not use
        style = "bold" if is_limiting else ""
        table.add_row(("> " if is_limiting else "  ") + short, *cells, LIMITS[short], style=style)
    return table


def _prediction(report: PlanReport) -> Table:
    prediction = report.prediction
    table = _table("Prediction of a model, not a measurement; attainable rates", "", "time", "what")
    limit = format_seconds(report.limits.physical_limit_s)
    attainable = format_seconds(report.attainable.physical_limit_s)
    for name, seconds, what in (
        ("update", prediction.predicted_s, f"all published to all committed; limit {limit}"),
        ("- open", prediction.open_s, "messages to and from all ranks before the first write"),
        ("- on the wire", prediction.wire_s, f"first to last byte; limit {attainable} attainable"),
        ("- commit", prediction.commit_s, "votes and decision after the last byte was verified"),
        ("pause", prediction.pause_s, _pause_text(report)),
        ("fixed costs", report.fixed_s, "the update if its bytes cost nothing"),
    ):
        if seconds is not None:
            table.add_row(name, format_seconds(seconds), what)
    table.add_row("efficiency", f"{100 * report.efficiency:.0f} %", "limit over predicted update")
    return table


def _pause_text(report: PlanReport) -> str:
    if report.rollout["mode"] == "in_place":
        return "engines stand still for the whole update"
    return "engines stand still: staged weights become the live ones"


def _memory(report: PlanReport) -> Table:
    memory = report.memory
    table = _table("Memory of one rank, the largest of each side", "", "bytes", "what")
    room = format_bytes(report.cluster.gpu_memory_bytes)
    for name, values, what in (
        ("source weights", memory.source_weights, "what the plan reads from"),
        ("source staging", memory.source_staging, "packed buckets on their way"),
        ("sink weights", memory.sink_weights, f"what is served; a GPU has {room}"),
        ("sink, staged", memory.sink_total("staged"), "with a second copy, where versions land"),
        ("sink, in place", memory.sink_total("in_place"), "no copy, but a long pause"),
    ):
        table.add_row(name, format_bytes(int(values.max())), what)
    return table
