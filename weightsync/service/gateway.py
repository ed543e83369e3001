"""A gateway: a process that holds connections of members for a coordinator in another process.

A message costs the process that holds its stream several times what deciding about it costs the
coordinator. Gateways listen at the same port, where the kernel spreads new connections over them,
check tokens, and pass messages on unread, over a socket pair:

    u32 length of the payload, u8 kind, u64 stream, payload

Everything that a stream means stays true: when its gateway dies it breaks, and when the coordinator
dies all gateways do at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import itertools
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc

from weightsync.errors import WeightSyncError
from weightsync.service.address import TcpAddress
from weightsync.service.credentials import Token
from weightsync.service.listen import TlsPort

__all__ = ["HEADER", "Kind", "Setup", "frame", "main"]

HEADER: Final = struct.Struct("<IBQ")
_SERVICE: Final = "weightsync.v1.Coordinator"
_GRACE_S: Final = 1.0  # for what was sent last


class Kind(enum.IntEnum):
    """What a frame is."""

    MESSAGE = 0  # of the stream, either way
    END = 1  # of the stream, either way
    STATUS = 2  # a request; its reply has the same number
    SETUP = 3  # to the gateway, once: `Setup`
    READY = 4  # from the gateway: it listens
    FAILED = 5  # from the gateway: why it does not
    CLOSE = 6  # to the gateway: send what is left, then end


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a gateway has to know. Holds secrets: travels over the socket pair only.

    Args:
        host, port: Where to listen, shared with other gateways.
        token: The job's.
        cert_pem, key_pem: The server's.
    """

    host: str
    port: int
    token: str = dataclasses.field(repr=False)
    cert_pem: str = dataclasses.field(repr=False)
    key_pem: str = dataclasses.field(repr=False)

    def to_bytes(self) -> bytes:
        """The payload of its frame."""
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def from_bytes(cls, payload: bytes) -> Setup:
        """The inverse of `to_bytes`."""
        return cls(**json.loads(payload))


def frame(kind: Kind, stream: int = 0, payload: bytes = b"") -> bytes:
    """One frame as it travels."""
    return HEADER.pack(len(payload), kind, stream) + payload


class _Gateway:
    """Hands bytes from gRPC to the coordinator and back. One loop owns it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._numbers = itertools.count(1)
        self._streams: dict[int, asyncio.Queue[bytes | None]] = {}
        self._replies: dict[int, asyncio.Future[bytes]] = {}
        self._outbox: list[bytes] = []

    async def serve(self) -> None:
        """Listen until the coordinator says Close or is gone."""
        kind, _, payload = await self._next()
        assert kind is Kind.SETUP
        setup = Setup.from_bytes(payload)
        port = TlsPort(
            TcpAddress(setup.host, setup.port),
            Token(setup.token),
            grpc.ssl_server_credentials([(setup.key_pem.encode(), setup.cert_pem.encode())]),
            is_shared=True,
        )
        server = port.make_server()
        # Without (de)serialisers: messages pass as they are.
        handlers = {
            "Join": grpc.stream_stream_rpc_method_handler(self._join),
            "Status": grpc.unary_unary_rpc_method_handler(self._status),
        }
        generic = grpc.method_handlers_generic_handler(_SERVICE, handlers)
        server.add_generic_rpc_handlers((generic,))
        try:
            await port.start(server)
        except WeightSyncError as error:
            self._writer.write(frame(Kind.FAILED, payload=str(error).encode()))
            await self._writer.drain()
            return
        self._send(frame(Kind.READY))
        while (found := await self._next())[0] is not Kind.CLOSE:
            self._deliver(*found)
        await server.stop(_GRACE_S)

    async def _next(self) -> tuple[Kind, int, bytes]:
        length, kind, stream = HEADER.unpack(await self._reader.readexactly(HEADER.size))
        return Kind(kind), stream, await self._reader.readexactly(length)

    def _send(self, data: bytes) -> None:
        """Send soon, with all that others say meanwhile: each time costs the coordinator."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(data)

    def _flush(self) -> None:
        self._writer.writelines(self._outbox)
        self._outbox.clear()

    def _deliver(self, kind: Kind, stream: int, payload: bytes) -> None:
        if kind is Kind.STATUS:
            if (reply := self._replies.get(stream)) is not None and not reply.done():
                reply.set_result(payload)
        elif (queue := self._streams.get(stream)) is not None:  # else it has ended
            queue.put_nowait(payload if kind is Kind.MESSAGE else None)

    async def _join(self, requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
        stream = next(self._numbers)
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._streams[stream] = queue
        reader = asyncio.create_task(self._read(stream, requests))
        try:
            while (payload := await queue.get()) is not None:
                yield payload
        finally:
            reader.cancel()
            del self._streams[stream]
            self._send(frame(Kind.END, stream))

    async def _read(self, stream: int, requests: AsyncIterator[bytes]) -> None:
        with contextlib.suppress(asyncio.CancelledError, grpc.RpcError):
            async for payload in requests:
                self._send(frame(Kind.MESSAGE, stream, payload))
                await self._writer.drain()  # a flood waits where it comes from
        if (queue := self._streams.get(stream)) is not None:
            queue.put_nowait(None)

    async def _status(self, request: bytes, context: object) -> bytes:
        number = next(self._numbers)
        self._replies[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(frame(Kind.STATUS, number, request))
            return await self._replies[number]
        finally:
            del self._replies[number]


async def _serve(link: socket.socket) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=link)
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        await _Gateway(reader, writer).serve()
        return
    # The coordinator is gone. So are we, at once: members must not wait for one that cannot answer.
    os._exit(1)


def main(argv: list[Any]) -> None:
    """Serve over the socket whose number is the one argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the coordinator's to handle
    asyncio.run(_serve(socket.socket(fileno=int(argv[1]))))


if __name__ == "__main__":
    main(sys.argv)
