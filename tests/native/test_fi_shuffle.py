"""The shim that makes libfabric deliver out of order, over a fake libfabric: runs its C++ test."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from support.shims import SHIMS, compile_cpp, shuffled

pytestmark = pytest.mark.timeout(300)  # the first run compiles


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shim")
    fake = folder / "libfake_fabric.so"
    compile_cpp(SHIMS / "fake_fabric.cpp", fake, "-shared")
    linked = (f'-DFAKE_FABRIC="{fake}"', f"-L{folder}", "-lfake_fabric", f"-Wl,-rpath,{folder}")
    compile_cpp(SHIMS / "fi_shuffle_test.cpp", folder / "test", *linked, "-ldl")
    return folder / "test"


def run(program: Path, way: str, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [str(program), way]
    return subprocess.run(
        command, env=environ, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("way", ["linked", "looked-up"])
def test_writes_are_reordered_and_nothing_else_changes(
    program: Path, way: str, seed: int, tmp_path: Path
) -> None:
    stats = tmp_path / "stats"
    done = run(program, way, shuffled(os.environ, seed=seed, stats=stats))
    assert (done.returncode, done.stdout) == (0, "fi_shuffle: 8 tests passed\n"), done.stderr
    _, held, reordered = map(int, stats.read_text().split())
    assert held >= 500
    assert 100 < reordered < held


def test_the_test_fails_without_the_shim(program: Path) -> None:
    assert run(program, "linked", dict(os.environ)).returncode == 1


def test_tables_are_those_of_libfabric(tmp_path: Path) -> None:
    probe = "#if !__has_include(<rdma/fi_rma.h>)\n#error\n#endif\n"
    command = ["c++", "-x", "c++", "-fsyntax-only", "-"]
    if subprocess.run(command, input=probe, text=True, capture_output=True, check=False).returncode:
        pytest.skip("no headers of libfabric to compare with; apt-get install libfabric-dev")
    compile_cpp(SHIMS / "fi_abi_check.cpp", tmp_path / "check.o", "-c")
