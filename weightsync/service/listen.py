"""Where a coordinator listens: a private Unix socket, or TLS with a token in every call."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import grpc

from weightsync.errors import ConfigError
from weightsync.service.address import CHANNEL_OPTIONS, TcpAddress, UnixAddress, parse_url
from weightsync.service.credentials import ServerCredentials, Token

__all__ = ["Listener", "TlsListener", "TlsPort", "TokenCheck", "open_listener", "taken"]

_log = logging.getLogger(__name__)

_HEADER: Final = "authorization"
_SCHEME: Final = b"Bearer "
_LOG_EVERY_S: Final = 10.0
_TCP_OPTIONS: Final[list[tuple[str, Any]]] = [
    # Members ask every 10 s whether this host is still there; see `address`.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]


class Listener(Protocol):
    """One way to be reached."""

    url: str
    """What members connect to; final once `start` has returned."""

    def make_server(self) -> grpc.aio.Server:
        """A server with this listener's rules. On the event loop."""
        ...

    async def start(self, server: grpc.aio.Server) -> None:
        """Listen and serve.

        Raises:
            ConfigError: The address is taken, or none of this host's.
        """
        ...

    def close(self) -> None:
        """Remove what lies in the file system. Idempotent."""
        ...


def open_listener(url: str | None, credentials: ServerCredentials | None) -> Listener:
    """The listener for a job URL; binds nothing yet.

    Args:
        url: None: a socket in a fresh private directory.
        credentials: For grpcs://.

    Raises:
        ConfigError: A URL that is not served; grpcs:// without credentials; a host that the
            certificate does not name.
    """
    if url is None:
        return _UnixListener(None)
    address = parse_url(url)
    if isinstance(address, UnixAddress):
        return _UnixListener(address.path)
    if credentials is None:
        raise ConfigError(
            f"job url {url}: a job is served on a network with TLS and a token only; run "
            "`weightsync certs` and pass token_file="
        )
    return TlsListener(address, credentials)


class _UnixListener:
    """Only who may enter the socket's folder, and is its owner, connects."""

    def __init__(self, path: Path | None) -> None:
        self._own_dir: Path | None = None
        if path is None:
            self._own_dir = Path(tempfile.mkdtemp(prefix="weightsync-"))
            path = self._own_dir / "job.sock"
        self._path = path
        self.url = f"unix:{self._path}"
        self._is_bound = False

    def make_server(self) -> grpc.aio.Server:
        return grpc.aio.server(options=CHANNEL_OPTIONS)

    async def start(self, server: grpc.aio.Server) -> None:
        self._take_path()
        # The path is removed by us, after the server stopped; umask: only the owner connects.
        mask = os.umask(0o177)
        try:
            server.add_insecure_port(self.url)
            await server.start()
        finally:
            os.umask(mask)
        self._is_bound = True

    def close(self) -> None:
        if self._is_bound:
            self._path.unlink(missing_ok=True)
        if self._own_dir is not None:
            with contextlib.suppress(OSError):
                self._own_dir.rmdir()

    def _take_path(self) -> None:
        if not self._path.parent.is_dir():
            raise ConfigError(f"job url {self.url}: no directory {self._path.parent}")
        if self._path.exists():
            # A socket left by a killed coordinator answers nobody; a living one does.
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.settimeout(1.0)
                try:
                    probe.connect(str(self._path))
                except OSError:
                    self._path.unlink(missing_ok=True)
                else:
                    raise ConfigError(f"a job is served at {self.url} already; choose another")


class TlsPort:
    """Everybody connects; who has not the token is heard no further.

    Args:
        address: Where; port 0: a free one.
        token: Asked for in every call.
        credentials: The server's certificate and key.
        is_shared: Processes of one job listen here together.
    """

    def __init__(
        self,
        address: TcpAddress,
        token: Token,
        credentials: grpc.ServerCredentials,
        *,
        is_shared: bool = False,
    ) -> None:
        self.address = address
        self._token, self._credentials = token, credentials
        self._is_shared = is_shared

    def make_server(self) -> grpc.aio.Server:
        """See `Listener`."""
        # Not shared, or a second job could listen there too and take half of the members.
        shared = ("grpc.so_reuseport", int(self._is_shared))
        return grpc.aio.server(
            interceptors=[TokenCheck(self._token)],
            options=[*CHANNEL_OPTIONS, *_TCP_OPTIONS, shared],
        )

    async def start(self, server: grpc.aio.Server) -> int:
        """Listen; the port.

        Raises:
            ConfigError: It is taken.
        """
        try:
            port = server.add_secure_port(str(self.address), self._credentials)
        except RuntimeError as error:
            # gRPC says why on stderr only.
            raise taken(self.address) from error
        await server.start()
        return port


