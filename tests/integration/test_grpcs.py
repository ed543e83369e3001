"""Jobs over TLS on loopback: what works on a Unix socket works here, what is wrong is named."""

from __future__ import annotations

import datetime as dt
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
import torch

from support.pair import TIMEOUT_S, Pair, join_source, until_lost
from support.tls import any_server, tcp_server
from support.toy import SHAPES, ToySourceLayout, toy_shard
from weightsync import errors
from weightsync.certs import make_certs, renew_certs
from weightsync.client import Job, Source
from weightsync.doctor import Check, Host, _job
from weightsync.service import weightsync_pb2 as pb
from weightsync.service import weightsync_pb2_grpc as rpc
from weightsync.service.session import fetch_status

ANYWHERE = "grpcs://127.0.0.1:0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certs(tmp_path_factory.mktemp("certs") / "job", ["one"]).folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certs(tmp_path_factory.mktemp("certs") / "other", ["one"]).folder


@pytest.fixture
def job(folder: Path) -> Iterator[Job]:
    with Job.start(ANYWHERE, token_file=folder / "token") as started:
        yield started


# ---- what works ----


def test_versions_commit_over_tls(job: Job, folder: Path) -> None:
    assert job.url.startswith("grpcs://127.0.0.1:")
    assert not job.url.endswith(":0")
    with ExitStack() as stack:
        pair = Pair(stack, job)
        assert [pair.step(seed) for seed in (1, 2, 3)] == [1, 2, 3]
        status = Job.connect(job.url, token_file=folder / "token").status()
        assert status["committed_version"] == 3
        assert status["replicas"]["a"]["serving"]


def test_the_environment_is_enough(job: Job, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTSYNC_JOB", job.url)
    monkeypatch.setenv("WEIGHTSYNC_TOKEN_FILE", str(folder / "token"))
    assert Job.connect().status()["phase"] == "idle"
    with ExitStack() as stack:
        assert Pair(stack, job.url).step(1) == 1
    found = list(_job(Host(environ={"WEIGHTSYNC_JOB": job.url})))
    assert [check.status for check in found] == ["missing"]  # no token there


def test_a_coordinator_that_restarts_is_joined_again(folder: Path, tmp_path: Path) -> None:
    journal, token = tmp_path / "job.db", folder / "token"
    first = Job.start(ANYWHERE, journal=journal, token_file=token)
    with ExitStack() as stack:
        pair = Pair(stack, first)
        assert pair.step(1) == 1
        first.close()
        until_lost(pair.source)
        with Job.start(first.url, journal=journal, token_file=token):
            assert pair.step(2) == 2


def test_members_keep_their_copies_when_the_certificate_is_renewed(tmp_path: Path) -> None:
    folder = make_certs(tmp_path / "job").folder
    first = Job.start(ANYWHERE, token_file=folder / "token")
    with ExitStack() as stack:
        pair = Pair(stack, first)
        first.close()
        until_lost(pair.source)
        renew_certs(folder)
        with Job.start(first.url, token_file=folder / "token"):
            assert pair.step(1) == 1


def test_ipv6_and_names(folder: Path) -> None:
    try:
        started = Job.start("grpcs://[::1]:0", token_file=folder / "token")
    except errors.ConfigError:
        pytest.skip("no IPv6 on this host")
    with started as job:
        assert job.url.startswith("grpcs://[::1]:")
        assert job.status()["phase"] == "idle"
    with Job.start("grpcs://localhost:0", token_file=folder / "token") as job:
        assert job.status()["phase"] == "idle"


# ---- what is refused ----


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer " + "x" * 43),)])
def test_no_rpc_is_served_without_the_token(
    job: Job, folder: Path, metadata: tuple[tuple[str, str], ...]
) -> None:
    target = job.url.removeprefix("grpcs://")
    credentials = grpc.ssl_channel_credentials((folder / "ca.pem").read_bytes())
    methods = [name for name in vars(rpc.CoordinatorServicer) if not name.startswith("_")]
    assert sorted(methods) == ["Join", "Status"]
    calls: list[Callable[[rpc.CoordinatorStub], object]] = [
        lambda stub: stub.Status(pb.StatusRequest(), metadata=metadata, timeout=5),
        lambda stub: list(
            stub.Join(iter([pb.MemberMessage(hello=pb.Hello())]), metadata=metadata, timeout=5)
        ),
    ]
    with grpc.secure_channel(target, credentials) as channel:
        for call in calls:
            with pytest.raises(grpc.RpcError) as caught:
                call(rpc.CoordinatorStub(channel))
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]
        unknown = channel.unary_unary("/weightsync.v1.Coordinator/Other")
        with pytest.raises(grpc.RpcError) as caught:
            unknown(b"", metadata=metadata, timeout=5)
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]
    assert job.status()["sources"] == []


