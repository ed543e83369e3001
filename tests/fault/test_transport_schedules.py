"""Seeded faults on every real transport: each version is one version or none, and nobody hangs."""

from __future__ import annotations

import multiprocessing
import sys
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from support import IS_LONG, scaled
from support.storms import FAULTS, FAULTS_EACH, Run, fabrics_here

# Of each fabric: enough to meet each fault once, or many times.
SEEDS = {name: scaled(-(-len(faults) // FAULTS_EACH), 50) for name, faults in FAULTS.items()}
RESULTS = Path(__file__).parents[2] / "docs/results/transport-faults.md"


@pytest.mark.timeout(1800)
def test_versions_are_whole_on_every_transport() -> None:
    runs = []
    for fabric in fabrics_here():
        execute = _in_a_process if fabric == "ofi:shm" else _execute
        runs += execute(fabric)
    table = _table(runs)
    sys.__stdout__.write("\n" + table + "\n")
    if IS_LONG:
        RESULTS.write_text(table)
    broken = [f"{run.fabric} seed {run.seed}: {run.violations}" for run in runs if run.violations]
    assert not broken, "\n".join(broken)
    met = {(run.fabric, found.fault) for run in runs for found in run.outcomes}
    assert met >= {(fabric, fault) for fabric in fabrics_here() for fault in FAULTS[fabric]}


def _execute(fabric: str) -> list[Run]:
    return [Run(fabric, seed).execute() for seed in range(SEEDS[fabric])]


def _in_a_process(fabric: str) -> list[Run]:
    """Execute where threads that are never given back disturb nobody (docs/fabrics/ofi.md)."""
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_tell, args=(fabric, theirs))
    process.start()
    theirs.close()
    try:
        assert ours.poll(1200), f"{fabric}: no result in 20 minutes"
        told = ours.recv()
    finally:
        process.kill()
        process.join()
        for path in Path("/dev/shm").glob(f"*-{process.pid}-*"):
            path.unlink(missing_ok=True)
    return [Run(fabric, *one) for one in told]


def _tell(fabric: str, channel: Connection) -> None:
    channel.send([(r.seed, r.outcomes, r.violations, r.num_locked) for r in _execute(fabric)])


def _table(runs: list[Run]) -> str:
    lines = [
        "# Faults on real transports",
        "",
        "Runs of five versions each. Written by `make test-long`",
        "(tests/fault/test_transport_schedules.py).",
        "",
        "| fabric | fault | versions | commit | abort | errors of the writer |",
        "|---|---|---|---|---|---|",
    ]
    for fabric in FAULTS:
        for fault in ("none", *FAULTS[fabric]):
            found = [o for r in runs if r.fabric == fabric for o in r.outcomes if o.fault == fault]
            if not found:
                continue
            errors = Counter(outcome.error for outcome in found if outcome.error)
            commits = sum(outcome.commit for outcome in found)
            text = ", ".join(f"{name} {count}" for name, count in errors.most_common()) or "none"
            counts = f"{len(found)} | {commits} | {len(found) - commits}"
            lines.append(f"| {fabric} | {fault} | {counts} | {text} |")
    bad = sum(bool(run.violations) for run in runs)
    locked = sum(run.num_locked for run in runs)
    lines += ["", f"{len(runs)} runs, {bad} with a violation.", ""]
    lines += [f"A lost writer took a lock of its provider with it {locked} times.", ""]
    return "\n".join(lines)
