"""What users install: the wheel holds the package, all of it and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

from support.interpreter import run_with_tree
from support.tree import PACKAGE, ROOT, module_name, package_files

EXTENSION = "weightsync/_native.*.so"
# Compiles what changed since `make setup`; a first build takes a minute or two.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"]
    subprocess.run([*command, "-w", str(folder), str(ROOT)], check=True, stdin=subprocess.DEVNULL)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def difference(packed: set[str], tree: set[str]) -> dict[str, set[str]]:
    """Names that only one side has; generated metadata and the extension aside."""
    ours = {
        name
        for name in packed
        if not fnmatch(name, "*.dist-info/*") and not fnmatch(name, EXTENSION)
    }
    return {"missing": tree - ours, "extra": ours - tree}


def tree_files() -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for path in package_files(suffix="")
        if path.suffix not in (".so", ".pyc")
    }


def test_wheel_holds_the_tree(wheel: Path) -> None:
    packed = contents(wheel)
    assert difference(packed, tree_files()) == {"missing": set(), "extra": set()}
    assert "weightsync/py.typed" in packed
    assert len([name for name in packed if name.endswith(".so")]) == 1
    assert any(name.endswith("licenses/LICENSE") for name in packed)


def test_difference_is_seen() -> None:
    packed = {
        "weightsync/a.py",
        "tests/b.py",
        "weightsync/_native.cpython-311.so",
        "w.dist-info/METADATA",
    }
    assert difference(packed, {"weightsync/a.py", "weightsync/planners/c.py"}) == {
        "missing": {"weightsync/planners/c.py"},
        "extra": {"tests/b.py"},
    }


def test_wheel_imports_from_anywhere(site: Path) -> None:
    code = "import weightsync.planners as p, weightsync._native as n; print(p.__file__, n.__file__)"
    done = run_with_tree(site, code)
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(f"{site}/weightsync/") for path in done.stdout.split())


def test_wheel_has_every_module(site: Path) -> None:
    names = [
        module_name(path)
        for path in package_files()
        if path.relative_to(PACKAGE).parts[0] in ("planners", "ir")
    ]
    done = run_with_tree(site, f"import {', '.join(names)}; print(weightsync.__file__)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{site}/weightsync/__init__.py"
