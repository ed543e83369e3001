"""Measure the planner on a synthetic fleet: regions, classes, seconds per stage, peak memory.

Usage: python scripts/bench/planner.py [--tensors N] [--classes N] [--sources N] ...

Tensors differ in shape so that classes are distinct by construction; a fifth of them is replicated
on pairs of sources, so that holders must be chosen. Prints one JSON object;
CPU seconds tell more than wall seconds where others use the machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

from weightsync.ir import Manifest, ManifestBuilder, Plan
from weightsync.planners import choose, outline, planner

STAGES = (
    (outline, "classify"),
    (outline, "find_boxes"),
    (outline, "intersect"),
    (choose, "find_holder_sets"),
    (choose, "solve"),
    (choose, "elect"),
    (outline, "stamp"),
    (planner, "_lower"),
    (Plan, "validate"),
)


def shapes(num_tensors: int, num_classes: int) -> list[tuple[str, tuple[int, int], str]]:
    """Name, shape and placement of every tensor; class k has its own shape and placement."""
    result = []
    for number in range(num_tensors):
        kind = number % num_classes
        rows, cols = 512 + 8 * (kind % 97), 1024 + 16 * (kind // 97)
        placement = ("rows", "gate", "columns", "rows", "whole")[kind % 5]
        shape = (rows, cols) if placement != "whole" else (1, 8192 + kind)
        name = f"layers.{number // num_classes:03d}.w{kind:04d}"
        result.append((name, shape, placement))
        if placement == "gate":
            result.append((f"{name}.up", shape, "up"))
    return result


def source_manifest(
    rank: int, tensors: list[tuple[str, tuple[int, int], str]], world: int
) -> Manifest:
    """One FSDP rank: uneven shards of dim 0; every fifth tensor is sharded over half the ranks."""
    builder = ManifestBuilder("source", f"source {rank}")
    for name, (rows, cols), placement in tensors:
        builder.tensor(name, (rows, cols))
        parts = world // 2 if placement == "whole" else world
        dim = 1 if placement == "whole" else 0
        size = -(-(rows, cols)[dim] // parts)
        begin = min((rank % parts) * size, (rows, cols)[dim])
        count = min(size, (rows, cols)[dim] - begin)
        if count <= 0:
            continue
        lo, n = ((begin, 0), (count, cols)) if dim == 0 else ((0, begin), (1, count))
        builder.buffer(name, "BF16", n[0] * n[1])
        builder.place(name, name, n, lo=lo, n=n)
    return builder.build()


def sink_manifest(
    label: str, rank: int, tensors: list[tuple[str, tuple[int, int], str]], tp: int
) -> Manifest:
    """One tensor-parallel rank: rows, columns or whole tensors; rows of gate and up interleave."""
    builder = ManifestBuilder("sink", label)
    for name, (rows, cols), placement in tensors:
        builder.tensor(name, (rows, cols))
        part = rows // tp
        if placement == "whole":
            builder.buffer(name, "BF16", cols)
            builder.place(name, name, (1, cols))
        elif placement == "columns":
            view = (rows, cols // tp)
            builder.buffer(name, "BF16", rows * cols // tp)
            builder.place(name, name, view, lo=(0, rank * cols // tp), n=view)
        elif placement == "rows":
            builder.buffer(name, "BF16", part * cols)
            builder.place(name, name, (part, cols), lo=(rank * part, 0), n=(part, cols))
        else:
            is_up = placement == "up"
            buffer, at = name.removesuffix(".up"), (0, int(is_up), 0)
            if not is_up:
                builder.buffer(buffer, "BF16", 2 * part * cols)
            view3, lo, n = (part, 2, cols), (rank * part, 0), (part, cols)
            builder.place(name, buffer, view3, at=at, lo=lo, n=n, axes=(0, 2))
    return builder.build()


def main() -> int:
    """Build the fleet, plan it once, print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensors", type=int, default=6000)
    parser.add_argument("--classes", type=int, default=2200)
    parser.add_argument("--sources", type=int, default=32)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--tp", type=int, default=8)
    args = parser.parse_args()
    tensors = shapes(args.tensors, args.classes)
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    sources = [source_manifest(r, tensors, args.sources) for r in range(args.sources)]
    sinks = [
        sink_manifest(f"sink {replica}/{rank}", rank, tensors, args.tp)
        for replica in range(args.replicas)
        for rank in range(args.tp)
    ]
    seconds["build_manifests"] = time.perf_counter() - started
    started = time.perf_counter()
    source, sink = Manifest.merge("source", sources), Manifest.merge("sink", sinks)
    digests = source.digest, sink.digest
    seconds["merge_and_hash"] = time.perf_counter() - started
    del sources, sinks
    rss_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    stages: dict[str, float] = {}
    counts: dict[str, int] = {}
    for owner, name in STAGES:
        setattr(owner, name, _timed(getattr(owner, name), name, stages, counts))
    started, cpu_started = time.perf_counter(), time.process_time()
    plan = planner.plan_transfer(source, sink)
    planned = time.perf_counter()
    digest = plan.digest
    finished, cpu_finished = time.perf_counter(), time.process_time()
    report = {
        "schema": "weightsync.bench.planner/1",
        "host": f"{platform.machine()}, python {platform.python_version()}",
        "tensors": args.tensors,
        "classes": counts["classify"],
        "sources": len(source.ranks),
        "sinks": len(sink.ranks),
        "source_pieces": len(source.pieces),
        "sink_pieces": len(sink.pieces),
        "regions": counts["stamp"],
        "rows": len(plan.rows),
        "chunks": len(plan.chunks),
        "buckets": len(plan.buckets),
        "bytes_total": int(plan.buckets.nbytes.sum()),
        "max_load_over_bound": plan.max_load_bytes / plan.shares.bound_bytes,
        "plan_and_prove_s": planned - started,
        "hash_s": finished - planned,
        "total_s": finished - started,
        "total_cpu_s": cpu_finished - cpu_started,
        "stages_cpu_s": stages,
        "before_s": seconds,
        "rss_before_plan_mib": rss_before,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "digest": digest,
        "manifests": digests,
    }
    print(json.dumps(report, indent=2))
    return 0


def _timed(
    function: Callable[..., Any], name: str, stages: dict[str, float], counts: dict[str, int]
) -> Callable[..., Any]:
    """Wrap a stage: add up its CPU seconds, note how much it found."""

    def run(*args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        result = function(*args, **kwargs)
        stages[name] = stages.get(name, 0.0) + time.process_time() - started
        if name == "classify":
            counts[name] = len(result.first)
        elif name == "stamp":
            counts[name] = len(result.tensor)
        return result

    return run


if __name__ == "__main__":
    sys.exit(main())