def test_plain_text_is_not_understood(job: Job) -> None:
    with grpc.insecure_channel(job.url.removeprefix("grpcs://")) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            rpc.CoordinatorStub(channel).Status(pb.StatusRequest(), timeout=5)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]


def test_a_wrong_token_is_said_at_once(job: Job, folder: Path, other: Path) -> None:
    wrong = Job.connect(job.url, token_file=other / "token", ca_file=folder / "ca.pem")
    started = time.monotonic()
    for use in (wrong.status, lambda: join_source(wrong)):
        with pytest.raises(errors.AuthError, match=r"refused the token in .*other/token.*copy"):
            use()
    assert time.monotonic() - started < 5  # not retried until the deadline
    assert job.status()["sources"] == []


def test_a_wrong_ca_is_said_at_once(job: Job, other: Path) -> None:
    wrong = Job.connect(job.url, token_file=other / "token")
    for use in (wrong.status, lambda: join_source(wrong)):
        with pytest.raises(errors.AuthError, match=r"another CA than .*other/ca\.pem.*copy"):
            use()


def test_a_server_of_another_ca_never_sees_the_token(folder: Path, other: Path) -> None:
    """The careless server takes every token; we must not even call it."""
    with any_server(other) as url:
        assert Job.connect(url, token_file=other / "token").status()["phase"] == "careless"
        with pytest.raises(errors.AuthError, match="another CA"):
            Job.connect(url, token_file=folder / "token").status()


@pytest.mark.parametrize(
    ("age_days", "why"),
    [(400, r"expired certificate.*certs --renew.*clock"), (-2, "not valid yet.*clocks")],
)
def test_a_certificate_out_of_time_is_said(tmp_path: Path, age_days: int, why: str) -> None:
    now = dt.datetime.now(dt.UTC) - dt.timedelta(days=age_days)
    folder = make_certs(tmp_path / "job", now=now).folder
    with pytest.raises(errors.AuthError, match="weightsync certs --renew"):
        Job.start(ANYWHERE, token_file=folder / "token")
    with any_server(folder) as url, pytest.raises(errors.AuthError, match=why):
        Job.connect(url, token_file=folder / "token").status()


def test_a_name_that_the_certificate_lacks_is_said(job: Job, folder: Path) -> None:
    alias = job.url.replace("127.0.0.1", "127.1")
    with pytest.raises(errors.AuthError, match=r"no certificate for 127\.1.*--renew --host 127\.1"):
        Job.connect(alias, token_file=folder / "token").status()


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("grpcs://127.0.0.1:1", r"nothing listens on port 1 of 127\.0\.0\.1.*is the job running"),
        ("grpcs://nowhere.invalid:7431", r"nowhere\.invalid is not known here.*DNS"),
    ],
)
def test_a_host_that_is_not_there_is_said(folder: Path, url: str, why: str) -> None:
    with pytest.raises(errors.PeerLostError, match=why):
        Job.connect(url, token_file=folder / "token").status()


def test_something_else_that_listens_is_said(folder: Path) -> None:
    token = folder / "token"
    no_tls = pytest.raises(errors.AuthError, match=r"does not speak TLS.*check host and port")
    with tcp_server(b"HTTP/1.1 200 OK\r\n\r\n") as url, no_tls:
        Job.connect(url, token_file=token).status()
    hung_up = pytest.raises(errors.PeerLostError, match="did not finish the TLS handshake")
    with tcp_server(b"") as url, hung_up:
        Job.connect(url, token_file=token).status()


def test_silence_ends_at_the_deadline(folder: Path) -> None:
    """As a frozen coordinator, or a firewall that drops: connected, never answered."""
    with tcp_server(None) as url:
        job = Job.connect(url, token_file=folder / "token")
        started = time.monotonic()
        with pytest.raises(errors.PeerLostError, match=r"no coordinator answered.*firewalls let"):
            Source(
                toy_shard({n: torch.zeros(s) for n, s in SHAPES.items()}, 0, 1),
                layout=ToySourceLayout(1), rank=0, world_size=1, job=job, timeout_s=0.5,
            )  # fmt: skip
        with pytest.raises(errors.PeerLostError, match=r"answered.* in 0\.3 s"):
            fetch_status(job.url, job._credentials, timeout_s=0.3)
        assert time.monotonic() - started < 3


def test_a_port_is_served_once(job: Job, folder: Path) -> None:
    with pytest.raises(errors.ConfigError, match="the port is taken"):
        Job.start(job.url, token_file=folder / "token")
    assert job.status()["phase"] == "idle"


