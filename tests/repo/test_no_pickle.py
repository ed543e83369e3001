"""Nothing in the package unpickles or executes data: what a peer sends stays data."""

from __future__ import annotations

import ast
from typing import Final

import pytest

from support.tree import PACKAGE, ROOT, package_files

# Loading any of these can run code that the sender chose.
MODULES: Final = {
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib",
    "jsonpickle", "multiprocessing.connection", "multiprocessing.managers",
}  # fmt: skip
BUILTINS: Final = {"eval", "exec", "compile", "__import__"}
# Full name of the callable -> why.
CALLS: Final = {
    "torch.load": "unpickles",
    "torch.package.PackageImporter": "executes",
    "torch.hub.load": "executes",
    "torch.jit.load": "executes",
    "torch.serialization.load": "unpickles",
    "pandas.read_pickle": "unpickles",
    "yaml.load": "executes",
    "yaml.unsafe_load": "executes",
    "yaml.full_load": "executes",
    "multiprocessing.Pipe": "unpickles",
    "multiprocessing.Manager": "unpickles",
    "multiprocessing.Queue": "unpickles",
    "multiprocessing.SimpleQueue": "unpickles",
}
# Methods that pickle whatever the object: torch.distributed's object collectives under any alias.
METHODS: Final = {
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list",
    "send_object_list", "recv_object_list", "read_pickle",
}  # fmt: skip


class Finder(ast.NodeVisitor):
    """Collects "line: what" for everything that would unpickle or execute."""

    def __init__(self) -> None:
        self.aliases: dict[str, str] = {}
        self.found: list[str] = []

    def report(self, node: ast.AST, what: str) -> None:
        self.found.append(f"{getattr(node, 'lineno', 0)}: {what}")

    def check_module(self, node: ast.AST, module: str) -> None:
        parts = module.split(".")
        if any(".".join(parts[: i + 1]) in MODULES for i in range(len(parts))):
            self.report(node, f"imports {module}")

    def visit_Import(self, node: ast.Import) -> None:
        for name in node.names:
            self.check_module(node, name.name)
            self.aliases[name.asname or name.name.partition(".")[0]] = (
                name.name if name.asname else name.name.partition(".")[0]
            )

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        for name in node.names:
            full = f"{module}.{name.name}"
            self.check_module(node, full)
            self.aliases[name.asname or name.name] = full
            if full in CALLS or name.name in METHODS:
                self.report(node, f"imports {full}")

    def full_name(self, node: ast.expr) -> str:
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            return f"{self.full_name(node.value)}.{node.attr}"
        return ""

    def visit_Attribute(self, node: ast.Attribute) -> None:
        full = self.full_name(node)
        if full in CALLS:
            self.report(node, f"{full} {CALLS[full]}")
        elif node.attr in METHODS:
            self.report(node, f".{node.attr} unpickles")
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in BUILTINS and node.id not in self.aliases:
            self.report(node, f"{node.id} executes")

    def visit_Call(self, node: ast.Call) -> None:
        # A dangerous module by name; other dynamic imports (lazy integrations) are fine.
        if self.full_name(node.func) == "importlib.import_module" and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                self.check_module(node, name.value)
        for keyword in node.keywords:
            is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg == "allow_pickle" and not is_false:
                self.report(node, "allow_pickle")
        self.generic_visit(node)


def dangers(source: str) -> list[str]:
    finder = Finder()
    finder.visit(ast.parse(source))
    return finder.found


def test_package_neither_unpickles_nor_executes() -> None:
    paths = list(package_files())
    assert {path.relative_to(PACKAGE).parts[0] for path in paths} >= {"planners", "integrations"}
    found = {
        str(path.relative_to(ROOT)): dangers(path.read_text(encoding="ascii")) for path in paths
    }
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import cloudpickle, json",
        "from multiprocessing.connection import Client",
        "def f():\n    import dill",
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path, weights_only=True)",
        "from torch import load",
        "from torch import distributed as dist\ndist.all_gather_object(a, b)",
        "import multiprocessing as mp\nq = mp.Queue()",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import numpy as np\nnp.load(path, allow_pickle=flag)",
        "import importlib\nimportlib.import_module('pickle')",
        "eval(text)",
        "list(map(exec, received))",
        "__import__(name)",
        "import yaml\nyaml.load(text)",
    ],
)
def test_finder_sees(source: str) -> None:
    assert dangers(source)


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import json\njson.load(file)",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "from re import compile\ncompile('a')",
        "import re\nre.compile('a')",
        "import multiprocessing as mp\nmp.get_context('spawn').Process(target=f)",
        "from importlib import import_module\nimport_module(home)",
        "class Loader:\n    def load(self): ...\nLoader().load()",
    ],
)
def test_finder_lets_pass(source: str) -> None:
    assert dangers(source) == []
