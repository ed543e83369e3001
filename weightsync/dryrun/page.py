"""`--report`: the dry run as one HTML file that opens from disk, with no network."""

from __future__ import annotations

import base64
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from weightsync.dryrun.advice import LIMITS, advice
from weightsync.dryrun.tables import side_text
from weightsync.dryrun.timeline import panels
from weightsync.errors import ConfigError
from weightsync.ir.tables import IntArray
from weightsync.outputs import check_output
from weightsync.units import format_bandwidth, format_bytes, format_seconds

if TYPE_CHECKING:
    from weightsync.dryrun.report import PlanReport

__all__ = ["check_page_target", "render_page", "write_page"]

_TEMPLATE: Final = "page.html.j2"
_MAX_ROWS: Final = 128  # rows or columns of a heat map; more ranks share one
_MAX_COLUMNS: Final = 256  # bars of a chart


def check_page_target(path: Path) -> None:
    """Check that a page can be written there, before anything is planned.

    Raises:
        ConfigError: Jinja2 is not installed, or as `check_output`.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise ConfigError(
            "--report needs Jinja2, which is not installed: pip install 'weightsync[plan]'"
        )
    check_output("--report", path, "plan.html")


def write_page(report: PlanReport, path: Path) -> None:
    """Write the page.

    Raises:
        ConfigError: Jinja2 is not installed, or the file cannot be written.
    """
    check_page_target(path)
    text = render_page(report)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--report {path} cannot be written: {error}", path=path) from error


def render_page(report: PlanReport) -> str:
    """Return the page; everything it needs is in it."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"seconds": format_seconds, "bytes": format_bytes}
    plan, prediction = report.plan, report.prediction
    matrix = report.traffic.pair_bytes
    return environment.get_template(_TEMPLATE).render(
        report=report,
        json=report.to_json(),
        trainer=side_text(report.trainer),
        rollout=side_text({k: v for k, v in report.rollout.items() if k != "replicas"}),
        advice=advice(report),
        limits=_limits(report),
        num_sources=len(plan.source.ranks),
        num_sinks=len(plan.sink.ranks),
        matrix=_heat(
            matrix.astype(np.float64),
            plan.source.ranks,
            plan.sink.ranks,
            "sum",
            "bytes",
        ),
        panels=[
            {
                "title": panel.title,
                "side": panel.side,
                **_heat(
                    panel.busy,
                    plan.source.ranks if panel.side == "source" else plan.sink.ranks,
                    [
                        format_seconds((step + 0.5) * prediction.predicted_s / panel.busy.shape[1])
                        for step in range(panel.busy.shape[1])
                    ],
                    "mean",
                    "share",
                    top=1.0,
                ),
            }
            for panel in panels(report)
        ],
        ticks=[
            {"at": 100 * k / 4, "text": format_seconds(prediction.predicted_s * k / 4)}
            for k in range(5)
        ],
        rails=[
            _rails("Trainer NICs: bytes sent", prediction.source_port_bytes, report),
            _rails("Rollout NICs: bytes received", prediction.sink_port_bytes, report),
            *_relays(report),
        ],
        memory=_memory(report),
    )


def _limits(report: PlanReport) -> list[dict[str, Any]]:
    """Bars of the limits, longest first; 100 percent is the largest number of the chart."""
    nominal, attainable = report.limits.by_name(), report.attainable.by_name()
    counted = report.limits.counted()
    most = max(*attainable.values(), *nominal.values(), report.prediction.predicted_s)
    found: list[dict[str, Any]] = [
        {
            "name": name.removesuffix("_s"),
            "what": LIMITS[name.removesuffix("_s")],
            "nominal": nominal[name],
            "attainable": attainable[name],
            "width": 100 * nominal[name] / most,
            "more": 100 * max(attainable[name] - nominal[name], 0) / most,
            "counts": name in counted,
            "limiting": name.removesuffix("_s") == report.limits.limiting,
        }
        for name in nominal
    ]
    found.sort(key=lambda bar: (not bar["counts"], -bar["nominal"]))
    return [{"predicted": 100 * report.prediction.predicted_s / most, "bars": found}]


def _relays(report: PlanReport) -> list[dict[str, Any]]:
    title, nbytes = (
        "Rollout NICs: bytes passed on to other nodes",
        report.prediction.relay_port_bytes,
    )
    return [_rails(title, nbytes, report)] if nbytes.any() else []


