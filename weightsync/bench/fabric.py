"""`weightsync bench fabric`: what one fabric does with writes of every kind, beside plain means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from weightsync.bench.host import Bar, available_bytes, host_facts, load
from weightsync.demo.worker import Message, Team, Worker
from weightsync.demo.workspace import Interrupts, workspace
from weightsync.errors import ConfigError
from weightsync.transport.fabrics import check_fabric
from weightsync.units import KIB, MIB, format_bytes, gb_per_s

__all__ = ["FabricOptions", "run_fabric"]

SIZES: Final = (256, 4 * KIB, 64 * KIB, MIB, 16 * MIB)
_PAGE: Final = 64 * KIB
_SMALL: Final = 64
_MAX_ROWS: Final = 1 << 15
_MIN_BYTES: Final = 16 * MIB
_MAX_PEERS: Final = 32
_START_S: Final = 60.0
_STEP_S: Final = 180.0
_ROUNDS: Final = 1000

Memory = Literal["shared", "private"]
How = Literal["post", "paged", "scatter"]


@dataclass(frozen=True, kw_only=True)
class FabricOptions:
    """What to measure.

    Args:
        fabric: Any but `sim`.
        memory: Of the readers: `shared` is the fabric's own, `private` ordinary memory. Of fabric
            `cuda_ipc` on both sides: `shared` is a GPU's, the last one's for readers.
        nbytes: Payload of one measurement, a multiple of 16 MiB; of writes below 4 KiB and of
            small posts as many bytes as 32,768 writes have.
        peers: Readers of the fan-out.
        repeats: Timed pairs of each kind.

    Raises:
        ConfigError: A number or name that cannot be, or too little memory.
    """

    fabric: str = "local"
    memory: Memory = "shared"
    nbytes: int = 256 * MIB
    peers: int = 3
    repeats: int = 5

    def __post_init__(self) -> None:
        check_fabric(self.fabric)
        if self.fabric == "sim":
            raise ConfigError("fabric 'sim' lives in one process; measure another one")
        if self.memory not in ("shared", "private"):
            raise ConfigError(f"memory={self.memory!r}: 'shared' or 'private'")
        if self.nbytes < _MIN_BYTES or self.nbytes % _MIN_BYTES:
            raise ConfigError(f"bytes={self.nbytes}: a multiple of {_MIN_BYTES}")
        if not 1 <= self.peers <= _MAX_PEERS:
            raise ConfigError(f"peers={self.peers}: 1 to {_MAX_PEERS}")
        if self.repeats < 1:
            raise ConfigError(f"repeats={self.repeats}: at least 1")
        needed = self.nbytes * (2 * self.peers + 3)
        if (free := available_bytes()) < needed:
            raise ConfigError(
                f"{self.peers} readers of {format_bytes(self.nbytes)} take {format_bytes(needed)} "
                f"of memory, {format_bytes(free)} are available; choose fewer --bytes or --peers"
            )


@dataclass
class _Series:
    """One shape of traffic: ours and the plain means right after it."""

    how: How
    rows: int
    row_bytes: int
    seconds: list[float] = field(default_factory=list)
    submit_s: list[float] = field(default_factory=list)
    plain_s: list[float] = field(default_factory=list)
    baseline: str = ""

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    def as_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "bytes_per_write": self.row_bytes,
            "writes": self.rows,
            "seconds": self.seconds,
            "gb_per_s": gb_per_s(self.nbytes, median(self.seconds)),
            "submit_us_per_write": median(self.submit_s) / self.rows * 1e6,
            "writes_per_s": self.rows / median(self.seconds),
        }
        if self.plain_s:
            pairs = zip(self.seconds, self.plain_s, strict=True)
            found["baseline"] = self.baseline
            found["baseline_gb_per_s"] = gb_per_s(self.nbytes, median(self.plain_s))
            found["ratio"] = median(plain / ours for ours, plain in pairs)
        return found


class _Bench:
    """One run, from started processes to the last comparison."""

    def __init__(self, options: FabricOptions, team: Team, bar: Bar) -> None:
        self.options, self.team, self.bar = options, team, bar
        self.problems: list[str] = []
        self._key = 0
        self._readers: list[Worker] = []
        self._writer: Worker
        self._place: Message = {}

    def start(self) -> None:
        """Start the processes."""
        self.bar.now("starting processes")
        shared = {
            "bytes": self.options.nbytes,
            "fabric": self.options.fabric,
            "memory": self.options.memory,
        }
        self._writer = self.team.start("writer", "writer", **shared)
        self._readers = [
            self.team.start(f"reader {i}", "reader", **shared) for i in range(self.options.peers)
        ]
        everybody = [self._writer, *self._readers]
        ready = self.team.wait(everybody, "ready", timeout_s=_START_S)[self._writer]
        self._place = {"pid": ready["pid"], "address": ready["address"]}

    def measure(self, how: How, row_bytes: int, *, is_compared: bool) -> _Series:
        """Writes of one size, or pages, or to all readers."""
        rows = min(self.options.nbytes // row_bytes, _MAX_ROWS)
        readers = self._readers if how == "scatter" else self._readers[:1]
        each = rows // len(readers)
        series = _Series(how, each * len(readers), row_bytes)
        self._connect(readers, each * row_bytes, each)
        plain = self._plain(series) if is_compared else None
        for number in range(self.options.repeats + 1):
            self.bar.now(f"{how}, {format_bytes(row_bytes)}: {number or 'warming up'}")
            self._change()
            for reader in readers:
                reader.send("receive")
            self.team.wait(readers, "armed", timeout_s=_STEP_S)
            self._writer.send("write", how=how, rows=series.rows, nbytes=row_bytes)
            done = self.team.wait([self._writer], "write", timeout_s=_STEP_S)[self._writer]
            ends = self.team.wait(readers, "receive", timeout_s=_STEP_S)
            self._check(readers, each * row_bytes)
            plain_s = plain() if plain is not None else None
            if number > 0:
                last = max(float(event["end"]) for event in ends.values())
                series.seconds.append(last - float(done["start"]))
                series.submit_s.append(float(done["submit_s"]))
                if plain_s is not None:
                    series.plain_s.append(plain_s)
            self.bar.advance()
        self._disconnect(readers)
        return series

    def latency(self) -> dict[str, Any]:
        """Half of a round of 8 bytes there and back, and the same over a plain connection."""
        self.bar.now("latency")
        reader = self._readers[0]
        self._connect([reader], 4096, 1)
        answers = self._do(self._writer, "open_answers")
        reader.send("pong", descriptor=answers["descriptor"], count=_ROUNDS)
        self.team.wait([reader], "armed", timeout_s=_STEP_S)
        ours = self._do(self._writer, "ping", count=_ROUNDS)["seconds"]
        self.team.wait([reader], "pong", timeout_s=_STEP_S)
        self._disconnect([reader])
        reader.send("pong_socket", count=_ROUNDS)
        port = self.team.wait([reader], "armed", timeout_s=_STEP_S)[reader]["port"]
        plain = self._do(self._writer, "ping_socket", port=port, count=_ROUNDS)["seconds"]
        self.team.wait([reader], "pong_socket", timeout_s=_STEP_S)
        self.bar.advance()
        return {
            "rounds": _ROUNDS,
            "us_median": median(ours) / 2 * 1e6,
            "us_p99": sorted(ours)[_ROUNDS * 99 // 100] / 2 * 1e6,
            "baseline": "socket, loopback",
            "baseline_us_median": median(plain) / 2 * 1e6,
        }

    # ---- what we are compared with

    def _plain(self, series: _Series) -> Callable[[], float]:
        """Moves the same rows as plainly as this machine allows; called once for each repeat."""
        sizes = [series.row_bytes] * series.rows
        if self.options.fabric in ("local", "cuda_ipc", "ofi:shm"):
            if self.options.memory == "private":
                return lambda: self._timed(series, self._readers[0], "read", **self._place)
            return lambda: self._timed(series, self._writer, "memcpy")
        reader = self._readers[0]
        port = self._do(reader, "open_sockets", sizes=sizes)["port"]
        self._do(self._writer, "open_sockets", port=port, sizes=sizes)

        def sockets() -> float:
            reader.send("sockets")
            self.team.wait([reader], "armed", timeout_s=_STEP_S)
            start = float(self._do(self._writer, "sockets")["start"])
            end = self.team.wait([reader], "sockets", timeout_s=_STEP_S)[reader]
            series.baseline = str(end["name"])
            self._check([reader], series.nbytes)
            return float(end["end"]) - start

        return sockets

    def _timed(self, series: _Series, worker: Worker, what: str, **arguments: Any) -> float:
        sizes = [series.row_bytes] * series.rows
        found = self._do(worker, what, sizes=sizes, **arguments)
        series.baseline = str(found["name"])
        if what == "read":
            self._check([worker], series.nbytes)
        return float(found["seconds"])

    # ---- steps

    def _connect(self, readers: list[Worker], nbytes: int, rows: int) -> None:
        found = [self._do(r, "export", nbytes=nbytes, rows=rows)["descriptor"] for r in readers]
        self._do(self._writer, "connect", descriptors=found)

    def _disconnect(self, readers: list[Worker]) -> None:
        self._do(self._writer, "disconnect")
        for reader in readers:
            self._do(reader, "unexport")

    def _change(self) -> None:
        self._key += 1
        self._do(self._writer, "change", key=self._key)

    def _check(self, readers: list[Worker], nbytes: int) -> None:
        for reader in readers:
            problem = self._do(reader, "check", nbytes=nbytes, key=self._key)["problem"]
            if problem is not None:
                self.problems.append(f"{reader.name}: {problem}")

    def _do(self, worker: Worker, what: str, **arguments: Any) -> Message:
        worker.send(what, **arguments)
        return self.team.wait([worker], what, timeout_s=_STEP_S)[worker]


def run_fabric(options: FabricOptions, console: Console) -> dict[str, Any]:
    """Measure and print tables. Blocks for the whole run, a minute or so.

    Args:
        options: What to measure.
        console: Where to print.

    Returns:
        The keys of `weightsync.bench_fabric/1`, without "schema".

    Raises:
        WeightSyncError: A process failed; nothing is left behind.
        KeyboardInterrupt: SIGINT or SIGTERM; every process and file is gone.
    """
    began = load()
    num_series = len(SIZES) + 3
    with (
        Interrupts() as interrupts,
        workspace() as folder,
        Team(folder, package="weightsync.bench") as team,
        Bar(console, num_series * (options.repeats + 1) + 1) as bar,
        interrupts.allowed(),
    ):
        bench = _Bench(options, team, bar)
        bench.start()
        sweep = [bench.measure("post", size, is_compared=True) for size in SIZES]
        paged = bench.measure("paged", _PAGE, is_compared=False)
        posts = bench.measure("post", _SMALL, is_compared=False)
        fan_out = bench.measure("scatter", MIB, is_compared=False)
        latency = bench.latency()
        bar.now("ending processes")
        team.dismiss()
    by_size = {series.row_bytes: series for series in sweep}
    result = {
        "fabric": options.fabric,
        "memory": options.memory,
        "bytes": options.nbytes,
        "sweep": [series.as_dict() for series in sweep],
        "paged": {**paged.as_dict(), "ratio_to_large": _ratio(paged, by_size[16 * MIB])},
        "posts": posts.as_dict(),
        "fan_out": {
            **fan_out.as_dict(),
            "peers": options.peers,
            "ratio_to_one": _ratio(fan_out, by_size[MIB]),
        },
        "latency": latency,
        "repeats": options.repeats,
        "verified": not bench.problems,
        "problems": bench.problems,
        "host": host_facts(began),
    }
    _print(console, options, result)
    return result


def _ratio(ours: _Series, other: _Series) -> float:
    """Of rates: how much of the other's `ours` reaches."""
    rate = ours.nbytes / median(ours.seconds)
    return rate / (other.nbytes / median(other.seconds))


