"""Dry runs of the models of the field: how long planning takes, and how near predictions are.

Usage: python scripts/bench/plans.py [--json] [NAME ...]

Every plan is made by a process of its own on one core, as `weightsync plan` makes it: manifests,
plan, proof that each byte is written once, limits and prediction. Its CPU seconds count from the
start of the interpreter; they tell more than wall seconds where others use the machine. Predictions
are of a model, not measured; ratios are to the limit of the strategy that the plan follows, at the
rates of data sheets and at those that good software attains.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from weightsync.dryrun.choices import choose
from weightsync.dryrun.command import read_choices, uncollected
from weightsync.ir import Plan
from weightsync.planners.outline import Outline
from weightsync.planners.planner import plan_rank

CASES = {
    "kimi_k2": "model=kimi_k2 trainer=fsdp16_pp2_ep8 rollout=ep32_x4",
    "kimi_k2 direct": "model=kimi_k2 trainer=fsdp16_pp2_ep8 rollout=ep32_x4 rollout.node_dedup=off",
    "deepseek_v3": "model=deepseek_v3 trainer=fsdp16_pp2_ep8 rollout=ep32_x4",
    "glm_4_5": "model=glm_4_5 trainer=fsdp2 trainer.fsdp=8 trainer.ep=32 "
    "trainer.dense_replicate=32 rollout=ep32_x4 rollout.tp=4 rollout.dp=8",
    "qwen3_235b ep32": "model=qwen3_235b_a22b trainer=fsdp16_ep8 rollout=ep32 "
    "rollout.encoding=fp8_block",
    "qwen3_235b 4 x tp8": "model=qwen3_235b_a22b trainer=fsdp16_ep8 rollout=tp8_x4 rollout.ep=8 "
    "rollout.encoding=fp8_block",
    "llama_3_1_405b": "model=llama_3_1_405b trainer=megatron_tp8_pp16 rollout=tp16",
    "gpt_oss_120b": "model=gpt_oss_120b trainer=fsdp16_ep8 rollout=vllm rollout.dp=8 rollout.ep=8 "
    "rollout.replicas=4 rollout.encoding=mxfp4 rollout.mxfp4_padding=[64,64]",
    "qwen3_0_6b": "model=qwen3_0_6b trainer=fsdp64 rollout=tp8_x4",
}


def load_ratio(plan: Plan) -> float:
    """The largest load of a source over the mean of those that it shares tensors with."""
    shares, load = plan.shares, plan.bytes_per_source().astype(float)
    num = len(load)
    ends = (shares.holder_set, shares.rank)
    held = coo_array(
        (np.ones(len(shares.rank)), ends), shape=(int(shares.holder_set.max()) + 1, num)
    )
    _, of = connected_components(held.T @ held, directed=False)
    mean = np.bincount(of, weights=load) / np.bincount(of)
    return float((load / mean[of]).max())


def alone(plan: Plan) -> dict[str, float]:
    """CPU seconds of the busiest rank's program alone, compared with what the plan has of it."""
    began = time.process_time()
    outline = Outline.of(plan.source, plan.sink, plan.options, plan.shares)
    outlined = time.process_time()
    rank = int(plan.bytes_per_source().argmax())
    program = plan_rank(outline, rank)
    ended = time.process_time()
    own = plan.program(rank)
    first, last = int(plan.buckets.chunk_lo[own[0]]), int(plan.buckets.chunk_hi[own[-1]])
    of_rank = slice(int(plan.chunks.row_lo[first]), int(plan.chunks.row_hi[last - 1]))
    moved = dataclasses.replace(program.rows, chunk=program.rows.chunk + first)
    nests = program.nests.take(program.rows.nest)
    for mine, whole in ((moved, plan.rows.take(of_rank)), (nests, plan.nest_of(of_rank))):
        for name in set(type(whole).COLUMNS) - {"nest"}:  # numbered otherwise
            if not np.array_equal(getattr(mine, name), getattr(whole, name)):
                raise SystemExit(f"plans: {name} of rank {rank} alone differs from the plan's")
    return {"outline_s": outlined - began, "rank_s": ended - outlined}


def measure(overrides: list[str]) -> dict[str, Any]:
    """Plan in this process."""
    with uncollected():
        report = read_choices(choose(overrides)).run()
    found = report.to_json()
    spent = {
        "cpu_s": time.process_time(),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    keys = ("num_regions", "num_writes", "strategy", "physical_limit_s", "limiting", "predicted_s")
    return {
        "command": "weightsync plan " + " ".join(overrides),
        **{key: found[key] for key in keys},
        "limits": found["limits"],
        "attainable_limit_s": report.attainable.physical_limit_s,
        "wire_s": report.prediction.wire_s,
        "fixed_s": report.fixed_s,
        "load_ratio": load_ratio(report.plan),
        **spent,
        **alone(report.plan),
        "digest": report.plan.digest,
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
        print(json.dumps(measure([*CASES[arguments.one].split(), "cluster=h100_cx7"])))
        return
    unknown = set(arguments.names) - set(CASES)
    if unknown:
        parser.error(f"no such plan: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    found = {}
    for name in arguments.names or CASES:
        print(f"plans: {name}", file=sys.stderr)
        done = subprocess.run(
            [sys.executable, __file__, "--one", name],
            check=True,
            stdout=subprocess.PIPE,
            env={"NUMPY_MADVISE_HUGEPAGE": "0", **os.environ},  # as `weightsync plan`
        )
        found[name] = json.loads(done.stdout)
    if arguments.json:
        host = {"cpus": os.cpu_count(), "kernel": platform.release()}
        print(json.dumps({"schema": "weightsync.bench.plans/1", "host": host, "plans": found}))
        return
    table = Table(title="Dry runs; predictions are of a model, not measured")
    columns = ("plan", "strategy", "rows", "CPU s", "GiB", "limit s", "attainable s")
    for column in (*columns, "predicted s", "/ limit", "/ attainable", "load / mean", "rank ms"):
        table.add_column(column, justify="left" if column in columns[:2] else "right")
    for name, row in found.items():
        predicted = row["predicted_s"]
        table.add_row(
            name,
            row["strategy"],
            f"{row['num_regions']:,}",
            f"{row['cpu_s']:.1f}",
            f"{row['peak_bytes'] / 2**30:.2f}",
            f"{row['physical_limit_s']:.4f}",
            f"{row['attainable_limit_s']:.4f}",
            f"{predicted:.4f}",
            f"{predicted / row['physical_limit_s']:.3f}",
            f"{predicted / row['attainable_limit_s']:.3f}",
            f"{row['load_ratio']:.4f}",
            f"{row['rank_s'] * 1e3:.1f}",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
