"""Secrets are read with care and shown nowhere."""

from __future__ import annotations

import copy
import datetime as dt
import logging
import pickle
from pathlib import Path

import pytest

from weightsync.certs import make_certs
from weightsync.errors import AuthError, ConfigError
from weightsync.service.credentials import Token, load_member, load_server
from weightsync.service.listen import TokenCheck
from weightsync.settings import Settings

TEXT = "s3cret-" + "x" * 36
NOW = dt.datetime.now(dt.UTC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_certs(tmp_path / "job", ["one"]).folder


def of(folder: Path, **files: Path) -> Settings:
    return Settings.resolve(token_file=folder / "token", environ={}, **files)


# ---- settings ----


def test_files_are_found_beside_the_token() -> None:
    settings = Settings.resolve(environ={"WEIGHTSYNC_TOKEN_FILE": "/run/job/token"})
    assert settings.ca_file == Path("/run/job/ca.pem")
    assert settings.cert_file == Path("/run/job/server.pem")
    assert settings.key_file == Path("/run/job/server.key")


def test_arguments_beat_variables_beat_neighbours() -> None:
    environ = {
        "WEIGHTSYNC_TOKEN_FILE": "/a/token",
        "WEIGHTSYNC_CA_FILE": "/b/ca",
        "WEIGHTSYNC_CERT_FILE": "/b/cert",
        "WEIGHTSYNC_KEY_FILE": "/b/key",
    }
    settings = Settings.resolve(token_file="/c/token", ca_file="/d/ca", environ=environ)
    assert settings.token_file == Path("/c/token")
    assert settings.ca_file == Path("/d/ca")
    assert settings.cert_file == Path("/b/cert")
    assert settings.key_file == Path("/b/key")
    assert Settings.resolve(environ={}).ca_file is None


# ---- the token ----


def test_a_token_shows_itself_nowhere(folder: Path) -> None:
    token = Token(TEXT)
    for shown in (repr(token), str(token), f"{token}", f"{token!r}", repr([token])):
        assert "s3cret" not in shown
    secret = (folder / "token").read_text().strip()
    key = (folder / "server.key").read_text().splitlines()[1]
    for loaded in (load_member(of(folder)), load_server(of(folder)), of(folder)):
        assert secret not in repr(loaded)
        assert key not in repr(loaded)


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_token_is_not_carried_away(duplicate: object) -> None:
    with pytest.raises(TypeError, match="not to be pickled"):
        duplicate(Token(TEXT))  # type: ignore[operator]


@pytest.mark.parametrize("text", ["", "short", "x" * 31, "x" * 4097, "a b" * 20, "\u00e9" * 40])
def test_what_is_no_token(text: str) -> None:
    with pytest.raises(ConfigError, match="one word of 32 to 4096") as caught:
        Token(text)
    assert not text or text not in str(caught.value)


def test_matches() -> None:
    token = Token(TEXT)
    assert token.matches(TEXT.encode())
    for other in (b"", TEXT[:-1].encode(), TEXT.encode() + b"x", TEXT.upper().encode(), b"\xff"):
        assert not token.matches(other)


@pytest.mark.parametrize(
    ("metadata", "accepted"),
    [
        ([("authorization", f"Bearer {TEXT}")], True),
        ([("authorization", f"Bearer {TEXT}".encode())], True),
        ([("user-agent", "x"), ("authorization", f"Bearer {TEXT}")], True),
        ([], False),
        ([("authorization", TEXT)], False),
        ([("authorization", f"bearer {TEXT}")], False),
        ([("authorization", f"Bearer {TEXT} ")], False),
        ([("authorization", f"Basic {TEXT}")], False),
        ([("authorization", "Bearer ")], False),
        ([("authorization", "Bearer \u00e9\udcff")], False),
        ([("x-authorization", f"Bearer {TEXT}")], False),
        ([("authorization", f"Bearer {TEXT}"), ("authorization", "Bearer x")], False),
    ],
)
def test_calls_that_are_let_in(metadata: list[tuple[str, str | bytes]], accepted: bool) -> None:
    assert TokenCheck(Token(TEXT)).accepts(metadata) is accepted


def test_refusals_are_logged_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    check = TokenCheck(Token(TEXT), clock=lambda: now[0])
    for second in (0.0, 1.0, 9.0, 11.0, 12.0):
        now[0] = second
        check._log_refusal("ipv4:10.0.0.9:1")
    assert [record.getMessage() for record in caplog.records] == [
        "refused ipv4:10.0.0.9:1: no token of this job",
        "refused ipv4:10.0.0.9:1: no token of this job (and 2 more since)",
    ]


# ---- files ----


def test_good_files(folder: Path) -> None:
    member, server = load_member(of(folder)), load_server(of(folder))
    assert member.token.matches((folder / "token").read_bytes().strip())
    assert member.ca_pem == (folder / "ca.pem").read_bytes()
    assert server.certificate.hosts[0] == "one"


def test_without_any_file_the_message_says_what_to_run() -> None:
    for load in (load_member, load_server):
        with pytest.raises(ConfigError, match=r"weightsync certs.*token_file=.*\$WEIGHTSYNC_TOKEN"):
            load(Settings())


@pytest.mark.parametrize("name", ["token", "ca.pem", "server.pem", "server.key"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    load = load_member if name == "ca.pem" else load_server
    with pytest.raises(ConfigError, match=rf"{name}: No such file.*weightsync certs"):
        load(of(folder))


@pytest.mark.parametrize("name", ["token", "server.key"])
@pytest.mark.parametrize(
    ("mode", "good"), [(0o600, True), (0o400, True), (0o440, True), (0o604, False), (0o660, False)]
)
def test_secrets_that_others_can_read_are_refused(
    folder: Path, name: str, mode: int, good: bool
) -> None:
    (folder / name).chmod(mode)
    if good:
        load_server(of(folder))
        return
    with pytest.raises(ConfigError, match=rf"{name} is a secret.*{mode:04o}.*chmod 600"):
        load_server(of(folder))


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("token", "short", "one word"),
        ("token", "", "one word"),
        ("token", "two words " * 5, "one word"),
        ("server.pem", "nonsense", "holds no certificate"),
        ("server.key", "nonsense", "holds no private key"),
    ],
)
def test_files_that_are_not_what_they_should_be(
    folder: Path, name: str, content: str, what: str
) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=rf"{name}.*{what}") as caught:
        load_server(of(folder))
    assert not content or content.strip() not in str(caught.value)


def test_a_key_of_another_certificate_is_refused(folder: Path, tmp_path: Path) -> None:
    other = make_certs(tmp_path / "other").folder
    with pytest.raises(ConfigError, match=r"server\.key is not the key of .*server\.pem"):
        load_server(of(folder, key_file=other / "server.key"))


@pytest.mark.parametrize("days", [-2, 366])
def test_a_server_certificate_out_of_time_is_refused(folder: Path, days: int) -> None:
    with pytest.raises(AuthError, match=r"valid from .* to .*weightsync certs --renew.*clock"):
        load_server(of(folder), now=NOW + dt.timedelta(days=days))


def test_the_end_of_a_certificate_is_announced(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_server(of(folder), now=NOW + dt.timedelta(days=300))
    assert not caplog.records
    load_server(of(folder), now=NOW + dt.timedelta(days=360))
    assert "--renew" in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    ("trace", "warns"), [("all", True), ("http,hpack_parser", True), ("h*", True), ("http", False)]
)
def test_traces_that_show_the_token_are_announced(
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    trace: str,
    warns: bool,
) -> None:
    monkeypatch.setenv("GRPC_TRACE", trace)
    with caplog.at_level(logging.WARNING):
        load_member(of(folder))
    assert bool(caplog.records) is warns
