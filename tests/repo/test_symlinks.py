"""planners, integrations and configs are folders at the top, mounted by relative links."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.tree import MOUNTED, ROOT


def problems(root: Path) -> list[str]:
    found = []
    for name in MOUNTED:
        link = root / "weightsync" / name
        if not link.is_symlink():
            found.append(f"weightsync/{name} is not a symbolic link")
        elif link.readlink() != Path("..", name):
            found.append(f"weightsync/{name} points to {link.readlink()}, not ../{name}")
        elif not (root / name / "__init__.py").is_file() or (root / name).is_symlink():
            found.append(f"{name}/ is not a real folder with an __init__.py")
    return found


def good_tree(root: Path) -> None:
    (root / "weightsync").mkdir()
    for name in MOUNTED:
        (root / name).mkdir()
        (root / name / "__init__.py").touch()
        (root / "weightsync" / name).symlink_to(Path("..", name))


def test_links_are_relative_and_complete() -> None:
    assert problems(ROOT) == []


def test_git_tracks_the_links_as_links() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-s", "--", *(f"weightsync/{name}" for name in MOUNTED)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    modes = {line.split()[3]: line.split()[0] for line in listing.splitlines()}
    assert modes == {f"weightsync/{name}": "120000" for name in MOUNTED}


@pytest.mark.parametrize("name", MOUNTED)
def test_second_name_is_refused(name: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {name}"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"ImportError: import weightsync.{name};" in done.stderr


def test_good_tree_passes(tmp_path: Path) -> None:
    good_tree(tmp_path)
    assert problems(tmp_path) == []


def test_checker_sees_an_absolute_link(tmp_path: Path) -> None:
    good_tree(tmp_path)
    (tmp_path / "weightsync/planners").unlink()
    (tmp_path / "weightsync/planners").symlink_to(tmp_path / "planners")
    assert len(problems(tmp_path)) == 1


def test_checker_sees_a_copied_folder(tmp_path: Path) -> None:
    good_tree(tmp_path)
    (tmp_path / "weightsync/configs").unlink()
    shutil.copytree(tmp_path / "configs", tmp_path / "weightsync/configs")
    assert problems(tmp_path) == ["weightsync/configs is not a symbolic link"]


def test_checker_sees_a_missing_folder(tmp_path: Path) -> None:
    good_tree(tmp_path)
    shutil.rmtree(tmp_path / "integrations")
    assert problems(tmp_path) == ["integrations/ is not a real folder with an __init__.py"]
