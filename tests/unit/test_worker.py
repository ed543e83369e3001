"""Processes of the demo and their pipes, with workers of a few lines."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from weightsync.demo.worker import Channel, Team
from weightsync.errors import ConfigError, InternalError, LayoutError, PeerLostError

PROGRAM = """
import sys
from weightsync.demo.worker import die_with, serve
role, read_fd, write_fd, parent = sys.argv[1:]
die_with(int(parent))
serve(int(read_fd), int(write_fd), lambda: __import__("toyteam.toy", fromlist=["run"]))
"""
ROLE = """
import os, sys
from weightsync import errors

def run(channel, options, commands):
    channel.send(event="progress")
    for command in commands:
        if command["do"] == "say":
            for kind in command["kinds"]:
                channel.send(event=kind, pid=os.getpid())
        elif command["do"] == "raise":
            raise getattr(errors, command["name"], ZeroDivisionError)("because")
        elif command["do"] == "die":
            print("last words", flush=True)
            os._exit(7)
"""


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Team]:
    package = tmp_path / "toyteam"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(textwrap.dedent(PROGRAM))
    (package / "toy.py").write_text(textwrap.dedent(ROLE))
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    with Team(tmp_path, package="toyteam") as made:
        yield made
    assert all(worker.process.returncode is not None for worker in made.workers)


def test_what_others_say_meanwhile_is_kept(team: Team) -> None:
    first, second = (team.start(name, "toy") for name in ("first", "second"))
    second.send("say", kinds=["early", "late"])
    second_said = []
    first.send("say", kinds=["ready"])
    team.wait([first], "ready", timeout_s=20, on_event=lambda w, e: second_said.append(e))
    # Both orders of arrival are right: the events of the second are there when they are wanted.
    found = team.wait([second], "late", timeout_s=20)
    assert found[second]["pid"] == second.process.pid
    assert team.wait([second], "early", timeout_s=20)[second]["event"] == "early"


def test_errors_of_workers_keep_their_type(team: Team) -> None:
    worker = team.start("worker", "toy")
    worker.send("raise", name="LayoutError")
    with pytest.raises(LayoutError, match="worker: because"):
        team.wait([worker], "never", timeout_s=20)


def test_other_exceptions_come_with_their_traceback(team: Team) -> None:
    worker = team.start("worker", "toy")
    worker.send("raise", name="nothing")
    with pytest.raises(InternalError, match=r"(?s)ZeroDivisionError: because.*Traceback"):
        team.wait([worker], "never", timeout_s=20)


def test_a_death_is_an_error_unless_it_was_ordered(team: Team) -> None:
    first, second = (team.start(name, "toy") for name in ("first", "second"))
    first.send("die")
    died = team.wait([first], "never", timeout_s=20, may_die=first)
    assert died[first] == {"event": "died", "status": 7}
    second.send("die")
    with pytest.raises(PeerLostError, match=r"(?s)second ended with status 7.*last words"):
        team.wait([second], "never", timeout_s=20)


def test_dismissed_workers_end_by_themselves(team: Team) -> None:
    worker = team.start("worker", "toy")
    team.dismiss(timeout_s=20)
    assert worker.process.returncode == 0


def test_a_channel_carries_objects_and_nothing_else() -> None:
    (read_a, write_b), (read_b, write_a) = os.pipe(), os.pipe()
    here, there = Channel(read_a, write_a), Channel(read_b, write_b)
    here.send(do="one", value=[1.5, "x"])
    here.send(do="two")
    assert there.receive() == {"do": "one", "value": [1.5, "x"]}
    assert there.is_buffered
    assert there.receive() == {"do": "two"}
    assert not there.is_waiting()
    os.write(write_a, b"[1]\n")
    with pytest.raises(ConfigError, match="not a message"):
        there.receive()
    here.close()
    assert there.receive() is None
    there.close()
