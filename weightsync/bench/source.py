"""The worker that has the weights: posts them, publishes them, copies them for comparison."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from weightsync import Source
from weightsync.bench.baseline import Memcpy, SocketSender
from weightsync.bench.content import allocate, arena_offsets, change, tensor_name, tensor_sizes
from weightsync.demo.worker import Channel, Message
from weightsync.errors import ConfigError
from weightsync.transport import Engine, Lease, Memory, Remote, open_fabric
from weightsync.transport.fabrics import open_for_job

__all__ = ["run"]


def run(channel: Channel, options: Message, commands: Iterator[Message]) -> None:
    """The life of the source."""
    torch.set_num_threads(1)
    source = _Source(options)
    channel.send(event="ready", pid=os.getpid(), addresses=source.addresses)
    for command in commands:
        do = str(command.pop("do"))
        found = source.do(do, command)
        channel.send(event=do, **found)
    source.close()


class _Source:
    def __init__(self, options: Message) -> None:
        self.sizes = tensor_sizes(int(options["bytes"]), int(options["tensors"]))
        self.fabric, self.threads = str(options["fabric"]), int(options["threads"])
        self.tensors = allocate(self.sizes, filled=True)
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]
        self._key = 0
        self._engine: Engine | None = None
        self._leases: list[Lease] = []
        self._remote: Remote | None = None
        self._writes = np.zeros((0, 4), np.int64)
        self._memory: Memory | None = None
        self._baseline: Memcpy | None = None
        self._sender: SocketSender | None = None
        self._source: Source | None = None

    def do(self, what: str, command: Message) -> Message:
        """Follow one command; what the parent hears of it."""
        actions: dict[str, Callable[..., Message]] = {
            "baseline": self.baseline,
            "change": self.change,
            "connect": self.connect,
            "disconnect": self.disconnect,
            "join": self.join,
            "publish": self.publish,
            "sockets": self.sockets,
            "transfer": self.transfer,
        }
        if what not in actions:
            raise ConfigError(f"no command {what!r}")
        return actions[what](**command)

    # ---- the transfer alone ----

    def connect(self, descriptor: str, immediates: list[int]) -> Message:
        """Reach the sink's memory; tensor i carries immediates[i]."""
        self._engine = open_for_job(self.fabric, threads=self.threads)
        self._leases = [
            self._engine.register(tensor.data_ptr(), tensor.nbytes, tensor)
            for tensor in self.tensors
        ]
        self._remote = self._engine.connect(base64.b64decode(descriptor))
        offsets = arena_offsets(self.sizes)[:-1]
        columns = (self.addresses, offsets, self.sizes, immediates)
        self._writes = np.ascontiguousarray(np.array(columns, np.int64).T)
        return {}

    def transfer(self) -> Message:
        """Post everything at once. The sink says when all of it has arrived."""
        assert self._remote is not None
        start = time.monotonic()
        operation = self._remote.post(self._writes)
        operation.wait(None)
        return {"start": start, "end": time.monotonic()}

    def disconnect(self) -> Message:
        """Give back what `connect` took."""
        if self._remote is not None:
            self._remote.close()
            self._remote = None
        for lease in self._leases:
            lease.release()
        self._leases = []
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        return {}

    # ---- the product ----

    def join(self, job: str, timeout_s: float) -> Message:
        """Become the job's source."""
        weights = {tensor_name(i): tensor for i, tensor in enumerate(self.tensors)}
        self._source = Source(
            weights,
            job=job,
            rank=0,
            world_size=1,
            timeout_s=timeout_s,
            fabric=self.fabric,
            threads=self.threads,
        )
        return {}

    def publish(self) -> Message:
        """Publish; blocks until the version is committed."""
        assert self._source is not None
        start = time.monotonic()
        report = self._source.publish()
        seconds = time.monotonic() - start
        return {"seconds": seconds, "version": report.version, "stages_s": report.stages_s}

    # ---- both ----

    def change(self, key: int) -> Message:
        """Give all tensors the values of `key`."""
        change(self.tensors, self._key ^ key)
        self._key = key
        return {}

    def baseline(self) -> Message:
        """Copy the tensors to memory of this process, of the kind that a sink receives into."""
        if self._baseline is None:
            # The memory lives as long as what refers to it; no other process ever sees it.
            engine = open_fabric(self.fabric)
            self._memory = engine.allocate(arena_offsets(self.sizes)[-1])
            engine.close()
            targets = [self._memory.address + at for at in arena_offsets(self.sizes)[:-1]]
            self._baseline = Memcpy(self.addresses, targets, self.sizes)
        return {"seconds": self._baseline.run(), "name": self._baseline.name}

    def sockets(self, port: int) -> Message:
        """Send the tensors over plain sockets."""
        if self._sender is None:
            self._sender = SocketSender(port, self.addresses, self.sizes)
        return {"start": self._sender.run()}

    def close(self) -> None:
        """Leave the job, close the engine."""
        if self._source is not None:
            self._source.close()
        self.disconnect()
        if self._sender is not None:
            self._sender.close()
