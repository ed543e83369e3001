"""Seeded schedules over the simulated wire: what sinks serve is always exactly one version."""

from __future__ import annotations

import gc
import os
from collections import Counter
from pathlib import Path

import pytest

from support.chaos import bugs
from support.simfleet import FAULTS, SimRun
from weightsync.transport.native import live_object_count, live_objects

IS_LONG = os.environ.get("WEIGHTSYNC_TEST_TIER") == "long"
SEEDS = range(1000) if IS_LONG else range(40)
RESULTS = Path(__file__).parents[2] / "docs" / "results" / "simulated-faults.md"


@pytest.mark.timeout(1800)
def test_no_schedule_mixes_versions() -> None:
    faults: Counter[str] = Counter()
    decisions: Counter[tuple[str, str]] = Counter()
    happened: Counter[str] = Counter()
    before = live_object_count()
    for seed in SEEDS:
        result = SimRun(seed).execute()
        gc.collect()
        assert live_object_count() <= before, f"seed {seed} left {live_objects()}"
        assert not result.violations, f"seed {seed}: {result.faults}: {result.violations}"
        faults.update(result.faults)
        decisions.update(zip(result.faults, result.decisions, strict=True))
        happened.update(result.happened)
    assert set(faults) == set(FAULTS)
    # A fault that never took place would prove nothing.
    for kind in ("reordered", "duplicated", "dropped", "late_landed", "held", "invisible"):
        assert happened[kind] > 0, kind
    commits = sum(n for (_, decision), n in decisions.items() if decision == "commit")
    aborts = sum(n for (_, decision), n in decisions.items() if decision == "abort")
    assert min(commits, aborts) >= 0.3 * (commits + aborts)
    if IS_LONG:
        RESULTS.write_text(_table(faults, decisions, happened))


@pytest.mark.timeout(1800)
def test_no_schedule_mixes_versions_where_sinks_pass_on() -> None:
    faults: Counter[str] = Counter()
    happened: Counter[str] = Counter()
    before = live_object_count()
    for seed in range(300) if IS_LONG else range(25):
        run = SimRun(seed, hops=True)
        assert len(run.forwarders) == len(run.sinks)
        result = run.execute()
        del run
        gc.collect()
        assert live_object_count() <= before, f"seed {seed} left {live_objects()}"
        assert not result.violations, f"seed {seed}: {result.faults}: {result.violations}"
        faults.update(result.faults)
        happened.update(result.happened)
    assert set(faults) == set(FAULTS)
    for kind in ("reordered", "duplicated", "dropped", "late_landed", "held", "forwarder_frozen"):
        assert happened[kind] > 0, kind


@pytest.mark.timeout(120)
@pytest.mark.parametrize("bug", ["no_fence", "digest_skipped"])
def test_a_planted_bug_is_found_where_sinks_pass_on(
    bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bugs.plant(bug, monkeypatch.setattr)
    for seed in range(40):
        if SimRun(seed, bug, hops=True).execute().violations:
            return
    pytest.fail(f"{bug} was not found by 40 schedules")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("bug", bugs.BUGS)
def test_a_planted_bug_is_found_by_the_same_schedules(
    bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bugs.plant(bug, monkeypatch.setattr)
    for seed in range(40):
        if SimRun(seed, bug).execute().violations:
            return
    pytest.fail(f"{bug} was not found by 40 schedules")


def _table(
    faults: Counter[str], decisions: Counter[tuple[str, str]], happened: Counter[str]
) -> str:
    lines = [
        "# Simulated faults",
        "",
        f"{len(SEEDS)} seeds, each of a few versions, on the `sim` fabric. Written by",
        "`make test-long` (tests/fault/test_sim_schedules.py). No violation in any run.",
        "",
        "| fault | versions | commit | abort |",
        "|---|---|---|---|",
    ]
    for fault in FAULTS:
        commit, abort = decisions[fault, "commit"], decisions[fault, "abort"]
        lines.append(f"| {fault} | {faults[fault]} | {commit} | {abort} |")
    lines += [
        "",
        "What the wire did: " + ", ".join(f"{k} {v}" for k, v in happened.items()) + ".",
        "",
    ]
    return "\n".join(lines)
