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
from weightsync.service.address import open_channel
from weightsync.service.credentials import MemberCredentials
from weightsync.service.reach import explain, no_answer

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


def fetch_status(
    url: str, credentials: MemberCredentials | None = None, *, timeout_s: float = 5.0
) -> pb.StatusReply:
    """Ask a coordinator how its job stands. Blocks up to `timeout_s`, then to find out why not.

    Raises:
        PeerLostError: Nobody answers at `url`.
        AuthError: The token or a certificate is not accepted.
    """
    with open_channel(url, credentials) as channel:
        try:
            return rpc.CoordinatorStub(channel).Status(pb.StatusRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise no_answer(url, timeout_s) from error
            raise explain(error, url, credentials, was_joined=False) from error


class Session:
    """One connection of one member to its coordinator. Hears nothing before `begin`.

    Args:
        url: Job URL.
        hello: First message.
        handler: Called on the reader thread with every message after Welcome; must not block.
            An answer needs this session, so `begin` comes when its owner has it at hand.
        on_lost: Called once, on the reader thread, when the stream ends for any reason but
            `close`; the argument says why.
        heartbeat: Makes the heartbeat message; called on the heartbeat thread.
        timeout_s: How long to wait for the coordinator's Welcome.
        credentials: Token and CA, for grpcs://.

    Raises:
        PeerLostError: No coordinator answers.
        AuthError: The token or a certificate is not accepted.
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
        credentials: MemberCredentials | None = None,
    ) -> None:
        self.url = url
        self._credentials = credentials
        self._handler = handler
        self._on_lost = on_lost
        self._heartbeat = heartbeat
        self._outbox: queue.SimpleQueue[pb.MemberMessage | None] = queue.SimpleQueue()
        self._welcomed = threading.Event()
        self._begun = threading.Event()
        self._closing = threading.Event()
        self._refusal: WeightSyncError | None = None
        self.welcome = pb.Welcome()
        self._channel = open_channel(url, credentials)
        self.send(hello=hello)
        self._call = rpc.CoordinatorStub(self._channel).Join(self._outgoing())
        self._reader = threading.Thread(target=self._read, name="weightsync-control", daemon=True)
        self._reader.start()
        if not self._welcomed.wait(timeout_s):
            self.close()
            raise no_answer(url, timeout_s)
        self._raise_refusal()
        self._beater = threading.Thread(target=self._beat, name="weightsync-lease", daemon=True)
        self._beater.start()

    def begin(self) -> None:
        """Let messages, and the loss of the stream, reach the handlers."""
        self._begun.set()

    def send(self, **kind: object) -> None:
        """Queue one MemberMessage, named by its field: `send(vote=pb.Vote(...))`. Never blocks."""
        self._outbox.put(pb.MemberMessage(**kind))  # type: ignore[arg-type]

    def close(self) -> None:
        """Leave and end the stream. Idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._begun.set()
        self._outbox.put(pb.MemberMessage(leave=pb.Leave()))
        self._outbox.put(None)
        if threading.current_thread() is not self._reader:
            self._reader.join(timeout=1.0)
        self._channel.close()

    def reset(self, timeout_s: float) -> None:
        """Break the connection: what is on its way in it reaches nobody. `on_lost` has run then.

        Not to be called from a handler. Blocks up to `timeout_s`.
        """
        self._call.cancel()  # type: ignore[no-untyped-call]
        self._reader.join(timeout_s)

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
                    self._begun.wait()  # for the owner, which called the constructor
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
            was_joined = self._welcomed.is_set()
            why = explain(error, self.url, self._credentials, was_joined=was_joined)
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
