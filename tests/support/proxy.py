"""A rail that a test can cut, hold up or slow down: a proxy in front of one address of a sink."""

from __future__ import annotations

import selectors
import socket
import struct
import threading
import time
from types import TracebackType

__all__ = ["Rail", "reroute"]

_HEADER_BYTES = 4 + 2 + 1 + len("tcp") + 4 + 8 + 8 + 32  # up to the number of addresses
_READ_BYTES = 1 << 18


class Rail:
    """Forwards connections to the address `index` of a descriptor; `descriptor` names the proxy."""

    def __init__(self, descriptor: bytes, index: int) -> None:
        host, port = endpoints(descriptor)[index]
        self._to = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._port = self._listener.getsockname()[1]
        self.descriptor = reroute(descriptor, index, self._port)
        self._wake, self._bell = socket.socketpair()
        self._lock = threading.Lock()
        self._is_over = self._is_held = self._is_cut = False
        self._bytes_per_s = float("inf")
        self.nbytes = 0  # forwarded to the sink
        self._peers: dict[socket.socket, socket.socket] = {}
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Reset every connection, and refuse new ones until `mend`."""
        with self._lock:
            self._is_cut = True
        self._bell.send(b"x")
        deadline = time.monotonic() + 10
        while self._peers and time.monotonic() < deadline:
            time.sleep(0.001)

    def hold(self) -> None:
        """Forward nothing more, as a cable that was pulled."""
        with self._lock:
            self._is_held = True
        self._bell.send(b"x")

    def mend(self) -> None:
        """Work again."""
        with self._lock:
            self._is_held = self._is_cut = False
        self._bell.send(b"x")

    def limit(self, bytes_per_s: float) -> None:
        """Be slow."""
        self._bytes_per_s = bytes_per_s

    def __enter__(self) -> Rail:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_over = True
        self._bell.send(b"x")
        self._thread.join(10)
        for one in (self._listener, self._wake, self._bell):
            one.close()

    def _loop(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            while not self._is_over:
                for key, _ in selector.select(0.2):
                    one = key.fileobj
                    assert isinstance(one, socket.socket)
                    if one is self._wake:
                        self._wake.recv(100)
                    elif one is self._listener:
                        self._accept(selector)
                    elif one in self._peers:
                        self._forward(selector, one)
                self._obey(selector)
            self._drop_all(selector)

    def _obey(self, selector: selectors.BaseSelector) -> None:
        with self._lock:
            is_cut, is_held = self._is_cut, self._is_held
        if is_cut:
            self._drop_all(selector)
        while is_held and not self._is_over:
            self._wake.recv(100)
            with self._lock:
                is_held = self._is_held

    def _accept(self, selector: selectors.BaseSelector) -> None:
        near, _ = self._listener.accept()
        if self._is_cut:
            _reset(near)
            return
        far = socket.create_connection(self._to)
        for one, other in ((near, far), (far, near)):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._peers[one] = other
            selector.register(one, selectors.EVENT_READ, one is near)

    def _forward(self, selector: selectors.BaseSelector, one: socket.socket) -> None:
        is_outward = bool(selector.get_key(one).data)
        other = self._peers[one]
        try:
            data = one.recv(_READ_BYTES)
            if data:
                other.sendall(data)
        except OSError:
            data = b""
        if not data:
            self._drop(selector, one)
        elif is_outward:
            self.nbytes += len(data)
            time.sleep(len(data) / self._bytes_per_s)

    def _drop(self, selector: selectors.BaseSelector, one: socket.socket) -> None:
        other = self._peers.pop(one)
        for each in (one, other):
            selector.unregister(each)
            _reset(each)
        del self._peers[other]

    def _drop_all(self, selector: selectors.BaseSelector) -> None:
        while self._peers:
            self._drop(selector, next(iter(self._peers)))


def endpoints(descriptor: bytes) -> list[tuple[str, int]]:
    """Addresses and ports of a tcp target, as its descriptor has them."""
    (count,) = struct.unpack_from("<H", descriptor, _HEADER_BYTES)
    at, found = _HEADER_BYTES + 2, []
    for _ in range(count):
        length = descriptor[at]
        host = descriptor[at + 1 : at + 1 + length].decode()
        found.append((host, struct.unpack_from("<H", descriptor, at + 1 + length)[0]))
        at += 1 + length + 2
    assert at == len(descriptor)
    return found


def reroute(descriptor: bytes, index: int, port: int) -> bytes:
    """The same with another place for one address."""
    found = endpoints(descriptor)
    found[index] = ("127.0.0.1", port)
    text = descriptor[: _HEADER_BYTES + 2]
    for host, at in found:
        text += bytes([len(host)]) + host.encode() + struct.pack("<H", at)
    return text


def _reset(one: socket.socket) -> None:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()
