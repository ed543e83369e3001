"""Fresh interpreters that see one tree only, whatever is installed for development."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

__all__ = ["run_fresh", "run_with_tree"]


def run_fresh(code: str) -> str:
    """Run `code` in a new interpreter from `/`; returns what it printed.

    The environment keeps nothing that changes where imports are found.
    """
    return _run([sys.executable, "-I", "-c", code]).stdout


def run_with_tree(tree: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` with `tree` first on the path and without the editable install.

    -S skips the .pth files, so the finder that maps weightsync to the checkout is not there; third
    parties' packages are still found.
    """
    path = [str(tree), sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    return _run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"],
        check=False,
    )


def _run(command: list[str], *, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        cwd="/",
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if check and done.returncode != 0:
        raise AssertionError(f"{command} failed:\n{done.stderr}")
    return done
