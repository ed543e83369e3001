"""A coordinator on one host, its members on another, nothing between them but TLS."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import IS_LONG
from support.netns import NoNamespacesError, TwoHosts, two_hosts
from support.tree import ROOT
from weightsync.certs import make_certs

COORDINATOR = """
import sys
from weightsync import Job
with Job.start("grpcs://0.0.0.0:0", token_file=sys.argv[1]) as job:
    print(job.url, flush=True)
    sys.stdin.read()
"""

# Source and sink share a process: `local` moves bytes between processes of one host only.
MEMBERS = """
import json, sys, time
import torch
from support.toy import SHAPES, ToySinkLayout, ToySourceLayout, expected_sink, toy_shard, toy_sink
from weightsync import Job, Sink, Source, WeightSyncError

def say(**what):
    print(json.dumps(what), flush=True)

def refused(url, **options):
    try:
        Job.connect(url, **options).status()
    except WeightSyncError as error:
        return f"{type(error).__name__}: {error}"

url = Job.connect().url
say(wrong_port=refused(url.rpartition(":")[0] + ":1"), no_token=refused(url, token_file="/none"))
values = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
live = toy_sink(1)
with (
    Source(values, layout=ToySourceLayout(1), rank=0, world_size=1) as source,
    Sink(live, layout=ToySinkLayout(1), replica="a", rank=0, world_size=1) as sink,
):
    for step in (1, 2):
        for value in values.values():
            value.copy_(torch.randn(value.shape))
        source.publish()
        version = sink.refit()
        same = all(torch.equal(live[n], t) for n, t in expected_sink(values, 0, 1).items())
        say(version=version, same=same)
    if sys.stdin.readline() == "watch\\n":
        started = time.monotonic()
        while source._member.lost is None and time.monotonic() < started + 50:
            time.sleep(0.05)
        say(seconds=time.monotonic() - started, lost=str(source._member.lost))
"""


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(two_hosts())
        except NoNamespacesError as error:
            pytest.skip(f"no network namespaces: {error}")
        yield made


class Run:
    """Both processes, with what the second one says."""

    def __init__(self, hosts: TwoHosts, stack: contextlib.ExitStack, folder: Path) -> None:
        served = make_certs(folder / "served", [hosts.addresses[0]]).folder
        copied = folder / "copied"  # all that the other host has
        copied.mkdir(mode=0o700)
        for name in ("ca.pem", "token"):
            shutil.copy2(served / name, copied)
        python = sys.executable
        self.coordinator = hosts.start(0, [python, "-c", COORDINATOR, str(served / "token")])
        stack.callback(end, self.coordinator)
        self.url = self.line(self.coordinator)
        environ = {
            **os.environ,
            "PYTHONPATH": str(ROOT / "tests"),
            "WEIGHTSYNC_JOB": self.url,
            "WEIGHTSYNC_TOKEN_FILE": str(copied / "token"),
        }
        self.members = hosts.start(1, [python, "-c", MEMBERS], env=environ)
        stack.callback(end, self.members)

    def said(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.line(self.members))
        return found

    def tell(self, text: str) -> None:
        assert self.members.stdin is not None
        self.members.stdin.write(f"{text}\n")
        self.members.stdin.flush()

    @staticmethod
    def line(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline().strip()
        if not line:
            raise AssertionError(process.stderr.read())
        return line


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_versions_commit_between_hosts(hosts: TwoHosts, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        run = Run(hosts, stack, tmp_path)
        assert run.url.startswith(f"grpcs://{hosts.addresses[0]}:")
        refusals = run.said()
        assert "PeerLostError" in refusals["wrong_port"]
        assert "nothing listens on port 1" in refusals["wrong_port"]
        assert "ConfigError: /none: No such file" in refusals["no_token"]
        assert [run.said() for _ in range(2)] == [{"version": v, "same": True} for v in (1, 2)]
        run.tell("leave")
        assert run.members.wait(20) == 0


@pytest.mark.skipif(not IS_LONG, reason="waits 20 s for a host that is gone: make test-long")
def test_a_host_that_is_cut_off_is_noticed(hosts: TwoHosts, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        run = Run(hosts, stack, tmp_path)
        for _ in range(3):
            run.said()
        hosts.cut()
        run.tell("watch")
        said = run.said()
        assert "lost the coordinator" in said["lost"]
        assert 5 < said["seconds"] < 25
