"""The parent of a fleet: starts its processes on their hosts, drives jobs, collects what they saw.

Times are of CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from weightsync.certs import make_certs
from weightsync.demo.worker import Message, Team, Worker
from weightsync.errors import ConfigError
from weightsync.fleet.job import layout_of
from weightsync.fleet.sockets import turns
from weightsync.ir import Manifest, Plan, PlanOptions
from weightsync.ir.repeat import repeat_ranks
from weightsync.planners.planner import plan_transfer
from weightsync.settings import TOKEN_NAME

__all__ = ["Fleet", "Host", "JobSpec", "Observed"]

_START_S: Final = 120.0
_STEP_S: Final = 150.0
_LEAD_S: Final = 0.1  # from telling everybody until they begin, and for each process
_LEAD_EACH_S: Final = 0.015
# Processes share two cores and sleep late: nobody is to be taken for lost because of that.
_LEASE_S: Final = 60.0


@dataclasses.dataclass(frozen=True)
class Host:
    """Where a process runs.

    Attributes:
        inside: Command that puts it there, such as `ip netns exec NAME`; empty: here.
        addresses: For weights, one for each rail.
        control: For messages; None: a Unix socket.
    """

    inside: tuple[str, ...]
    addresses: tuple[str, ...]
    control: str | None = None


@dataclasses.dataclass(frozen=True)
class JobSpec:
    """A job: layouts of both sides, replicas and budgets.

    Attributes:
        source, sink: Descriptions of layouts; see `fleet.job.layout_of`.
        sources: Ranks of the sources.
        replicas: Equal ones.
        ranks: Of one replica.
        options: Budgets of the plan.
    """

    source: Mapping[str, Any]
    sink: Mapping[str, Any]
    sources: int
    replicas: int
    ranks: int
    options: PlanOptions

    @property
    def sinks(self) -> int:
        """Sink ranks of all replicas."""
        return self.replicas * self.ranks

    def plan(self) -> Plan:
        """Return the plan that the job makes, made here."""
        merged = Manifest.merge(
            "source",
            [layout_of("source", dict(self.source)).manifest(r) for r in range(self.sources)],
        )
        one = Manifest.merge(
            "sink", [layout_of("sink", dict(self.sink)).manifest(r) for r in range(self.ranks)]
        )
        labels = [
            [f"sink {replica}/{rank}" for rank in range(self.ranks)]
            for replica in range(self.replicas)
        ]
        return plan_transfer(merged, repeat_ranks(one, labels), self.options)


@dataclasses.dataclass(frozen=True)
class Observed:
    """One version, as its members saw it.

    Attributes:
        seconds: From the moment all had called publish to the last source's commit.
        stages_s: The same cut into `publish` (until the first bucket is read), `wire` (until the
            last write is complete at its source), `verify` (until the last sink has checked
            everything) and `commit`; besides `pause`, the longest copy over live weights.
        sources, sinks: What each said.
    """

    seconds: float
    stages_s: dict[str, float]
    sources: list[Message]
    sinks: list[Message]


class Fleet:
    """Processes of one machine that act as the hosts of a cluster.

    Context manager: leaving it ends every process. `start` comes first.

    Args:
        folder: For logs, journals and the job's certificates.
        sources, sinks: Where they run.
        coordinator: Where jobs are hosted.
        fabric_options: Of the fabric `tcp`, besides the hosts' addresses.
    """

    def __init__(
        self,
        folder: Path,
        *,
        sources: Sequence[Host],
        sinks: Sequence[Host],
        coordinator: Host,
        fabric_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.team = Team(folder, package="weightsync.fleet")
        self._hosts = (list(sources), list(sinks))
        self._fabric_options = dict(fabric_options or {})
        self._url, token = f"unix:{folder}/job", None
        if coordinator.control is not None:
            certs = make_certs(folder / "certs", [coordinator.control])
            self._url = f"grpcs://{coordinator.control}:0"
            token = str(certs.folder / TOKEN_NAME)
        self._token_file = token
        self._num_jobs = 0
        self._key = 0
        self._spec: JobSpec | None = None
        self._coordinator_host = coordinator
        self.coordinator: Worker
        self.sources: list[Worker] = []
        self.sinks: list[Worker] = []

    def start(self) -> None:
        """Start all processes and wait until they have loaded their modules."""
        shared = {"fabric": "tcp", "token_file": self._token_file}
        self.coordinator = self.team.start(
            "coordinator",
            "coordinator",
            self._coordinator_host.inside,
            url=self._url,
            token_file=self._token_file,
        )
        for role, hosts, workers in zip(
            ("source", "sink"), self._hosts, (self.sources, self.sinks), strict=True
        ):
            for rank, host in enumerate(hosts):
                options = {**self._fabric_options, "addresses": list(host.addresses)}
                workers.append(
                    self.team.start(
                        f"{role} {rank}",
                        role,
                        host.inside,
                        rank=rank,
                        addresses=list(host.addresses),
                        fabric_options=options,
                        **shared,
                    )
                )
        self.team.wait(self.team.workers, "ready", timeout_s=_START_S)

    # ---- a job ----

    def open_job(self, spec: JobSpec) -> str:
        """Have the first ranks of each side join a new job; returns its URL.

        Weights have the values of key 0, as `check` compares them.

        Raises:
            ConfigError: More ranks than the fleet has hosts.
        """
        if spec.sources > len(self.sources) or spec.sinks > len(self.sinks):
            raise ConfigError(
                f"{spec.sources} sources and {spec.sinks} sinks do not fit a fleet of "
                f"{len(self.sources)} and {len(self.sinks)}"
            )
        self._num_jobs += 1
        self._key, self._spec = 0, spec
        url = self._do(
            [self.coordinator],
            "host",
            journal=str(self.folder / f"journal-{self._num_jobs}"),
            replicas=spec.replicas,
            lease_s=_LEASE_S,
            plan=dataclasses.asdict(spec.options),
        )[0]["url"]
        sources, sinks = self._members(spec)
        for rank, worker in enumerate(sources):
            worker.send("hold", layout=dict(spec.source), rank=rank)
        for number, worker in enumerate(sinks):
            worker.send("hold", layout=dict(spec.sink), rank=number % spec.ranks)
        self.team.wait(sources + sinks, "hold", timeout_s=_STEP_S)
        for rank, worker in enumerate(sources):
            worker.send("join", job=url, rank=rank, world_size=spec.sources)
        for number, worker in enumerate(sinks):
            replica, rank = divmod(number, spec.ranks)
            # In the order of names, which is the order of the plan's sinks.
            worker.send("join", job=url, replica=f"{replica:04d}", rank=rank, world_size=spec.ranks)
        self.team.wait(sources + sinks, "join", timeout_s=_STEP_S)
        return str(url)

    def publish(self, version: int) -> Observed:
        """Publish new values as the next version of the job, and have all sinks adopt it."""
        spec = self._spec
        assert spec is not None
        sources, sinks = self._members(spec)
        self._key = version
        self._do(sources, "change", key=version)
        for worker in sinks:
            worker.send("refit", version=version, timeout_s=_STEP_S)
        at = time.monotonic() + self._lead_s
        for worker in sources:
            worker.send("publish", at=at, timeout_s=_STEP_S)
        published = self._wait(sources, "publish")
        adopted = self._wait(sinks, "refit")
        return _observed(published, adopted)

    def check(self) -> list[str]:
        """Compare every element of every sink with what was published last; what is wrong."""
        spec = self._spec
        assert spec is not None
        found = self._do(self._members(spec)[1], "check", key=self._key)
        return [
            f"sink {number}: {event['problem']}"
            for number, event in enumerate(found)
            if event["problem"] is not None
        ]

    def close_job(self) -> None:
        """Have all members leave, and end the job."""
        if self._spec is not None:
            sources, sinks = self._members(self._spec)
            self._do(sources + sinks, "leave_job")
            self._do([self.coordinator], "close")
            self._spec = None

    # ---- raw sockets ----

    def blast(self, matrix: Sequence[Sequence[int]]) -> float:
        """Move a traffic matrix over raw sockets; the seconds it took.

        Args:
            matrix: Bytes from each source to each sink; every rail carries an equal share.
        """
        sources, sinks = self.sources[: len(matrix)], self.sinks[: len(matrix[0])]
        order = turns(matrix)
        for worker, own in zip(sinks, order, strict=True):
            worker.send("blast_from", order=own)
        places = self._wait(sinks, "blast_from")
        for number, worker in enumerate(sources):
            mine = [[nbytes for s, nbytes in own if s == number] for own in order]
            worker.send(
                "blast_to",
                sinks=[
                    {"addresses": place["addresses"], "ports": place["ports"], "nbytes": max(own)}
                    for place, own in zip(places, mine, strict=True)
                    if own
                ],
            )
        self._wait(sources, "blast_to")
        at = time.monotonic() + self._lead_s
        for worker in sinks:
            worker.send("blast", at=at)
        for worker in sources:
            worker.send("blast")
        ends = [float(event["end"]) for event in self._wait(sinks, "blast")]
        self._wait(sources, "blast")
        return max(ends) - at

    # ---- for those who measure single constants ----

    def do(self, worker: Worker, what: str, **arguments: Any) -> Message:
        """Have one process do something; what it said."""
        return self._do([worker], what, **arguments)[0]

    def wait(self, worker: Worker, what: str) -> Message:
        """Wait for what one process was told."""
        return self._wait([worker], what)[0]

    # ---- inside ----

    @property
    def _lead_s(self) -> float:
        return _LEAD_S + _LEAD_EACH_S * len(self.team.workers)

    def _members(self, spec: JobSpec) -> tuple[list[Worker], list[Worker]]:
        return self.sources[: spec.sources], self.sinks[: spec.sinks]

    def _do(self, workers: list[Worker], what: str, **arguments: Any) -> list[Message]:
        for worker in workers:
            worker.send(what, **arguments)
        return self._wait(workers, what)

    def _wait(self, workers: list[Worker], what: str) -> list[Message]:
        found = self.team.wait(workers, what, timeout_s=_STEP_S)
        return [found[worker] for worker in workers]

    def dismiss(self) -> None:
        """Let every process leave by itself."""
        self.team.dismiss()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exc: object) -> None:
        self.team.__exit__(*exc)


def _observed(published: list[Message], adopted: list[Message]) -> Observed:
    began = max(float(event["began"]) for event in published)

    def spans(stage: str) -> list[tuple[float, float]]:
        return [(s, e) for event in published for name, s, e in event["spans"] if name == stage]

    committed = max(float(event["marks"]["decide"]) for event in published)
    fills = [event["spans"]["fill"] for event in adopted]
    pauses = [event["spans"]["pause"] for event in adopted]
    marks = [
        began,
        min((start for start, _ in spans("read")), default=began),
        max((end for _, end in spans("complete")), default=began),
        max(float(end) for _, end in fills),
        committed,
    ]
    for number in range(1, len(marks)):  # a sink may be done before its sources know
        marks[number] = max(marks[number], marks[number - 1])
    names = ("publish", "wire", "verify", "commit")
    stages = {name: marks[n + 1] - marks[n] for n, name in enumerate(names)}
    stages["pause"] = max(float(end) - float(start) for start, end in pauses)
    return Observed(
        seconds=committed - began,
        stages_s=stages,
        sources=published,
        sinks=adopted,
    )
