"""Modules that SGLang imports and this machine does not have: importable, and of no use.

SGLang's model classes import two packages that PyPI has for GPUs only. Their loaders never call
them, so whatever is imported from such a module is a class that cannot be made.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

__all__ = ["install"]

# Package -> who imports it. A package that is installed after all is never stood in for.
_ABSENT: Final = {
    "torchvision": "image processors, which the registry of models imports",
    "vllm": "rotary embeddings, where neither CUDA nor another accelerator is found",
}


class _NotHere:
    """Stands for any name of an absent module."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"{type(self).__qualname__} is not installed; it is a stand-in")


class _Module(ModuleType):
    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(f"{self.__name__}.{name}", (_NotHere,), {})
        setattr(self, name, made)
        return made


class _Finder(MetaPathFinder, Loader):
    def __init__(self, packages: frozenset[str]) -> None:
        self._packages = packages

    def knows(self, name: str) -> bool:
        return name.split(".")[0] in self._packages

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if self.knows(name) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def _is_installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    # A folder of that name on the path is no package; tests/vllm is one.
    return spec is not None and spec.origin is not None


def install() -> None:
    """Let the absent packages be imported, but not be found by those who ask whether they exist."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    find_spec = importlib.util.find_spec
    finder = _Finder(frozenset(name for name in _ABSENT if not _is_installed(name)))

    def find_real(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if finder.knows(name) else find_spec(name, package)

    importlib.util.find_spec = find_real
    sys.meta_path.insert(0, finder)
