"""TLS for tests: certificates once per run, servers that are wrong on purpose, a second opinion."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from weightsync.service import weightsync_pb2 as pb
from weightsync.service import weightsync_pb2_grpc as rpc
from weightsync.settings import CA_NAME, CERT_NAME, KEY_NAME

__all__ = ["any_server", "handshake", "tcp_server"]


class _Careless(rpc.CoordinatorServicer):
    def Status(self, request: pb.StatusRequest, context: object) -> pb.StatusReply:  # type: ignore[override]  # noqa: N802
        return pb.StatusReply(phase="careless")


@contextlib.contextmanager
def any_server(folder: Path) -> Iterator[str]:
    """A job URL served with a folder's certificate, valid or not, and without asking for a token.

    Yields:
        `grpcs://127.0.0.1:PORT`.
    """
    pair = ((folder / KEY_NAME).read_bytes(), (folder / CERT_NAME).read_bytes())
    server = grpc.server(ThreadPoolExecutor(1))
    rpc.add_CoordinatorServicer_to_server(_Careless(), server)  # type: ignore[no-untyped-call]
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()
    try:
        yield f"grpcs://127.0.0.1:{port}"
    finally:
        server.stop(None).wait(5)


@contextlib.contextmanager
def tcp_server(answer: bytes | None) -> Iterator[str]:
    """A job URL where something listens that is no coordinator.

    Args:
        answer: Sent to whoever connects, before hanging up; None: accept nobody.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:

        def run() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(answer or b"")
                        connection.shutdown(socket.SHUT_WR)
                        while connection.recv(4096):
                            pass

        thread = threading.Thread(target=run, daemon=True)
        if answer is not None:
            thread.start()
        try:
            yield f"grpcs://127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            if answer is not None:
                thread.join(5)


def handshake(folder: Path, host: str, ca: Path | None = None) -> None:
    """A handshake by OpenSSL, in memory; shares no code with the package.

    Args:
        folder: Whose certificate the server shows.
        host: Whom the client wants to reach.
        ca: Folder of the CA that the client trusts; None: the same.

    Raises:
        ssl.SSLCertVerificationError: The client refuses.
    """
    trusted = (folder if ca is None else ca) / CA_NAME
    client = ssl.create_default_context(cafile=str(trusted))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / CERT_NAME, folder / KEY_NAME)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(down, up, server_hostname=host),
        server.wrap_bio(up, down, server_side=True),
    ]
    while ends:
        for end in list(ends):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
                ends.remove(end)
