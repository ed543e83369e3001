"""The model of the protocol holds, finds its planted bugs, and says what docs/protocol.md says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import Final

import pytest

from support import IS_LONG
from support.tree import ROOT

FORMAL: Final = ROOT / "formal"
PAGE: Final = (ROOT / "docs/protocol.md").read_text(encoding="utf-8")
CHECK: Final = (FORMAL / "check").read_text(encoding="utf-8")
MODEL: Final = "\n".join(p.read_text(encoding="utf-8") for p in sorted(FORMAL.glob("*.pml")))
# `NAME|I7|dfs|...` or `NAME (remark)|I7|...`: one planted bug and the claim that must find it.
BUG_ROW: Final = re.compile(r"^([A-Z]+(?:_[A-Z]+)+)(?: \(.*\))?\|(I\d+)\|", re.MULTILINE)


@pytest.mark.timeout(3600 if IS_LONG else 900)
def test_the_model_holds_and_every_planted_bug_is_found() -> None:
    if shutil.which("spin") is None:
        pytest.skip("THE PROTOCOL WAS NOT VERIFIED: no spin here; apt-get install spin")
    jobs = min(2, len(os.sched_getaffinity(0)))
    command = [str(FORMAL / "check"), "--jobs", str(jobs), *(["--long"] if IS_LONG else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_page_and_model_have_the_same_invariants() -> None:
    declared = set(re.findall(r"^bit (I\d+_\w+) = 1;", MODEL, re.MULTILINE))
    claimed = set(re.findall(r"CLAIM\((I\d+_\w+),", MODEL))
    assert declared == claimed
    assert declared == set(re.findall(r"^\| (I\d+_\w+) \|", PAGE, re.MULTILINE))
    assert sorted(int(name[1:].split("_")[0]) for name in declared) == list(range(1, 16))


def test_page_check_and_model_have_the_same_planted_bugs() -> None:
    checked = set(BUG_ROW.findall(CHECK))
    assert checked == set(
        re.findall(r"^\| ([A-Z]+(?:_[A-Z]+)+) \|.*\| (I\d+) \|$", PAGE, re.MULTILINE)
    )
    for name, _ in checked:
        assert re.search(rf"^#(?:el)?if.*\b{name}\b", MODEL, re.MULTILINE), name


def test_page_lists_the_fail_points_of_the_code() -> None:
    listed = set(re.findall(r"^\| `((?:source|sink|coordinator)\.\w+)` \|", PAGE, re.MULTILINE))
    code = "\n".join(p.read_text(encoding="utf-8") for p in ROOT.glob("weightsync/*/*.py"))
    hit = set(re.findall(r'failpoints\.hit\("(\w+\.\w+)"\)', code))
    assert hit
    assert hit <= listed
    # The coordinator's other places are made from the kind of message that it is about to send.
    assert all(name.startswith("coordinator.") for name in listed - hit)
