"""The scale model as a user runs it: a small one, one that is stopped, one that is too fast."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from support import IS_LONG
from support.clusters import cluster
from support.tree import ROOT
from weightsync.calibrate.constants import Calibration
from weightsync.calibrate.stored import store
from weightsync.cli import app
from weightsync.planners.cluster import Cluster
from weightsync.scale.topology import why_not

_PROBLEM = why_not()
needs_network = pytest.mark.skipif(_PROBLEM is not None, reason=f"no scale model: {_PROBLEM}")
SCRIPT = str(ROOT / "scripts" / "scale_model")
SMALL = ("--sources", "4", "--sinks", "2", "--replicas", "1", "--rails", "2")


def _outside() -> dict[str, str]:
    """Return everything of this namespace that a network could change."""
    commands = {
        "links": ["ip", "-o", "link"],
        "addresses": ["ip", "-o", "address"],
        "routes": ["ip", "route", "show", "table", "all"],
        "queues": ["tc", "qdisc", "show"],
    }
    return {what: subprocess.check_output(command, text=True) for what, command in commands.items()}


def _namespaces() -> list[str]:
    listed = subprocess.check_output(["ip", "netns", "list"], text=True)
    return [line for line in listed.splitlines() if line.startswith("wsm-")]


def _processes() -> list[str]:
    return [
        found.info["name"]
        for found in psutil.process_iter(["name", "cmdline"])
        if "weightsync.fleet" in (found.info["cmdline"] or [])
    ]


@pytest.fixture
def unchanged() -> Iterator[None]:
    """The root namespace is as before, and nothing is left behind."""
    before = _outside()
    yield
    assert _outside() == before
    assert _namespaces() == []
    assert _processes() == []


def _run(
    folder: Path, *arguments: str, timeout_s: float = 55
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    done = subprocess.run(
        [SCRIPT, *arguments, "--json"],
        env={**os.environ, "XDG_CACHE_HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )
    assert done.stdout.count("\n") == 1, done.stderr
    return done, json.loads(done.stdout)


@needs_network
@pytest.mark.usefixtures("unchanged")
def test_a_small_model_runs_the_real_thing(tmp_path: Path) -> None:
    arguments = (*SMALL, "--seconds", "1.5", "--repeats", "1", "--no-broadcast")
    done, result = _run(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert result["schema"] == "weightsync.scale_model/1"
    assert result["verified"] is True
    assert result["limit_s"] == result["physical_limit_s"] >= 1.5
    # Nothing is faster than its links but for what they let through in one burst.
    assert 0.95 * result["limit_s"] < result["blast_s"] < result["limit_s"] / 0.95
    assert len(result["measured_s"]) == 1
    assert 0.97 * result["limit_s"] < result["measured_s"][0] < 3 * result["limit_s"]
    assert result["limit_s"] < result["predicted_s"] < 1.5 * result["limit_s"]
    links = result["links"]
    assert links["match"] is True
    assert sum(links["rank_bytes_sent"]) == sum(links["rank_bytes_received"])
    assert sum(links["rank_bytes_sent"]) == result["bytes_total"]
    assert result["calibration"]["fresh"] is True
    stored = Path(result["calibration"]["path"])
    assert stored.is_relative_to(tmp_path)
    assert "calibration" in done.stderr


@needs_network
@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_nothing_in_the_way(tmp_path: Path, how: int) -> None:
    environ = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    running = subprocess.Popen(
        [SCRIPT, *SMALL, "--no-broadcast", "--json"],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert running.stderr is not None
        for line in running.stderr:  # until processes run in the namespaces
            if "calibration: the wire" in line:
                break
        assert len(_namespaces()) == 8  # 4 + 2 hosts, the coordinator's, the switch
        busy, answer = _run(tmp_path, *SMALL, "--no-broadcast")
        assert busy.returncode == 2
        assert "another scale model runs" in answer["message"]
        running.send_signal(how)
        output, _ = running.communicate(timeout=30)
    finally:
        running.kill()
        running.communicate()
    if how == signal.SIGINT:
        assert running.returncode == 130
        assert json.loads(output)["error"] == "interrupted"
        return
    deadline = time.monotonic() + 10
    while _processes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert _namespaces()  # the next run removes them, whatever comes of it
    _refused(tmp_path)


@needs_network
@pytest.mark.usefixtures("unchanged")
def test_a_machine_that_is_slower_than_its_links_is_refused(tmp_path: Path) -> None:
    _refused(tmp_path)


def _refused(folder: Path) -> None:
    """Ask for links that no processor can fill: 6 ranks of 2 x 40 Gbit/s."""
    made = cluster(
        gpus_per_node=2, nics_per_node=4, nic_gbit_per_s={"nominal": 40, "attainable": 40}
    )
    path = folder / "fast.yaml"
    store(Calibration(made, dict.fromkeys(Cluster.__dataclass_fields__, "by hand")), path)
    fast = ("--mbit", "40000", "--seconds", "0.02", "--calibration", str(path))
    done, result = _run(folder, *SMALL, *fast, "--no-broadcast")
    assert done.returncode == 1
    assert result["ok"] is False
    assert result["message"].startswith("cpu_bound: raw sockets take")


@needs_network
@pytest.mark.skipif(not IS_LONG, reason="16 -> 8 ranks, several layouts, minutes: make test-long")
@pytest.mark.timeout(1500)
@pytest.mark.usefixtures("unchanged")
def test_the_cluster_of_the_paper_at_one_to_sixteen(tmp_path: Path) -> None:
    full = ("--sources", "16", "--sinks", "8", "--replicas", "4", "--rails", "2")
    done, result = _run(tmp_path, *full, "--layout", "all", timeout_s=1400)
    assert done.returncode == 0, done.stderr
    assert result["verified"] is True
    assert result["broadcast_s"] > 5 * result["limit_s"]
    layouts = {one["layout"]: one for one in result["layouts"]}
    for name, one in layouts.items():
        assert one["limit_s"] >= 4
        assert one["limit_s"] / one["blast_s"] >= 0.95
        assert one["links"]["match"], name
        assert one["ratio"] <= 1.15, name
    close = [name for name, one in layouts.items() if abs(one["prediction_error"]) <= 0.1]
    assert len(close) >= 6, {name: one["prediction_error"] for name, one in layouts.items()}


@needs_network
@pytest.mark.usefixtures("unchanged")
def test_what_a_node_shares_crosses_its_rails_once(tmp_path: Path) -> None:
    # Both ranks of the replica hold the whole model, so half of it goes from one to the other.
    path = tmp_path / "links.yaml"
    made = cluster(
        gpus_per_node=2, nics_per_node=4, nic_gbit_per_s={"nominal": 0.1, "attainable": 0.0993}
    )
    store(Calibration(made, dict.fromkeys(Cluster.__dataclass_fields__, "by hand")), path)
    short = ("--seconds", "2", "--repeats", "1", "--no-broadcast", "--calibration", str(path))
    done, result = _run(tmp_path, *SMALL, *short, "--layout", "dense_dp", "--node-dedup")
    assert done.returncode == 0, done.stderr
    assert result["verified"] is True
    assert result["bytes_total"] == result["bytes_unique"]
    assert result["measured_s"][0] < 3 * result["limit_s"]


@needs_network
@pytest.mark.skipif(not IS_LONG, reason="16 -> 8 ranks, several layouts, minutes: make test-long")
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("unchanged")
def test_node_deduplication_at_one_to_sixteen(tmp_path: Path) -> None:
    full = ("--sources", "16", "--sinks", "8", "--replicas", "4", "--rails", "2", "--node-dedup")
    layouts = ("--layout", "paper", "--layout", "dense_dp", "--layout", "moe_dp")
    done, result = _run(tmp_path, *full, *layouts, "--no-broadcast", timeout_s=800)
    assert done.returncode == 0, done.stderr
    assert result["verified"] is True
    for one in result["layouts"]:
        assert one["ratio"] <= 1.15, one["layout"]
        assert abs(one["prediction_error"]) <= 0.1, one["layout"]
        assert one["links"]["match"], one["layout"]


def test_unknown_layouts_are_answered_with_those_that_there_are(tmp_path: Path) -> None:
    done, result = _run(tmp_path, "--layout", "other")
    assert done.returncode == 2
    assert "there are paper, moe_tp" in result["message"]


def test_calibrate_stores_a_cluster_that_plans_take(tmp_path: Path) -> None:
    out = tmp_path / "cluster" / "here.yaml"
    done = CliRunner().invoke(
        app, ["calibrate", "--name", "here", "--out", str(out), "--sources", "1", "--sinks", "1",
              "--json"]
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["schema"] == "weightsync.calibrate/1"
    assert result["path"] == str(out)
    constants = result["constants"]
    assert set(constants) == set(result["how"]) == set(Cluster.__dataclass_fields__)
    # Loopback on any machine: between 1 Mbit/s and 10 Tbit/s, below a second, not for nothing.
    assert 0.001 < constants["nic_gbit_per_s"]["attainable"] < 10_000
    assert 0 < constants["latency_s"] < 1
    assert 0 < constants["control_round_trip_s"] < 1
    assert 0 < constants["journal_s"] < 1
    planned = CliRunner().invoke(
        app,
        ["plan", "--config-dir", str(tmp_path), "cluster=here", "model=qwen3_0_6b", "trainer=fsdp8",
         "rollout=tp1", "--json"],
    )  # fmt: skip
    assert planned.exit_code == 0, planned.stderr
    assert json.loads(planned.stdout)["cluster"] == "here"
