"""What source and sink members share: staying joined, and one worker for slow messages."""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable

from weightsync.errors import (
    ConfigError,
    FencedError,
    LayoutError,
    NoQuorumError,
    PeerLostError,
    PlanError,
    SourceMutatedError,
    StaleVersionError,
    VersionAbortedError,
    WeightSyncError,
)
from weightsync.service import weightsync_pb2 as pb
from weightsync.service.credentials import MemberCredentials
from weightsync.service.session import Session, to_error

__all__ = ["Member", "abort_error"]

_log = logging.getLogger(__name__)

_RETRY_S = 0.1  # between attempts to reach a coordinator that went away
_RETRY_MAX_S = 1.0
_CLOSE_S = 5.0

# What a caller can mend is raised as it is; everything else is "the fleet aborted, because".
_KEPT = (
    ConfigError,
    LayoutError,
    NoQuorumError,
    PlanError,
    SourceMutatedError,
    StaleVersionError,
    VersionAbortedError,
)


def abort_error(problem: pb.Problem, version: int) -> WeightSyncError:
    """What `publish` raises for a version that was not committed."""
    error = to_error(problem, version=version)
    if isinstance(error, _KEPT):
        return error
    wrapped = VersionAbortedError(
        f"version {version} was aborted, the old one serves: {problem.message}",
        version=version,
        reason=problem.message,
    )
    wrapped.__cause__ = error
    return wrapped


class Member:
    """A process that takes part in a job until `close`.

    Subclasses answer `hello`, handle messages in `handle` (reader thread, must not block) and
    run slow work with `submit` (one worker thread, in order). When the coordinator is lost the
    member keeps trying to join again; a fenced member joins as a new generation.

    Args:
        url: Job URL.
        connect_timeout_s: How long the first join may take.
        credentials: Token and CA, for grpcs://.
    """

    def __init__(
        self,
        url: str,
        *,
        connect_timeout_s: float,
        credentials: MemberCredentials | None = None,
    ) -> None:
        self.url = url
        self._credentials = credentials
        self.connect_timeout_s = connect_timeout_s
        self.generation = secrets.randbits(63)
        self.changed = threading.Condition()
        self.lost: WeightSyncError | None = None  # why there is no session now
        self.refused: WeightSyncError | None = None  # why there never will be one again
        self.closing = threading.Event()
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._work, name="weightsync-worker", daemon=True)
        self._rejoiner: threading.Thread | None = None
        self.session: Session | None = None

    def join(self) -> None:
        """Join the job for the first time; raises what `Session` raises.

        Waits for a coordinator that is not there yet: processes of a job start in any order.
        """
        deadline = time.monotonic() + self.connect_timeout_s
        while self.session is None:
            try:
                self.session = self._connect(max(_RETRY_S, deadline - time.monotonic()))
                self.session.begin()
            except PeerLostError:
                if time.monotonic() + _RETRY_S > deadline:
                    raise
                time.sleep(_RETRY_S)
        self._worker.start()

    def close(self) -> None:
        """Leave the job and stop all threads. Idempotent, bounded."""
        if self.closing.is_set():
            return
        self.closing.set()
        with self.changed:
            self.changed.notify_all()
        if self.session is not None:
            self.session.close()
        self._tasks.put(None)
        if self._worker.is_alive():
            self._worker.join(_CLOSE_S)
        rejoiner = self._rejoiner
        if rejoiner is not None:
            rejoiner.join(_CLOSE_S)

    # ---- for subclasses ----

    def hello(self) -> pb.Hello:
        """The message that joins, with what this member went through before."""
        raise NotImplementedError

    def handle(self, message: pb.CoordinatorMessage) -> None:
        """React to one message; reader thread."""
        raise NotImplementedError

    def heartbeat(self) -> pb.Heartbeat:
        """The lease renewal."""
        return pb.Heartbeat()

    def disconnected(self, why: WeightSyncError) -> None:
        """The session is gone; a new one is being sought. Reader thread."""

    def rejoined(self) -> None:
        """There is a session again. Rejoin thread."""

    def given_up(self, why: WeightSyncError) -> None:
        """There will be no session again, `refused` says so by now. Rejoin thread."""

    def prepare_rejoin(self, why: WeightSyncError) -> None:
        """Bring the member to rest before it says Hello again. Rejoin thread; may block."""

    def send(self, **kind: object) -> None:
        """Send one message if there is a session; what a lost session misses, Hello restates."""
        session = self.session
        if session is not None:
            session.send(**kind)

    def submit(self, task: Callable[[], None]) -> None:
        """Run `task` on the worker thread after those submitted before."""
        self._tasks.put(task)

    def drain(self, timeout_s: float) -> bool:
        """Wait until the worker has finished what was submitted; False on time-out."""
        done = threading.Event()
        self.submit(done.set)
        return done.wait(timeout_s)

    # ---- inside ----

    def _connect(self, timeout_s: float) -> Session:
        return Session(
            self.url,
            self.hello(),
            handler=self.handle,
            on_lost=self._on_lost,
            heartbeat=self.heartbeat,
            timeout_s=timeout_s,
            credentials=self._credentials,
        )

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except Exception:  # noqa: BLE001 - the worker must live on
                # Tasks turn expected failures into messages; this is a bug, and must be seen.
                _log.exception("%s: a task failed", type(self).__name__)

    def _on_lost(self, why: WeightSyncError) -> None:
        with self.changed:
            self.session = None
            self.lost = why
            self.changed.notify_all()
        self.disconnected(why)
        if not self.closing.is_set():
            rejoiner = threading.Thread(
                target=self._rejoin, args=(why,), name="weightsync-rejoin", daemon=True
            )
            rejoiner.start()
            self._rejoiner = rejoiner  # only a started thread can be waited for

    def _rejoin(self, why: WeightSyncError) -> None:
        self.prepare_rejoin(why)
        if isinstance(why, FencedError):
            self.generation = secrets.randbits(63)
        wait_s = _RETRY_S
        while not self.closing.wait(wait_s):
            wait_s = min(_RETRY_MAX_S, wait_s * 2)
            started = time.monotonic()
            try:
                session = self._connect(min(self.connect_timeout_s, 5.0))
            except PeerLostError as error:
                self.lost = error
                _log.debug("join again after %.1f s: %s", time.monotonic() - started, error)
                continue
            except WeightSyncError as error:
                # Refused: nobody but the user can mend this.
                with self.changed:
                    self.lost = self.refused = error
                    self.changed.notify_all()
                _log.error("cannot join %s again: %s", self.url, error)
                self.given_up(error)
                return
            with self.changed:
                self.session = session
                self.lost = None
                self.changed.notify_all()
            session.begin()
            self.rejoined()
            return
