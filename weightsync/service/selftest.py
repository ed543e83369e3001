"""For `weightsync doctor`: does a job over TLS work here, and does the job of this shell answer?"""

from __future__ import annotations

import datetime as dt
import tempfile
from pathlib import Path

from weightsync.certs import Certificate, make_certs, read_certificate
from weightsync.errors import ConfigError
from weightsync.service import weightsync_pb2 as pb
from weightsync.service.address import TcpAddress, parse_url
from weightsync.service.coordinator import Coordinator
from weightsync.service.credentials import load_member, load_server
from weightsync.service.session import fetch_status
from weightsync.settings import TOKEN_NAME, Settings

__all__ = ["ask_job", "days_left", "server_certificate", "try_tls"]


def try_tls(timeout_s: float) -> str:
    """Host a job on loopback with certificates of its own, and ask it for its status. Blocks.

    Returns:
        The URL that answered.

    Raises:
        WeightSyncError: It could not be served, or did not answer.
    """
    with tempfile.TemporaryDirectory(prefix="weightsync-") as folder:
        certs = make_certs(Path(folder) / "certs", ["localhost"])
        settings = Settings.resolve(token_file=certs.folder / TOKEN_NAME, environ={})
        server, member = load_server(settings), load_member(settings)
        with Coordinator("grpcs://127.0.0.1:0", credentials=server) as coordinator:
            fetch_status(coordinator.url, member, timeout_s=timeout_s)
            return coordinator.url


def ask_job(settings: Settings, timeout_s: float) -> pb.StatusReply:
    """The status of the job that the settings name. Blocks.

    Raises:
        ConfigError: No job is named, or a file is missing or open to others.
        PeerLostError, AuthError: It does not answer, or not to us.
    """
    url = settings.require_job_url()
    member = load_member(settings) if isinstance(parse_url(url), TcpAddress) else None
    return fetch_status(url, member, timeout_s=timeout_s)


def server_certificate(settings: Settings) -> Certificate | None:
    """The server's certificate, where this host has one.

    Raises:
        ConfigError: The file holds no certificate.
    """
    path = settings.cert_file
    if path is None or not path.exists():
        return None
    return read_certificate(path)


def days_left(certificate: Certificate, now: dt.datetime | None = None) -> int:
    """Whole days until the certificate ends; negative if it has.

    Raises:
        ConfigError: It is not valid yet.
    """
    now = dt.datetime.now(dt.UTC) if now is None else now
    if now < certificate.not_before:
        raise ConfigError(f"the certificate is valid from {certificate.not_before:%Y-%m-%d} on")
    return (certificate.not_after - now).days
