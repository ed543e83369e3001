"""The end of the fabric benchmark that writes."""

from __future__ import annotations

import base64
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from weightsync.bench.baseline import Memcpy, SocketSender
from weightsync.bench.gpu import DeviceCopy, DeviceWords, device_count
from weightsync.bench.payload import address_of, changed, make
from weightsync.bench.reader import export_rows
from weightsync.demo.worker import Channel, Message
from weightsync.errors import ConfigError
from weightsync.transport import Engine, Memory, Operation, Pages, Remote, Target, open_fabric

__all__ = ["run"]

_TIMEOUT_S: Final = 120.0


def run(channel: Channel, options: Message, commands: Iterator[Message]) -> None:
    """The life of the writer."""
    writer = _Writer(options)
    channel.send(event="ready", pid=os.getpid(), address=writer.address)
    for command in commands:
        do = str(command.pop("do"))
        channel.send(event=do, **writer.do(do, command))
    writer.close()


class _Writer:
    def __init__(self, options: Message) -> None:
        nbytes = int(options["bytes"])
        self._engine: Engine = open_fabric(str(options["fabric"]))
        self._words = make(nbytes)
        self._device: DeviceWords | None = None
        self._device_copy: DeviceCopy | None = None
        if options["fabric"] == "cuda_ipc" and options["memory"] == "shared":
            self._device = DeviceWords(self._words, 0)
        self.address = address_of(self._words) if self._device is None else self._device.address
        self._lease = self._engine.register(self.address, nbytes, self._words)
        self._key = 0
        self._remotes: list[Remote] = []
        self._sender: SocketSender | None = None
        self._copied: npt.NDArray[np.uint8] | None = None
        self._answers: tuple[Target, Memory] | None = None

    def do(self, what: str, command: Message) -> Message:
        """Follow one command; what the parent hears of it."""
        actions: dict[str, Callable[..., Message]] = {
            "change": self.change,
            "connect": self.connect,
            "disconnect": self.disconnect,
            "memcpy": self.memcpy,
            "open_answers": self.open_answers,
            "open_sockets": self.open_sockets,
            "ping": self.ping,
            "ping_socket": self.ping_socket,
            "sockets": self.sockets,
            "write": self.write,
        }
        if what not in actions:
            raise ConfigError(f"no command {what!r}")
        return actions[what](**command)

    def change(self, key: int) -> Message:
        """Take the values of another key."""
        changed(self._words, self._key, key)
        self._key = key
        if self._device is not None:
            self._device.upload()
        return {}

    def connect(self, descriptors: list[str]) -> Message:
        """Reach the readers."""
        self.disconnect()
        self._remotes = [self._engine.connect(base64.b64decode(found)) for found in descriptors]
        return {}

    def disconnect(self) -> Message:
        """Leave them, and let nobody answer any more."""
        if self._answers is not None:
            self._answers[0].close()
            self._answers = None
        for remote in self._remotes:
            remote.close()
        self._remotes = []
        return {}

    def write(self, how: str, rows: int, nbytes: int) -> Message:
        """Write `rows` times `nbytes`, one write after the other in memory.

        `how`: "post" and "paged" go to the first reader; "scatter" gives each its equal share of
        the rows, which lies at the beginning of its memory.
        """
        numbers = np.arange(rows)
        submit: Callable[[], Operation]
        if how == "paged":
            pages = Pages(numbers, nbytes, self.address), Pages(numbers, nbytes, 0)
            submit = lambda: self._remotes[0].write_paged(nbytes, *pages, 0)  # noqa: E731
        else:
            each = rows // len(self._remotes) if how == "scatter" else rows
            local = numbers % each
            table = np.stack(
                [
                    self.address + local * nbytes,
                    local * nbytes,
                    np.full(rows, nbytes),
                    local,
                ],
                axis=1,
            ).astype(np.int64)
            if how == "scatter":
                peers = (numbers // each).astype(np.int32)
                submit = lambda: self._engine.scatter(self._remotes, table, peers)  # noqa: E731
            else:
                submit = lambda: self._remotes[0].post(table)  # noqa: E731
        start = time.monotonic()
        operation = submit()
        submitted = time.monotonic()
        operation.wait(_TIMEOUT_S)
        return {"start": start, "submit_s": submitted - start}

    def open_answers(self) -> Message:
        """Open memory that a reader may answer into."""
        memory = self._engine.allocate(4096)
        target = export_rows(self._engine, memory, memory.nbytes, 1)
        self._answers = target, memory
        return {"descriptor": base64.b64encode(target.descriptor).decode()}

    def ping(self, count: int) -> Message:
        """Write 8 bytes and wait for the answer, `count` times; the seconds of each round."""
        assert self._answers is not None
        target = self._answers[0]
        row = np.array([[self.address, 0, 8, 0]], np.int64)
        times = []
        for _ in range(count):
            start = time.perf_counter()
            operation = self._remotes[0].post(row)
            target.wait([0], _TIMEOUT_S)
            times.append(time.perf_counter() - start)
            target.reset([0])
            operation.wait(_TIMEOUT_S)
        return {"seconds": times}

    # ---- what it is compared with

    def memcpy(self, sizes: list[int]) -> Message:
        """Copy the same rows inside this process."""
        nbytes = sum(sizes)
        if self._device is not None:
            return self._copy_on_device(self._device, nbytes)
        if self._copied is None:
            self._copied = np.empty(self._words.nbytes, np.uint8)
            self._copied.fill(1)  # every page present
        at = np.concatenate(([0], np.cumsum(sizes)[:-1]))
        copy = Memcpy((self.address + at).tolist(), (address_of(self._copied) + at).tolist(), sizes)
        seconds = copy.run()
        if not np.array_equal(self._copied[:nbytes], self._words.view(np.uint8)[:nbytes]):
            raise ConfigError("the plain copy is wrong")
        return {"seconds": seconds, "name": copy.name}

    def _copy_on_device(self, source: DeviceWords, nbytes: int) -> Message:
        """The same bytes to memory of the reader's GPU, by one call of this process."""
        if self._device_copy is None:
            target = DeviceWords(np.zeros_like(self._words), device_count() - 1)
            self._device_copy = DeviceCopy(target, source)
        seconds = self._device_copy.run(nbytes)
        copied = self._device_copy.target
        copied.download()
        if not np.array_equal(copied.host[: nbytes // 8], self._words[: nbytes // 8]):
            raise ConfigError("the plain copy is wrong")
        return {"seconds": seconds, "name": self._device_copy.name}

    def open_sockets(self, port: int, sizes: list[int]) -> Message:
        """Connect plainly."""
        if self._sender is not None:
            self._sender.close()
        at = self.address + np.concatenate(([0], np.cumsum(sizes)[:-1]))
        self._sender = SocketSender(port, at.tolist(), sizes)
        return {}

    def sockets(self) -> Message:
        """Send the rows that were agreed."""
        assert self._sender is not None
        return {"start": self._sender.run()}

    def ping_socket(self, port: int, count: int) -> Message:
        """The same rounds over a plain connection."""
        times = []
        with socket.create_connection(("127.0.0.1", port)) as stream:
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(count):
                start = time.perf_counter()
                stream.sendall(bytes(8))
                stream.recv(8, socket.MSG_WAITALL)
                times.append(time.perf_counter() - start)
        return {"seconds": times}

    def close(self) -> None:
        """Let go of everything."""
        self.disconnect()
        if self._sender is not None:
            self._sender.close()
        self._engine.close()
