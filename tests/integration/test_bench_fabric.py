"""`bench fabric` as a user runs it, and whether it would notice wrong words."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from support.cuda import faked
from support.fabrics import ofi_problem
from weightsync.bench.payload import changed, first_difference, make
from weightsync.cli import app
from weightsync.transport.cuda_ipc import cuda_ipc_problem

pytestmark = pytest.mark.timeout(200)

needs_ofi = pytest.mark.skipif(ofi_problem() is not None, reason=str(ofi_problem()))


@pytest.mark.parametrize(
    ("fabric", "memory", "baseline"),
    [
        ("local", "shared", "memcpy, 1 thread"),
        ("local", "private", "process_vm_readv, 1 thread"),
        ("tcp", "private", "sockets, 2 streams"),
        pytest.param("ofi:tcp", "private", "sockets, 2 streams", marks=needs_ofi),
        pytest.param("ofi:shm", "shared", "memcpy, 1 thread", marks=needs_ofi),
        ("cuda_ipc", "shared", "cudaMemcpyAsync, device to device"),
    ],
)
def test_run(mark: dict[str, str], fabric: str, memory: str, baseline: str) -> None:
    if fabric == "cuda_ipc" and cuda_ipc_problem() is not None:
        mark = faked(mark)  # the figures mean nothing, the words are right
    command = [sys.executable, "-m", "weightsync.cli", "bench", "fabric", "--json"]
    done = subprocess.run(
        [
            *(*command, "--fabric", fabric, "--memory", memory),
            *("--bytes", "16MiB", "--repeats", "1", "--peers", "2"),
        ],
        env=mark,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["schema"] == "weightsync.bench_fabric/1"
    assert (result["fabric"], result["memory"]) == (fabric, memory)
    assert result["verified"] is True
    assert "verified: yes" in done.stderr
    assert [found["bytes_per_write"] for found in result["sweep"]] == [
        *(256, 4096, 65536, 1 << 20, 16 << 20)
    ]
    for found in result["sweep"]:
        moved = found["bytes_per_write"] * found["writes"]
        assert found["baseline"] == baseline
        assert found["gb_per_s"] == pytest.approx(moved / found["seconds"][0] / 1e9)
        assert found["ratio"] == pytest.approx(found["gb_per_s"] / found["baseline_gb_per_s"])
    assert result["fan_out"]["peers"] == 2
    assert result["fan_out"]["writes"] == 16
    assert 0 < result["latency"]["us_median"] <= result["latency"]["us_p99"]
    assert result["posts"]["writes_per_s"] > 0
    assert result["paged"]["ratio_to_large"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--bytes", "5MiB"), "multiple"),
        (("--bytes", "1024TiB"), "fewer --bytes"),
        (("--peers", "0"), "peers=0"),
        (("--repeats", "0"), "repeats=0"),
        (("--memory", "sacred"), "sacred"),
        (("--fabric", "sim"), "lives in one process"),
        (("--fabric", "pigeon"), "unknown fabric"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input(arguments: tuple[str, ...], words: str) -> None:
    done = CliRunner().invoke(app, ["bench", "fabric", "--json", *arguments])
    assert done.exit_code == 2, done.output
    assert words in json.loads(done.stdout)["message"]


def test_wrong_words_are_noticed() -> None:
    base, words = make(4096), make(4096)
    changed(words, 0, 7)
    assert np.array_equal(words, make(4096, 7))
    assert first_difference(words, base, 7) is None
    assert first_difference(words, base, 6) == "512 of 512 words are wrong, the first is 0"
    words[100] ^= np.uint64(1)
    assert first_difference(words, base, 7) == "1 of 512 words are wrong, the first is 100"
