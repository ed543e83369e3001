"""The contract over the ofi fabrics while libfabric delivers writes out of order, as SRD does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.fabrics import ofi_problem

shims = pytest.importorskip("support.shims", reason="the out-of-order shim is not built here")

pytestmark = pytest.mark.skipif(ofi_problem() is not None, reason=str(ofi_problem()))


@pytest.mark.timeout(120)  # the first run compiles the shim
@pytest.mark.parametrize("fabric", ["ofi:tcp", "ofi:shm"])
def test_the_contract_holds_out_of_order(fabric: str, tmp_path: Path) -> None:
    stats = tmp_path / "stats"
    suite = Path(__file__).with_name("test_fabric.py")
    options = ["-q", "-p", "no:cacheprovider", "--timeout", "30", "-k", fabric]
    done = subprocess.run(  # a process of its own: the shim must be loaded first
        [sys.executable, "-m", "pytest", *options, str(suite)],
        env=shims.shuffled(os.environ, stats=stats),
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    reordered = sum(int(line.split()[2]) for line in stats.read_text().splitlines())
    assert reordered > 100
