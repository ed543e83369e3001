"""The job's CA: what lies on disk, whom OpenSSL accepts, what the command says."""

from __future__ import annotations

import datetime as dt
import json
import os
import ssl
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from support.tls import handshake
from weightsync.certs import make_certs, read_certificate, renew_certs
from weightsync.cli import app
from weightsync.errors import ConfigError

FILES = {"ca.key", "ca.pem", "token", "server.pem", "server.key"}
NOW = dt.datetime.now(dt.UTC)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    hosts = ["Trainer-0", "10.0.0.1", "fd00:0::1", "*.pods.example"]
    return make_certs(tmp_path_factory.mktemp("certs") / "job", hosts).folder


def test_only_the_owner_may_look(made: Path, tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        open_handed = make_certs(tmp_path / "a" / "b").folder
    finally:
        os.umask(old)
    for folder in (made, open_handed):
        assert folder.stat().st_mode & 0o777 == 0o700
        assert {path.name for path in folder.iterdir()} == FILES
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


@pytest.mark.parametrize(
    "host", ["trainer-0", "10.0.0.1", "fd00::1", "x.pods.example", "localhost", "127.0.0.1", "::1"]
)
def test_openssl_accepts_the_hosts(made: Path, host: str) -> None:
    handshake(made, host)
    assert read_certificate(made / "server.pem").names(host)


@pytest.mark.parametrize(
    "host", ["trainer-1", "10.0.0.2", "fd00::2", "pods.example", "a.b.pods.example"]
)
def test_openssl_refuses_other_hosts(made: Path, host: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=r"mismatch|not valid for"):
        handshake(made, host)
    assert not read_certificate(made / "server.pem").names(host)


def test_openssl_refuses_another_ca(made: Path, tmp_path: Path) -> None:
    other = make_certs(tmp_path / "other").folder
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
        handshake(made, "localhost", ca=other)


@pytest.mark.parametrize(("age_days", "why"), [(400, "expired"), (-2, "not yet valid")])
def test_openssl_refuses_other_times(tmp_path: Path, age_days: int, why: str) -> None:
    folder = make_certs(tmp_path / "old", now=NOW - dt.timedelta(days=age_days)).folder
    with pytest.raises(ssl.SSLCertVerificationError, match=why):
        handshake(folder, "localhost")


def test_a_clock_that_lags_is_tolerated(made: Path) -> None:
    now = dt.datetime.now(dt.UTC)  # not NOW: other tests may have taken an hour since
    assert read_certificate(made / "server.pem").not_before < now - dt.timedelta(minutes=30)


def test_two_jobs_share_nothing(tmp_path: Path) -> None:
    first, second = (contents(make_certs(tmp_path / name).folder) for name in "ab")
    assert {name for name in FILES if first[name] == second[name]} == set()
    assert len(first["token"].strip()) == 43  # 32 bytes in base64


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    folder = make_certs(tmp_path / "job").folder
    before = contents(folder)
    with pytest.raises(ConfigError, match=r"holds ca\.key.*--renew.*--force"):
        make_certs(folder)
    assert contents(folder) == before
    make_certs(folder, force=True)
    after = contents(folder)
    assert after.keys() == FILES
    assert {name for name in FILES if before[name] == after[name]} == set()


def test_one_file_is_enough_to_refuse(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir(mode=0o700)
    (folder / "token").symlink_to("/nowhere")
    with pytest.raises(ConfigError, match="holds token already"):
        make_certs(folder)


def test_links_are_replaced_not_followed(tmp_path: Path) -> None:
    folder, victim = tmp_path / "job", tmp_path / "victim"
    folder.mkdir(mode=0o700)
    victim.write_text("mine")
    (folder / "ca.key").symlink_to(victim)
    make_certs(folder, force=True)
    assert victim.read_text() == "mine"
    assert not (folder / "ca.key").is_symlink()


def test_renewed_certificates_belong_to_the_same_ca(tmp_path: Path) -> None:
    folder = make_certs(tmp_path / "job", ["one"], now=NOW - dt.timedelta(days=400)).folder
    before = contents(folder)
    renewed = renew_certs(folder)
    after = contents(folder)
    assert {name for name in FILES if before[name] != after[name]} == {"server.pem", "server.key"}
    assert renewed.server.hosts == ("one", "localhost", "127.0.0.1", "::1")
    handshake(folder, "one")
    renew_certs(folder, ["two"], days=3)
    handshake(folder, "two")
    left = read_certificate(folder / "server.pem").not_after - dt.datetime.now(dt.UTC)
    assert round(left / dt.timedelta(days=1)) == 3
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_a_certificate_does_not_outlast_its_ca(tmp_path: Path) -> None:
    folder = make_certs(tmp_path / "job", now=NOW - dt.timedelta(days=3600)).folder
    with pytest.raises(ConfigError, match="the CA ends in 50 days"):
        renew_certs(folder, days=51, now=NOW)
    renewed = renew_certs(folder, now=NOW)
    assert renewed.server.not_after == renewed.ca.not_after
    with pytest.raises(ConfigError, match=r"the CA in .* ended on .*--force"):
        renew_certs(folder, now=NOW + dt.timedelta(days=51))


@pytest.mark.parametrize(
    ("hosts", "what"),
    [
        (["grpcs://a:1"], "without port or scheme"),
        (["a:7431"], "without port or scheme"),
        (["a b"], "DNS name"),
        (["a..b"], "DNS name"),
        (["-a"], "DNS name"),
        (["1.2.3.400"], "DNS name"),
        ([""], "DNS name"),
        (["a" * 64], "DNS name"),
        (["0.0.0.0"], "nobody connects to it"),
    ],
)
def test_hosts_that_cannot_be(tmp_path: Path, hosts: list[str], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        make_certs(tmp_path / "job", hosts)
    assert not (tmp_path / "job").exists()


def test_folders_that_others_may_enter_are_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    with pytest.raises(ConfigError, match=r"mode 0750.*chmod 700"):
        make_certs(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"folder .*file: "):
        make_certs(tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("ca.pem", None, "No such file"),
        ("ca.pem", b"nonsense", "holds no certificate"),
        ("ca.key", b"nonsense", "holds no private key"),
        ("ca.key", None, "No such file"),
    ],
)
def test_renewing_needs_the_ca(tmp_path: Path, name: str, content: bytes | None, what: str) -> None:
    folder = make_certs(tmp_path / "job").folder
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=what):
        renew_certs(folder)


# ---- the command ----


def run(*arguments: str, status: int = 0) -> Any:
    done = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, ["certs", *arguments])
    assert done.exit_code == status, done.output
    return done


