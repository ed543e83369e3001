"""A member's side of the control stream: join, heartbeats, and typed problems as exceptions.

`Session` owns one gRPC stream and two threads: one reads messages and hands them to the
member's handler, one sends heartbeats. When the stream breaks the handler is told once; it
decides whether to open a new session.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator

import grpc

import weightsync.errors as errors
from weightsync.errors import InternalError, PeerLostError, WeightSyncError
from weightsync.service import weightsync_pb2 as pb
from weightsync.service import weightsync_pb2_grpc as rpc
from weightsync.service.coordinator import CHANNEL_OPTIONS, socket_path

__all__ = ["Session", "fetch_status", "problem_of", "to_error"]

_log = logging.getLogger(__name__)


def to_error(problem: pb.Problem, **context: object) -> WeightSyncError:
    """The exception that a message describes; unknown class names become InternalError."""
    found = getattr(errors, problem.error, None)
    if not (isinstance(found, type) and issubclass(found, WeightSyncError)):
        return InternalError(f"{problem.error}: {problem.message}", **context)
    return found(problem.message, reason=problem.message, **context)


def problem_of(error: BaseException) -> pb.Problem:
    """The message that describes an exception."""
    if isinstance(error, WeightSyncError):
        return pb.Problem(error=type(error).__name__, message=str(error))
    return pb.Problem(error="InternalError", message=f"{type(error).__name__}: {error}")


def fetch_status(url: str, *, timeout_s: float = 5.0) -> pb.StatusReply:
    """Ask a coordinator how its job stands. Blocks up to `timeout_s`.

    Raises:
        PeerLostError: Nobody answers at `url`.
    """
    with grpc.insecure_channel(f"unix:{socket_path(url)}", options=CHANNEL_OPTIONS) as channel:
        try:
            return rpc.CoordinatorStub(channel).Status(pb.StatusRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise PeerLostError(
                f"no coordinator answers at {url}: {_details(error)}", peer=url
            ) from error


class Session:
    """One connection of one member to its coordinator.

    Args:
        url: Job URL.
        hello: First message.
        handler: Called on the reader thread with every message after Welcome; must not block.
        on_lost: Called once, on the reader thread, when the stream ends for any reason but
            `close`; the argument says why.
        heartbeat: Makes the heartbeat message; called on the heartbeat thread.
        timeout_s: How long to wait for the coordinator's Welcome.

    Raises:
        PeerLostError: No coordinator answers.
        ConfigError, FencedError: The coordinator refuses this member.
    """

    def __init__(
        self,
        url: str,
        hello: pb.Hello,
        *,
        handler: Callable[[pb.CoordinatorMessage], None],
        on_lost: Callable[[WeightSyncError], None],
        heartbeat: Callable[[], pb.Heartbeat],
        timeout_s: float,
    ) -> None:
        self.url = url
        self._handler = handler
        self._on_lost = on_lost
        self._heartbeat = heartbeat
        self._outbox: queue.SimpleQueue[pb.MemberMessage | None] = queue.SimpleQueue()
        self._welcomed = threading.Event()
        self._closing = threading.Event()
        self._refusal: WeightSyncError | None = None
        self.welcome = pb.Welcome()
        self._channel = grpc.insecure_channel(f"unix:{socket_path(url)}", options=CHANNEL_OPTIONS)
        self.send(hello=hello)
        self._call = rpc.CoordinatorStub(self._channel).Join(self._outgoing())
        self._reader = threading.Thread(target=self._read, name="weightsync-control", daemon=True)
        self._reader.start()
        if not self._welcomed.wait(timeout_s):
            self.close()
            raise PeerLostError(
                f"no coordinator answered at {url} in {timeout_s:g} s; is the job running?",
                peer=url,
            )
        self._raise_refusal()
        self._beater = threading.Thread(target=self._beat, name="weightsync-lease", daemon=True)
        self._beater.start()

    def send(self, **kind: object) -> None:
        """Queue one MemberMessage, named by its field: `send(vote=pb.Vote(...))`. Never blocks."""
        self._outbox.put(pb.MemberMessage(**kind))  # type: ignore[arg-type]

    def close(self) -> None:
        """Leave and end the stream. Idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._outbox.put(pb.MemberMessage(leave=pb.Leave()))
        self._outbox.put(None)
        if threading.current_thread() is not self._reader:
            self._reader.join(timeout=1.0)
        self._channel.close()

    def _raise_refusal(self) -> None:
        if self._refusal is not None:
            self.close()
            raise self._refusal

    def _outgoing(self) -> Iterator[pb.MemberMessage]:
        while (message := self._outbox.get()) is not None:
            yield message

    def _read(self) -> None:
        why: WeightSyncError = PeerLostError(
            f"the coordinator at {self.url} ended the connection", peer=self.url
        )
        try:
            for message in self._call:
                kind = message.WhichOneof("kind")
                if kind == "welcome":
                    self.welcome = message.welcome
                    self._welcomed.set()
                elif kind == "refused":
                    why = to_error(message.refused.problem)
                    self._refusal = why
                    break
                elif kind == "closing":
                    why = PeerLostError(
                        f"the job at {self.url} ended: {message.closing.reason}", peer=self.url
                    )
                    break
                else:
                    self._handler(message)
        except grpc.RpcError as error:
            what = "lost the" if self._welcomed.is_set() else "no"
            why = PeerLostError(
                f"{what} coordinator at {self.url}: {_details(error)}", peer=self.url
            )
        if not self._welcomed.is_set():
            self._refusal = why
            self._welcomed.set()
        elif not self._closing.is_set():
            self._closing.set()  # nobody closes a session that is lost: its threads end here
            self._outbox.put(None)
            self._channel.close()
            self._on_lost(why)

    def _beat(self) -> None:
        while not self._closing.wait(self.welcome.lease_s / 5):
            self.send(heartbeat=self._heartbeat())


def _details(error: grpc.RpcError) -> str:
    details = getattr(error, "details", None)
    return str(details()) if callable(details) else str(error)
