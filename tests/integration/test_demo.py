"""The demo as a user runs it: whole processes, judged by their JSON, exit status and leftovers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support import IS_LONG
from support.marked import MARK, marked
from weightsync.demo.run import DemoOptions
from weightsync.errors import ConfigError

pytestmark = pytest.mark.timeout(300)

KEYS = {"ok", "verified", "sources", "sinks", "steps", "bytes", "publish_s", "gb_per_s", "stages"}
STAGES = {"wait_open", "transfer", "read", "cast", "write", "complete", "decide", "fill", "pause"}


def start(environ: dict[str, str], cwd: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "weightsync.cli", "demo", "--json", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environ, cwd=cwd, stdout=pipe, stderr=pipe, text=True)


def demo(environ: dict[str, str], cwd: Path, *arguments: str, status: int) -> dict[str, Any]:
    process = start(environ, cwd, *arguments)
    output, messages = process.communicate(timeout=200)
    assert process.returncode == status, messages
    assert output.count("\n") == 1
    result: dict[str, Any] = json.loads(output)
    assert result["schema"] == "weightsync.demo/1"
    return {**result, "messages": messages}


DEMOS: list[tuple[str, ...]] = [("--steps", "3")]
if IS_LONG:
    DEMOS += [
        ("--tls", "--sources", "3", "--sinks", "2", "--steps", "2"),
        ("--model", "qwen3_moe", "--sources", "3", "--mode", "in_place", "--steps", "2"),
    ]
else:
    MOE = ("--model", "qwen3_moe", "--mode", "in_place")
    DEMOS.append(("--tls", *MOE, "--sources", "3", "--sinks", "2", "--steps", "2"))


@pytest.mark.parametrize("arguments", DEMOS, ids=" ".join)
def test_versions_arrive_bit_for_bit(
    mark: dict[str, str], tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    result = demo(mark, tmp_path, *arguments, status=0)
    assert result.keys() >= KEYS
    assert result["ok"] is True
    assert result["verified"] is True
    steps = int(arguments[-1])
    assert len(result["publish_s"]) == steps
    assert result["stages"].keys() >= STAGES
    assert result["bytes"] > 1_000_000
    assert_trace(tmp_path / result["trace"], sources=result["sources"], sinks=result["sinks"])


def assert_trace(path: Path, *, sources: int, sinks: int) -> None:
    """One track per process and stage, times that can be."""
    events = json.loads(path.read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert len([name for name in names.values() if name.startswith("trainer ")]) == sources
    assert len([name for name in names.values() if name.startswith("sink ")]) == sinks
    tracks = {(names[e["pid"]], e["args"]["name"]) for e in events if e["name"] == "thread_name"}
    assert {("trainer 0", stage) for stage in ("write", "cast", "train")} <= tracks
    assert ("sink a/0", "fill") in tracks
    assert all(e["ts"] >= 0 and e["dur"] >= 0 for e in events if e["ph"] == "X")


@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_a_killed_trainer_aborts_the_version(
    mark: dict[str, str], tmp_path: Path, mode: str
) -> None:
    arguments = ("--mode", mode, "--sinks", "2", "--steps", "2", "--kill", "trainer:2")
    result = demo(mark, tmp_path, *arguments, status=0)
    assert result["ok"] is True
    assert result["aborted"]["version"] == 2
    assert "source 1" in result["aborted"]["reason"]
    assert "trainer 1 was killed" in result["messages"]
    if mode == "staged":
        assert "replica a still serves version 1" in result["messages"]
        assert "read back: version 1 bit for bit in replica(s) a, b" in result["messages"]


# All bugs are tried in test_plants.py; here one goes through the whole demo.
PLANT = ("--sinks", "2", "--sources", "1", "--steps", "1", "--plant", "k_v")


def test_the_digest_refuses_a_planted_layout_bug(mark: dict[str, str], tmp_path: Path) -> None:
    result = demo(mark, tmp_path, *PLANT, status=1)
    assert result["ok"] is False
    assert result["verified"] is False
    assert result["publish_s"] == []
    assert "holds other values" in result["aborted"]["reason"]
    assert "serves nothing" in result["messages"]


def test_the_read_back_sees_a_planted_layout_bug(mark: dict[str, str], tmp_path: Path) -> None:
    mark["WEIGHTSYNC_PLANT_SKIP_DIGEST"] = "1"
    result = demo(mark, tmp_path, *PLANT, status=1)
    assert result["ok"] is False
    assert result["verified"] is False
    assert len(result["publish_s"]) == 1, "without its digest the version is committed"
    assert "k_proj" in result["problems"][0]


@pytest.mark.parametrize(
    ("number", "moment"), [(signal.SIGINT, "step 1"), (signal.SIGTERM, "started")]
)
def test_an_interrupt_leaves_nothing(
    mark: dict[str, str], tmp_path: Path, number: signal.Signals, moment: str
) -> None:
    process = start(mark, tmp_path, "--steps", "1000", "--sinks", "1")
    wait_for(process, moment)
    process.send_signal(number)
    output, messages = process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads(output)["ok"] is False
    assert "Traceback" not in messages
    assert shared_memory() == set()


def test_kill_9_leaves_nothing(mark: dict[str, str], tmp_path: Path) -> None:
    process = start(mark, tmp_path, "--steps", "1000", "--sinks", "1")
    wait_for(process, "step 1")
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    folder = Path(mark["TMPDIR"])
    while (marked(mark[MARK]) or list(folder.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert shared_memory() == set()


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return
    pytest.fail(f"ended with status {process.wait()} before it said {text!r}")


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("weightsync*")}


@pytest.mark.parametrize(
    "arguments",
    [
        ("--sinks", "3"),
        ("--sources", "0"),
        ("--steps", "0"),
        ("--mode", "sideways"),
        ("--model", "gpt2"),
        ("--kill", "trainer:9"),
        ("--kill", "sink:1"),
        ("--sinks", "24"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_clear_line(
    mark: dict[str, str], tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    result = demo(mark, tmp_path, *arguments, status=2)
    assert result["ok"] is False
    assert result["error"] == "ConfigError"
    assert result["messages"].count("\n") == 1
    assert "ConfigError: " in result["messages"]


def test_debug_shows_where_an_error_came_from(mark: dict[str, str], tmp_path: Path) -> None:
    process = start(mark, tmp_path, "--sinks", "3", "--debug")
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" in messages


def test_options_refuse_what_cannot_be() -> None:
    assert DemoOptions.parse_kill("trainer:2") == 2
    assert DemoOptions.parse_kill(None) is None
    for text in ("trainer", "trainer:", "trainer:x", "sink:1", "trainer:-1"):
        with pytest.raises(ConfigError):
            DemoOptions.parse_kill(text)


def test_the_read_back_knows_nothing_of_the_mover() -> None:
    code = "import weightsync.demo.verify, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    parts = ("weightsync.ir", "weightsync.planners", "weightsync.runtime", "weightsync.service")
    loaded = {name for name in done.stdout.split() if name.startswith(parts)}
    assert loaded == set()
