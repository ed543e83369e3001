"""What the fabrics are compared with: plain copies of the same tensors, as fast as we know how."""

from __future__ import annotations

import ctypes
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from weightsync.encodings import kernels
from weightsync.encodings.rows import pack_rows
from weightsync.errors import MemoryRegistrationError, PeerLostError
from weightsync.ir.dtypes import Dtype
from weightsync.units import MIB

__all__ = ["Memcpy", "ProcessRead", "SocketReceiver", "SocketSender"]

Int64 = npt.NDArray[np.int64]

_IOV_MAX: Final = 1024  # of one system call
_STREAMS: Final = 2  # as `weightsync.transport.tcp.open_tcp` has them
_PIECE_BYTES: Final = 16 * MIB  # threads share out pieces of this size


class Memcpy:
    """`memcpy` of every tensor on one thread, in a loop of compiled code.

    Args:
        sources: Addresses.
        targets: Addresses of memory whose pages are present.
        sizes: Bytes.
    """

    name = "memcpy, 1 thread"

    def __init__(
        self, sources: Sequence[int], targets: Sequence[int], sizes: Sequence[int]
    ) -> None:
        rows = len(sizes)
        n = np.ones((rows, 4), np.int64)
        n[:, 3] = sizes
        # Rows without strides or casts: the kernel is one memcpy of the C library for each.
        stride = np.zeros((rows, 4), np.int64)
        stride[:, 3] = 1
        dtype = int(Dtype.U8)
        self._table = pack_rows(sources, targets, dtype, dtype, n, stride, stride)

    def run(self) -> float:
        """Copy everything; the seconds it took."""
        start = time.perf_counter()
        kernels.pack(self._table, 1)
        return time.perf_counter() - start


class ProcessRead:
    """`process_vm_readv` of every tensor, the vectors of many tensors in one call.

    Args:
        pid: Process to read from.
        sources: Addresses there.
        targets: Addresses here.
        sizes: Bytes.
        threads: Threads that read; each takes the next call that is left.
    """

    def __init__(
        self,
        pid: int,
        sources: Sequence[int],
        targets: Sequence[int],
        sizes: Sequence[int],
        threads: int,
    ) -> None:
        self.name = f"process_vm_readv, {threads} thread{'s' if threads > 1 else ''}"
        self._pid = pid
        self._threads = threads
        self._calls = _calls(sources, targets, sizes)
        function: Any = ctypes.CDLL(None, use_errno=True).process_vm_readv
        function.restype = ctypes.c_ssize_t
        function.argtypes = [
            *(ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong),
            *(ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong),
        ]
        self._readv = function

    def run(self) -> float:
        """Read everything; the seconds it took.

        Raises:
            MemoryRegistrationError: The system refuses, or the other process is gone.
        """
        left = iter(self._calls)
        if self._threads == 1:
            start = time.perf_counter()
            self._work(left)
            return time.perf_counter() - start
        lock, failures = threading.Lock(), []
        ready, go = threading.Barrier(self._threads + 1), threading.Event()

        def one_at_a_time() -> Any:
            while True:
                with lock:
                    call = next(left, None)
                if call is None:
                    return
                yield call

        def work() -> None:
            ready.wait()
            go.wait()
            try:
                self._work(one_at_a_time())
            except MemoryRegistrationError as error:
                failures.append(error)

        readers = [threading.Thread(target=work, daemon=True) for _ in range(self._threads)]
        for reader in readers:
            reader.start()
        ready.wait()
        start = time.perf_counter()
        go.set()
        for reader in readers:
            reader.join()
        took = time.perf_counter() - start
        if failures:
            raise failures[0]
        return took

    def _work(self, calls: Any) -> None:
        for here, there, count, nbytes in calls:
            got = self._readv(self._pid, here, count, there, count, 0)
            if got != nbytes:
                why = os.strerror(ctypes.get_errno()) if got < 0 else f"{got} of {nbytes} bytes"
                raise MemoryRegistrationError(
                    f"process_vm_readv of process {self._pid}: {why}; run `weightsync doctor` to "
                    "see what this host allows"
                )


