"""Progress while a command works, and the table of stages after it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from types import TracebackType
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from weightsync.units import format_bytes, format_seconds, gb_per_s

__all__ = ["STAGES", "LiveProgress", "VersionRow", "figures_of", "stage_table"]

# In the order in which they happen; who takes the time, and what for.
STAGES: Final[dict[str, str]] = {
    "wait_open": "called, room made",
    "transfer": "first to last bucket",
    "read": "- wait for staging",
    "cast": "- cast, pack, digest",
    "write": "- one-sided writes",
    "digest": "- digest alone",
    "complete": "- locally complete",
    "decide": "votes and decision",
    "fill": "sinks: check arrivals",
    "pause": "sinks: copy over live",
    "adopt": "every replica serves it",
    "sink_fill": "sinks: check arrivals",
    "sink_verify": "- digests",
    "sink_pause": "sinks: make it live",
}
_MAX_VERSIONS = 3  # columns that fit a terminal of 80 characters


class LiveProgress:
    """A bar that says what is happening, with lines above it that stay. Context manager.

    On a console that is no terminal only the lines are printed.

    Args:
        console: Where to print.
        total: Steps that fill the bar.
    """

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        self._bar = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total)

    def now(self, text: str) -> None:
        """Say what is happening at this moment."""
        self._bar.update(self._task, description=text)

    def advance(self) -> None:
        """One step is done."""
        self._bar.advance(self._task)

    def say(self, text: str | Text) -> None:
        """Print a line that stays."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> LiveProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()


@dataclass
class VersionRow:
    """What the table says of one version.

    Args:
        version: Its number.
        seconds: The publish, by the slowest source.
        num_bytes: Payload of all sources.
        num_replicas: Replicas that hold it.
        stages_s: Seconds by stage, of the slowest rank.
        verified: Whether the read-back was right; None where nothing was read back.
        is_committed: False for a version that was aborted.
    """

    version: int
    seconds: float = 0.0
    num_bytes: int = 0
    num_replicas: int = 0
    stages_s: dict[str, float] = field(default_factory=dict)
    verified: bool | None = None
    is_committed: bool = True

    def add_published(self, reports: Sequence[Mapping[str, Any]]) -> None:
        """Take in what sources report of the version: keys as in `VersionReport`."""
        self.seconds = max(report["seconds"] for report in reports)
        self.num_bytes = sum(report["num_bytes"] for report in reports)
        self.num_replicas = min(report["num_replicas"] for report in reports)

    def add_stages(self, reports: Iterable[Mapping[str, float]]) -> None:
        """Take in ranks' seconds by stage; the slowest counts."""
        for report in reports:
            for name, seconds in report.items():
                self.stages_s[name] = max(self.stages_s.get(name, 0.0), seconds)


def figures_of(rows: Sequence[VersionRow]) -> dict[str, Any]:
    """Bytes, seconds and stages of the committed versions, for `--json`."""
    names = {name: None for row in rows for name in row.stages_s}
    return {
        "bytes": max((row.num_bytes for row in rows), default=0),
        "publish_s": [row.seconds for row in rows],
        "gb_per_s": median([gb_per_s(row.num_bytes, row.seconds) for row in rows] or [0.0]),
        "stages": {name: [row.stages_s.get(name) for row in rows] for name in names},
    }


def stage_table(rows: Sequence[VersionRow], verified_how: str = "bit for bit") -> Table:
    """Where the time of every version went: a row per stage, a column per version.

    Args:
        rows: In order. The last ones are shown, and the median of all that were committed.
        verified_how: What the verdict of a version rests on.
    """
    shown = list(rows)[-_MAX_VERSIONS:]
    done = [row for row in rows if row.is_committed]
    table = Table(title="time by stage, slowest rank", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("stage", no_wrap=True)
    for row in shown:
        table.add_column(f"v{row.version}", justify="right", no_wrap=True)
    table.add_column("median", justify="right", no_wrap=True)
    table.add_column("what", style="dim")
    known = {name for row in rows for name in row.stages_s}
    for name in [*STAGES, *sorted(known - STAGES.keys())]:
        if name in known:
            cells = [_seconds(row.stages_s.get(name)) for row in shown]
            middle = _seconds(_median([r.stages_s[name] for r in done if name in r.stages_s]))
            table.add_row(name, *cells, middle, STAGES.get(name, ""))
    table.add_section()
    cells = [_seconds(row.seconds if row.is_committed else None) for row in shown]
    table.add_row("publish", *cells, _seconds(_median([r.seconds for r in done])), "call to commit")
    sizes = [format_bytes(row.num_bytes) if row.is_committed else "-" for row in shown]
    table.add_row("bytes", *sizes, "", "written")
    rates = [_rate(row) if row.is_committed else "-" for row in shown]
    middle_rate = _median([gb_per_s(r.num_bytes, r.seconds) for r in done])
    table.add_row("GB/s", *rates, "-" if middle_rate is None else f"{middle_rate:.2f}", "")
    table.add_row("replicas", *(str(row.num_replicas) for row in shown), "", "that hold it")
    table.add_row("verified", *(_verdict(row) for row in shown), "", verified_how)
    return table


def _rate(row: VersionRow) -> str:
    return f"{gb_per_s(row.num_bytes, row.seconds):.2f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else format_seconds(value)


def _median(values: list[float]) -> float | None:
    return median(values) if values else None


def _verdict(row: VersionRow) -> Text:
    if not row.is_committed:
        return Text("aborted", style="yellow")
    if row.verified is None:
        return Text("-")
    return Text("yes", style="green") if row.verified else Text("NO", style="bold red")
