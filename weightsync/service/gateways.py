"""The coordinator's side of its gateways: starts them, hears their members, answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Protocol

from google.protobuf.message import DecodeError

from weightsync.errors import ConfigError, InternalError
from weightsync.service import weightsync_pb2 as pb
from weightsync.service.address import TcpAddress
from weightsync.service.credentials import ServerCredentials
from weightsync.service.gateway import HEADER, Kind, Setup, frame
from weightsync.service.listen import TlsListener, taken

__all__ = ["Gateways", "Outlet", "Streams"]

_log = logging.getLogger(__name__)

_START_S = 30.0
_STOP_S = 5.0


class Outlet(Protocol):
    """Where messages to one member go."""

    def put_nowait(self, message: pb.CoordinatorMessage | None, /) -> None:
        """Send; None ends the stream after what was sent before."""
        ...


class Streams(Protocol):
    """Who decides about messages. All calls come from the loop's thread."""

    def joined(self, outlet: Outlet) -> int:
        """A stream begins; its number."""
        ...

    def heard(self, member: int, message: pb.MemberMessage) -> None:
        """A message came in."""
        ...

    def left(self, member: int) -> None:
        """The stream has ended."""
        ...

    def status(self) -> pb.StatusReply:
        """How the job stands."""
        ...


class Gateways:
    """Runs `count` gateways. One loop owns it; see `gateway` for what they are.

    Args:
        count: Processes; 48 members each is a good share.
        listener: Where they listen, together.
        credentials: What they serve with.
        streams: Decides.
    """

    def __init__(
        self,
        count: int,
        listener: TlsListener,
        credentials: ServerCredentials,
        streams: Streams,
    ) -> None:
        self._count, self._listener = count, listener
        self._credentials, self._streams = credentials, streams
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closing = False
        self._place: socket.socket | None = None

    async def start(self) -> None:
        """Start all of them; they listen when this returns. Takes about a second.

        Raises:
            ConfigError: The port is taken.
            InternalError: A process did not start.
        """
        self._place = _take(self._listener.port.address)
        host, port = self._place.getsockname()[:2]
        self._setup = Setup(
            host,
            port,
            self._credentials.token.for_own_process(),
            self._credentials.cert_pem.decode(),
            self._credentials.key_pem.decode(),
        ).to_bytes()
        self._listener.at(port)
        await asyncio.gather(*(self._start_one() for _ in range(self._count)))

    async def stop(self) -> None:
        """End them, after what was sent to members before."""
        self._is_closing = True
        for task in self._tasks:
            task.cancel()
        processes = [link.process for link in self._links]
        for link in self._links:
            link.send(frame(Kind.CLOSE))
        await asyncio.gather(*(asyncio.to_thread(_end, process) for process in processes))
        if self._place is not None:
            self._place.close()

    async def _start_one(self) -> None:
        ours, process = await asyncio.to_thread(_spawn)
        link = _Link(process, self._streams, self._ended)
        self._links.add(link)
        await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=ours)
        link.send(frame(Kind.SETUP, payload=self._setup))
        try:
            await asyncio.wait_for(link.ready, _START_S)
        except TimeoutError as error:
            process.kill()
            raise InternalError(f"a gateway did not start in {_START_S} s") from error

    def _ended(self, link: _Link) -> None:
        """A process is gone, and what its members were connected to."""
        self._links.discard(link)
        if self._is_closing or not link.was_ready:
            return
        _log.error("a gateway of the coordinator ended; its members join again at another one")
        task = asyncio.get_running_loop().create_task(self._replace(link))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _replace(self, link: _Link) -> None:
        await asyncio.to_thread(_end, link.process)
        try:
            await self._start_one()
        except (ConfigError, InternalError) as error:
            _log.error("no gateway in its place: %s", error)


class _Link(asyncio.Protocol):
    """The socket pair to one gateway, and the streams that it holds."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        streams: Streams,
        on_end: Callable[[_Link], None],
    ) -> None:
        self.process = process
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._streams, self._on_end = streams, on_end
        self._members: dict[int, int] = {}  # by stream
        self._inbox = bytearray()
        self._outbox: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        # The same message often goes to many, one after the other.
        self._last: tuple[pb.CoordinatorMessage | None, bytes] = (None, b"")

    @property
    def was_ready(self) -> bool:
        """Whether it ever listened."""
        return self.ready.done() and self.ready.exception() is None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        self._inbox += data
        at = 0
        while at + HEADER.size <= len(self._inbox):
            length, kind, stream = HEADER.unpack_from(self._inbox, at)
            end = at + HEADER.size + length
            if end > len(self._inbox):
                break
            payload = bytes(self._inbox[at + HEADER.size : end])
            at = end
            self._take(Kind(kind), stream, payload)
        del self._inbox[:at]

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio."""
        if not self.ready.done():
            self.ready.set_exception(InternalError("a gateway ended before it listened"))
        self._transport = None
        for member in self._members.values():
            self._streams.left(member)
        self._members.clear()
        self._on_end(self)

    def send(self, data: bytes) -> None:
        """Send soon, with all that is said meanwhile."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(data)

    def message(self, stream: int, message: pb.CoordinatorMessage | None) -> None:
        """Send to a member; None ends its stream."""
        if message is None:
            self.send(frame(Kind.END, stream))
            return
        if message is not self._last[0]:
            self._last = (message, message.SerializeToString())
        self.send(frame(Kind.MESSAGE, stream, self._last[1]))

    def _flush(self) -> None:
        if self._transport is not None:
            self._transport.writelines(self._outbox)
        self._outbox.clear()

    def _take(self, kind: Kind, stream: int, payload: bytes) -> None:
        if kind is Kind.MESSAGE:
            self._hear(stream, payload)
        elif kind is Kind.END:
            if (member := self._members.pop(stream, None)) is not None:
                self._streams.left(member)
        elif kind is Kind.STATUS:
            self.send(frame(Kind.STATUS, stream, self._streams.status().SerializeToString()))
        elif kind is Kind.READY:
            self.ready.set_result(None)
        elif kind is Kind.FAILED:
            self.ready.set_exception(ConfigError(payload.decode()))

    def _hear(self, stream: int, payload: bytes) -> None:
        try:
            message = pb.MemberMessage.FromString(payload)
        except DecodeError as error:
            _log.error("a member sent what is no message: %s", error)
            self.message(stream, None)
            return
        member = self._members.get(stream)
        if member is None:
            member = self._streams.joined(_Stream(self, stream))
            self._members[stream] = member
        self._streams.heard(member, message)


class _Stream:
    """The way to one member through its gateway."""

    def __init__(self, link: _Link, number: int) -> None:
        self._link, self._number = link, number

    def put_nowait(self, message: pb.CoordinatorMessage | None, /) -> None:
        """See `Outlet`."""
        self._link.message(self._number, message)


def _take(address: TcpAddress) -> socket.socket:
    """Hold a port that nobody else has, for gateways to share. Nothing listens at it yet."""
    family, kind, number, _, place = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    try:
        with socket.socket(family, kind, number) as alone:  # fails where anybody is
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(place)
            place = alone.getsockname()
        held = socket.socket(family, kind, number)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(place)
    except OSError as error:
        raise taken(address) from error
    return held


def _spawn() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """A new gateway, and our end of the socket pair to it."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "weightsync.service.gateway", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
    return ours, process


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_S)
        return
    process.kill()
    process.wait()
