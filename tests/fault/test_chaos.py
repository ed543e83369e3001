"""kill -9 and SIGSTOP of every role at every stage, with real processes and an outside watcher."""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.chaos.run import ACTIONS, STAGES, Fault, Result, Run, Zygote, every_fault

pytestmark = pytest.mark.filterwarnings("default:run again")  # told of in the summary

IS_LONG = os.environ.get("WEIGHTSYNC_TEST_TIER") == "long"
ROUNDS = 5 if IS_LONG else 1
SIDE_BY_SIDE = 3
RESULTS = Path(__file__).parents[2] / "docs" / "results" / "faults.md"


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    started = Zygote()
    yield started
    started.close()


def _run_all(zygote: Zygote, work: list[tuple[Fault, int]], bug: str = "") -> list[Result]:
    """Run faults with their seeds; those in which the host stood still again, up to three times."""
    found: list[Result] = []
    for _ in range(3):
        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            results = list(
                pool.map(lambda w: Run(zygote, w[0], bug=bug, seed=w[1]).execute(), work)
            )
        is_over = [bool(bug or r.violations or not r.stalled) for r in results]
        found += [r for r, over in zip(results, is_over, strict=True) if over]
        for result in [r for r, over in zip(results, is_over, strict=True) if not over]:
            sys.__stdout__.write(f"\n{result.stalled}\n")
            why = result.stalled.partition("\n")[0]
            warnings.warn(f"run again: {result.fault.name}: {why}", stacklevel=1)
        work = [w for w, over in zip(work, is_over, strict=True) if not over]
        if not work:
            return found
    pytest.fail(f"the host stood still in every one of three runs of {work}")


@pytest.mark.timeout(1800)
def test_every_role_at_every_stage(zygote: Zygote) -> None:
    work = [(fault, seed) for seed in range(ROUNDS) for fault in every_fault()]
    results = _run_all(zygote, work)
    table = _table(results)
    sys.__stdout__.write("\n" + table + "\n")
    if IS_LONG:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(table)
    broken = [f"{r.fault.name}: {r.violations}" for r in results if r.violations]
    assert not broken, "\n".join(broken)
    hits = Counter(r.fault.name for r in results if r.was_hit)
    missed = [fault.name for fault in every_fault() if hits[fault.name] < ROUNDS]
    assert not missed, f"never reached: {missed}"
    decisions = Counter(r.decision for r in results)
    assert decisions["commit"] >= 0.3 * len(results), decisions
    assert decisions["abort"] >= 0.3 * len(results), decisions


@pytest.mark.timeout(300)
def test_sinks_that_pass_on_over_a_network_are_struck(zygote: Zygote) -> None:
    faults = [
        Fault("sink", "forwarding", action, mode, "tcp")
        for action in ACTIONS
        for mode in ("staged", "in_place")
    ]
    work = [(fault, seed) for seed in range(ROUNDS) for fault in faults]
    found = _run_all(zygote, work)
    broken = [f"{r.fault.name}: {r.violations}" for r in found if r.violations]
    assert not broken, "\n".join(broken)
    assert all(r.was_hit for r in found)
    # The rank owed nothing to the other replica, which goes on alone.
    assert {(r.decision, r.why) for r in found} == {("commit", "1 replica(s)")}


# double_count needs deliveries that repeat: tests/fault/test_sim_schedules.py finds that one.
FOUND_BY = {
    "no_fence": [Fault("source", "writing", "stop")],
    "dropped_tail": [Fault("source", "decided", "kill")],
    "commit_before_vote": [Fault("sink", "filling", "stop"), Fault("source", "writing", "stop")],
    "digest_skipped": [Fault("sink", "flip", "flip")],
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("bug", FOUND_BY)
def test_a_planted_bug_is_found_by_the_same_runs(zygote: Zygote, bug: str) -> None:
    for seed in range(10):
        results = _run_all(zygote, [(fault, seed) for fault in FOUND_BY[bug]], bug)
        if any(r.violations for r in results):
            return
    pytest.fail(f"{bug} was not found")


def _table(results: list[Result]) -> str:
    """Counts per role, stage and action, as Markdown."""
    lines = [
        "# Fault runs",
        "",
        "Each row: the place where a process was hit, how often, and what the version it met came",
        "to. Written by `make test-long` (tests/fault/test_chaos.py).",
        "",
        "| role | stage | action | runs | hit | commit | abort | violations | median s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    places = [
        (role, stage, action) for role in STAGES for stage in STAGES[role] for action in ACTIONS
    ]
    for role, stage, action in [*places, ("sink", "flip", "flip")]:
        found = [
            r
            for r in results
            if (r.fault.role, r.fault.stage, r.fault.action) == (role, stage, action)
        ]
        if not found:
            continue
        decisions = Counter(r.decision for r in found)
        seconds = sorted(r.seconds for r in found)[len(found) // 2]
        hit = sum(r.was_hit for r in found)
        bad = sum(bool(r.violations) for r in found)
        lines.append(
            f"| {role} | {stage} | {action} | {len(found)} | {hit} | {decisions['commit']} | "
            f"{decisions['abort']} | {bad} | {seconds:.1f} |"
        )
    total = Counter(r.decision for r in results)
    checks = sum(r.checks for r in results)
    lines += [
        "",
        f"{len(results)} runs: {total['commit']} committed, {total['abort']} aborted; the watcher "
        f"hashed serving replicas {checks} times.",
        "",
    ]
    return "\n".join(lines)