class _Streams:
    """A few connections over loopback, each with a thread and its share of the calls."""

    def __init__(
        self, sockets: Sequence[socket.socket], addresses: Sequence[int], sizes: Sequence[int]
    ) -> None:
        self.name = f"sockets, {len(sockets)} streams"
        self._sockets = sockets
        # Equal shares: piece by piece in turn, as both sides cut them the same way.
        calls = _buffers(addresses, sizes)
        self._shares = [calls[i :: len(sockets)] for i in range(len(sockets))]

    def _run(self, move: Callable[[socket.socket, list[memoryview]], int]) -> tuple[float, float]:
        """Move everything; when it began and when it ended, of the monotonic clock."""
        failures: list[Exception] = []

        def work(stream: socket.socket, share: list[list[memoryview]]) -> None:
            try:
                for buffers in share:
                    _move_all(move, stream, buffers)
            except OSError as error:
                failures.append(error)

        threads = [
            threading.Thread(target=work, args=pair, daemon=True)
            for pair in zip(self._sockets, self._shares, strict=True)
        ]
        start = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise PeerLostError(f"plain sockets over loopback: {failures[0]}")
        return start, time.monotonic()

    def close(self) -> None:
        """Hang up."""
        for stream in self._sockets:
            stream.close()


class SocketSender(_Streams):
    """Sends tensors over as many plain connections as the tcp fabric uses.

    Args:
        port: Of a `SocketReceiver` on this host.
        addresses: Where the tensors are.
        sizes: Bytes of each.
    """

    def __init__(self, port: int, addresses: Sequence[int], sizes: Sequence[int]) -> None:
        streams = [socket.create_connection(("127.0.0.1", port)) for _ in range(_STREAMS)]
        for number, stream in enumerate(streams):
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream.sendall(bytes([number]))
        super().__init__(streams, addresses, sizes)

    def run(self) -> float:
        """Send everything; when it began, of the monotonic clock."""
        return self._run(lambda stream, buffers: stream.sendmsg(buffers))[0]


class SocketReceiver:
    """The other end: receives straight into place.

    Args:
        addresses: Where the tensors go, every page present.
        sizes: Bytes of each.
    """

    name = ""

    def __init__(self, addresses: Sequence[int], sizes: Sequence[int]) -> None:
        self._place = (addresses, sizes)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._streams: _Streams | None = None

    def run(self) -> float:
        """Receive everything; when it ended, of the monotonic clock. The first call accepts."""
        if self._streams is None:
            found = [self._listener.accept()[0] for _ in range(_STREAMS)]
            by_number = {stream.recv(1)[0]: stream for stream in found}
            self._streams = _Streams([by_number[i] for i in range(_STREAMS)], *self._place)
            self.name = self._streams.name
        return self._streams._run(
            lambda stream, buffers: stream.recvmsg_into(buffers, 0, socket.MSG_WAITALL)[0]
        )[1]

    def close(self) -> None:
        """Hang up."""
        self._listener.close()
        if self._streams is not None:
            self._streams.close()


def _move_all(
    move: Callable[[socket.socket, list[memoryview]], int],
    stream: socket.socket,
    buffers: list[memoryview],
) -> None:
    """One call, and more where the system stopped short."""
    left = sum(len(buffer) for buffer in buffers) - move(stream, buffers)
    while left:
        done = sum(len(buffer) for buffer in buffers) - left
        rest = []
        for buffer in buffers:
            rest.append(buffer[min(done, len(buffer)) :])
            done -= min(done, len(buffer))
        buffers = [buffer for buffer in rest if len(buffer)]
        moved = move(stream, buffers)
        if moved == 0:
            raise ConnectionError("the other side hung up")
        left -= moved


def _buffers(addresses: Sequence[int], sizes: Sequence[int]) -> list[list[memoryview]]:
    """The memory of many tensors as buffers of system calls."""
    views = []
    for here, _, count, _ in _calls(addresses, addresses, sizes):
        pairs = np.frombuffer(here, np.uint64).reshape(count, 2).tolist()
        views.append(
            [memoryview((ctypes.c_ubyte * size).from_address(at)).cast("B") for at, size in pairs]
        )
    return views


def _calls(
    sources: Sequence[int], targets: Sequence[int], sizes: Sequence[int]
) -> list[tuple[Any, Any, int, int]]:
    """Arguments of the system calls: vectors here, vectors there, their number, their bytes."""
    calls: list[tuple[Any, Any, int, int]] = []
    here: list[tuple[int, int]] = []
    there: list[tuple[int, int]] = []
    nbytes = 0

    def close() -> None:
        nonlocal nbytes
        if here:
            vectors = [np.array(v, np.uint64) for v in (here, there)]
            local, remote = ((ctypes.c_uint64 * v.size)(*v.ravel().tolist()) for v in vectors)
            calls.append((local, remote, len(here), nbytes))
            here.clear()
            there.clear()
            nbytes = 0

    for source, target, size in zip(sources, targets, sizes, strict=True):
        for at in range(0, size, _PIECE_BYTES):
            part = min(_PIECE_BYTES, size - at)
            if nbytes + part > _PIECE_BYTES or len(here) == _IOV_MAX:
                close()
            here.append((target + at, part))
            there.append((source + at, part))
            nbytes += part
    close()
    return calls
