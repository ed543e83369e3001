from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from weightsync.errors import ConfigError
from weightsync.settings import DEFAULT_TIMEOUT_S, Settings, check_job_url

ENVIRON = {"WEIGHTSYNC_JOB": "unix:/run/job", "WEIGHTSYNC_TOKEN_FILE": "/run/token"}


def test_defaults() -> None:
    settings = Settings.resolve(environ={})
    assert settings == Settings()
    assert settings.job_url is None
    assert settings.timeout_s == DEFAULT_TIMEOUT_S


def test_environment_beats_defaults() -> None:
    settings = Settings.resolve(environ=ENVIRON)
    assert settings.job_url == "unix:/run/job"
    assert settings.token_file == Path("/run/token")


def test_argument_beats_environment() -> None:
    settings = Settings.resolve(job="grpc://127.0.0.1:7000", token_file="mine", environ=ENVIRON)
    assert settings.job_url == "grpc://127.0.0.1:7000"
    assert settings.token_file == Path("mine")


def test_process_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTSYNC_JOB", "ray-actor:coordinator")
    assert Settings.resolve().require_job_url() == "ray-actor:coordinator"


def test_empty_variable_is_not_set() -> None:
    assert Settings.resolve(environ={"WEIGHTSYNC_JOB": ""}).job_url is None


def test_bad_variable_is_named() -> None:
    with pytest.raises(ConfigError, match=r"\$WEIGHTSYNC_JOB: job URL 'http://x'"):
        Settings.resolve(environ={"WEIGHTSYNC_JOB": "http://x"})


def test_missing_job_says_how_to_give_one() -> None:
    with pytest.raises(ConfigError, match=r"job=URL or set \$WEIGHTSYNC_JOB"):
        Settings().require_job_url()


@pytest.mark.parametrize("url", ["", "unix:", "grpc://", "tcp://a:1", "/run/job", "UNIX:/x"])
def test_bad_urls(url: str) -> None:
    with pytest.raises(ConfigError, match="none of unix:PATH"):
        check_job_url(url)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, math.inf, math.nan])
def test_bad_timeouts(timeout_s: float) -> None:
    with pytest.raises(ConfigError, match="timeout_s="):
        Settings.resolve(timeout_s=timeout_s, environ={})
    with pytest.raises(ConfigError, match="connect_timeout_s="):
        Settings(connect_timeout_s=timeout_s)


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().job_url = "unix:/x"  # type: ignore[misc]
