"""Measure cold start and export of a checkpoint beside plain reads and writes of the same bytes.

Usage: python scripts/bench/checkpoint.py [--bytes SIZE] [--folder DIR] [--repeat N]

Cold start: `weightsync load` publishes DIR's checkpoint to the two ranks of a vLLM replica, all in
processes of their own; timed from the first byte to the last digest. Beside it, the same files read
into memory with plain `readinto`, in interleaved pairs: once with the files in the page cache, once
after it was told to drop them. Export: the same checkpoint written by `weightsync export`, beside
plain writes and fsync. Everything is compared in the end. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from weightsync import Job, Sink, Source
from weightsync.integrations import readback
from weightsync.planners import rules
from weightsync.units import gb_per_s, parse_bytes

BLOCK_BYTES = 16 << 20
TIMEOUT_S = 120.0


def model(nbytes: int) -> dict[str, Any]:
    """A Qwen3 of about so many bytes in bf16, its layers those of the 0.6B."""
    layer = 2 * 1024 * (2048 + 2 * 1024 + 2048 + 3 * 3072)
    return {
        "model_type": "qwen3",
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": max(1, (nbytes - 2 * 32000 * 1024) // layer),
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    }


def store(folder: Path, config: dict[str, Any]) -> int:
    """Random weights in files of a quarter each; returns their bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = list(rules.canonical_tensors(config).items())
    generator, weight_map, total = torch.Generator().manual_seed(1), {}, 0
    for index in range(4):
        name = f"model-{index + 1:05d}-of-00004.safetensors"
        chunk = names[index * len(names) // 4 : (index + 1) * len(names) // 4]
        held = {n: torch.randn(s, generator=generator).bfloat16() for n, s in chunk}
        save_file(held, folder / name)
        weight_map |= dict.fromkeys(held, name)
        total += sum(tensor.nbytes for tensor in held.values())
    index_path = folder / "model.safetensors.index.json"
    index_path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total


def drop_cache(folder: Path) -> None:
    """Ask the kernel to forget the files' pages."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plainly(folder: Path, memory: memoryview) -> float:
    """Seconds to read all files into memory that is there already."""
    started = time.perf_counter()
    at = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(memory[at : at + BLOCK_BYTES]):
                at += count
    return time.perf_counter() - started


def write_plainly(folder: Path, out: Path) -> float:
    """Seconds to write the same bytes from memory, with fsync."""
    out.mkdir()
    blobs = [(path.name, path.read_bytes()) for path in sorted(folder.glob("*.safetensors"))]
    started = time.perf_counter()
    for name, blob in blobs:
        with (out / name).open("wb", buffering=0) as file:
            view = memoryview(blob)
            while view:
                view = view[file.write(view[:BLOCK_BYTES]) :]
            os.fsync(file.fileno())
    return time.perf_counter() - started


def command(*arguments: str) -> subprocess.Popen[str]:
    """A command of ours, started."""
    line = [sys.executable, "-m", "weightsync.cli", *arguments, "--json"]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What it printed, when it has ended well."""
    output, messages = process.communicate(timeout=TIMEOUT_S)
    if process.returncode:
        raise SystemExit(messages)
    found: dict[str, Any] = json.loads(output)
    return found


def load(folder: Path, sinks: list[Sink], job: Job) -> float:
    """Seconds of one cold start, from the first byte to the last digest."""
    process = command("load", str(folder), "--job", job.url, "--until", "adopted")
    with ThreadPoolExecutor() as pool:
        list(pool.map(Sink.refit, sinks))
    result(process)
    return max(sink.seconds["fill"] for sink in sinks)


def export(folder: Path, out: Path, memory: list[dict[str, torch.Tensor]], layout: Any) -> float:
    """Seconds from publishing what engines hold to a folder that is on disk."""
    with Job.start() as job:
        process = command("export", "--job", job.url, "--out", str(out), "--like", str(folder))
        while not job.status()["replicas"]:
            time.sleep(0.05)
        sources = [
            Source(memory[r], layout=layout, rank=r, world_size=len(memory), job=job)
            for r in range(len(memory))
        ]
        started = time.perf_counter()
        with ThreadPoolExecutor() as pool:
            list(pool.map(Source.publish, sources))
        process.wait(TIMEOUT_S)
        seconds = time.perf_counter() - started
        result(process)
        for source in sources:
            source.close()
    return seconds


def pairs(
    repeat: int, nbytes: int, ours: Callable[[], float], baseline: Callable[[], float]
) -> dict[str, Any]:
    """Interleaved runs of both, in turns first, as rates and the median of their ratios."""
    seconds = []
    for index in range(repeat):
        if index % 2:
            second = baseline()
            seconds.append((ours(), second))
        else:
            seconds.append((ours(), baseline()))
    return {
        "gb_per_s": round(gb_per_s(nbytes, statistics.median(a for a, _ in seconds)), 2),
        "baseline_gb_per_s": round(gb_per_s(nbytes, statistics.median(b for _, b in seconds)), 2),
        "ratio": round(statistics.median(b / a for a, b in seconds), 2),
        "seconds": [[round(a, 4), round(b, 4)] for a, b in seconds],
    }


def measure(root: Path, nbytes: int, repeat: int) -> dict[str, Any]:
    """All series, on files below `root`."""
    config, folder = model(nbytes), root / "checkpoint"
    total = store(folder, config)
    layout = rules.vllm(config, tp=2)
    memory = [
        {p.name: torch.zeros(p.shape, dtype=torch.bfloat16) for p in layout.parameters(rank)}
        for rank in range(2)
    ]
    block = memoryview(bytearray(total + (64 << 20)))
    series: dict[str, Any] = {}
    with Job.start() as job:
        sinks = [
            Sink(memory[r], layout=layout, replica="a", rank=r, world_size=2, job=job)
            for r in range(2)
        ]
        load(folder, sinks, job)  # pages of the sinks, imports

        def cold(call: Callable[[], float]) -> Callable[[], float]:
            def after_drop() -> float:
                drop_cache(folder)
                return call()

            return after_drop

        def ours() -> float:
            return load(folder, sinks, job)

        def plain() -> float:
            return read_plainly(folder, block)

        series["load_cached"] = pairs(repeat, total, ours, plain)
        series["load_from_disk"] = pairs(repeat, total, cold(ours), cold(plain))
        for sink in sinks:
            sink.close()
    outs = iter(root / f"out-{i}" for i in range(2 * repeat))
    series["export"] = pairs(
        repeat,
        total,
        lambda: export(folder, next(outs), memory, layout),
        lambda: write_plainly(folder, next(outs)),
    )
    named = {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}
    written = {
        n: t for path in (root / "out-0").glob("*.safetensors") for n, t in load_file(path).items()
    }
    good = written.keys() == named.keys() and all(
        torch.equal(written[name].view(torch.int16), tensor.view(torch.int16))
        for name, tensor in named.items()
    )
    for rank in range(2):
        expected = readback.shard(named, config, tp=2, rank=rank)
        good &= all(torch.equal(memory[rank][n], t) for n, t in expected.items())
    return {"bytes": total, **series, "verified": good}


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bytes", type=parse_bytes, default=1 << 30, metavar="SIZE")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        found = measure(Path(root), options.bytes, options.repeat)
    report = {
        "schema": "weightsync.bench.checkpoint/1",
        "host": f"{platform.machine()}, {os.cpu_count()} cores, python {platform.python_version()}",
        **found,
    }
    print(json.dumps(report))
    return 0 if found["verified"] else 1


if __name__ == "__main__":
    sys.exit(main())
