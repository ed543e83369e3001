"""`weightsync bench transfer`: how fast weights move here, beside plain copies of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from weightsync.bench.content import tensor_sizes
from weightsync.bench.host import Bar, CpuTimes, available_bytes, host_facts, load
from weightsync.client import Job
from weightsync.demo.worker import Message, Team, Worker
from weightsync.demo.workspace import Interrupts, workspace
from weightsync.errors import ConfigError
from weightsync.transport.fabrics import check_fabric
from weightsync.units import GIB, MIB, format_bytes, format_seconds, gb_per_s

__all__ = ["TransferOptions", "run_transfer"]

_MIN_REPEATS: Final = 1
_MAX_THREADS: Final = 64
_START_S: Final = 300.0
_STEP_S: Final = 180.0
_PROCESS_BYTES: Final = 400 * MIB  # torch, three times over, and tables

Memory = Literal["shared", "private"]


@dataclass(frozen=True, kw_only=True)
class TransferOptions:
    """What to measure.

    Args:
        nbytes: Payload.
        tensors: Over how many tensors; see `content.tensor_sizes` for their sizes.
        fabric: Any but `sim`. `local`, `cuda_ipc` and `ofi:shm` are compared with plain copies,
            the others with raw sockets. Weights are on the host whatever the fabric.
        memory: Of the sink: `shared` is the fabric's own (the source writes), `private` are
            ordinary tensors (the sink reads).
        repeats: Timed pairs of each kind.
        threads: Of the engine, the kernels and the reference that reads.

    Raises:
        ConfigError: A number or name that cannot be, or too little memory.
    """

    nbytes: int = GIB
    tensors: int = 200
    fabric: str = "local"
    memory: Memory = "shared"
    repeats: int = 7
    threads: int = 1

    def __post_init__(self) -> None:
        check_fabric(self.fabric)
        if self.fabric == "sim":
            raise ConfigError("fabric 'sim' lives in one process; measure another one")
        if self.memory not in ("shared", "private"):
            raise ConfigError(f"memory={self.memory!r}: 'shared' or 'private'")
        if self.repeats < _MIN_REPEATS:
            raise ConfigError(f"repeats={self.repeats}: at least {_MIN_REPEATS}")
        if not 1 <= self.threads <= _MAX_THREADS:
            raise ConfigError(f"threads={self.threads}: 1 to {_MAX_THREADS}")
        tensor_sizes(self.nbytes, self.tensors)
        # Weights, copies for comparison, staged and live weights; or weights on both sides.
        needed = self.nbytes * (4 if self.memory == "shared" else 2) + _PROCESS_BYTES * 3
        if (free := available_bytes()) < needed:
            raise ConfigError(
                f"measuring {format_bytes(self.nbytes)} takes {format_bytes(needed)} of memory, "
                f"{format_bytes(free)} are available; choose fewer --bytes"
            )


@dataclass
class _Series:
    """Timed pairs of one kind: ours and the plain copy right after it."""

    ours_s: list[float] = field(default_factory=list)
    plain_s: list[float] = field(default_factory=list)
    foreign_cores: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Median over the pairs of our rate in units of the plain copy's."""
        return median(p / o for o, p in zip(self.ours_s, self.plain_s, strict=True))


class _Bench:
    """One run, from started workers to the last comparison."""

    def __init__(self, options: TransferOptions, team: Team, job: Job, bar: Bar) -> None:
        self.options, self.team, self.job, self.bar = options, team, job, bar
        self.transfers, self.publishes = _Series(), _Series()
        self.problems: list[str] = []
        self.baseline_name = ""
        self.stages: list[dict[str, float]] = []
        self._key = 0
        self.source: Worker
        self.sink: Worker
        self._readable: Message = {}

    def run(self) -> None:
        """Measure everything."""
        options = self.options
        shared = {
            "bytes": options.nbytes,
            "tensors": options.tensors,
            "fabric": options.fabric,
            "memory": options.memory,
            "threads": options.threads,
        }
        self.bar.now("starting two processes")
        self.source = self.team.start("source", "source", **shared)
        self.sink = self.team.start("sink", "sink", **shared)
        both = [self.source, self.sink]
        ready = self.team.wait(both, "ready", timeout_s=_START_S)[self.source]
        if options.memory == "private":
            self._readable = {"pid": ready["pid"], "addresses": ready["addresses"]}

        self._do(self.source, "connect", **self._do(self.sink, "export"))
        self._repeat("transfer", self._transfer, self.transfers)
        self._do(self.source, "disconnect")
        self._do(self.sink, "close")

        self.bar.now("joining the job")
        for worker in (self.sink, self.source):
            self._do(worker, "join", job=self.job.url, timeout_s=_STEP_S)
        self._repeat("publish", self._publish, self.publishes)

    def _repeat(self, what: str, once: Any, series: _Series) -> None:
        """One pair to warm up, then those that count; each has values of its own."""
        for number in range(self.options.repeats + 1):
            self.bar.now(f"{what}: {'warming up' if number == 0 else number}")
            self._key += 1
            self._do(self.source, "change", key=self._key)
            before = CpuTimes.now(self.team.workers)
            ours_s = once()
            if number == self.options.repeats:
                self.bar.now(f"{what}: comparing whole tensors")
                self._note(self._do(self.sink, "check", key=self._key))
            plain = self._plain()
            if number > 0:
                series.ours_s.append(ours_s)
                series.plain_s.append(float(plain["seconds"]))
                series.foreign_cores.append(before.foreign_cores(self.team.workers))
            self.baseline_name = str(plain["name"])
            self.bar.advance()

    def _transfer(self) -> float:
        self.sink.send("receive", key=self._key)
        self.team.wait([self.sink], "armed", timeout_s=_STEP_S)
        self.source.send("transfer")
        waited = self.team.wait(
            [self.source, self.sink], ("transfer", "receive"), timeout_s=_STEP_S
        )
        self._note(waited[self.sink])
        return float(waited[self.sink]["end"]) - float(waited[self.source]["start"])

    def _publish(self) -> float:
        version = len(self.stages) + 1
        in_place = self.options.memory == "private"
        if in_place:
            self.sink.send("refit", version=version, key=self._key)
            self.team.wait([self.sink], "waiting", timeout_s=_STEP_S)
        published = self._do(self.source, "publish")
        if not in_place:
            self.sink.send("refit", version=version, key=self._key)
        adopted = self.team.wait([self.sink], "refit", timeout_s=_STEP_S)[self.sink]
        self._note(adopted)
        self.stages.append({**published["stages_s"], **adopted["stages_s"]})
        return float(published["seconds"])

    def _plain(self) -> Message:
        """Move the same bytes as plainly as this machine allows."""
        if self.options.fabric in ("local", "cuda_ipc", "ofi:shm"):
            worker = self.source if self.options.memory == "shared" else self.sink
            return self._do(worker, "baseline", **self._readable)
        self.sink.send("sockets")
        port = self.team.wait([self.sink], "listening", timeout_s=_STEP_S)[self.sink]["port"]
        self.source.send("sockets", port=port)
        both = self.team.wait([self.source, self.sink], "sockets", timeout_s=_STEP_S)
        seconds = float(both[self.sink]["end"]) - float(both[self.source]["start"])
        return {"name": both[self.sink]["name"], "seconds": seconds}

    def _do(self, worker: Worker, what: str, **arguments: Any) -> Message:
        worker.send(what, **arguments)
        event = self.team.wait([worker], what, timeout_s=_STEP_S)[worker]
        del event["event"]
        return event

    def _note(self, event: Message) -> None:
        if event["problem"] is not None:
            self.problems.append(str(event["problem"]))


