"""`weightsync load` and `weightsync export` as a user runs them: processes, JSON, leftovers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from support.layout_oracle import TINY_QWEN3, build_model, checkpoint
from weightsync.cli import app
from weightsync.client import Job, Sink, Source
from weightsync.integrations import readback
from weightsync.planners import rules

WAIT_S = 40.0


@pytest.fixture
def job() -> Iterator[Job]:
    with Job.start() as started:
        yield started


def start(environ: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "weightsync.cli", *arguments, "--json"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environ, stdout=pipe, stderr=pipe, text=True)


def finished(process: subprocess.Popen[str], status: int) -> dict[str, Any]:
    output, messages = process.communicate(timeout=WAIT_S)
    assert process.returncode == status, messages
    assert output.count("\n") == 1
    result: dict[str, Any] = json.loads(output)
    return {**result, "messages": messages}


def wait_until(found: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not found():
        assert time.monotonic() < end
        time.sleep(0.02)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    model = build_model(TINY_QWEN3).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="8KB")  # type: ignore[operator]
    return checkpoint(model, TINY_QWEN3)


def test_load_then_export(mark: dict[str, str], job: Job, tmp_path: Path) -> None:
    """Two readers -> an engine of two ranks; the engine -> two writers."""
    named = stored(tmp_path / "old")
    environ = {**mark, "WEIGHTSYNC_JOB": job.url}
    layout = rules.vllm(TINY_QWEN3, tp=2)
    memory = [
        {p.name: torch.zeros(p.shape, dtype=torch.bfloat16) for p in layout.parameters(rank)}
        for rank in range(2)
    ]
    sinks = [
        Sink(memory[r], layout=layout, replica="a", rank=r, world_size=2, job=job, timeout_s=WAIT_S)
        for r in range(2)
    ]
    readers = [
        start(environ, "load", str(tmp_path / "old"), "--rank", str(r), "--world-size", "2",
              "--until", "adopted", "--tag", "cold")
        for r in range(2)
    ]  # fmt: skip
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(Sink.refit, sinks)) == [1, 1]
    loaded = [finished(reader, 0) for reader in readers]
    for rank, result in enumerate(loaded):
        assert result["schema"] == "weightsync.load/1"
        facts = {"ok": True, "version": 1, "stage": "adopted", "tag": "cold", "rank": rank}
        assert facts.items() <= result.items()
        assert "version 1 is adopted in 1 replica(s)" in result["messages"]
    # Both ranks hold the norms.
    assert sum(r["bytes"] for r in loaded) == sum(
        t.nbytes * (1 + name.endswith("norm.weight")) for name, t in named.items()
    )
    for rank, held in enumerate(memory):
        for name, tensor in readback.shard(named, TINY_QWEN3, tp=2, rank=rank).items():
            assert torch.equal(held[name].view(torch.int16), tensor.view(torch.int16)), name
    for sink in sinks:
        sink.close()

    out = tmp_path / "out"
    writers = [
        start(environ, "export", "--out", str(out), "--like", str(tmp_path / "old"),
              "--max-file", "8000", "--rank", str(r), "--world-size", "2")
        for r in range(2)
    ]  # fmt: skip
    with ThreadPoolExecutor() as pool:
        sources = [
            Source(memory[r], layout=layout, rank=r, world_size=2, job=job, timeout_s=WAIT_S)
            for r in range(2)
        ]
        assert [r.version for r in pool.map(Source.publish, sources)] == [2, 2]
        written = [finished(writer, 0) for writer in writers]
        for source in sources:
            source.close()
    assert {result["schema"] for result in written} == {"weightsync.export/1"}
    assert {(result["ok"], result["version"]) for result in written} == {(True, 2)}
    files = sorted(name for result in written for name in result["files"])
    assert files == sorted(path.name for path in out.glob("*.safetensors"))
    found = {name: t for file in files for name, t in load_file(out / file).items()}
    assert found.keys() == named.keys()
    for name, tensor in named.items():
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "out", "tmp"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_export_leaves_nothing(
    mark: dict[str, str], job: Job, tmp_path: Path, number: signal.Signals
) -> None:
    stored(tmp_path / "old")
    arguments = ["--out", str(tmp_path / "out"), "--like", str(tmp_path / "old")]
    process = start(mark, "export", "--job", job.url, *arguments)
    wait_until(lambda: bool(job.status()["replicas"]))
    assert (tmp_path / ".out.partial" / "rank-0").is_dir()
    process.send_signal(number)
    result = finished(process, 130)
    assert (result["ok"], result["error"]) == (False, "interrupted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "tmp"]
    wait_until(lambda: not job.status()["replicas"])


def test_what_a_killed_export_leaves_the_next_one_removes(
    mark: dict[str, str], job: Job, tmp_path: Path
) -> None:
    named = stored(tmp_path / "old")
    arguments = ["--out", str(tmp_path / "out"), "--like", str(tmp_path / "old")]
    process = start(mark, "export", "--job", job.url, *arguments)
    wait_until(lambda: bool(job.status()["replicas"]))
    process.kill()
    process.communicate()
    assert (tmp_path / ".out.partial").is_dir()
    wait_until(lambda: not job.status()["replicas"])
    again = start(mark, "export", "--job", job.url, *arguments)
    with Source(named, rank=0, world_size=1, job=job, timeout_s=WAIT_S) as source:
        source.publish()
        finished(again, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "out", "tmp"]


def test_bad_input(job: Job, tmp_path: Path) -> None:
    old, out = tmp_path / "old", tmp_path / "out"
    stored(old)
    export = ["export", "--out", str(out), "--like", str(old)]
    assert_refused(job, 2, "either config or like", ["export", "--out", str(out)])
    again = ["export", "--out", str(old), "--like", str(old)]
    assert_refused(job, 2, "is there already", again)
    assert_refused(job, 2, "dtype 'F8' is none of", [*export, "--dtype", "F8"])
    assert_refused(job, 2, "committed or adopted", ["load", str(old), "--until", "prepared"])
    assert_refused(job, 1, "no model.safetensors.index.json", ["load", str(tmp_path)])
    file = next(old.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-5])
    assert_refused(job, 1, file.name, ["load", str(old)])
    assert_refused(job, 1, file.name, export)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert job.status()["replicas"] == {}


def assert_refused(job: Job, status: int, message: str, arguments: list[str]) -> None:
    runner = CliRunner(env={"WEIGHTSYNC_JOB": job.url})
    found = runner.invoke(app, [*arguments, "--json"])
    assert found.exit_code == status, found.output
    result = json.loads(found.stdout)
    assert result["ok"] is False
    assert message in result["message"]
    assert message in found.stderr