def _print(console: Console, options: FabricOptions, result: dict[str, Any]) -> None:
    table = Table(
        title=f"{options.fabric}, {options.memory} memory: medians of {options.repeats}",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for name in ("", "writes", "GB/s", "ratio", "to", "submit us"):
        is_text = name in ("", "to")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=True)

    def add(name: str, found: dict[str, Any], ratio: float | None, to: str) -> None:
        table.add_row(
            name,
            f"{found['writes']:,}",
            f"{found['gb_per_s']:.2f}",
            "" if ratio is None else f"{ratio:.2f}",
            to,
            f"{found['submit_us_per_write']:.2f}",
        )

    for found in result["sweep"]:
        add(f"{format_bytes(found['bytes_per_write'])}", found, found["ratio"], "baseline")
    paged, posts, fan_out = result["paged"], result["posts"], result["fan_out"]
    add(f"{format_bytes(paged['bytes_per_write'])} pages", paged, paged["ratio_to_large"], "large")
    add(f"{_SMALL} B posts", posts, None, f"{posts['writes_per_s'] / 1e6:.2f} M/s")
    add(f"1 MiB, {options.peers} readers", fan_out, fan_out["ratio_to_one"], "one reader")
    console.print(table)
    latency = result["latency"]
    console.print(
        f"baseline: {result['sweep'][0]['baseline']}; submit: inside the call, per write\n"
        f"latency of 8 bytes: {latency['us_median']:.1f} us, 99 % {latency['us_p99']:.1f} us; "
        f"{latency['baseline']}: {latency['baseline_us_median']:.1f} us\n"
        f"verified: {'yes, word for word' if result['verified'] else 'NO'}",
        highlight=False,
    )
    for problem in result["problems"]:
        console.print(Text(problem, "bold red"))
