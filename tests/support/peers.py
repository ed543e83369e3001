"""A process that serves one end of a fabric and does what the test tells it, by name.

with Peer() as peer:
    descriptor = peer.call("export", nbytes=4096, slots=[1], is_private=False)
    peer.kill()
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from support.cuda import Gpu, the_gpu
from support.fabrics import Bytes, address_of, place_of, random_bytes, rows
from weightsync.errors import WeightSyncError
from weightsync.transport.base import Operation, Remote, Target
from weightsync.transport.fabrics import open_fabric
from weightsync.transport.group import PeerGroup

__all__ = ["Peer", "PeerError"]


class PeerError(Exception):
    """What a call raised in the other process: the class's name, and its message."""


class Peer:
    """The test's end.

    Args:
        fabric: Of the other process' engine.
        options: Of that fabric.
    """

    def __init__(self, fabric: str = "local", **options: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.peers", json.dumps([fabric, options])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self.pid = self._process.pid

    def call(self, name: str, **arguments: Any) -> Any:
        self.start(name, **arguments)
        return self.result()

    def start(self, name: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, arguments]) + "\n")
        self._process.stdin.flush()

    @property
    def output(self) -> IO[str]:
        """Where answers come: a line for each call."""
        assert self._process.stdout is not None
        return self._process.stdout

    def result(self) -> Any:
        kind, value = json.loads(self.output.readline())
        if kind == "error":
            raise PeerError(value)
        return value

    def stop(self) -> None:
        """SIGSTOP, and wait until it has stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def cpu_share(self, seconds: float) -> float:
        """Processor time that all its threads take for so long, in units of one core."""

        def busy_s() -> float:
            tasks = Path(f"/proc/{self.pid}/task").glob("*/schedstat")
            return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

        before, start = busy_s(), time.monotonic()
        time.sleep(seconds)
        return (busy_s() - before) / (time.monotonic() - start)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.wait(10)

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


class _Server:
    """The other end: each method is one call."""

    def __init__(self) -> None:
        fabric, options = json.loads(sys.argv[1])
        self.engine = open_fabric(fabric, name="peer", **options)
        self.place = place_of(fabric)
        self.view: Bytes
        self.target: Target
        self.remote: Remote
        self.remotes: list[Remote] = []
        self.payload: Bytes
        self.payload_address: int
        self.gpu: Gpu
        self.group: PeerGroup
        self.operation: Operation
        self.kept: list[object] = []

    def export(self, nbytes: int, slots: list[int], is_private: bool) -> str:
        if is_private:
            self.view = self.place(np.zeros(nbytes, np.uint8))
            memory: Any = self.engine.register(address_of(self.view), nbytes, self.view)
        else:
            memory = self.engine.allocate(nbytes)
            self.view = np.frombuffer(memory, np.uint8)
        self.target = self.engine.export([(0, memory, 0, nbytes)], slots, 8, 1)
        return self.target.descriptor.hex()

    def wait(self, slots: list[int], timeout_s: float) -> None:
        self.target.wait(slots, timeout_s)

    def holds(self, nbytes: int, seed: int) -> bool:
        return bool(np.array_equal(self.view[:nbytes], random_bytes(nbytes, seed)))

    def fence(self) -> None:
        self.target.fence()

    def connect(self, descriptor: str) -> None:
        self.remote = self.engine.connect(bytes.fromhex(descriptor), 10.0)
        self.remotes.append(self.remote)

    def use_remote(self, number: int) -> None:
        self.remote = self.remotes[number]

    def load(self, nbytes: int, seed: int) -> None:
        self.payload = self.place(random_bytes(nbytes, seed))
        self.payload_address = address_of(self.payload)
        self.kept.append(self.engine.register(self.payload_address, nbytes, self.payload))

    def load_device(self, nbytes: int, seed: int) -> int:
        """The payload in memory of a GPU, fake or not."""
        self.gpu = the_gpu()
        self.payload_address = self.gpu.allocate(nbytes)
        self.gpu.write(self.payload_address, random_bytes(nbytes, seed))
        self.kept.append(self.engine.register(self.payload_address, nbytes, None))
        return self.payload_address

    def unload_device(self) -> None:
        lease: Any = self.kept.pop()
        lease.release()
        self.gpu.free(self.payload_address)

    def fail_gpu(self, function: str, result: int, skip: int = 0) -> None:
        """Let one call of that function of the fake driver fail, after `skip` that do not."""
        the_gpu().fail(function, result, skip)

    def missing(self, slot: int) -> list[int]:
        return list(self.target.missing(slot))

    def post(self, table: list[list[int]]) -> None:
        """Rows with the source as an offset into the payload."""
        writes = rows(*table)
        writes[:, 0] += self.payload_address
        self.operation = self.remote.post(writes)

    def transfer(self, table: list[list[int]], timeout_s: float) -> None:
        """Both in one call, so that the test can go on meanwhile."""
        self.post(table)
        self.finish(timeout_s)

    def finish(self, timeout_s: float) -> None:
        self.operation.wait(timeout_s)

    def join(self, index: int, size: int) -> str:
        self.group = self.engine.open_group(index, size)
        return self.group.descriptor.hex()

    def meet(self, member: int, descriptor: str) -> None:
        self.group.connect(member, bytes.fromhex(descriptor), 10.0)

    def barrier(self, timeout_s: float) -> None:
        self.group.barrier(timeout_s)

    def tell(self, member: int, text: str) -> None:
        self.group.send(member, text.encode(), 10.0).wait(10.0)

    def store(self, offset: int, nbytes: int, value: int) -> None:
        """Write through the mapping, as a zombie would: asking nobody."""
        assert self.remote.address is not None
        ctypes.memset(self.remote.address + offset, value, nbytes)

    def drop_capabilities(self) -> None:
        """Be no better than any process of this user; threads started from now on too."""
        version_3 = 0x20080522
        header = (ctypes.c_uint32 * 2)(version_3, 0)
        none = (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, none) == 0

    def forbid_attaching(self) -> None:
        """As a process without core dumps: only privileged ones may read its memory."""
        pr_set_dumpable = 4
        assert ctypes.CDLL(None).prctl(pr_set_dumpable, 0, 0, 0, 0) == 0

    def unmap_payload(self) -> None:
        """Break the promise of the lease: the pages are gone while it lives."""
        first = -(-address_of(self.payload) // 4096) * 4096
        libc = ctypes.CDLL(None, use_errno=True)
        length = (self.payload.nbytes - 8192) // 4096 * 4096
        none = 0
        assert libc.mprotect(ctypes.c_void_p(first), ctypes.c_size_t(length), none) == 0


def _serve() -> None:
    server = _Server()
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = ["ok", getattr(server, name)(**arguments)]
        except WeightSyncError as error:
            answer = ["error", f"{type(error).__name__}: {error}"]
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
