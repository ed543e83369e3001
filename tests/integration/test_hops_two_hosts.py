"""A node's sinks pass on over the host's memory what came to them over the network, once."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from integration.test_hops import CUT, SHARED
from support import IS_LONG
from support.netns import NoNamespacesError, TwoHosts, two_hosts
from support.tree import ROOT
from weightsync.certs import make_certs

VERSIONS = 2

SOURCE = f"""
import os, sys, torch
from support.toy import SHAPES, ToySourceLayout
from weightsync import Job, Source
values = {{name: torch.zeros(shape) for name, shape in SHAPES.items()}}
options = dict(token_file=sys.argv[1], ranks_per_node=2, node_dedup="on", bucket_bytes=512)
with Job.start("grpcs://0.0.0.0:0", **options) as job:
    print(job.url, flush=True)
    sys.stdin.readline()
    with Source(
        values, layout=ToySourceLayout(1), rank=0, world_size=1, job=job,
        fabric="local+tcp", fabric_options={{"addresses": [sys.argv[2]]}},
    ) as source:
        for step in range(1, {VERSIONS} + 1):
            for name, value in values.items():
                value.copy_(torch.arange(value.numel()).reshape(value.shape) % (100 + step))
            report = source.publish(until="adopted")
            print(report.num_bytes, flush=True)
        sys.stdin.readline()
"""

SINK = f"""
import json, sys, torch
from support.toy import SHAPES, ToySinkLayout, expected_sink, toy_sink
from weightsync import Sink
rank, live = int(sys.argv[1]), toy_sink(2)
with Sink(
    live, layout=ToySinkLayout(2), replica="a", rank=rank, world_size=2,
    fabric="local+tcp", fabric_options={{"addresses": [sys.argv[2]]}},
) as sink:
    for step in range(1, {VERSIONS} + 1):
        sink.refit()
        values = {{
            name: (torch.arange(torch.Size(shape).numel()).reshape(shape) % (100 + step)).float()
            for name, shape in SHAPES.items()
        }}
        wanted = expected_sink(values, rank, 2)
        print(json.dumps({{
            "same": all(torch.equal(live[name], value) for name, value in wanted.items()),
            "nic_out": sum(rail["bytes_out"] for rail in sink._fabric.rails()),
            "arrived": sink._fabric.counters()["bytes_arrived"],
        }}), flush=True)
    sys.stdin.readline()
"""


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    assert process.stderr is not None
    line = process.stdout.readline().strip()
    assert line, process.stderr.read()
    return line


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def _start(
    stack: contextlib.ExitStack, hosts: TwoHosts, host: int, *command: str, **environ: str
) -> subprocess.Popen[str]:
    path = {"PYTHONPATH": str(ROOT / "tests")}
    process = hosts.start(
        host, [sys.executable, "-c", *command], env={**os.environ, **path, **environ}
    )
    stack.callback(_end, process)
    return process


@pytest.mark.skipif(not IS_LONG, reason="three processes with torch: make test-long")
def test_what_a_node_shares_crosses_the_network_once(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        try:
            hosts = stack.enter_context(two_hosts())
        except NoNamespacesError as error:
            pytest.skip(f"no network namespaces: {error}")
        folder = make_certs(tmp_path / "served", [hosts.addresses[0]]).folder
        source = _start(stack, hosts, 0, SOURCE, str(folder / "token"), hosts.addresses[0])
        environ = {
            "WEIGHTSYNC_JOB": _line(source),
            "WEIGHTSYNC_TOKEN_FILE": str(folder / "token"),
        }
        sinks = [
            _start(stack, hosts, 1, SINK, str(rank), hosts.addresses[1], **environ)
            for rank in range(2)
        ]
        assert source.stdin is not None
        source.stdin.write("go\n")
        source.stdin.flush()
        for version in range(1, VERSIONS + 1):
            assert int(_line(source)) == SHARED + CUT  # over the cable
            said: list[dict[str, Any]] = [json.loads(_line(sink)) for sink in sinks]
            assert [one["same"] for one in said] == [True, True]
            assert [one["nic_out"] for one in said] == [0, 0]
            assert sum(one["arrived"] for one in said) == version * (2 * SHARED + CUT)
