"""Raw sockets that move a traffic matrix in an order that nothing collides in: the ceiling.

Receivers grant: on each rail one sender at a time has the receiver's word to send, the next one
gets it shortly before its predecessor is done. So no queue of a switch ever holds more than that.
Who has the next turn is worked out before, so that no sender has to serve two at once while others
idle.
"""

from __future__ import annotations

import heapq
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from weightsync.errors import PeerLostError
from weightsync.units import KIB, MIB

__all__ = ["BlastReceiver", "BlastSender", "turns"]

_TIMEOUT_S: Final = 120.0
_AHEAD_BYTES: Final = 128 * KIB  # of the current sender left when the next one may begin
_PIECE_BYTES: Final = MIB
_NAME: Final = struct.Struct("<II")  # sender, rail
_GRANT: Final = struct.Struct("<Q")  # bytes; 0: the end
_SLICES: Final = 8  # turns that the bytes of a pair are cut into, if they are not few


def turns(matrix: Sequence[Sequence[int]]) -> list[list[tuple[int, int]]]:
    """Work out an order in which nobody waits for a sender that is busy, as far as there is one.

    Whoever is free first takes of the senders that have bytes for it the one that is free first,
    of equals the one that has the most left for it.

    Args:
        matrix: Bytes from each sender to each receiver.

    Returns:
        `(sender, bytes)` of each turn, for each receiver.
    """
    left = [dict(enumerate(column)) for column in zip(*matrix, strict=True)]
    slices = [{s: -(-n // _SLICES) for s, n in column.items()} for column in left]
    busy = [0] * len(matrix)
    found: list[list[tuple[int, int]]] = [[] for _ in left]
    free = [(0, receiver) for receiver in range(len(left))]
    while free:
        now, receiver = heapq.heappop(free)
        open_ = {sender: nbytes for sender, nbytes in left[receiver].items() if nbytes}
        if not open_:
            continue
        sender = min(
            open_, key=lambda s: (max(busy[s], now), -open_[s], (s - receiver) % len(busy))
        )
        nbytes = min(open_[sender], max(slices[receiver][sender], _PIECE_BYTES))
        left[receiver][sender] -= nbytes
        busy[sender] = max(now, busy[sender]) + nbytes
        found[receiver].append((sender, nbytes))
        heapq.heappush(free, (busy[sender], receiver))
    return found


class BlastSender:
    """One sender: a connection and a thread for each receiver and rail.

    Args:
        number: Of this sender.
        addresses: Of this host, one for each rail.
        sinks: `addresses`, `ports` and `nbytes` (most of one turn and rail) of each receiver.

    Raises:
        PeerLostError: A receiver does not answer.
    """

    def __init__(
        self, number: int, addresses: Sequence[str], sinks: Sequence[Mapping[str, Any]]
    ) -> None:
        self._streams: list[socket.socket] = []
        self._payload = memoryview(bytes(max((sink["nbytes"] for sink in sinks), default=0)))
        for sink in sinks:
            for rail, own in enumerate(addresses):
                to = (sink["addresses"][rail], sink["ports"][rail])
                stream = socket.create_connection(to, _TIMEOUT_S, source_address=(own, 0))
                stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                stream.sendall(_NAME.pack(number, rail))
                self._streams.append(stream)

    def run(self) -> None:
        """Send what is granted until all receivers have said that it is over."""
        _together(self._send, [(stream,) for stream in self._streams])
        for stream in self._streams:
            stream.close()

    def _send(self, stream: socket.socket) -> None:
        who = f"receiver {stream.getpeername()[0]}"
        while (nbytes := _GRANT.unpack(_exactly(stream, _GRANT.size, who))[0]) > 0:
            stream.sendall(self._payload[:nbytes])


class BlastReceiver:
    """One receiver: a listener and a thread for each rail.

    Args:
        addresses: Of this host, one for each rail.
        order: Sender and bytes of each turn; every rail carries an equal share.

    Attributes:
        ports: Where it listens, for each rail.
    """

    def __init__(self, addresses: Sequence[str], order: Sequence[tuple[int, int]]) -> None:
        self._order = order
        self._listeners = [socket.create_server((own, 0), backlog=1024) for own in addresses]
        self.ports: list[int] = [found.getsockname()[1] for found in self._listeners]

    def run(self, at: float) -> float:
        """Take connections, grant from `at` on; the time of the last byte. Monotonic clock.

        Raises:
            PeerLostError: A sender is gone.
        """
        rails, senders = len(self._listeners), {sender for sender, _ in self._order}
        streams: list[dict[int, socket.socket]] = [{} for _ in range(rails)]
        for listener, found in zip(self._listeners, streams, strict=True):
            listener.settimeout(_TIMEOUT_S)
            while len(found) < len(senders):
                stream, (host, _) = listener.accept()
                stream.settimeout(_TIMEOUT_S)
                sender, _ = _NAME.unpack(_exactly(stream, _NAME.size, f"a sender at {host}"))
                found[sender] = stream
            listener.close()
        time.sleep(max(0.0, at - time.monotonic()))
        _together(self._receive, [(streams[rail], rail) for rail in range(rails)])
        end = time.monotonic()
        for found in streams:
            for stream in found.values():
                stream.sendall(_GRANT.pack(0))
                stream.close()
        return end

    def _receive(self, streams: Mapping[int, socket.socket], rail: int) -> None:
        rails = len(self._listeners)
        granted = [
            (streams[sender], nbytes // rails + (rail < nbytes % rails), sender)
            for sender, nbytes in self._order
        ]
        room = memoryview(bytearray(_PIECE_BYTES))
        for place, (stream, nbytes, sender) in enumerate(granted):
            if place == 0:
                stream.sendall(_GRANT.pack(nbytes))
            following = granted[place + 1] if place + 1 < len(granted) else None
            left = nbytes
            while left:
                if left <= _AHEAD_BYTES and following is not None:
                    following[0].sendall(_GRANT.pack(following[1]))
                    following = None
                # Stop where the next one is granted.
                stop = left - _AHEAD_BYTES if left > _AHEAD_BYTES else left
                got = stream.recv_into(room, min(stop, _PIECE_BYTES), socket.MSG_WAITALL)
                if got == 0:
                    raise PeerLostError(f"sender {sender} hung up on rail {rail}")
                left -= got


def _exactly(stream: socket.socket, nbytes: int, who: str) -> bytes:
    data = stream.recv(nbytes, socket.MSG_WAITALL)
    if len(data) != nbytes:
        raise PeerLostError(f"{who} hung up")
    return data


def _together(work: Any, arguments: Sequence[tuple[Any, ...]]) -> None:
    """Run `work` on a thread for each tuple of arguments; raises the first failure."""
    failures: list[Exception] = []

    def run(own: tuple[Any, ...]) -> None:
        try:
            work(*own)
        except (OSError, PeerLostError) as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(own,), daemon=True) for own in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise PeerLostError(f"raw sockets: {failures[0]}") from failures[0]