def _rails(title: str, port_bytes: IntArray, report: PlanReport) -> dict[str, Any]:
    """Bytes over each NIC; where there are many, the fullest of neighbours."""
    prediction = report.prediction
    rails = np.repeat(port_bytes / prediction.rails_per_port, prediction.rails_per_port)
    step = -(-len(rails) // _MAX_COLUMNS)
    per_node = report.cluster.nics_per_node
    most = float(rails.max(initial=0)) or 1.0
    bars = []
    for first in range(0, len(rails), step):
        group = rails[first : first + step]
        node, rail = divmod(first, per_node)
        name = f"node {node}, NIC {rail}"
        if len(group) > 1:
            name += f" and {len(group) - 1} more, the fullest of them"
        share = float(group.max()) / max(prediction.wire_s, 1e-12)
        bars.append(
            {
                "height": 100 * float(group.max()) / most,
                "text": f"{name}: {format_bytes(float(group.max()))}, "
                f"{format_bandwidth(share)} on average while bytes are on the wire",
            }
        )
    mean = float(rails.mean()) if len(rails) else 0.0
    return {
        "title": title,
        "bars": bars,
        "count": len(rails),
        "most": float(rails.max(initial=0)),
        "mean": mean,
    }


def _memory(report: PlanReport) -> dict[str, Any]:
    """Stacked bars of the fullest rank of each side and mode, beside a GPU's memory."""
    memory, room = report.memory, report.cluster.gpu_memory_bytes
    source, sink = int(memory.source_total.argmax()), int(memory.sink_total("staged").argmax())
    rows = [
        (
            "source",
            f"fullest of {len(memory.source_weights)} trainer ranks",
            int(memory.source_weights[source]),
            int(memory.source_staging[source]),
            "staging",
        ),
        (
            "sink, staged",
            "a second copy takes the new version while the old one serves",
            int(memory.sink_weights[sink]),
            int(memory.sink_staging[sink]),
            "second copy",
        ),
        (
            "sink, in place",
            "versions land in the live weights; generation pauses for the whole update",
            int(memory.sink_weights.max()),
            0,
            "",
        ),
    ]
    most = max(room, *(weights + more for _, _, weights, more, _ in rows))
    bars = [
        {
            "name": name,
            "what": what,
            "weights": weights,
            "more": more,
            "kind": kind,
            "width": 100 * weights / most,
            "more_width": 100 * more / most,
            "fits": weights + more <= room,
        }
        for name, what, weights, more, kind in rows
    ]
    return {"bars": bars, "room": room, "room_at": 100 * room / most}


def _heat(
    values: NDArray[np.float64],
    rows: Sequence[str],
    columns: Sequence[str],
    how: str,
    unit: str,
    *,
    top: float | None = None,
) -> dict[str, Any]:
    """A heat map for the page's script: one byte a cell, neighbours joined where there are many.

    Args:
        values: `(R, C)`.
        rows: Names, `(R,)`.
        columns: Names, `(C,)`; joined like the rows unless they are steps of time.
        how: "sum" or "mean" of what is joined.
        unit: "bytes" or "share"; the script spells them.
        top: Value of the darkest cell; None: the largest.
    """
    joined, row_names = _joined(values, rows, how)
    column_names = list(columns)
    if unit == "bytes":
        transposed, column_names = _joined(joined.T, columns, how)
        joined = transposed.T
    most = float(joined.max(initial=0)) if top is None else top
    cells = np.clip(np.rint(joined * (255 / (most or 1.0))), 0, 255).astype(np.uint8)
    return {
        "height": cells.shape[0],
        "width": cells.shape[1],
        "top": most,
        "unit": unit,
        "rows": row_names,
        "columns": column_names,
        "cells": base64.b64encode(cells.tobytes()).decode(),
    }


def _joined(
    values: NDArray[np.float64], names: Sequence[str], how: str
) -> tuple[NDArray[np.float64], list[str]]:
    """Join neighbouring rows until there are few enough."""
    step = -(-len(names) // _MAX_ROWS)
    if step == 1:
        return values, list(names)
    starts = np.arange(0, len(names), step)
    total = np.add.reduceat(values, starts, axis=0)
    ends = np.minimum(starts + step, len(names))
    if how == "mean":
        total = total / (ends - starts)[:, None]
    bounds = zip(starts.tolist(), ends.tolist(), strict=True)
    labels = [names[a] if b - a == 1 else f"{names[a]} to {names[b - 1]}" for a, b in bounds]
    return total, labels
