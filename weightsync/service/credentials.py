"""What proves who is who on `grpcs://`: the job's token, its CA, the server's certificate.

Secrets are read from files that others cannot read, kept in objects that do not show them, and
put into messages of TLS connections only.
"""

from __future__ import annotations

import datetime as dt
import fnmatch
import hmac
import logging
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn

import grpc

from weightsync.certs import Certificate, public_key_of, read_certificate
from weightsync.errors import AuthError, ConfigError
from weightsync.settings import (
    CA_NAME,
    ENV_CA_FILE,
    ENV_CERT_FILE,
    ENV_KEY_FILE,
    ENV_TOKEN_FILE,
    Settings,
)

__all__ = ["MemberCredentials", "ServerCredentials", "Token", "load_member", "load_server"]

_log = logging.getLogger(__name__)

# 24 random bytes in base64; `weightsync certs` writes 43 characters.
_MIN_TOKEN: Final = 32
_MAX_TOKEN: Final = 4096
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/=-]+")
_WARN_BEFORE: Final = dt.timedelta(days=7)


class Token:
    """The job's token. Shows itself nowhere: not in repr, not in str, and it cannot be pickled.

    Raises:
        ConfigError: Too short to be a secret, or not one word.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        if not _MIN_TOKEN <= len(text) <= _MAX_TOKEN or not _TOKEN.fullmatch(text):
            raise ConfigError(
                f"the token must be one word of {_MIN_TOKEN} to {_MAX_TOKEN} letters and digits; "
                "`weightsync certs` makes one"
            )
        self._text = text

    def matches(self, presented: bytes) -> bool:
        """Whether `presented` is this token, in a time that says nothing about where it differs."""
        return hmac.compare_digest(presented, self._text.encode("ascii"))

    def call_credentials(self) -> grpc.CallCredentials:
        """Puts the token into every call; gRPC refuses to do so on a channel without TLS."""
        return grpc.access_token_call_credentials(self._text)

    def for_own_process(self) -> str:
        """The text, for a gateway of this job, over a socket pair."""
        return self._text

    def __repr__(self) -> str:
        return "Token(hidden)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a token is not to be pickled; read it from its file where it is needed")


@dataclass(frozen=True)
class MemberCredentials:
    """What a source, a sink or a status call needs.

    Args:
        token: Sent with every call.
        token_file: Where it came from, for messages.
        ca_pem: Certificates that the server's must lead to.
        ca_file: Where they came from, for messages.
    """

    token: Token
    token_file: Path
    ca_pem: bytes = field(repr=False)
    ca_file: Path

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """TLS that verifies the server, and the token inside."""
        return grpc.composite_channel_credentials(
            grpc.ssl_channel_credentials(self.ca_pem), self.token.call_credentials()
        )


@dataclass(frozen=True)
class ServerCredentials:
    """What a coordinator needs.

    Args:
        token: Asked for in every call.
        certificate: What the server's certificate says.
        cert_file: Where it came from, for messages.
        cert_pem: The certificate, then those between it and the CA.
        key_pem: Its private key.
    """

    token: Token
    certificate: Certificate
    cert_file: Path
    cert_pem: bytes = field(repr=False)
    key_pem: bytes = field(repr=False)

    def server_credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`."""
        return grpc.ssl_server_credentials([(self.key_pem, self.cert_pem)])


def load_member(settings: Settings) -> MemberCredentials:
    """Read the token and the CA. Blocks for two small files.

    Raises:
        ConfigError: A file is not named, not there, empty, or open to others.
    """
    token, token_file = _load_token(settings)
    ca_file = _named(settings.ca_file, "certificate of the job's CA", "ca_file", ENV_CA_FILE)
    read_certificate(ca_file)  # gRPC would only say that the handshake failed
    return MemberCredentials(token, token_file, _read(ca_file), ca_file)


def load_server(settings: Settings, *, now: dt.datetime | None = None) -> ServerCredentials:
    """Read the token, the server's certificate and its key. Blocks for three small files.

    Raises:
        ConfigError: A file is not named, not there, empty or open to others, or the key is not the
            certificate's.
        AuthError: The certificate is not valid now.
    """
    token, _ = _load_token(settings)
    cert_file = _named(settings.cert_file, "server's certificate", "cert_file", ENV_CERT_FILE)
    key_file = _named(settings.key_file, "server's private key", "key_file", ENV_KEY_FILE)
    certificate = read_certificate(cert_file)
    key_pem = _read_private(key_file)
    try:
        is_pair = public_key_of(key_pem) == certificate.public_key
    except (ValueError, TypeError):
        raise ConfigError(f"{key_file} holds no private key (PEM, no pass phrase)") from None
    if not is_pair:
        raise ConfigError(
            f"{key_file} is not the key of {cert_file}; take both from one `weightsync certs`"
        )
    now = dt.datetime.now(dt.UTC) if now is None else now
    if not certificate.not_before <= now < certificate.not_after:
        raise AuthError(
            f"{cert_file} is valid from {certificate.not_before:%Y-%m-%d %H:%M} to "
            f"{certificate.not_after:%Y-%m-%d %H:%M} UTC, and it is {now:%Y-%m-%d %H:%M}: run "
            f"`weightsync certs --renew --dir {cert_file.parent}`, or mend this host's clock"
        )
    if certificate.not_after - now < _WARN_BEFORE:
        _log.warning(
            "%s ends on %s UTC: nobody can join after that; renew it with `weightsync certs "
            "--renew` and start the job again",
            cert_file,
            f"{certificate.not_after:%Y-%m-%d %H:%M}",
        )
    return ServerCredentials(token, certificate, cert_file, _read(cert_file), key_pem)


def _load_token(settings: Settings) -> tuple[Token, Path]:
    path = _named(settings.token_file, "job's token", "token_file", ENV_TOKEN_FILE)
    text = _read_private(path).decode("ascii", "replace").strip()
    try:
        token = Token(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    traced = os.environ.get("GRPC_TRACE", "").split(",")
    if any(fnmatch.fnmatch("hpack_parser", name) or name == "all" for name in traced if name):
        _log.warning("GRPC_TRACE has gRPC print the headers of every call, the token among them")
    return token, path


def _named(path: Path | None, what: str, argument: str, variable: str) -> Path:
    if path is None:
        elsewhere = f"; {argument}= and ${variable} name another place"
        raise ConfigError(
            f"grpcs:// needs the {what}: run `weightsync certs`, then pass token_file= or set "
            f"${ENV_TOKEN_FILE}; {CA_NAME} and the others are found beside the token"
            f"{elsewhere if variable != ENV_TOKEN_FILE else ''}"
        )
    return path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_private(path: Path) -> bytes:
    """Read a secret; refuse one that everybody on this host can read or change."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            # The group may read: that is how containers are handed secrets.
            if stat.S_ISREG(mode) and mode & (stat.S_IRWXO | stat.S_IWGRP):
                raise ConfigError(
                    f"{path} is a secret that others can read or change (mode "
                    f"{mode & 0o777:04o}): chmod 600 {path}"
                )
            return file.read(1 << 20)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{path}: {error.strerror}; `weightsync certs` makes it where the coordinator runs, other "
        "hosts need copies of ca.pem and token"
    )
