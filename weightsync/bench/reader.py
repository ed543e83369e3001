"""The end of the fabric benchmark that is written to."""

from __future__ import annotations

import base64
import socket
import time
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from weightsync.bench.baseline import ProcessRead, SocketReceiver
from weightsync.bench.gpu import DeviceWords, device_count
from weightsync.bench.payload import Words, address_of, first_difference, make
from weightsync.demo.worker import Channel, Message
from weightsync.errors import ConfigError
from weightsync.transport import Engine, Lease, Memory, Target, open_fabric

__all__ = ["CHUNK_BITS", "export_rows", "run"]

CHUNK_BITS: Final = 12
_TIMEOUT_S: Final = 120.0


def run(channel: Channel, options: Message, commands: Iterator[Message]) -> None:
    """The life of a reader."""
    reader = _Reader(channel, options)
    channel.send(event="ready")
    for command in commands:
        do = str(command.pop("do"))
        channel.send(event=do, **reader.do(do, command))
    reader.close()


def export_rows(engine: Engine, memory: Lease | Memory, nbytes: int, rows: int) -> Target:
    """Open `nbytes` for `rows` writes, one chunk each."""
    per_slot = 1 << CHUNK_BITS
    chunks = [min(per_slot, rows - first) for first in range(0, rows, per_slot)]
    return engine.export([(0, memory, 0, nbytes)], chunks, CHUNK_BITS, 1)


class _Reader:
    def __init__(self, channel: Channel, options: Message) -> None:
        self._channel = channel
        nbytes = int(options["bytes"])
        self._fabric = str(options["fabric"])
        self._engine = open_fabric(self._fabric)
        self._memory: Lease | Memory
        self._words: Words
        self._device: DeviceWords | None = None
        if options["memory"] == "shared" and self._fabric == "cuda_ipc":
            # Not the writer's, where there are two.
            self._device = device = DeviceWords(
                np.zeros(nbytes // 8, np.uint64), device_count() - 1
            )
            self._words = device.host
            self._memory = self._engine.register(device.address, nbytes, device)
        elif options["memory"] == "private":
            self._words = np.zeros(nbytes // 8, np.uint64)
            self._words.fill(0)  # every page present
            self._memory = self._engine.register(address_of(self._words), nbytes, self._words)
        else:
            self._memory = memory = self._engine.allocate(nbytes)
            self._words = np.frombuffer(memoryview(memory), np.uint64)
        self._base = make(nbytes)
        self._target: Target | None = None
        self._slots = np.zeros(0, np.int32)
        self._receiver: SocketReceiver | None = None

    def do(self, what: str, command: Message) -> Message:
        """Follow one command; what the parent hears of it."""
        actions: dict[str, Callable[..., Message]] = {
            "check": self.check,
            "export": self.export,
            "open_sockets": self.open_sockets,
            "pong": self.pong,
            "pong_socket": self.pong_socket,
            "read": self.read,
            "receive": self.receive,
            "sockets": self.sockets,
            "unexport": self.unexport,
        }
        if what not in actions:
            raise ConfigError(f"no command {what!r}")
        return actions[what](**command)

    def export(self, nbytes: int, rows: int) -> Message:
        """Open memory for `rows` writes."""
        self.unexport()
        self._target = export_rows(self._engine, self._memory, nbytes, rows)
        self._slots = np.arange(self._target.num_slots, dtype=np.int32)
        return {"descriptor": base64.b64encode(self._target.descriptor).decode()}

    def receive(self) -> Message:
        """Wait for all of it; says "armed" when it does."""
        target = self._target
        assert target is not None
        self._channel.send(event="armed")
        target.wait(self._slots, _TIMEOUT_S)
        target.flush()
        end = time.monotonic()
        target.reset(self._slots)
        return {"end": end}

    def check(self, nbytes: int, key: int, clear: bool = True) -> Message:
        """Compare the first `nbytes` with the payload of `key`, word for word; then forget them."""
        if self._device is not None:
            self._device.download()
        found = self._words[: nbytes // 8]
        problem = first_difference(found, self._base, key)
        if clear:
            found.fill(0)
        if self._device is not None:
            self._device.upload()
        return {"problem": problem}

    def unexport(self) -> Message:
        """Close the target."""
        if self._target is not None:
            self._target.close()
            self._target = None
        return {}

    def pong(self, descriptor: str, count: int) -> Message:
        """Answer each write with one."""
        target = self._target
        assert target is not None
        answer = np.zeros(8, np.uint8)
        remote = self._engine.connect(base64.b64decode(descriptor))
        lease = self._engine.register(address_of(answer), answer.nbytes, answer)
        row = np.array([[address_of(answer), 0, answer.nbytes, 0]], np.int64)
        self._channel.send(event="armed")
        for _ in range(count):
            target.wait([0], _TIMEOUT_S)
            target.reset([0])
            remote.post(row).wait(_TIMEOUT_S)
        remote.close()
        lease.release()
        return {}

    # ---- what it is compared with

    def open_sockets(self, sizes: list[int]) -> Message:
        """Listen for plain connections that bring writes of these sizes."""
        if self._receiver is not None:
            self._receiver.close()
        at = self._memory.address + np.concatenate(([0], np.cumsum(sizes)[:-1]))
        self._receiver = SocketReceiver(at.tolist(), sizes)
        return {"port": self._receiver.port}

    def sockets(self) -> Message:
        """Receive them all."""
        assert self._receiver is not None
        self._channel.send(event="armed")
        return {"end": self._receiver.run(), "name": self._receiver.name}

    def read(self, pid: int, address: int, sizes: list[int]) -> Message:
        """Read them out of the other process."""
        at = np.concatenate(([0], np.cumsum(sizes)[:-1]))
        here = (address_of(self._words) + at).tolist()
        reader = ProcessRead(pid, (address + at).tolist(), here, sizes, 1)
        return {"seconds": reader.run(), "name": reader.name}

    def pong_socket(self, count: int) -> Message:
        """Answer each 8 bytes of a plain connection."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._channel.send(event="armed", port=listener.getsockname()[1])
            stream, _ = listener.accept()
        with stream:
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(count):
                stream.sendall(stream.recv(8, socket.MSG_WAITALL))
        return {}

    def close(self) -> None:
        """Let go of everything."""
        self.unexport()
        if self._receiver is not None:
            self._receiver.close()
        self._engine.close()
