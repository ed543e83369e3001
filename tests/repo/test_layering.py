"""Who may import whom, and what a cheap import must not load."""

from __future__ import annotations

import ast
import shutil
import sys
from pathlib import Path
from typing import Final

import pytest

from support.interpreter import run_fresh, run_with_tree
from support.tree import MOUNTED, PACKAGE, ROOT, is_generated, module_name, package_files

LINT: Final = """
from importlinter.cli import lint_imports
import sys
sys.exit(lint_imports(config_filename={config!r}, no_cache=True, no_logo=True))
"""
# The only parts that may touch the extension.
NATIVE_USERS: Final = ("weightsync.transport.", "weightsync.encodings.")
# What pure parts may use beside the standard library and this package.
PURE: Final = {"weightsync.ir": {"numpy", "scipy"}, "weightsync.planners": {"numpy", "scipy"}}
HEAVY: Final = ("torch", "ray", "transformers", "weightsync._native")


def imported(source: str) -> set[str]:
    """Full names of everything that `source` imports, at any depth of the code."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{name.name}" for name in node.names}
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            names.add(str(node.args[0].value))
    return names


def uses_native(source: str) -> bool:
    return any(f"{name}.".startswith("weightsync._native.") for name in imported(source))


def foreign(source: str, allowed: set[str]) -> set[str]:
    """Third parties that `source` imports and may not."""
    tops = {name.partition(".")[0] for name in imported(source)}
    return tops - set(sys.stdlib_module_names) - {"weightsync"} - allowed


def sources() -> dict[str, str]:
    return {module_name(path): path.read_text(encoding="ascii") for path in package_files()}


def lint(tree: Path) -> tuple[int, str]:
    config = str(tree / "pyproject.toml")
    done = run_with_tree(tree, LINT.format(config=config))
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package's Python files and links elsewhere, to break them."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("weightsync", *MOUNTED):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_contracts_hold() -> None:
    code, output = lint(ROOT)
    assert code == 0, output


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("planners/sample.py", "import weightsync.runtime"),
        ("planners/sample.py", "import torch"),
        ("weightsync/runtime/sample.py", "import weightsync.planners"),
        ("weightsync/ir/sample.py", "from weightsync import clock"),
        ("weightsync/transport/sample.py", "import weightsync.runtime"),
        ("integrations/sample.py", "import weightsync.transport"),
        ("weightsync/sample.py", "# a module that no layer names"),
    ],
)
def test_contracts_catch(copy: Path, module: str, line: str) -> None:
    (copy / module).write_text(line + "\n")
    code, output = lint(copy)
    assert code == 1, output
    assert "BROKEN" in output
    assert "sample" in output, "another contract broke than the one that was provoked"


def test_only_fabrics_and_encodings_touch_the_extension() -> None:
    users = {name for name, source in sources().items() if uses_native(source)}
    assert {name for name in users if not f"{name}.".startswith(NATIVE_USERS)} == set()


@pytest.mark.parametrize("part", PURE)
def test_pure_parts_use_tables_only(part: str) -> None:
    found = {
        name: foreign(source, PURE[part])
        for name, source in sources().items()
        if f"{name}.".startswith(f"{part}.")
    }
    assert found
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import weightsync._native",
        "from weightsync import _native",
        "from weightsync._native import pack",
        "def f():\n    import weightsync._native as n",
        "importlib.import_module('weightsync._native')",
    ],
)
def test_native_use_is_seen(source: str) -> None:
    assert uses_native(source)
    assert not uses_native("from weightsync import errors")


def test_foreign_import_is_seen() -> None:
    assert foreign("import os\nfrom torch import nn\nimport numpy.linalg", {"numpy"}) == {"torch"}


def loaded_after(code: str) -> set[str]:
    return set(run_fresh(f"{code}\nimport sys\nprint(*sys.modules)").split())


def test_import_weightsync_is_cheap() -> None:
    loaded = loaded_after("import weightsync; weightsync.ConfigError; weightsync.__version__")
    assert "weightsync" in loaded
    assert loaded.isdisjoint({*HEAVY, "numpy", "grpc"})


def test_the_command_line_is_cheap() -> None:
    """`weightsync plan` tells numpy how to take memory, which must not be loaded before."""
    assert loaded_after("import weightsync.cli").isdisjoint({*HEAVY, "numpy", "grpc"})


def test_planning_needs_no_framework() -> None:
    names = [
        module_name(path)
        for path in package_files()
        if path.relative_to(PACKAGE).parts[0] in ("planners", "ir") and not is_generated(path)
    ]
    assert "weightsync.planners" in names
    loaded = loaded_after(f"import {', '.join(names)}")
    assert set(names) <= loaded
    assert loaded.isdisjoint({*HEAVY, "grpc"})


def test_loaded_modules_are_seen() -> None:
    assert "json" in loaded_after("import json")
