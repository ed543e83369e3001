"""Measure planning and binding the demo's models: what one rank waits for when a fleet forms.

Usage: python scripts/bench/binding.py [--model qwen3|qwen3_moe] [--sources N] [--sinks M]

Every rank plans from the serialised manifests of all, proves cover and hashes; then a sink exports
memory (allocated and filled before the first version only, so timed apart) and a source turns its
part of the plan into tables and connects to the sinks. Each rank works alone, one after the other,
on one core. Prints one JSON object; milliseconds are medians over the repeats.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from weightsync.demo.model import MODELS, model_config
from weightsync.ir import Plan, PlanOptions
from weightsync.planners import rules
from weightsync.runtime.program import source_program
from weightsync.runtime.receiver import Receiver
from weightsync.service.planning import make_plan
from weightsync.transport import Engine, Remote, open_fabric

Result = TypeVar("Result")
Manifests = list[tuple[str, bytes]]


def manifests(model: str, sources: int, sinks: int) -> tuple[Manifests, Manifests]:
    """Serialised manifests as the demo's ranks send them."""
    config, tp = model_config(model), sinks // 2
    trainer = rules.fsdp2(config, fsdp=sources)
    engine = rules.vllm(config, tp=tp)
    of_sources = [(f"source {r}", trainer.manifest(r).to_bytes()) for r in range(sources)]
    of_sinks = [
        (f"sink {replica}/{rank}", engine.manifest(rank).to_bytes())
        for replica in "ab"
        for rank in range(tp)
    ]
    return of_sources, of_sinks


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
    """What `call` returns, and the milliseconds that it takes."""
    started = time.perf_counter()
    result = call()
    return result, 1e3 * (time.perf_counter() - started)


def bind_once(of_sources: Manifests, of_sinks: Manifests) -> tuple[int, dict[str, float]]:
    """Form the fleet once in this process; rows of the plan, milliseconds of the slowest rank."""
    plan, plan_ms = timed(lambda: make_plan(of_sources, of_sinks, PlanOptions()).plan)
    allocate_ms, export_ms, connect_ms = [0.0], [0.0], [0.0]
    with contextlib.closing(open_fabric("local")) as engine:
        receivers, descriptors = [], []
        for sink in range(len(of_sinks)):
            live = np.zeros(int((plan.sink.buffers.rank == sink).sum()), np.int64)
            receiver = Receiver(engine, live=live, live_owner=None, mode="staged")
            bind = functools.partial(receiver.bind, plan, sink)
            first_ms = timed(bind)[1]
            # The memory is there now, as for every binding but the first.
            descriptor, ms = timed(bind)
            export_ms.append(ms)
            allocate_ms.append(first_ms - ms)
            descriptors.append(descriptor)
            receivers.append(receiver)
        for source in range(len(of_sources)):
            remotes, ms = timed(functools.partial(connect, engine, plan, source, descriptors))
            connect_ms.append(ms)
            for remote in remotes:
                remote.close()
        for receiver in receivers:
            receiver.close()
    found = {
        "plan": plan_ms,
        "sink_allocate_and_fill": max(allocate_ms),
        "sink_bind": max(export_ms),
        "source_bind": max(connect_ms),
        "plan_and_bind": plan_ms + max(*export_ms, *connect_ms),
    }
    return len(plan.rows), found


def connect(engine: Engine, plan: Plan, source: int, descriptors: list[bytes]) -> list[Remote]:
    """What a source does between its plan and "connected"."""
    sinks = sorted({program.sink for program in source_program(plan, source)})
    return [engine.connect(descriptors[sink]) for sink in sinks]


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="qwen3")
    parser.add_argument("--sources", type=int, default=2)
    parser.add_argument("--sinks", type=int, default=4, help="two replicas of half as many ranks")
    parser.add_argument("--repeat", type=int, default=15)
    options = parser.parse_args()
    of_sources, of_sinks = manifests(options.model, options.sources, options.sinks)
    bind_once(of_sources, of_sinks)  # imports and tables that are made once
    runs = [bind_once(of_sources, of_sinks) for _ in range(options.repeat)]
    report = {
        "schema": "weightsync.bench.binding/1",
        "host": f"{platform.machine()}, python {platform.python_version()}",
        "model": options.model,
        "sources": options.sources,
        "sinks": options.sinks,
        "rows": runs[0][0],
        "ms": {k: round(statistics.median(found[k] for _, found in runs), 2) for k in runs[0][1]},
    }
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
