"""`bench transfer` as a user runs it, its parts, and whether it would notice wrong bytes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.fabrics import ofi_problem
from weightsync.bench import content
from weightsync.bench.baseline import Memcpy, ProcessRead
from weightsync.bench.sink import _Sink
from weightsync.bench.source import _Source
from weightsync.bench.transfer import TransferOptions
from weightsync.demo.worker import Channel
from weightsync.errors import ConfigError, MemoryRegistrationError
from weightsync.units import GIB, KIB, MIB

pytestmark = pytest.mark.timeout(200)

KEYS = {
    *("schema", "fabric", "memory", "bytes", "tensors", "seconds", "gb_per_s"),
    *("publish_gb_per_s", "baseline", "baseline_gb_per_s", "ratio", "verified"),
}


# ---- the command ----


def start(environ: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "weightsync.cli", "bench", "transfer", "--json", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environ, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize(
    ("fabric", "memory", "baseline", "mode", "arguments"),
    [
        ("local", "shared", "memcpy, 1 thread", "staged", ("--bytes", "24MiB", "--tensors", "12")),
        (
            "local",
            "private",
            "process_vm_readv, 2 threads",
            "in_place",
            ("--bytes", "6000002", "--tensors", "4500", "--threads", "2"),
        ),
        (
            "tcp",
            "shared",
            "sockets, 2 streams",
            "staged",
            ("--bytes", "24MiB", "--tensors", "12", "--fabric", "tcp"),
        ),
        pytest.param(
            "ofi:shm",
            "shared",
            "memcpy, 1 thread",
            "staged",
            ("--bytes", "24MiB", "--tensors", "12", "--fabric", "ofi:shm"),
            marks=pytest.mark.skipif(ofi_problem() is not None, reason=str(ofi_problem())),
        ),
    ],
)
def test_run(
    mark: dict[str, str],
    fabric: str,
    memory: str,
    baseline: str,
    mode: str,
    arguments: tuple[str, ...],
) -> None:
    process = start(mark, "--memory", memory, "--repeats", "3", *arguments)
    output, messages = process.communicate(timeout=180)
    assert process.returncode == 0, messages
    assert output.count("\n") == 1
    result: dict[str, Any] = json.loads(output)
    assert result.keys() >= KEYS
    assert result["schema"] == "weightsync.bench_transfer/1"
    assert (result["fabric"], result["memory"]) == (fabric, memory)
    assert (result["baseline"], result["publish_mode"]) == (baseline, mode)
    assert result["verified"] is True
    assert "verified: yes" in messages
    # Derived figures, worked out again from the times.
    ours, plain = np.array(result["seconds"]), np.array(result["baseline_seconds"][0])
    assert len(ours) == len(plain) == len(result["publish_seconds"]) == 3
    assert result["gb_per_s"] == pytest.approx(result["bytes"] / np.median(ours) / 1e9)
    assert result["ratio"] == pytest.approx(np.median(plain / ours))
    published = np.array(result["publish_seconds"])
    assert result["publish_gb_per_s"] == pytest.approx(result["bytes"] / np.median(published) / 1e9)
    assert result["publish_ratio"] == pytest.approx(
        np.median(np.array(result["baseline_seconds"][1]) / published)
    )


def test_interrupt_leaves_nothing(mark: dict[str, str]) -> None:
    process = start(mark, "--bytes", "8MiB", "--tensors", "8", "--repeats", "100000")
    deadline = time.monotonic() + 120
    while len(psutil.Process(process.pid).children()) < 3:  # two workers and the janitor
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, messages = process.communicate(timeout=60)
    assert process.returncode == 130, messages
    assert json.loads(output)["error"] == "interrupted"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--bytes", "-5"), "-5"),
        (("--bytes", "3 apples"), "apples"),
        (("--bytes", "7"), "even number"),
        (("--tensors", "0"), "tensors=0"),
        (("--repeats", "0"), "repeats=0"),
        (("--threads", "0"), "threads=0"),
        (("--memory", "sacred"), "sacred"),
        (("--fabric", "sim"), "lives in one process"),
        (("--fabric", "pigeon"), "unknown fabric"),
        (("--bytes", "1000TiB"), "fewer --bytes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input(arguments: tuple[str, ...], words: str) -> None:
    from typer.testing import CliRunner

    from weightsync.cli import app

    done = CliRunner().invoke(app, ["bench", "transfer", "--json", *arguments])
    assert done.exit_code == 2, done.output
    result = json.loads(done.stdout)
    assert result["error"] == "ConfigError"
    assert words in result["message"]


def test_options_are_checked_first() -> None:
    with pytest.raises(ConfigError, match="repeats"):
        TransferOptions(nbytes=1024, tensors=1, repeats=0)


# ---- does it notice? ----


@pytest.mark.parametrize("memory", ["shared", "private"])
def test_wrong_bytes_are_noticed(memory: str) -> None:
    options = {"bytes": 3 * MIB, "tensors": 3, "fabric": "local", "memory": memory, "threads": 1}
    read_fd, write_fd = os.pipe()
    source, sink = _Source(options), _Sink(Channel(read_fd, write_fd), options)
    try:
        source.do("connect", sink.do("export", {}))
        source.do("change", {"key": 5})
        source.do("transfer", {})
        assert sink.do("receive", {"key": 5})["problem"] is None
        assert sink.do("check", {"key": 5})["problem"] is None
        # A repetition whose bytes stayed behind; then one element in the middle.
        assert "not this repetition's" in sink.do("check_ends", {"key": 6})["problem"]
        assert "tensor.000000 differs" in sink.do("check", {"key": 6})["problem"]
        sink.views[1][12345] ^= 1
        assert sink.do("check_ends", {"key": 5})["problem"] is None
        assert sink.do("check", {"key": 5})["problem"].startswith(
            "tensor.000001 differs in 1 elements, the first is 12345"
        )
    finally:
        source.close()
        sink.close()


# ---- its parts ----


@pytest.mark.parametrize(("nbytes", "count"), [(2 * GIB, 200), (GIB, 200), (40 * GIB, 5000)])
def test_sizes_are_mixed(nbytes: int, count: int) -> None:
    sizes = content.tensor_sizes(nbytes, count)
    assert sum(sizes) == nbytes
    assert len(sizes) == count
    assert sum(512 <= size <= 64 * KIB for size in sizes) == count * 5 // 10
    assert sum(MIB <= size <= 8 * MIB for size in sizes) == count * 3 // 10
    large = sorted(sizes)[-count * 2 // 10 :]
    assert max(large) <= 148 * MIB
    assert min(large) > 8 * MIB
    assert len(set(large)) > 1
    assert sizes == content.tensor_sizes(nbytes, count)  # both processes must agree
    assert sizes != sorted(sizes)


def test_sizes_are_equal() -> None:
    assert content.tensor_sizes(655_360_000, 10_000) == [65536] * 10_000


@given(count=st.integers(1, 300), spare=st.integers(0, 1 << 36))
def test_sizes_add_up(count: int, spare: int) -> None:
    nbytes = 2 * (count + spare)
    sizes = content.tensor_sizes(nbytes, count)
    assert (len(sizes), sum(sizes)) == (count, nbytes)
    assert min(sizes) >= 2
    assert all(size % 2 == 0 for size in sizes)
    if spare < count * MIB // 2 - count:
        assert max(sizes) - min(sizes) <= 2


def test_values() -> None:
    sizes = [4096, 2, 30, 65536]
    tensors = content.allocate(sizes, filled=True)
    assert [tensor.nbytes for tensor in tensors] == sizes
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors)
    hashes = {hashlib.sha256(content.units(t).tobytes()).digest() for t in tensors}
    assert len(hashes) == len(sizes)
    for key in (1, 77, 65535):
        before = [content.units(tensor).copy() for tensor in tensors]
        content.change(tensors, key)
        for index, tensor in enumerate(tensors):
            assert np.array_equal(content.units(tensor), before[index] ^ np.uint16(key))
    for index, tensor in enumerate(tensors):
        now = content.make(index, tensor.nbytes, 1 ^ 77 ^ 65535)
        assert np.array_equal(content.units(tensor), now)


def buffers(sizes: list[int], filled: bool) -> tuple[list[torch.Tensor], list[int]]:
    tensors = content.allocate(sizes, filled=filled)
    return tensors, [tensor.data_ptr() for tensor in tensors]


# More vectors than a system call takes, and one tensor longer than a piece.
SIZES = [2 + 2 * (index % 50) for index in range(1500)] + [20 * MIB, 4098]


def test_memcpy_copies() -> None:
    (here, sources), (there, targets) = buffers(SIZES, True), buffers(SIZES, False)
    assert Memcpy(sources, targets, SIZES).run() > 0
    assert all(map(torch.equal, bits(there), bits(here)))


@pytest.mark.parametrize("threads", [1, 3])
def test_process_read_copies(threads: int) -> None:
    (here, sources), (there, targets) = buffers(SIZES, True), buffers(SIZES, False)
    assert ProcessRead(os.getpid(), sources, targets, SIZES, threads).run() > 0
    assert all(map(torch.equal, bits(there), bits(here)))


@pytest.mark.parametrize("threads", [1, 2])
def test_process_read_of_nothing(threads: int) -> None:
    there, targets = buffers([4096] * 3, False)
    with pytest.raises(MemoryRegistrationError, match="process_vm_readv"):
        ProcessRead(os.getpid(), [4096] * 3, targets, [4096] * 3, threads).run()
    assert not any(tensor.any() for tensor in there)


def bits(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """As integers: random bits hold NaNs, which are unlike themselves."""
    return [tensor.view(torch.int16) for tensor in tensors]
