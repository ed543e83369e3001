"""Runs programs in a guest with Soft-RoCE devices, for tests that need real verbs."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path
from typing import Final

import pytest

from support.tree import ROOT

__all__ = ["SCRIPT", "guest_kind", "run_in_guest"]

SCRIPT: Final = ROOT / "scripts/soft_roce"
PREPARE_S: Final = 900.0  # the stock kernel may have to be downloaded


@functools.cache
def _probe() -> tuple[str, str]:
    command = [str(SCRIPT), "--probe"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PREPARE_S)
    return done.stdout.strip() if done.returncode == 0 else "", done.stderr.strip()


def guest_kind() -> str:
    """`uml` (fast) or `qemu` (slow: do the least); skips the test, with why, where none can run.

    Only what is missing on this host is a reason: a guest that fails is a failure.
    """
    kind, reason = _probe()
    if not kind:
        pytest.skip(f"NO REAL VERBS: {reason.splitlines()[-1] if reason else 'no guest'}")
    return kind


def run_in_guest(
    *command: str | Path,
    options: tuple[str, ...] = (),
    num_nics: int = 2,
    timeout_s: float = 120.0,
    environ: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command in a guest to its end; status, output and errors are the command's.

    Args:
        command: What runs; everything that is on this host is there.
        options: More options of `scripts/soft_roce`.
        num_nics: Devices rxe0, rxe1, ...
        timeout_s: The guest is ended after this time: status 124.
        environ: None: this process's.
        cwd: None: this process's.
    """
    own = ["--nics", str(num_nics), "--timeout", str(timeout_s), *options]
    return subprocess.run(
        [str(SCRIPT), *own, "--", *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ if environ is None else environ,
        cwd=cwd,
        timeout=timeout_s + 60,
    )
