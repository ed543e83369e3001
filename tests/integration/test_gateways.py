"""Jobs whose members are connected to gateways: nothing that a member sees is different."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from support.pair import TIMEOUT_S, Pair
from weightsync.certs import make_certs
from weightsync.client import Job
from weightsync.errors import AuthError, ConfigError, WeightSyncError
from weightsync.service.session import fetch_status

ANYWHERE = "grpcs://127.0.0.1:0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certs(tmp_path_factory.mktemp("certs") / "job", ["one"]).folder


@pytest.fixture
def job(folder: Path) -> Iterator[Job]:
    with Job.start(ANYWHERE, gateways=2, token_file=folder / "token") as started:
        yield started
    assert gateways_of(os.getpid()) == []


def gateways_of(pid: int) -> list[int]:
    """Processes of gateways that a process has started."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_bytes()
        except (OSError, ValueError):
            continue
        if parent == pid and b"weightsync.service.gateway" in command:
            found.append(int(entry.name))
    return sorted(found)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_versions_commit_through_gateways(job: Job) -> None:
    assert len(gateways_of(os.getpid())) == 2
    with ExitStack() as stack:
        pair = Pair(stack, job)
        assert [pair.step(seed) for seed in (1, 2, 3)] == [1, 2, 3]
        status = job.status()
        assert status["committed_version"] == 3
        assert status["replicas"]["a"]["serving"]
    until(lambda: job.status()["sources"] == [])  # their streams have ended


def test_members_join_again_when_their_gateway_dies(job: Job) -> None:
    before = gateways_of(os.getpid())
    with ExitStack() as stack:
        pair = Pair(stack, job)
        assert pair.step(1) == 1
        for pid in before:
            os.kill(pid, signal.SIGKILL)

        def has_committed() -> bool:
            try:
                return pair.step(2) > 1
            except WeightSyncError:  # it was open when the stream broke, or nobody is there yet
                return False

        until(has_committed)
        after = gateways_of(os.getpid())
        assert len(after) == 2
        assert not set(after) & set(before)
        assert pair.step(3) > 2


def test_gateways_end_with_a_killed_coordinator(folder: Path) -> None:
    program = (
        "from weightsync.client import Job\n"
        f"job = Job.start({ANYWHERE!r}, gateways=2, token_file={str(folder / 'token')!r})\n"
        "print(job.url, flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        gateways = gateways_of(process.pid)
        assert len(gateways) == 2
        assert Job.connect(url, token_file=folder / "token").status()["phase"] == "idle"
        process.kill()
    until(lambda: not any(is_running(pid) for pid in gateways))


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def test_the_token_is_asked_for_at_gateways(
    job: Job, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = make_certs(tmp_path / "other", ["one"]).folder
    with pytest.raises(AuthError):
        Job.connect(job.url, token_file=other / "token", ca_file=None).status()
    target = job.url.removeprefix("grpcs://")
    with grpc.insecure_channel(target) as channel, pytest.raises(grpc.RpcError):
        channel.unary_unary("/weightsync.v1.Coordinator/Status")(b"", timeout=TIMEOUT_S)


def test_what_is_no_message_ends_its_own_stream_only(job: Job, folder: Path) -> None:
    with ExitStack() as stack:
        pair = Pair(stack, job)
        assert pair.step(1) == 1
        credentials = job._credentials
        assert credentials is not None
        channel = stack.enter_context(
            grpc.secure_channel(job.url.removeprefix("grpcs://"), credentials.channel_credentials())
        )
        call = channel.stream_stream("/weightsync.v1.Coordinator/Join")(
            iter([b"\xff\xff\xff"]), timeout=TIMEOUT_S
        )
        assert list(call) == []
        assert pair.step(2) == 2


def test_a_port_is_served_by_one_job(job: Job, folder: Path) -> None:
    port = int(job.url.rpartition(":")[2])
    for gateways in (0, 2):
        with pytest.raises(ConfigError, match="the port is taken"):
            Job.start(f"grpcs://127.0.0.1:{port}", gateways=gateways, token_file=folder / "token")
    assert fetch_status(job.url, job._credentials).phase == "idle"


def test_gateways_need_a_network_and_a_number() -> None:
    with pytest.raises(ConfigError, match="Unix socket has none"):
        Job.start(gateways=2)
    with pytest.raises(ConfigError, match="gateways=-1: 0 to 64"):
        Job.start(gateways=-1)
