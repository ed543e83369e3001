"""Settings of one process: explicit argument, else environment, else default."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from weightsync.errors import ConfigError

__all__ = ["ENV_JOB", "ENV_TOKEN_FILE", "JOB_SCHEMES", "Settings", "check_job_url"]

ENV_JOB: Final = "WEIGHTSYNC_JOB"
ENV_TOKEN_FILE: Final = "WEIGHTSYNC_TOKEN_FILE"
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
        timeout_s: Deadline of one version, in seconds.
        connect_timeout_s: Deadline of reaching the coordinator, in seconds.

    Raises:
        ConfigError: A URL of no known kind or a deadline that is not positive and finite.
    """

    job_url: str | None = None
    token_file: Path | None = None
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
        timeout_s: float | None = None,
        connect_timeout_s: float | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Settings:
        """Settings from arguments, the environment and defaults, in this order.

        Args:
            job: Job URL; None reads $WEIGHTSYNC_JOB.
            token_file: Path; None reads $WEIGHTSYNC_TOKEN_FILE.
            timeout_s: Deadline of one version in seconds; None takes the default.
            connect_timeout_s: Deadline of connecting in seconds; None takes the default.
            environ: Variables to read; None means those of this process. An empty variable counts
                as not set.

        Returns:
            Checked settings. The token file is not opened here.

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
        if token_file is None and variables.get(ENV_TOKEN_FILE):
            token_file = variables[ENV_TOKEN_FILE]
        return cls(
            job_url=job,
            token_file=None if token_file is None else Path(token_file),
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
