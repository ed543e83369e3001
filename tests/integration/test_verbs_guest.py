"""The contract of every fabric over `verbs`, on real libibverbs: all of it in one guest, if long.

The guest has four Soft-RoCE NICs. Here, on the host, the same tests are only counted: what runs
over `tcp`, which works everywhere, must have run over `verbs` there, with one rail on either side
and with two against three. So nothing can be left out silently.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Final

import pytest

from support import IS_LONG
from support.soft_roce import guest_kind, run_in_guest
from support.tree import ROOT

SUITES: Final = (
    "test_fabric.py",
    "test_counters.py",
    "test_pages_and_scatter.py",
    "test_groups.py",
    "test_progress.py",
    "test_known_defects.py",
    "test_hops.py",
)
OWN: Final = "tests/contract/test_verbs.py"
PROCESSES: Final = "tests/contract/test_processes.py"
RAILS: Final = ("verbs", "verbs-2-to-3")
# Of the slow guest, which emulates a processor, and of the default tier: whether it works at all.
FEW: Final = ("test_a_write_of_any_length_lands_exactly", "test_a_killed_peer")
# Of the slow guest in the long tier, besides.
HOPS: Final = ("sources_send_it_once[both-staged-verbs]", "lands_nowhere[staged-verbs]")
LIMIT_S: Final = 600.0
SLOW_LIMIT_S: Final = 400.0

# A parameter of a test's id that is just this word: not "tcp-3-rails", not "ofi:tcp".
_TCP: Final = re.compile(r"(?<=[\[-])tcp(?=[\]-](?!.*rails))")


def collected(*arguments: str) -> list[str]:
    """Ids of tests that pytest finds on this host."""
    pytest_command = str(Path(sys.executable).with_name("pytest"))
    command = [pytest_command, "--collect-only", "-q", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


def wanted() -> set[str]:
    """Ids of tests that the guest has to pass."""
    over_tcp = [
        name
        for name in collected(*(f"tests/contract/{suite}" for suite in SUITES))
        if _TCP.search(name)
    ]
    assert {name.partition("::")[0] for name in over_tcp} == {
        f"tests/contract/{suite}" for suite in SUITES
    }
    both = {_TCP.sub(rails, name) for name in over_tcp for rails in RAILS}
    processes = {_TCP.sub(RAILS[0], name) for name in collected(PROCESSES) if _TCP.search(name)}
    return both | processes | set(collected(OWN))


def run_there(folder: Path, choice: str, limit_s: float) -> dict[str, Any]:
    """The guest's report."""
    report = folder / "report.json"
    done = run_in_guest(
        sys.executable, "-P", ROOT / "tests/support/guest_suite.py", report,
        *("-q", "-p", "no:cacheprovider", "-k", choice),
        *(f"tests/contract/{suite}" for suite in SUITES), PROCESSES, OWN,
        options=("--rw", str(folder)), num_nics=4, timeout_s=limit_s, cwd=ROOT,
    )  # fmt: skip
    said = f"{done.stdout[-20000:]}\n{done.stderr[-4000:]}"
    assert done.returncode == 0, said
    assert report.exists(), said
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def say(capsys: pytest.CaptureFixture[str], found: dict[str, Any]) -> None:
    counts = Counter(found["outcomes"].values())
    text = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    with capsys.disabled():
        sys.stdout.write(f"\nin the guest: {text} in {sum(found['durations'].values()):.0f} s\n")


@pytest.mark.timeout(LIMIT_S + 60)
def test_the_contract_over_verbs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not IS_LONG:
        pytest.skip("minutes: make test-long runs all of it, the default tier a part")
    if guest_kind() != "uml":
        pytest.skip("the qemu guest is slow; scripts/soft_roce --build makes the fast one")
    found = run_there(tmp_path, "verbs", LIMIT_S)
    say(capsys, found)
    passed = {name for name, outcome in found["outcomes"].items() if outcome == "passed"}
    assert sorted(wanted() - passed) == [], found["reasons"]
    assert found["imported"] == []


@pytest.mark.timeout(SLOW_LIMIT_S + 60)
def test_writes_land_and_lost_peers_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if IS_LONG and guest_kind() == "uml":
        pytest.skip("part of all of it, above")
    found = run_there(tmp_path, f"verbs and ({' or '.join(FEW)})", SLOW_LIMIT_S)
    say(capsys, found)
    expected = {name for name in wanted() if any(word in name for word in FEW)}
    assert sorted(expected - found["outcomes"].keys()) == []
    assert set(found["outcomes"].values()) == {"passed"}


@pytest.mark.timeout(SLOW_LIMIT_S + 60)
def test_sinks_pass_on_in_the_slow_guest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not IS_LONG:
        pytest.skip("a minute and a half: make test-long")
    if guest_kind() == "uml":
        pytest.skip("part of all of it, above")
    choice = "test_hops and staged-verbs and not 2-to-3 and (both or frozen)"
    found = run_there(tmp_path, choice, SLOW_LIMIT_S)
    say(capsys, found)
    assert len(found["outcomes"]) == len(HOPS)
    for ending in HOPS:
        assert [o for name, o in found["outcomes"].items() if name.endswith(ending)] == ["passed"]
    assert found["imported"] == []