def test_command_says_what_to_do_next(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    done = run("--dir", str(folder), "--host", "10.0.0.7", "--host", "trainer-0")
    for part in (
        "for 10.0.0.7, trainer-0, localhost",
        f'Job.start("grpcs://0.0.0.0:7431", token_file="{folder}/token")',
        f"scp -p {folder}/ca.pem {folder}/token HOST:{folder}/",
        f"export WEIGHTSYNC_TOKEN_FILE={folder}/token",
        "export WEIGHTSYNC_JOB=grpcs://10.0.0.7:7431",
    ):
        assert part in done.output
    assert (folder / "token").read_text().strip() not in done.output


def test_command_in_json(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    run("--dir", str(folder), "--host", "fd00::1")
    done = run("--dir", str(folder), "--renew", "--json", "--days", "30")
    result = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert result["schema"] == "weightsync.certs/1"
    assert result["ok"] is True
    assert result["renewed"] is True
    assert result["files"] == {name: str(folder / name) for name in FILES}
    assert result["hosts"] == ["fd00::1", "localhost", "127.0.0.1", "::1"]
    assert dt.datetime.fromisoformat(result["not_after"]) - NOW < dt.timedelta(days=31)
    assert "start the job again" in done.stderr


@pytest.mark.parametrize(
    "arguments", [("--host", "a:1"), ("--days", "0"), ("--renew",), ("--renew", "--force")]
)
def test_command_refuses_bad_input(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = run("--dir", str(tmp_path / "job"), "--json", *arguments, status=2)
    assert json.loads(done.stdout)["error"] == "ConfigError"


def test_help_has_examples() -> None:
    output = run("--help").output
    assert "weightsync certs --host trainer-0 --host 10.0.0.1" in output
    assert "--renew" in output