def taken(address: TcpAddress) -> ConfigError:
    """Why nobody listens there."""
    return ConfigError(
        f"cannot listen on {address}: the port is taken, or the address is none of this host's; "
        "choose another port, or 0 for a free one"
    )


class TlsListener:
    """A port, and the name under which members connect to it.

    Args:
        address: Where to listen.
        credentials: For everybody who connects.
    """

    def __init__(self, address: TcpAddress, credentials: ServerCredentials) -> None:
        self.port = TlsPort(address, credentials.token, credentials.server_credentials())
        self._public_host = _public_host(address, credentials)
        self.url = f"grpcs://{self._public_host}:{address.port}"

    def make_server(self) -> grpc.aio.Server:
        """See `Listener`."""
        return self.port.make_server()

    async def start(self, server: grpc.aio.Server) -> None:
        """See `Listener`."""
        self.at(await self.port.start(server))

    def at(self, port: int) -> None:
        """The number that port 0 became."""
        self.url = f"grpcs://{self._public_host}:{port}"

    def close(self) -> None:
        """Nothing lies anywhere."""


class TokenCheck(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in stubs only
    """Refuses every call that does not carry the token, before anything of it is read.

    Args:
        token: What calls must carry.
        clock: Limits how often refusals are logged.
    """

    def __init__(self, token: Token, clock: Callable[[], float] = time.monotonic) -> None:
        self._token = token
        self._clock = clock
        self._logged: float | None = None
        self._num_unlogged = 0

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """See gRPC."""
        if self.accepts(handler_call_details.invocation_metadata):
            return await continuation(handler_call_details)
        # A stream, whatever was called: its handler starts before the first message is read.
        return grpc.stream_stream_rpc_method_handler(self._refuse)

    def accepts(self, metadata: Sequence[tuple[str, str | bytes]]) -> bool:
        """Whether there is exactly one proof, and it is the token."""
        proofs = [value for key, value in metadata if key == _HEADER]
        if len(proofs) != 1:
            return False
        value = proofs[0]
        proof = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        # The scheme is no secret; the rest is compared in constant time.
        return proof.startswith(_SCHEME) and self._token.matches(proof.removeprefix(_SCHEME))

    async def _refuse(self, requests: object, context: Any) -> AsyncIterator[Any]:
        self._log_refusal(context.peer())
        # Missing and wrong look alike from outside.
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token of this job")
        yield  # makes this a generator; never reached

    def _log_refusal(self, peer: str) -> None:
        now = self._clock()
        if self._logged is not None and now < self._logged + _LOG_EVERY_S:
            self._num_unlogged += 1
            return
        more = f" (and {self._num_unlogged} more since)" if self._num_unlogged else ""
        _log.warning("refused %s: no token of this job%s", peer, more)
        self._logged, self._num_unlogged = now, 0


def _public_host(address: TcpAddress, credentials: ServerCredentials) -> str:
    """Under which name members connect and accept the certificate; as URLs write it."""
    certificate, cert_file = credentials.certificate, credentials.cert_file
    if not address.is_wildcard:
        if not certificate.names(address.host):
            raise ConfigError(
                f"{cert_file} is for {', '.join(certificate.hosts)}, not for {address.host}: no "
                "member would accept it; run `weightsync certs --renew --host "
                f"{address.host} --dir {cert_file.parent}`, or listen on one of those"
            )
        return f"[{address.host}]" if ":" in address.host else address.host
    name = socket.gethostname()
    host = name if certificate.names(name) else certificate.public_host
    if host is None:
        raise ConfigError(
            f"{cert_file} names no host that others could reach; run `weightsync certs --renew "
            f"--host {name} --dir {cert_file.parent}` with the name under which they do"
        )
    return host
