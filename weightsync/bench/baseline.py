"""What the fabrics are compared with: plain copies of the same tensors, as fast as we know how."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from weightsync.encodings import kernels
from weightsync.encodings.rows import pack_rows
from weightsync.errors import MemoryRegistrationError
from weightsync.ir.dtypes import Dtype
from weightsync.units import MIB

__all__ = ["Memcpy", "ProcessRead"]

Int64 = npt.NDArray[np.int64]

_IOV_MAX: Final = 1024  # of one system call
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
