"""Where a job is: its URL taken apart, and the channel that leads there.

Two kinds are served. `unix:PATH` is protected by the permissions of its folder. `grpcs://HOST:PORT`
is TLS with a token in every call. There is no third kind: what listens on a network has both.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from weightsync.errors import ConfigError
from weightsync.service.credentials import MemberCredentials
from weightsync.settings import ENV_TOKEN_FILE, check_job_url

__all__ = ["CHANNEL_OPTIONS", "TcpAddress", "UnixAddress", "open_channel", "parse_url"]

# Manifests of a trillion parameters are tens of megabytes; the default limit is 4 MiB.
CHANNEL_OPTIONS: Final[list[tuple[str, Any]]] = [
    ("grpc.max_receive_message_length", 1 << 30),
    ("grpc.max_send_message_length", 1 << 30),
]
_TCP_OPTIONS: Final[list[tuple[str, Any]]] = [
    # Hosts of a job reach each other directly; a web proxy of the environment is for other things.
    ("grpc.enable_http_proxy", 0),
    # A host that lost its power says nothing: ask it, so that a member sees it within 20 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
]
_HOST_PORT: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})")


@dataclass(frozen=True)
class UnixAddress:
    """A socket in the file system.

    Args:
        path: Of the socket.
    """

    path: Path


@dataclass(frozen=True)
class TcpAddress:
    """A host and a port.

    Args:
        host: DNS name or IP address, without brackets.
        port: 0 where a server is to choose one.
    """

    host: str
    port: int

    @property
    def is_wildcard(self) -> bool:
        """Whether it means every address of the host: good for listening only."""
        try:
            return ipaddress.ip_address(self.host).is_unspecified
        except ValueError:
            return False

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_url(url: str) -> UnixAddress | TcpAddress:
    """Take a job URL apart.

    Raises:
        ConfigError: It is of another kind, or names no host and port.
    """
    check_job_url(url)
    scheme, _, rest = url.partition(":")
    if scheme == "unix":
        return UnixAddress(Path(rest))
    if scheme == "grpc":
        raise ConfigError(
            f"job url {url}: grpc:// has neither TLS nor a token and is not served; use "
            f"grpcs://{rest.removeprefix('//')} with the files that `weightsync certs` makes, or "
            "unix:PATH on one host"
        )
    if scheme != "grpcs":
        raise ConfigError(f"job url {url}: this version serves unix:PATH and grpcs://HOST:PORT")
    found = _HOST_PORT.fullmatch(rest.removeprefix("//"))
    if found is None or int(found[3]) > 65535:
        raise ConfigError(
            f"job url {url}: write grpcs://HOST:PORT, such as grpcs://trainer-0:7431 or "
            "grpcs://[fd00::1]:7431"
        )
    return TcpAddress(found[1] or found[2], int(found[3]))


def open_channel(url: str, credentials: MemberCredentials | None) -> grpc.Channel:
    """A channel to the coordinator of a job. Returns at once; connects when it is used.

    Args:
        url: Job URL.
        credentials: For grpcs://; not used otherwise.

    Raises:
        ConfigError: A URL that nobody connects to, or grpcs:// without credentials.
    """
    address = parse_url(url)
    if isinstance(address, UnixAddress):
        return grpc.insecure_channel(f"unix:{address.path}", options=CHANNEL_OPTIONS)
    if credentials is None:
        raise ConfigError(
            f"job url {url}: no token and no CA; use Job.connect(url, token_file=...) or set "
            f"${ENV_TOKEN_FILE}"
        )
    if address.port == 0 or address.is_wildcard:
        raise ConfigError(
            f"job url {url}: only a server listens there; connect to the Job.url of the process "
            "that hosts the job"
        )
    return grpc.secure_channel(
        str(address), credentials.channel_credentials(), options=[*CHANNEL_OPTIONS, *_TCP_OPTIONS]
    )
