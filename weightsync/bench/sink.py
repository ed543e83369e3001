"""The worker that needs the weights: exports memory, adopts versions, checks every one."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import torch

from weightsync import Sink
from weightsync.bench.baseline import ProcessRead, SocketReceiver
from weightsync.bench.content import (
    Expected,
    FlatLayout,
    Units,
    allocate,
    arena_offsets,
    tensor_sizes,
    units,
)
from weightsync.demo.worker import Channel, Message
from weightsync.errors import ConfigError
from weightsync.transport import Engine, Lease, Memory, Target, open_fabric
from weightsync.transport.fabrics import open_for_job

__all__ = ["run"]

_CHUNK_BITS: Final = 12  # tensors of one slot, as buckets have at most
_TIMEOUT_S: Final = 120.0


def run(channel: Channel, options: Message, commands: Iterator[Message]) -> None:
    """The life of the sink."""
    torch.set_num_threads(1)
    sink = _Sink(channel, options)
    channel.send(event="ready")
    for command in commands:
        do = str(command.pop("do"))
        found = sink.do(do, command)
        channel.send(event=do, **found)
    sink.close()


class _Sink:
    def __init__(self, channel: Channel, options: Message) -> None:
        self.channel = channel
        self.sizes = tensor_sizes(int(options["bytes"]), int(options["tensors"]))
        self.fabric, self.threads = str(options["fabric"]), int(options["threads"])
        self.is_shared = options["memory"] == "shared"
        self.expected = Expected(self.sizes)
        self.tensors = [] if self.is_shared else allocate(self.sizes, filled=False)
        self.views: list[Units] = [units(tensor) for tensor in self.tensors]
        self._engine: Engine | None = None
        self._memory: Memory | None = None
        self._leases: list[Lease] = []
        self._target: Target | None = None
        self._slots = np.zeros(0, np.int32)
        self._baseline: ProcessRead | None = None
        self._receiver: SocketReceiver | None = None
        self._plain_memory: Memory | None = None
        self._sink: Sink | None = None

    def do(self, what: str, command: Message) -> Message:
        """Follow one command; what the parent hears of it."""
        actions: dict[str, Callable[..., Message]] = {
            "baseline": self.baseline,
            "check": self.check,
            "check_ends": self.check_ends,
            "close": self.unexport,
            "export": self.export,
            "join": self.join,
            "receive": self.receive,
            "refit": self.refit,
            "sockets": self.sockets,
        }
        if what not in actions:
            raise ConfigError(f"no command {what!r}")
        return actions[what](**command)

    # ---- the transfer alone ----

    def export(self) -> Message:
        """Open memory for the source: one chunk for each tensor."""
        self._engine = engine = open_for_job(self.fabric, threads=self.threads)
        offsets = arena_offsets(self.sizes)
        ranges: list[tuple[int, Lease | Memory, int, int]]
        if self.is_shared:
            self._memory = memory = engine.allocate(offsets[-1])
            ranges = [(0, memory, 0, offsets[-1])]
            whole = np.frombuffer(memoryview(memory), np.uint16)
            self.views = [
                whole[at // 2 : (at + size) // 2]
                for at, size in zip(offsets, self.sizes, strict=False)
            ]
        else:
            self._leases = [engine.register(t.data_ptr(), t.nbytes, t) for t in self.tensors]
            ranges = [
                (at, lease, 0, size)
                for at, lease, size in zip(offsets, self._leases, self.sizes, strict=False)
            ]
        count = len(self.sizes)
        per_slot = 1 << _CHUNK_BITS
        chunks = [min(per_slot, count - first) for first in range(0, count, per_slot)]
        self._slots = np.arange(len(chunks), dtype=np.int32)
        self._target = engine.export(ranges, chunks, _CHUNK_BITS, 1)
        return {
            "descriptor": base64.b64encode(self._target.descriptor).decode(),
            "immediates": list(range(count)),
        }

    def receive(self, key: int) -> Message:
        """Wait for everything; says "armed" when it does, and then when all of it was there."""
        target = self._target
        assert target is not None
        self.channel.send(event="armed")
        target.wait(self._slots, _TIMEOUT_S)
        target.flush()
        end = time.monotonic()
        target.reset(self._slots)
        return {"end": end, **self.check_ends(key)}

    def unexport(self) -> Message:
        """Give back what `export` took."""
        if self._target is not None:
            self._target.close()
            self._target = None
        for lease in self._leases:
            lease.release()
        self._leases = []
        self._memory = None
        if self.is_shared:
            self.views = []
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        return {}

    # ---- the product ----

    def join(self, job: str, timeout_s: float) -> Message:
        """Become the job's only sink: staged beside the live weights, or straight into them."""
        if self.is_shared:
            self.tensors = allocate(self.sizes, filled=False)
            self.views = [units(tensor) for tensor in self.tensors]
        layout = FlatLayout(self.sizes)
        weights = dict(zip(layout.manifest(0).buffers.names, self.tensors, strict=True))
        self._sink = Sink(
            weights,
            layout=layout,
            replica="a",
            rank=0,
            world_size=1,
            job=job,
            mode="staged" if self.is_shared else "in_place",
            timeout_s=timeout_s,
            fabric=self.fabric,
            threads=self.threads,
        )
        return {}

    def refit(self, version: int, key: int) -> Message:
        """Adopt a version. In place, "waiting" comes first."""
        sink = self._sink
        assert sink is not None
        if not self.is_shared:
            self.channel.send(event="waiting")  # nothing is written before a refit waits
        sink.refit(version)
        return {"stages_s": sink.seconds, **self.check_ends(key)}

    # ---- both ----

    def baseline(self, pid: int, addresses: list[int]) -> Message:
        """Read the source's tensors into the private ones, without the engine."""
        if self._baseline is None:
            targets = [tensor.data_ptr() for tensor in self.tensors]
            self._baseline = ProcessRead(pid, addresses, targets, self.sizes, self.threads)
        return {"seconds": self._baseline.run(), "name": self._baseline.name}

    def sockets(self) -> Message:
        """Receive the tensors over plain sockets, into memory of the kind that a target has."""
        if self._receiver is None:
            targets = [tensor.data_ptr() for tensor in self.tensors]
            if self.is_shared:
                engine = open_fabric(self.fabric)
                self._plain_memory = memory = engine.allocate(arena_offsets(self.sizes)[-1])
                engine.close()
                targets = [memory.address + at for at in arena_offsets(self.sizes)[:-1]]
            self._receiver = SocketReceiver(targets, self.sizes)
        receiver = self._receiver
        self.channel.send(event="listening", port=receiver.port)
        return {"end": receiver.run(), "name": receiver.name}

    def check(self, key: int) -> Message:
        """Compare whole tensors with what they must hold."""
        return {"problem": self.expected.difference(self.views, key)}

    def check_ends(self, key: int) -> Message:
        """The same for the ends of each tensor only; quick enough for every repetition."""
        return {"problem": self.expected.wrong_end(self.views, key)}

    def close(self) -> None:
        """Leave the job, close the engine."""
        if self._sink is not None:
            self._sink.close()
        self.unexport()
        if self._receiver is not None:
            self._receiver.close()
