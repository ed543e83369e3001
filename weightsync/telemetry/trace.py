"""Traces in Chrome's JSON format: open them in ui.perfetto.dev.

Times are readings of CLOCK_MONOTONIC, which all processes of one machine share, so spans that
were taken in different processes line up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightsync.errors import ConfigError

__all__ = ["Span", "Trace"]

_US = 1e6  # the format counts microseconds


@dataclass(frozen=True)
class Span:
    """Something that took time.

    Args:
        process: Who did it, such as "trainer 0".
        track: The line it is drawn on, such as a stage; spans of one track follow one another
            or nest.
        name: What was done.
        start: `time.monotonic()` at the beginning.
        end: Likewise at the end.
        args: Facts shown when it is selected; JSON values.
    """

    process: str
    track: str
    name: str
    start: float
    end: float
    args: Mapping[str, Any] = field(default_factory=dict)


class Trace:
    """Collects spans and writes them as one file. Processes and tracks keep their first order."""

    def __init__(self) -> None:
        self._spans: list[Span] = []

    def __len__(self) -> int:
        return len(self._spans)

    def add(
        self, process: str, track: str, name: str, start: float, end: float, **args: Any
    ) -> None:
        """Add one span; see `Span`."""
        self._spans.append(Span(process, track, name, start, end, args))

    def events(self) -> list[dict[str, Any]]:
        """The trace as Chrome events; time starts at 0 with the earliest span."""
        origin = min((span.start for span in self._spans), default=0.0)
        pids: dict[str, int] = {}
        tids: dict[tuple[str, str], int] = {}
        events: list[dict[str, Any]] = []
        for span in self._spans:
            if span.process not in pids:
                pids[span.process] = pid = len(pids) + 1
                events.append(_meta("process_name", pid, 0, {"name": span.process}))
                events.append(_meta("process_sort_index", pid, 0, {"sort_index": pid}))
            pid = pids[span.process]
            track = (span.process, span.track)
            if track not in tids:
                tids[track] = tid = len(tids) + 1
                events.append(_meta("thread_name", pid, tid, {"name": span.track}))
                events.append(_meta("thread_sort_index", pid, tid, {"sort_index": tid}))
            events.append(
                {
                    "ph": "X",
                    "name": span.name,
                    "cat": span.track,
                    "pid": pid,
                    "tid": tids[track],
                    "ts": round((span.start - origin) * _US, 3),
                    "dur": round(max(0.0, span.end - span.start) * _US, 3),
                    "args": dict(span.args),
                }
            )
        return events

    def write(self, path: Path) -> None:
        """Write the file, making its folder if need be.

        Raises:
            ConfigError: The file cannot be written.
        """
        content = {"displayTimeUnit": "ms", "traceEvents": self.events()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write the trace {path}: {error}") from error


def _meta(name: str, pid: int, tid: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "args": args}
