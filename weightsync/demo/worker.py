"""Processes of the demo and how they talk: JSON objects, one a line, over a pair of pipes.

Nothing that comes from another process is unpickled or executed. A worker dies with the process
that started it, however that one ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import selectors
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import weightsync.errors as errors
from weightsync.errors import (
    ConfigError,
    InternalError,
    PeerLostError,
    TransferTimeoutError,
    WeightSyncError,
)

__all__ = ["Channel", "Message", "Team", "Worker", "die_with", "serve"]

Message = dict[str, Any]

_PR_SET_PDEATHSIG: Final = 1
_MAX_LINE: Final = 64 << 20  # spans of a long run are a few megabytes
_LOG_TAIL: Final = 2000
_READ_BYTES: Final = 1 << 16


class Channel:
    """One end of the pipes between a worker and its parent.

    Args:
        read_fd: Open for reading; owned.
        write_fd: Open for writing; owned.
    """

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self.read_fd, self._write_fd = read_fd, write_fd
        self._pending = b""
        self._closed = False

    def send(self, **message: Any) -> None:
        """Send one object. Blocks while the pipe is full.

        Raises:
            BrokenPipeError: The other end is gone.
        """
        data = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        while data:
            data = data[os.write(self._write_fd, data) :]

    def receive(self) -> Message | None:
        """The next object; blocks. None when the other end is gone.

        Raises:
            ConfigError: What came is no JSON object.
        """
        while b"\n" not in self._pending:
            data = os.read(self.read_fd, _READ_BYTES)
            if not data:
                return None
            self._pending += data
            if len(self._pending) > _MAX_LINE:
                raise ConfigError(f"a message of more than {_MAX_LINE} bytes")
        line, _, self._pending = self._pending.partition(b"\n")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ConfigError(f"not a message: {line[:80]!r}")
        return message

    @property
    def is_buffered(self) -> bool:
        """Whether an object was read from the pipe already."""
        return b"\n" in self._pending

    def is_waiting(self) -> bool:
        """Whether `receive` would return at once (or nearly so)."""
        return self.is_buffered or bool(select.select([self.read_fd], [], [], 0)[0])

    def close(self) -> None:
        """Close both pipes. Idempotent."""
        if not self._closed:
            self._closed = True
            os.close(self.read_fd)
            os.close(self._write_fd)


class Worker:
    """A process of the demo, seen from its parent.

    Args:
        name: For people, such as "trainer 0".
        role: Module of `package` that it runs.
        log: File that takes its output; its folder also takes temporary files.
        package: Whose `__main__` it starts in.
        inside: Command that runs it, such as `ip netns exec NAME`; must become it by exec.
    """

    def __init__(
        self,
        name: str,
        role: str,
        log: Path,
        *,
        package: str = "weightsync.demo",
        inside: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.log = log
        self.inbox: deque[Message] = deque()  # events that nobody has taken yet
        down_read, down_write = os.pipe()
        up_read, up_write = os.pipe()
        self.channel = Channel(up_read, down_write)
        try:
            with log.open("wb") as output:
                self.process = subprocess.Popen(
                    [
                        *inside,
                        *(sys.executable, "-P", "-m", package, role),
                        *(str(down_read), str(up_write), str(os.getpid())),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=(down_read, up_write),
                    env=_environment(log.parent),
                    start_new_session=True,  # Ctrl-C is for the parent, which ends its workers
                )
        except BaseException:
            self.channel.close()
            raise
        finally:
            os.close(down_read)
            os.close(up_write)

    def send(self, do: str, **arguments: Any) -> None:
        """Tell the worker to do something; what comes of it arrives as an event."""
        with contextlib.suppress(BrokenPipeError):  # its end is noticed by whoever waits for it
            self.channel.send(do=do, **arguments)

    def take(self, kinds: Sequence[str]) -> Message | None:
        """The oldest event of one of these kinds that was not taken yet."""
        for event in self.inbox:
            if event["event"] in kinds:
                self.inbox.remove(event)
                return event
        return None

    def log_tail(self) -> str:
        """The end of what it printed."""
        try:
            return self.log.read_bytes()[-_LOG_TAIL:].decode(errors="replace").strip()
        except OSError:
            return ""

    def end(self, timeout_s: float) -> None:
        """Wait for the end of the process, kill it after `timeout_s`; close the pipes."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()
        self.channel.close()

    def kill(self) -> None:
        """End the process, and what it started, at once."""
        with contextlib.suppress(ProcessLookupError):  # it leads a session of its own
            os.killpg(self.process.pid, signal.SIGKILL)


