"""Settings of one process: explicit argument, else environment, else default."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from weightsync.errors import ConfigError

__all__ = [
    "CA_NAME",
    "CERT_NAME",
    "ENV_CA_FILE",
    "ENV_CERT_FILE",
    "ENV_JOB",
    "ENV_KEY_FILE",
    "ENV_TOKEN_FILE",
    "JOB_SCHEMES",
    "KEY_NAME",
    "TOKEN_NAME",
    "Settings",
    "check_job_url",
]

ENV_JOB: Final = "WEIGHTSYNC_JOB"
ENV_TOKEN_FILE: Final = "WEIGHTSYNC_TOKEN_FILE"
ENV_CA_FILE: Final = "WEIGHTSYNC_CA_FILE"
ENV_CERT_FILE: Final = "WEIGHTSYNC_CERT_FILE"
ENV_KEY_FILE: Final = "WEIGHTSYNC_KEY_FILE"

# What `weightsync certs` calls its files. Those beside the token are found without being named.
TOKEN_NAME: Final = "token"
CA_NAME: Final = "ca.pem"
CERT_NAME: Final = "server.pem"
KEY_NAME: Final = "server.key"

JOB_SCHEMES: Final = ("unix:", "grpc://", "grpcs://", "ray-actor:")

# Long enough for the slowest step of a large fleet, short enough that a hang is seen the same hour.
DEFAULT_TIMEOUT_S: Final = 120.0
# Connecting is one round trip; a coordinator that needs longer is not there.
DEFAULT_CONNECT_TIMEOUT_S: Final = 30.0


def check_job_url(url: str) -> str:
    """Refuse what cannot be a job's address.

    Args:
        url: `unix:PATH`, `grpc://HOST:PORT`, `grpcs://HOST:PORT` or `ray-actor:NAME`.

    Returns:
        The same URL.

    Raises:
        ConfigError: Another scheme, or nothing behind the scheme.
    """
    if "@" in url and not url.startswith("unix:"):
        # Not shown: what stands before the @ is likely to be a secret.
        raise ConfigError(
            "a job URL carries no user and no token (there is an @ in it); "
            f"name the token's file in token_file= or ${ENV_TOKEN_FILE}"
        )
    for scheme in JOB_SCHEMES:
        if url.startswith(scheme) and len(url) > len(scheme):
            return url
    raise ConfigError(
        f"job URL {url!r} is none of unix:PATH, grpc://HOST:PORT, grpcs://HOST:PORT, ray-actor:NAME"
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where the job is, how to prove that we belong to it, and how long to wait.

    Args:
        job_url: Address of the coordinator; None where this process hosts it.
        token_file: File that holds the job's token; None for jobs that need none.
        ca_file: Certificate of the job's CA, for grpcs://.
        cert_file: Certificate of the server; needed where a grpcs:// job is hosted.
        key_file: Private key of that certificate.
        timeout_s: Deadline of one version, in seconds.
        connect_timeout_s: Deadline of reaching the coordinator, in seconds.

    Raises:
        ConfigError: A URL of no known kind or a deadline that is not positive and finite.
    """

    job_url: str | None = None
    token_file: Path | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    timeout_s: float = DEFAULT_TIMEOUT_S
    connect_timeout_s: float = DEFAULT_CONNECT_TIMEOUT_S

    def __post_init__(self) -> None:
        if self.job_url is not None:
            check_job_url(self.job_url)
        for name in ("timeout_s", "connect_timeout_s"):
            seconds = getattr(self, name)
            if not (math.isfinite(seconds) and seconds > 0):
                raise ConfigError(f"{name}={seconds}: give a positive number of seconds")

    @classmethod
    def resolve(
        cls,
        *,
        job: str | None = None,
        token_file: str | Path | None = None,
        ca_file: str | Path | None = None,
        cert_file: str | Path | None = None,
        key_file: str | Path | None = None,
        timeout_s: float | None = None,
        connect_timeout_s: float | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Settings:
        """Settings from arguments, the environment and defaults, in this order.

        Args:
            job: Job URL; None reads $WEIGHTSYNC_JOB.
            token_file: Path; None reads $WEIGHTSYNC_TOKEN_FILE.
            ca_file: Path; None reads $WEIGHTSYNC_CA_FILE, else takes ca.pem beside the token.
            cert_file: Path; None reads $WEIGHTSYNC_CERT_FILE, else server.pem beside the token.
            key_file: Path; None reads $WEIGHTSYNC_KEY_FILE, else server.key beside the token.
            timeout_s: Deadline of one version in seconds; None takes the default.
            connect_timeout_s: Deadline of connecting in seconds; None takes the default.
            environ: Variables to read; None means those of this process. An empty variable counts
                as not set.

        Returns:
            Checked settings. No file is opened here.

        Raises:
            ConfigError: As the constructor; the message names the variable a bad URL came from.
        """
        variables = os.environ if environ is None else environ
        if job is None and variables.get(ENV_JOB):
            job = variables[ENV_JOB]
            try:
                check_job_url(job)
            except ConfigError as error:
                raise ConfigError(f"${ENV_JOB}: {error}") from None
        token = _path(token_file, variables.get(ENV_TOKEN_FILE))

        def beside(explicit: str | Path | None, variable: str, name: str) -> Path | None:
            found = _path(explicit, variables.get(variable))
            return token.parent / name if found is None and token is not None else found

        return cls(
            job_url=job,
            token_file=token,
            ca_file=beside(ca_file, ENV_CA_FILE, CA_NAME),
            cert_file=beside(cert_file, ENV_CERT_FILE, CERT_NAME),
            key_file=beside(key_file, ENV_KEY_FILE, KEY_NAME),
            timeout_s=DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s,
            connect_timeout_s=(
                DEFAULT_CONNECT_TIMEOUT_S if connect_timeout_s is None else connect_timeout_s
            ),
        )

    def require_job_url(self) -> str:
        """Return the job's URL, or explain how to give one.

        Raises:
            ConfigError: No URL was given.
        """
        if self.job_url is None:
            raise ConfigError(f"no job given: pass job=URL or set ${ENV_JOB}")
        return self.job_url


def _path(explicit: str | Path | None, variable: str | None) -> Path | None:
    if explicit is not None:
        return Path(explicit)
    return Path(variable) if variable else None