def test_a_member_whose_token_went_out_of_use_is_told(tmp_path: Path) -> None:
    """Whoever waits when the coordinator comes back, and whoever asks after that."""
    folder = make_certs(tmp_path / "job").folder
    first = Job.start(ANYWHERE, token_file=folder / "token")
    with ExitStack() as stack:
        pair = Pair(stack, first)
        source, sink = pair.source, pair.sinks[0]
        first.close()
        until_lost(source, sink)
        waits = [pair.pool.submit(source.publish), pair.pool.submit(sink.refit)]
        deadline = time.monotonic() + TIMEOUT_S
        while not (source._member._open and sink._member._refitting):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        new = make_certs(tmp_path / "new").folder
        (folder / "token").write_bytes((new / "token").read_bytes())
        with Job.start(first.url, token_file=folder / "token"):
            for wait in waits:
                with pytest.raises(errors.AuthError, match="older than the last"):
                    wait.result(TIMEOUT_S / 2)
            for ask in (source.publish, sink.refit):
                with pytest.raises(errors.AuthError, match="older than the last"):
                    ask()


# ---- the doctor ----


def examine(**environ: str) -> dict[str, Check]:
    return {check.name: check for check in _job(Host(environ=environ))}


def test_doctor_asks_the_job_of_the_environment(job: Job, folder: Path, tmp_path: Path) -> None:
    token = str(folder / "token")
    good = examine(WEIGHTSYNC_JOB=job.url, WEIGHTSYNC_TOKEN_FILE=token)
    assert good["job"].status == "ok"
    assert "idle, version 0 committed" in good["job"].found
    assert good["job certificate"].status == "ok"
    wrong = make_certs(tmp_path / "job", days=3).folder
    bad = examine(WEIGHTSYNC_JOB=job.url, WEIGHTSYNC_TOKEN_FILE=str(wrong / "token"))
    assert bad["job"].status == "missing"
    assert bad["job"].found.startswith("AuthError: ")
    assert bad["job certificate"].status == "warning"
    assert examine()["job"].status == "ok"
    assert examine(WEIGHTSYNC_JOB="grpcs://x")["job"].status == "missing"


# ---- the token stays where it is ----

LOUD = """
import logging, sys, traceback
from pathlib import Path
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
from weightsync import Job, WeightSyncError
from weightsync.cli import app
from weightsync.client import Source
from weightsync.settings import Settings
good, other = map(Path, sys.argv[1:])
job = Job.start("grpcs://127.0.0.1:0", token_file=good / "token")
print(job, vars(job), vars(job._coordinator), job._coordinator._listener.__dict__, job.status())
tries = [
    lambda: Job.connect(job.url, token_file=other / "token", ca_file=good / "ca.pem").status(),
    lambda: Job.connect(job.url, token_file=other / "token").status(),
    lambda: Job.connect(job.url.replace("127.0.0.1", "127.1"), token_file=good / "token").status(),
    lambda: Job.connect("grpcs://127.0.0.1:1", token_file=good / "token").status(),
    lambda: Job.start(job.url, token_file=good / "token"),
    lambda: Job.start("grpcs://9.9.9.9:0", token_file=good / "token"),
]
for attempt in tries:
    try:
        attempt()
    except WeightSyncError as error:
        traceback.print_exc()
        print(repr(error), error.context, vars(error))
    else:
        raise SystemExit("that should have failed")
job.close()
for arguments in (["certs", "--dir", str(good)], ["certs", "--dir", str(good), "--renew"],
                  ["doctor", "--json"]):
    try:
        app(arguments)
    except SystemExit:
        pass
print("ran to the end")
"""


def test_the_token_is_in_no_output(folder: Path, tmp_path: Path) -> None:
    good = make_certs(tmp_path / "good").folder
    other = make_certs(tmp_path / "other").folder
    done = subprocess.run(
        [sys.executable, "-c", LOUD, str(good), str(other)],
        env={
            "PATH": "/usr/bin:/bin",
            "GRPC_VERBOSITY": "debug",
            "GRPC_TRACE": "http,channel,subchannel,call_error,tsi,secure_endpoint",
            "WEIGHTSYNC_TOKEN_FILE": str(good / "token"),
        },
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    output = done.stdout + done.stderr
    assert "ran to the end" in done.stdout
    assert "refused ipv4:127.0.0.1" in output  # logging was on
    assert output.count("AuthError") >= 3
    for where in (good, other):
        token = (where / "token").read_text().strip()
        assert token not in output
        assert token[:16] not in output
        for name in ("ca.key", "server.key"):
            assert (where / name).read_text().splitlines()[1] not in output