class Team:
    """All workers of one demo. Context manager: leaving it ends every process.

    Args:
        folder: Takes their logs.
        package: Holds the modules of their roles.
    """

    def __init__(self, folder: Path, *, package: str = "weightsync.demo") -> None:
        self.folder = folder
        self._package = package
        self.workers: list[Worker] = []
        self._gone: set[Worker] = set()

    def start(self, name: str, role: str, inside: Sequence[str] = (), /, **options: Any) -> Worker:
        """Start a process, by the command `inside` if any, and send it its options."""
        log = self.folder / f"{name.replace(' ', '-').replace('/', '-')}.log"
        worker = Worker(name, role, log, package=self._package, inside=inside)
        self.workers.append(worker)
        worker.send("start", **options)
        return worker

    def wait(
        self,
        workers: Sequence[Worker],
        kinds: str | tuple[str, ...],
        *,
        timeout_s: float,
        may_die: Worker | None = None,
        on_event: Callable[[Worker, Message], None] | None = None,
    ) -> dict[Worker, Message]:
        """Take one event of each of `workers`; what else is said is kept for later.

        Args:
            workers: Whom to wait for.
            kinds: Values of "event" that count. Events of kind "progress" are passed to
                `on_event` only.
            timeout_s: Deadline.
            may_die: A worker whose end counts as an event of kind "died".
            on_event: Called for every event as it comes.

        Returns:
            The event of every worker.

        Raises:
            WeightSyncError: A worker reported one, or ended when it should not.
            TransferTimeoutError: The deadline passed; names who was waited for.
        """
        deadline = time.monotonic() + timeout_s
        kinds = (kinds,) if isinstance(kinds, str) else kinds
        found: dict[Worker, Message] = {}
        while True:
            for worker in workers:
                if worker not in found and (event := worker.take((*kinds, "died"))) is not None:
                    found[worker] = event
            if len(found) == len(workers):
                return found
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                late = ", ".join(worker.name for worker in workers if worker not in found)
                raise TransferTimeoutError(f"waited {timeout_s:g} s for {late}")
            for worker in self._heard(min(left_s, 1.0)):
                event = self._event(worker, may_die)
                if on_event is not None:
                    on_event(worker, event)
                if event["event"] != "progress":
                    worker.inbox.append(event)

    def _heard(self, timeout_s: float) -> list[Worker]:
        """Workers that have said something, or have ended; each has at least one event."""
        alive = [worker for worker in self.workers if worker not in self._gone]
        buffered = [worker for worker in alive if worker.channel.is_buffered]
        if buffered:
            return buffered
        by_fd = {worker.channel.read_fd: worker for worker in alive}
        with selectors.DefaultSelector() as selector:
            for fd in by_fd:
                selector.register(fd, selectors.EVENT_READ)
            return [by_fd[key.fd] for key, _ in selector.select(timeout_s)]

    def _event(self, worker: Worker, may_die: Worker | None) -> Message:
        message = worker.channel.receive()
        if message is None:
            status = worker.process.wait()
            self._gone.add(worker)
            if worker is may_die:
                return {"event": "died", "status": status}
            raise PeerLostError(
                f"{worker.name} ended with status {status} while it was needed; it printed:\n"
                f"{worker.log_tail()}",
                peer=worker.name,
            )
        if message.get("event") == "failed":
            raise _error_of(worker, message)
        return message

    def dismiss(self, timeout_s: float = 10.0) -> None:
        """Let every worker leave by itself; those that do not are killed."""
        for worker in self.workers:
            worker.send("leave")
        deadline = time.monotonic() + timeout_s
        for worker in self.workers:
            worker.end(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.end(10.0)


Role = Callable[[Channel, Message, Iterator[Message]], None]


def serve(read_fd: int, write_fd: int, load: Callable[[], Any]) -> None:
    """The main function of a worker process.

    Args:
        read_fd: Commands come from here.
        write_fd: Events go there.
        load: Imports the module of the role. Its `run` gets the channel, the options that the
            worker was started with, and the commands that follow until the parent says "leave"
            or is gone. An exception is reported to the parent and ends the process.
    """
    channel = Channel(read_fd, write_fd)
    try:
        run: Role = load().run
        options = channel.receive()
        if options is not None:
            run(channel, options, _commands(channel))
    except Exception as error:  # noqa: BLE001 - the parent says it to the user
        traceback.print_exc()  # into the log, before anybody reads it
        with contextlib.suppress(BrokenPipeError):
            channel.send(event="failed", error=type(error).__name__, message=str(error))
        raise SystemExit(1) from None


def _commands(channel: Channel) -> Iterator[Message]:
    while (command := channel.receive()) is not None and command["do"] != "leave":
        yield command


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, even by SIGKILL."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise InternalError(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        raise SystemExit(1)  # it ended before we could say so


def _environment(folder: Path) -> dict[str, str]:
    """The environment of workers: one thread each, no network, quiet libraries."""
    return {
        **os.environ,
        "TMPDIR": str(folder),  # what libraries leave behind goes with it
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONUNBUFFERED": "1",
    }


def _error_of(worker: Worker, message: Message) -> WeightSyncError:
    found = getattr(errors, str(message.get("error")), None)
    if isinstance(found, type) and issubclass(found, WeightSyncError):
        return found(f"{worker.name}: {message.get('message')}")
    return InternalError(
        f"{worker.name}: {message.get('error')}: {message.get('message')}; it printed:\n"
        f"{worker.log_tail()}"
    )
