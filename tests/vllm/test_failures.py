"""What goes wrong around a real engine: it serves the old version, or nothing at all."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from support.vllm_fleet import Fleet
from weightsync.demo.vllm.server import Api
from weightsync.doctor_vllm import check_vllm

PROMPTS = [[3, 14, 15, 92, 65], [84, 104, 101, 32]]
NUM_TOKENS = 16


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with Fleet(tmp_path, model="qwen3", dtype="float32", timeout_s=60.0) as made:
        made.start_trainers(2)
        made.start_server("a", tp=2)
        made.start_server("b", tp=1)
        made.wait_ready()
        made.attach()
        yield made


def workers_of(server_pid: int) -> list[psutil.Process]:
    """vLLM's worker processes of one server, by the names that they give themselves."""
    family = psutil.Process(server_pid).children(recursive=True)
    return [process for process in family if "Worker" in " ".join(process.cmdline())]


def test_what_may_go_wrong(fleet: Fleet) -> None:
    """One fleet, four misfortunes: engines take long to start."""
    fleet.train()
    fleet.publish()
    first = fleet.generate(PROMPTS, NUM_TOKENS)
    best, *_ = fleet.judge(PROMPTS, first)
    assert first == best

    # What an operator would ask: both can follow a job, and only this host can reach their routes.
    for api in fleet.apis.values():
        assert [check.status for check in check_vllm(api.url)] == ["ok", "ok"]

    # An engine sleeps: it is left alone, and takes the version when it wakes up. (On a CPU vLLM
    # moves no weights for that, but it takes no requests either.)
    sleeper = fleet.apis[fleet.servers[1]]
    sleeper.post("/sleep?level=1")
    fleet.train()
    for trainer in fleet.trainers:
        trainer.send("publish", until="committed")
    events = fleet.team.wait(fleet.trainers, ("published", "aborted"), timeout_s=60.0)
    assert [event["event"] for event in events.values()] == ["published"] * 2, events
    wait_until(lambda: fleet.apis[fleet.servers[0]].weight_version() == "2")
    time.sleep(1.5)
    assert (sleeper.weight_version(), sleeper.get("/is_paused")["is_paused"]) == ("1", True)
    sleeper.post("/wake_up")
    wait_until(lambda: sleeper.weight_version() == "2")
    first = fleet.generate(PROMPTS, NUM_TOKENS)
    best, *_ = fleet.judge(PROMPTS, first)
    assert first == best

    # A trainer is frozen in the middle of a transfer: both engines go on with the old version.
    fleet.train()
    for trainer in fleet.trainers:
        frozen = trainer is fleet.trainers[-1]
        trainer.send("publish", failpoint="source.writing@1=stop" if frozen else "")
    process = psutil.Process(fleet.trainers[-1].process.pid)
    wait_until(lambda: process.status() == psutil.STATUS_STOPPED)
    assert fleet.job.status()["phase"] == "writing"
    for _ in range(3):
        assert fleet.generate(PROMPTS, NUM_TOKENS) == first
    assert fleet.job.status()["phase"] == "writing"
    assert {api.weight_version() for api in fleet.apis.values()} == {"2"}
    os.kill(process.pid, signal.SIGCONT)
    events = fleet.team.wait(fleet.trainers, ("published", "aborted"), timeout_s=60.0)
    assert [event["event"] for event in events.values()] == ["published"] * 2, events
    second = fleet.generate(PROMPTS, NUM_TOKENS)
    best, *_ = fleet.judge(PROMPTS, second)
    assert second == best
    assert second != first

    # A rank of replica a dies while nothing is published: a goes out, b goes on.
    a, b = fleet.servers
    pid = fleet.ready[a]["pid"]
    victims = workers_of(pid)
    assert len(victims) == 2, [p.cmdline() for p in psutil.Process(pid).children(recursive=True)]
    os.kill(victims[1].pid, signal.SIGKILL)
    fleet.train()
    fleet.start_publish()
    events = fleet.team.wait(fleet.trainers, ("published", "aborted"), timeout_s=60.0)
    assert [event["event"] for event in events.values()] == ["published"] * 2, events
    assert {event["num_replicas"] for event in events.values()} == {1}
    assert refuses(fleet.apis[a])
    api = fleet.apis[b]
    third = [api.generate(prompt, NUM_TOKENS) for prompt in PROMPTS]
    best, *_ = fleet.judge(PROMPTS, third)
    assert third == best
    assert third != second

    # A trainer dies while it writes: the version is aborted everywhere, the old one serves.
    fleet.train()
    for trainer in fleet.trainers:
        die = trainer is fleet.trainers[-1]
        trainer.send("publish", failpoint="source.writing@1=kill" if die else "")
    event = fleet.team.wait(
        [fleet.trainers[0]], "aborted", timeout_s=60.0, may_die=fleet.trainers[-1]
    )[fleet.trainers[0]]
    assert event["error"] == "VersionAbortedError"
    assert "source 1" in event["message"]
    assert fleet.trainers[-1].process.wait(10.0) == -signal.SIGKILL
    assert [api.generate(prompt, NUM_TOKENS) for prompt in PROMPTS] == third
    assert api.weight_version() == "4"
    assert api.get("/is_paused") == {"is_paused": False}


def wait_until(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def refuses(api: Api) -> bool:
    """Whether a server answers no request for tokens within some seconds."""
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        try:
            api.generate(PROMPTS[0], 1, timeout_s=5.0)
        except OSError:
            return True
        time.sleep(0.2)
    return False
