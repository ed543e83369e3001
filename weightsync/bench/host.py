"""What every benchmark does beside measuring: a progress bar, and facts about this machine."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from weightsync.demo.worker import Worker

__all__ = ["Bar", "CpuTimes", "available_bytes", "host_facts", "load"]


class Bar:
    """A progress bar that is drawn between measurements only, never during one."""

    def __init__(self, console: Console, total: int) -> None:
        self._bar = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
            auto_refresh=False,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total)

    def now(self, text: str) -> None:
        """Say what goes on."""
        self._bar.update(self._task, description=text, refresh=True)

    def advance(self) -> None:
        """One step is done."""
        self._bar.advance(self._task)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()


@dataclass(frozen=True)
class CpuTimes:
    """Processor seconds since boot, of everybody and of this benchmark."""

    at: float
    busy_s: float
    own_s: float

    @classmethod
    def now(cls, workers: Sequence[Worker]) -> CpuTimes:
        """Read /proc."""
        tick = os.sysconf("SC_CLK_TCK")
        fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
        user, nice, system, _idle, _wait, irq, softirq, steal = map(int, fields[:8])
        busy = user + nice + system + irq + softirq + steal
        own = 0
        for pid in [os.getpid(), *(worker.process.pid for worker in workers)]:
            # The name, in parentheses, may hold anything; utime and stime are fields 14 and 15.
            text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            numbers = text.rpartition(")")[2].split()
            own += int(numbers[11]) + int(numbers[12])
        return cls(time.monotonic(), busy / tick, own / tick)

    def foreign_cores(self, workers: Sequence[Worker]) -> float:
        """Cores that others kept busy since then."""
        now = self.now(workers)
        others = (now.busy_s - self.busy_s) - (now.own_s - self.own_s)
        return max(0.0, others / (now.at - self.at))


def host_facts(began: list[float]) -> dict[str, Any]:
    """The machine, for the JSON object; `began` is the load before."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "load_before": began,
        "load_after": load(),
    }


def available_bytes() -> int:
    """Memory that processes can still get."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def load() -> list[float]:
    """Load averages of 1, 5 and 15 minutes."""
    return [round(load, 2) for load in os.getloadavg()]
