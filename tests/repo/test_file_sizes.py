"""Files stay small enough to read: about 300 lines, never more than 600."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from support.tree import ROOT, is_generated

LIMIT: Final = 600
FOLDERS: Final = (
    "weightsync", "planners", "integrations", "configs", "native", "scripts", "tests", "formal",
)  # fmt: skip
SUFFIXES: Final = {"", ".py", ".pyi", ".cpp", ".hpp", ".h", ".sh", ".pml", ".proto"}
# Path -> why it may be longer. An entry that is no longer needed fails the test too.
ALLOWED: Final[dict[str, str]] = {}


def long_files(root: Path, limit: int = LIMIT) -> dict[str, int]:
    found = {}
    for top in FOLDERS:
        for folder, subfolders, names in os.walk(root / top):
            subfolders[:] = [name for name in subfolders if name != "__pycache__"]
            for path in (Path(folder, name) for name in names):
                if path.suffix not in SUFFIXES or path.is_symlink() or is_generated(path):
                    continue
                num_lines = path.read_bytes().count(b"\n")
                if num_lines > limit:
                    found[path.relative_to(root).as_posix()] = num_lines
    return found


def test_no_file_is_too_long_without_a_reason() -> None:
    found = long_files(ROOT)
    assert {path: n for path, n in found.items() if path not in ALLOWED} == {}
    assert [path for path in ALLOWED if path not in found] == []
    assert all(reason.strip() for reason in ALLOWED.values())


def test_counter_sees_a_long_file(tmp_path: Path) -> None:
    (tmp_path / "planners").mkdir()
    (tmp_path / "planners/long.py").write_text("x = 1\n" * (LIMIT + 1))
    (tmp_path / "planners/full.py").write_text("x = 1\n" * LIMIT)
    (tmp_path / "planners/made_pb2.py").write_text("x = 1\n" * (LIMIT + 1))
    assert long_files(tmp_path) == {"planners/long.py": LIMIT + 1}
