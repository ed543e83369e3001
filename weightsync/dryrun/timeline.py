"""How busy ranks and ports are over the predicted time: pictures of the report, and the trace."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from weightsync.ir.tables import IntArray
from weightsync.planners.predict import STAGES
from weightsync.telemetry.trace import Trace
from weightsync.units import GB, gb_per_s

if TYPE_CHECKING:
    from weightsync.dryrun.report import PlanReport

__all__ = ["Panel", "panels", "write_trace"]

Floats = NDArray[np.float64]

_BINS: Final = 240
# A trace of more is slow to open; ranks are left out, never buckets of a rank.
_MAX_SPANS: Final = 100_000

_TITLES: Final = {
    "read": "read: wait for staging, and PCIe where weights cross it",
    "cast": "cast: pack, cast, encode and digest",
    "write": "write: post one-sided writes",
    "wire": "send: bytes leave over the rank's share of its NICs",
    "receive": "receive: bytes arrive over the rank's share of its NICs",
    "pass_on": "pass on: sinks send what they received to others, over links of the node or NICs",
    "verify": "verify: digest what arrived",
}


@dataclasses.dataclass(frozen=True)
class Panel:
    """One stage over time.

    Attributes:
        stage: Its name.
        title: What happens in it.
        side: "source" or "sink".
        busy: Share of each time step in which each rank (for the wire: of the rate that its port
            or its link has) was in use, `(ranks, steps)`.
    """

    stage: str
    title: str
    side: str
    busy: Floats


def panels(report: PlanReport) -> list[Panel]:
    """Work out how busy every rank is in every stage, up to the predicted end."""
    prediction, plan, cluster = report.prediction, report.plan, report.cluster
    edges = np.linspace(0, max(prediction.predicted_s, 1e-12), _BINS + 1)
    num = {"source": len(plan.source.ranks), "sink": len(plan.sink.ranks)}
    own = prediction.source < num["source"]
    sharing = cluster.gpus_per_node // cluster.ports_per_node
    nic = cluster.port_bytes_per_s("attainable") / sharing
    rate_of = np.where(prediction.is_local, cluster.nvlink_gb_per_s.of("attainable") * GB, nic)
    shown = {"receive": ~prediction.is_local, "verify": np.ones(len(own), np.bool_)}
    found = []
    for stage, title in _TITLES.items():
        on_wire = stage in ("wire", "receive", "pass_on")
        number = STAGES.index("wire" if on_wire else stage)
        side = "sink" if stage in ("receive", "verify", "pass_on") else "source"
        mine = np.flatnonzero(~own if stage == "pass_on" else shown.get(stage, own))
        rank = prediction.sink if stage in shown else prediction.source
        first = num["source"] if stage == "pass_on" else 0
        start, end = prediction.start_s[mine, number], prediction.end_s[mine, number]
        weight = np.ones(len(start))
        if on_wire:
            weight = plan.buckets.nbytes[mine] / np.maximum(end - start, 1e-12) / rate_of[mine]
        busy = _busy(rank[mine] - first, num[side], start, end, weight, edges)
        if busy.any():
            found.append(Panel(stage, title, side, busy))
    return found


def _busy(
    rank: IntArray, num_ranks: int, start: Floats, end: Floats, weight: Floats, edges: Floats
) -> Floats:
    """Return the mean of `sum of weight over what is going on` in each step, `(ranks, steps)`.

    The integral up to an edge T is `sum of w max(T - start, 0) - w max(T - end, 0)`; sums of w and
    of w times its moment over all moments before each edge give it for all edges at once.
    """
    steps = len(edges) - 1
    width = edges[1] - edges[0]
    total = np.zeros((num_ranks, steps + 1))
    for moment, sign in ((start, 1.0), (end, -1.0)):
        place = np.clip((moment / width).astype(np.int64) + 1, 0, steps)
        slot = rank * (steps + 1) + place
        size = num_ranks * (steps + 1)
        slope = np.bincount(slot, weight, size).reshape(num_ranks, -1).cumsum(axis=1)
        offset = np.bincount(slot, weight * moment, size).reshape(num_ranks, -1).cumsum(axis=1)
        total += sign * (slope * edges - offset)
    return np.asarray(np.maximum(np.diff(total, axis=1) / width, 0))


def write_trace(report: PlanReport, path: Path) -> None:
    """Write the predicted timeline for Perfetto: a process a rank, a track a stage.

    The first process is the update as a whole. Where there are too many buckets, the ranks that
    finish last are kept; spans of the update say how many.

    Raises:
        ConfigError: The file cannot be written.
    """
    prediction, plan = report.prediction, report.plan
    end = prediction.end_s[:, STAGES.index("verify")]
    num_sources = len(plan.source.ranks)
    everyone = [*plan.source.ranks, *plan.sink.ranks]
    sides = (
        ("sender", prediction.source, ("read", "cast", "write", "wire")),
        ("sink", prediction.sink + num_sources, ("wire", "verify")),
    )
    budget = _MAX_SPANS // 2
    kept = [_kept(ranks, end, budget // len(stages), len(everyone)) for _, ranks, stages in sides]
    trace = Trace()
    first, last = prediction.open_s, prediction.predicted_s - prediction.commit_s
    shown = f"{len(set().union(*kept))} of {len(everyone)}"
    for name, begin, until in (
        ("open", 0.0, first),
        ("transfer", first, last),
        ("votes and decision", last, prediction.predicted_s),
    ):
        trace.add("update (predicted)", "update", name, begin, until, ranks_shown=shown)
    for (side, ranks, stages), numbers in zip(sides, kept, strict=True):
        for number in numbers:
            mine = np.flatnonzero(ranks == number)
            for stage in stages:
                _add_stage(trace, report, f"{everyone[number]} (predicted)", stage, side, mine)
    trace.write(path)


def _kept(rank: IntArray, end: Floats, budget: int, num_ranks: int) -> list[int]:
    """Choose ranks with at most so many buckets together, those that finish last first."""
    finish = np.zeros(num_ranks)
    np.maximum.at(finish, rank, end)
    order = np.argsort(-finish, kind="stable")
    spent = np.cumsum(np.bincount(rank, minlength=num_ranks)[order])
    return sorted(order[: max(1, int(np.searchsorted(spent, budget, side="right")))].tolist())


def _add_stage(
    trace: Trace, report: PlanReport, process: str, stage: str, side: str, mine: IntArray
) -> None:
    """Add the spans of one stage of one rank; what overlaps goes to further tracks."""
    prediction, plan = report.prediction, report.plan
    number = STAGES.index(stage)
    start, end = prediction.start_s[mine, number], prediction.end_s[mine, number]
    peers = prediction.sink if side == "sender" else prediction.source
    labels = plan.sink.ranks if side == "sender" else [*plan.source.ranks, *plan.sink.ranks]
    nbytes = plan.buckets.nbytes
    name = {"wire": "send" if side == "sender" else "receive"}.get(stage, stage)
    if side == "sender" and len(mine) and mine[0] >= plan.num_direct:
        name = f"pass on: {name}"
    lanes: list[float] = []
    for place in np.argsort(start, kind="stable").tolist():
        begin, until = float(start[place]), float(end[place])
        if until <= begin:
            continue
        lane = next((i for i, free in enumerate(lanes) if free <= begin), len(lanes))
        lanes[lane : lane + 1] = [until]
        bucket = int(mine[place])
        trace.add(
            process,
            name if lane == 0 else f"{name} {lane + 1}",
            f"bucket {bucket}",
            begin,
            until,
            bytes=int(nbytes[bucket]),
            peer=labels[int(peers[bucket])],
            gb_per_s=round(gb_per_s(int(nbytes[bucket]), until - begin), 3),
        )
