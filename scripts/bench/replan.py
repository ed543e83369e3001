"""Planning again after a replica left, came back, or a source was replaced, beside from scratch.

Usage: python scripts/bench/replan.py [--json] [--rounds N] [--merged] [NAME ...]

Every plan begins with the serialised manifests of all ranks and ends with its digest, as a member
of a job makes it, and is compared with that from scratch. Each fleet has a process of its own on
one core. CPU seconds, the least of the rounds: they tell more than wall seconds where others use
the machine; first touches of memory, which the kernel counts as the process's time, differ most.
From scratch means without a memory; with --merged every rank's manifest is read and every replica
planned by itself besides, as releases before this one did.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import time
from typing import Any

from plans import CASES
from rich.console import Console
from rich.table import Table

from weightsync.dryrun.choices import choose
from weightsync.dryrun.command import read_choices
from weightsync.ir import Manifest, Plan, PlanOptions
from weightsync.planners.planner import plan_transfer
from weightsync.planners.replan import PlanMemory
from weightsync.service.planning import plan_key

Members = list[tuple[str, bytes]]

NAMES = ("kimi_k2", "kimi_k2 direct", "deepseek_v3", "qwen3_235b 4 x tp8", "qwen3_0_6b")


class Fleet:
    """One fleet of a few equal replicas, as its manifests."""

    def __init__(self, overrides: list[str]) -> None:
        run = read_choices(choose([*overrides, "cluster=h100_cx7"]))
        self.count = run.replicas
        self.options = run.options if run.options is not None else PlanOptions()
        self.sources = [
            (f"source {rank}", run.trainer.manifest(rank).to_bytes())
            for rank in range(run.trainer.world_size)
        ]
        self._replica = [
            run.rollout.manifest(rank).to_bytes() for rank in range(run.rollout.world_size)
        ]

    def sinks(self, without: int | None = None) -> Members:
        """Members of all replicas but one; each has bytes of its own, as messages have."""
        return [
            (f"sink {number}/{rank}", bytes(bytearray(data)))
            for number in range(self.count)
            if number != without
            for rank, data in enumerate(self._replica)
        ]

    def plan(self, sinks: Members, memory: PlanMemory | None) -> Plan:
        """From bytes to a digest."""
        reader = PlanMemory() if memory is None else memory
        source, sink = reader.merge("source", self.sources), reader.merge("sink", sinks)
        del reader
        made = plan_transfer(source, sink, self.options, memory=memory)
        assert made.digest
        return made

    def plan_merged(self, sinks: Members) -> str:
        """The digest of a plan that knows of no replicas."""
        source, sink = (
            Manifest.merge(side, [Manifest.from_bytes(m, ranks=(name,)) for name, m in members])
            for side, members in (("source", self.sources), ("sink", sinks))
        )
        return plan_transfer(source, sink, self.options).digest


def measure(overrides: list[str], rounds: int, *, merged: bool) -> dict[str, Any]:
    """Let things happen to a fleet in this process, once or a few times."""
    gc.disable()
    fleet = Fleet(overrides)
    all_sinks, fewer = fleet.sinks(), fleet.sinks(without=1)
    seconds: dict[str, dict[str, list[float]]] = {}
    kept, rows = 0, {}

    def timed(event: str, how: str, sinks: Members, memory: PlanMemory | None = None) -> str:
        began = time.process_time()
        if how == "merged":
            digest = fleet.plan_merged(sinks)
        else:
            plan = fleet.plan(sinks, memory)
            digest, rows[event] = plan.digest, len(plan.rows)
        spent = time.process_time() - began
        seconds.setdefault(event, {}).setdefault(how, []).append(spent)
        return digest

    for _ in range(rounds):
        memory = PlanMemory()
        events = (("first plan", all_sinks), ("leaves", fewer), ("comes back", all_sinks))
        digests = [timed(event, "again", sinks, memory) for event, sinks in events]
        kept = memory.nbytes
        del memory
        expected = [timed(event, "scratch", sinks) for event, sinks in events]
        if merged:
            expected += [timed(event, "merged", sinks) for event, sinks in events[1:]]
            digests += digests[1:]
        if digests != expected:
            raise SystemExit("replan: a plan differs from the one from scratch")
        began = time.process_time()
        same = plan_key(fleet.sources, all_sinks, fleet.options, b"")
        spent = time.process_time() - began
        assert same == plan_key(list(fleet.sources), fleet.sinks(), fleet.options, b"")
        of_source = seconds.setdefault("source replaced", {})
        of_source.setdefault("again", []).append(spent)
        of_source["scratch"] = seconds["comes back"]["scratch"]
    return {
        "events": {e: {how: min(s) for how, s in by.items()} for e, by in seconds.items()},
        "rows": rows,
        "kept_bytes": kept,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--merged", action="store_true", help="also plan as if none were equal")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
        overrides = CASES[arguments.one].split()
        print(json.dumps(measure(overrides, arguments.rounds, merged=arguments.merged)))
        return
    unknown = set(arguments.names) - set(CASES)
    if unknown:
        parser.error(f"no such plan: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    found = {}
    for name in arguments.names or NAMES:
        print(f"replan: {name}", file=sys.stderr)
        command = [sys.executable, __file__, "--one", name, "--rounds", str(arguments.rounds)]
        command += ["--merged"] * arguments.merged
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        found[name] = json.loads(done.stdout)
    if arguments.json:
        host = {"cpus": os.cpu_count(), "kernel": platform.release()}
        print(json.dumps({"schema": "weightsync.bench.replan/1", "host": host, "plans": found}))
        return
    table = Table(title="Planning again: CPU seconds from manifests to digest")
    for column in ("plan", "event", "rows", "merged", "scratch", "again", "scratch / again", "MiB"):
        table.add_column(column, justify="left" if column in ("plan", "event") else "right")
    for name, result in found.items():
        for event, spent in result["events"].items():
            table.add_row(
                name,
                event,
                f"{result['rows'][event]:,}" if event in result["rows"] else "",
                f"{spent['merged']:.2f}" if "merged" in spent else "",
                f"{spent['scratch']:.2f}",
                f"{spent['again']:.2f}",
                f"{spent['scratch'] / spent['again']:.1f}",
                f"{result['kept_bytes'] / 2**20:.0f}" if event == "first plan" else "",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
