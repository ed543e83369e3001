"""A sink of a fleet: receives, checks and adopts versions, and measures what a sink does."""

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
from weightsync.fleet.sockets import BlastReceiver
from weightsync.runtime.receiver import Receiver
from weightsync.service.sink import SinkMember
from weightsync.transport.base import Target

__all__ = ["run"]

_TIMEOUT_S: Final = 120.0
_CHUNK_BITS: Final = 12


def run(channel: Channel, options: Message, commands: Iterator[Message]) -> None:
    """The life of a sink."""
    sink = _Sink(channel, options)
    channel.send(event="ready", pid=os.getpid())
    for command in commands:
        do = str(command.pop("do"))
        channel.send(event=do, **sink.do(do, command))
    sink.close()


class _Sink(Rank[SinkMember]):
    COMMANDS = (
        "blast",
        "blast_from",
        "check",
        "export",
        "hold",
        "join",
        "leave_job",
        "pong",
        "receive",
        "refit",
        "unexport",
    )

    def __init__(self, channel: Channel, options: Message) -> None:
        super().__init__(options)
        self._channel = channel
        self._blast: BlastReceiver | None = None
        self._target: Target | None = None
        self._num_placed = 0

    # ---- the product ----

    def hold(self, layout: dict[str, Any], rank: int) -> Message:
        """Make room for the weights of a rank."""
        self._manifest = layout_of("sink", layout).manifest(rank)
        self._held = Held(self._manifest, is_filled=False)
        return {"bytes": int(self._held.sizes.sum())}

    def join(self, job: str, replica: str, rank: int, world_size: int) -> Message:
        """Become a sink of a job."""
        assert self._held is not None
        self._fabric, self._num_placed = self._open_fabric(), 0
        receiver = Receiver(
            self._fabric, live=self._held.addresses, live_owner=self._held.memory, mode="staged"
        )
        self._member = SinkMember(
            job,
            manifest=self._manifest.to_bytes(),
            replica=replica,
            rank=rank,
            world_size=world_size,
            receiver=receiver,
            fabric_name=self._options["fabric"],
            hooks=None,
            connect_timeout_s=_TIMEOUT_S,
            credentials=credentials_of(job, self._options["token_file"]),
        )
        self._member.join()
        return {}

    def refit(self, version: int, timeout_s: float) -> Message:
        """Wait for a version and adopt it; what it took."""
        assert self._member is not None
        self._member.refit(version, timeout_s)
        return {"spans": self._member.spans, "placed": self._placed()}

    def _placed(self) -> int:
        """Return the bytes of weights that the fabric placed since the last time."""
        assert self._fabric is not None
        before = self._num_placed
        self._num_placed = sum(int(rail["bytes_in"]) for rail in self._fabric.rails())
        return self._num_placed - before

    def check(self, key: int) -> Message:
        """Compare every element with the values of a key."""
        assert self._held is not None
        return {"problem": self._held.difference(key)}

    # ---- raw sockets ----

    def blast_from(self, order: list[list[int]]) -> Message:
        """Listen for senders; see `BlastReceiver`."""
        turns = [(sender, nbytes) for sender, nbytes in order]
        self._blast = BlastReceiver(self._options["addresses"], turns)
        return {"addresses": self._options["addresses"], "ports": self._blast.ports}

    def blast(self, at: float) -> Message:
        """Grant senders their turns from a time on; when the last byte was here."""
        assert self._blast is not None
        found = self._blast.run(at)
        self._blast = None
        return {"end": found}

    # ---- single constants ----

    def export(self, nbytes: int, rows: int) -> Message:
        """Open memory for `rows` writes without a job."""
        self._fabric = self._open_fabric()
        memory = self._fabric.allocate(max(nbytes, 8))
        most = 1 << _CHUNK_BITS
        chunks = [min(most, rows - first) for first in range(0, rows, most)]
        self._target = self._fabric.export([(0, memory, 0, memory.nbytes)], chunks, _CHUNK_BITS, 1)
        return {"descriptor": base64.b64encode(self._target.descriptor).decode()}

    def receive(self) -> Message:
        """Wait until all writes are here; when that was."""
        assert self._target is not None
        slots = np.arange(self._target.num_slots, dtype=np.int32)
        self._channel.send(event="armed")
        self._target.wait(slots, _TIMEOUT_S)
        self._target.flush()
        end = time.monotonic()
        self._target.reset(slots)
        return {"end": end}

    def pong(self, descriptor: str, count: int) -> Message:
        """Answer each of `count` writes with one of 8 bytes."""
        assert self._target is not None
        assert self._fabric is not None
        answer = np.zeros(8, np.uint8)
        lease = self._fabric.register(answer.ctypes.data, answer.nbytes, answer)
        remote = self._fabric.connect(base64.b64decode(descriptor), _TIMEOUT_S)
        row = np.array([[answer.ctypes.data, 0, 8, 0]], np.int64)
        self._channel.send(event="armed")
        for _ in range(count):
            self._target.wait([0], _TIMEOUT_S)
            self._target.reset([0])
            remote.post(row).wait(_TIMEOUT_S)
        remote.close()
        lease.release()
        return {}

    def unexport(self) -> Message:
        """Undo `export`."""
        if self._target is not None:
            self._target.close()
            self._target = None
        return self.leave_job()

    def close(self) -> None:
        """Let go of everything."""
        self.unexport()