def run_transfer(options: TransferOptions, console: Console) -> dict[str, Any]:
    """Measure and print a table. Blocks for the whole run, some seconds per GiB and repeat.

    Args:
        options: What to measure.
        console: Where to print.

    Returns:
        The keys of `weightsync.bench_transfer/1`, without "schema".

    Raises:
        WeightSyncError: A worker failed; nothing is left behind.
        KeyboardInterrupt: SIGINT or SIGTERM; every process and file is gone.
    """
    began = load()
    with (
        Interrupts() as interrupts,
        workspace() as folder,
        Job.start(f"unix:{folder}/job") as job,
        Team(folder, package="weightsync.bench") as team,
        Bar(console, 2 * (options.repeats + 1)) as bar,
        interrupts.allowed(),
    ):
        bench = _Bench(options, team, job, bar)
        bench.run()
        bar.now("ending processes")
        team.dismiss()
    result = _result(options, bench, began)
    _print(console, options, bench, result)
    return result


def _result(options: TransferOptions, bench: _Bench, began: list[float]) -> dict[str, Any]:
    nbytes, transfers, publishes = options.nbytes, bench.transfers, bench.publishes
    timed = bench.stages[1:]
    return {
        "fabric": options.fabric,
        "memory": options.memory,
        "bytes": nbytes,
        "tensors": options.tensors,
        "seconds": transfers.ours_s,
        "gb_per_s": gb_per_s(nbytes, median(transfers.ours_s)),
        "publish_gb_per_s": gb_per_s(nbytes, median(publishes.ours_s)),
        "baseline": bench.baseline_name,
        "baseline_gb_per_s": gb_per_s(nbytes, median(transfers.plain_s + publishes.plain_s)),
        "ratio": transfers.ratio,
        "verified": not bench.problems,
        "publish_ratio": publishes.ratio,
        "publish_mode": "staged" if options.memory == "shared" else "in_place",
        "publish_seconds": publishes.ours_s,
        "publish_stages": {n: median(s[n] for s in timed) for n in timed[0]},
        "baseline_seconds": [transfers.plain_s, publishes.plain_s],
        "foreign_cores": [transfers.foreign_cores, publishes.foreign_cores],
        "threads": options.threads,
        "problems": bench.problems,
        "host": host_facts(began),
    }


def _print(
    console: Console, options: TransferOptions, bench: _Bench, result: dict[str, Any]
) -> None:
    table = Table(
        title=f"{format_bytes(options.nbytes)} in {options.tensors:,} tensors, {options.fabric}, "
        f"{options.memory} memory: medians of {options.repeats}",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for name in ("", "seconds", "GB/s", "of baseline"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    plain_s = median(bench.transfers.plain_s + bench.publishes.plain_s)
    rows = [
        ("transfer", median(bench.transfers.ours_s), f"{result['ratio']:.2f}"),
        (
            f"publish, {result['publish_mode'].replace('_', ' ')}: digests, votes, commit",
            median(bench.publishes.ours_s),
            f"{result['publish_ratio']:.2f}",
        ),
        (f"baseline: {bench.baseline_name}", plain_s, ""),
    ]
    for name, seconds, ratio in rows:
        rate = f"{gb_per_s(options.nbytes, seconds):.2f}"
        table.add_row(name, format_seconds(seconds), rate, ratio)
    console.print(table)
    foreign = median(bench.transfers.foreign_cores + bench.publishes.foreign_cores)
    console.print(
        f"verified: {'yes, bit for bit' if result['verified'] else 'NO'}; other programs used "
        f"{foreign:.1f} of {result['host']['cores']} cores meanwhile",
        highlight=False,
    )
    for problem in bench.problems:
        console.print(Text(problem, "bold red"))
