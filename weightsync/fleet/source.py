"""A source of a fleet: publishes made-up weights, and measures what a source does."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from weightsync.demo.worker import Channel, Message
from weightsync.fleet.content import Held
from weightsync.fleet.job import credentials_of, layout_of
from weightsync.fleet.rank import Rank
from weightsync.fleet.sockets import BlastSender
from weightsync.service import weightsync_pb2 as pb
from weightsync.service import weightsync_pb2_grpc as rpc
from weightsync.service.address import open_channel
from weightsync.service.source import SourceMember
from weightsync.transport.base import Engine, Lease, Remote, Target

__all__ = ["run"]

_TIMEOUT_S: Final = 120.0


def run(channel: Channel, options: Message, commands: Iterator[Message]) -> None:
    """The life of a source."""
    source = _Source(options)
    channel.send(event="ready", pid=os.getpid())
    for command in commands:
        do = str(command.pop("do"))
        channel.send(event=do, **source.do(do, command))
    source.close()


class _Source(Rank[SourceMember]):
    COMMANDS = (
        "blast",
        "blast_to",
        "change",
        "hold",
        "join",
        "leave_job",
        "link",
        "ping",
        "publish",
        "round_trip",
        "unlink",
        "write",
    )

    def __init__(self, options: Message) -> None:
        super().__init__(options)
        self._blast: BlastSender | None = None
        self._link: _Link | None = None

    # ---- the product ----

    def hold(self, layout: dict[str, Any], rank: int) -> Message:
        """Make the weights of a rank."""
        self._manifest = layout_of("source", layout).manifest(rank)
        self._held = Held(self._manifest, is_filled=True)
        return {"bytes": int(self._held.sizes.sum())}

    def join(self, job: str, rank: int, world_size: int) -> Message:
        """Become a source of a job."""
        held = self._held
        assert held is not None
        self._fabric = self._open_fabric()
        self._member = SourceMember(
            job,
            manifest=self._manifest.to_bytes(),
            rank=rank,
            world_size=world_size,
            fabric=self._fabric,
            fabric_name=self._options["fabric"],
            bases=lambda: held.addresses,
            sizes=held.sizes,
            fingerprint=lambda: held.key,
            changed_since=lambda key: None if key == held.key else "all",
            owner=held.memory,
            staging_bytes=0,
            threads=1,
            connect_timeout_s=_TIMEOUT_S,
            credentials=credentials_of(job, self._options["token_file"]),
        )
        self._member.join()
        return {}

    def change(self, key: int) -> Message:
        """Give the weights the values of a key."""
        assert self._held is not None
        self._held.change(key)
        return {}

    def publish(self, at: float, timeout_s: float) -> Message:
        """Publish at a time of the monotonic clock; returns when the version is committed."""
        member = self._member
        assert member is not None
        time.sleep(max(0.0, at - time.monotonic()))
        began = time.monotonic()
        opened = member.start(0, "", timeout_s)
        member.wait(opened, "committed", None)
        report = member.report(opened)
        return {
            "began": began,
            "marks": dict(opened.marks),
            "spans": report.spans,
            "bytes": report.num_bytes,
        }

    # ---- raw sockets ----

    def blast_to(self, sinks: list[dict[str, Any]]) -> Message:
        """Connect to all sinks over every rail; see `BlastSender`."""
        self._blast = BlastSender(self._options["rank"], self._options["addresses"], sinks)
        return {}

    def blast(self) -> Message:
        """Send what was agreed, as receivers grant it."""
        assert self._blast is not None
        self._blast.run()
        self._blast = None
        return {}

    # ---- single constants ----

    def link(self, descriptor: str, nbytes: int) -> Message:
        """Connect to one sink's memory, with memory of this side to write from and to."""
        self._link = _Link(self._open_fabric(), descriptor, nbytes)
        return {"descriptor": self._link.descriptor}

    def write(self, rows: int, nbytes: int) -> Message:
        """Write `rows` times `nbytes`; when it began, and the seconds that handing over took."""
        assert self._link is not None
        return self._link.write(rows, nbytes)

    def ping(self, count: int) -> Message:
        """Write 8 bytes and wait for the answer, `count` times."""
        assert self._link is not None
        return {"seconds": self._link.ping(count)}

    def unlink(self) -> Message:
        """Undo `link`."""
        if self._link is not None:
            self._link.close()
            self._link = None
        return {}

    def round_trip(self, job: str, count: int) -> Message:
        """Ask the coordinator how it is, `count` times over one connection."""
        credentials = credentials_of(job, self._options["token_file"])
        times = []
        with open_channel(job, credentials) as channel:
            stub = rpc.CoordinatorStub(channel)
            for _ in range(count + 1):
                start = time.monotonic()
                stub.Status(pb.StatusRequest(), timeout=_TIMEOUT_S)
                times.append(time.monotonic() - start)
        return {"seconds": times[1:]}  # the first one connects

    def close(self) -> None:
        """Let go of everything."""
        self.unlink()
        self.leave_job()


class _Link:
    """A connection to one sink without a job, and memory for its answers."""

    def __init__(self, engine: Engine, descriptor: str, nbytes: int) -> None:
        self._engine = engine
        self._memory = np.zeros(max(nbytes, 8), np.uint8)
        self._lease: Lease = engine.register(self._memory.ctypes.data, self._memory.nbytes, self)
        answers = engine.allocate(4096)
        self._target: Target = engine.export([(0, answers, 0, answers.nbytes)], [1], 1, 1)
        self._remote: Remote = engine.connect(base64.b64decode(descriptor), _TIMEOUT_S)

    @property
    def descriptor(self) -> str:
        """Where answers go."""
        return base64.b64encode(self._target.descriptor).decode()

    def write(self, rows: int, nbytes: int) -> Message:
        at = np.arange(rows, dtype=np.int64)
        table = np.stack(
            [self._memory.ctypes.data + at * nbytes, at * nbytes, np.full(rows, nbytes), at], axis=1
        )
        table = np.ascontiguousarray(table, np.int64)
        start = time.monotonic()
        operation = self._remote.post(table)
        operation.wait(_TIMEOUT_S)
        return {"start": start}

    def ping(self, count: int) -> list[float]:
        row = np.array([[self._memory.ctypes.data, 0, 8, 0]], np.int64)
        times = []
        for _ in range(count):
            start = time.monotonic()
            operation = self._remote.post(row)
            self._target.wait([0], _TIMEOUT_S)
            times.append(time.monotonic() - start)
            self._target.reset([0])
            operation.wait(_TIMEOUT_S)
        return times

    def close(self) -> None:
        self._remote.close()
        self._target.close()
        self._lease.release()
        self._engine.close()
