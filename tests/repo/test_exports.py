"""Every module says what is public, and what it says exists."""

from __future__ import annotations

import ast
import importlib
from types import ModuleType

import pytest

import weightsync
from support.tree import is_generated, module_name, package_files
from weightsync import errors

# A __main__ is run, not imported from.
MODULES = [
    module_name(path)
    for path in package_files()
    if not is_generated(path) and path.stem != "__main__"
]


def problems(module: ModuleType) -> list[str]:
    names = getattr(module, "__all__", None)
    if names is None:
        return [f"{module.__name__} has no __all__"]
    found = [
        f"{module.__name__}.{name} does not exist" for name in names if not hasattr(module, name)
    ]
    if len(set(names)) != len(names):
        found.append(f"{module.__name__}.__all__ has doubles")
    return found


def has_code(name: str) -> bool:
    """False for an __init__.py that holds a docstring and the mount guard only."""
    path = next(path for path in package_files() if module_name(path) == name)
    body = ast.parse(path.read_text(encoding="ascii")).body
    return not all(isinstance(node, ast.Expr | ast.If) for node in body)


@pytest.mark.parametrize("name", MODULES)
def test_all_is_complete(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "vllm":  # tests/vllm may be found as a part
            raise
        pytest.skip(f"{name} needs vLLM: make test-vllm imports it")
    if has_code(name):
        assert problems(module) == []


def test_package_exports_every_error() -> None:
    assert set(errors.__all__) <= set(weightsync.__all__)
    for name in errors.__all__:
        assert getattr(weightsync, name) is getattr(errors, name)


def test_public_names_are_those_of_their_home() -> None:
    from weightsync import client

    for name in ("Job", "Source", "Sink", "Update", "VersionReport", "SinkHooks", "Layout"):
        assert name in weightsync.__all__
        assert getattr(weightsync, name) is getattr(client, name)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Sauce'"):
        weightsync.Sauce  # noqa: B018


def test_checker_sees_what_is_wrong() -> None:
    module = ModuleType("sample")
    assert problems(module) == ["sample has no __all__"]
    module.__dict__["__all__"] = ["there", "gone", "gone"]
    module.__dict__["there"] = 1
    assert problems(module) == [
        "sample.gone does not exist",
        "sample.gone does not exist",
        "sample.__all__ has doubles",
    ]
