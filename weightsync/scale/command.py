"""`scripts/scale_model`: the command line of the scale model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from weightsync.execute import execute
from weightsync.scale.layouts import LAYOUTS, Counts
from weightsync.units import format_seconds

__all__ = ["main"]

_LAYOUT_HELP = (
    "May be repeated, or `all`: "
    + "; ".join(f"{layout.name}: {layout.what}" for layout in LAYOUTS.values())
    + "."
)


def command(
    sources: Annotated[int, typer.Option(help="Trainer ranks, a process and a host each.")] = 16,
    sinks: Annotated[int, typer.Option(help="Rollout ranks.")] = 8,
    replicas: Annotated[int, typer.Option(help="Among these.")] = 4,
    rails: Annotated[int, typer.Option(help="Shaped links of each rank.")] = 2,
    layout: Annotated[list[str] | None, typer.Option(help=_LAYOUT_HELP)] = None,
    repeats: Annotated[int, typer.Option(help="Versions that count; one more goes before.")] = 5,
    seconds: Annotated[float, typer.Option(help="Least physical limit of a layout.")] = 4.0,
    mbit: Annotated[int, typer.Option(help="Of a link, in each direction.")] = 100,
    broadcast: Annotated[
        bool, typer.Option(help="Run the first layout the usual way, too: needs torch, minutes.")
    ] = True,
    node_dedup: Annotated[
        bool, typer.Option("--node-dedup", help="What a node's ranks share crosses its rails once.")
    ] = False,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Constants. Default: stored, or measured.")
    ] = None,
    recalibrate: Annotated[
        bool, typer.Option("--recalibrate", help="Measure constants even if there are stored ones.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout, progress on stderr.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
) -> None:
    """Run the real thing in network namespaces behind shaped links, beside limit and prediction.

    Needs root, and iproute2. Everything it makes is in namespaces of its own and is removed.
    """

    def run(console: Console) -> dict[str, Any]:
        from weightsync.scale.run import ScaleOptions, run_scale
        from weightsync.scale.topology import Shape

        names = tuple(layout) if layout else ("paper",)
        options = ScaleOptions(
            counts=Counts(sources, sinks, replicas),
            rails=rails,
            layouts=tuple(LAYOUTS) if names == ("all",) else names,
            repeats=repeats,
            seconds=seconds,
            shape=Shape(mbit_per_s=mbit),
            broadcast=broadcast,
            node_dedup=node_dedup,
            calibration=calibration,
            recalibrate=recalibrate,
        )
        result = run_scale(options, lambda text: _say(console, text))
        _print(console, result)
        return result

    execute("scale_model", run, as_json=as_json, debug=debug)


def main() -> None:
    """Run it."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    app(prog_name="scripts/scale_model")


def _say(console: Console, text: str) -> None:
    console.print(Text(f"scale model: {text}", "dim"), soft_wrap=True)


def _print(console: Console, result: dict[str, Any]) -> None:
    scale = result["scale"]
    table = Table(
        title=f"{result['sources']} -> {result['sinks']} ranks, {result['rails']} rails of "
        f"{result['mbit_per_s']} Mbit/s each: NICs 1 : {scale['nic']:.0f}, bytes of a rank "
        f"1 : {scale['bytes']:.0f}",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    columns = ("layout", "limit", "raw sockets", "predicted", "measured", "of limit", "error")
    for name in columns:
        table.add_column(name, justify="left" if name == "layout" else "right", no_wrap=True)
    for one in result["layouts"]:
        times = (one["limit_s"], one["blast_s"], one["predicted_s"], _median(one["measured_s"]))
        table.add_row(
            one["layout"],
            *(format_seconds(seconds) for seconds in times),
            f"{one['ratio']:.3f}",
            f"{100 * one['prediction_error']:+.1f} %",
        )
    console.print(table)
    if result["broadcast_s"] is not None:
        console.print(
            "the usual way (gather to rank 0 over gloo, broadcast): "
            f"{format_seconds(result['broadcast_s'])}, {result['broadcast_ratio']:.1f} times as "
            "long",
            highlight=False,
        )
    console.print(f"verified: {'yes' if result['verified'] else 'NO'}", highlight=False)
    for one in result["layouts"]:
        for problem in [*one["problems"], *one["links"]["wrong"]]:
            console.print(Text(f"{one['layout']}: {problem}", "bold red"))


def _median(values: list[float]) -> float:
    from statistics import median

    return median(values)
