"""The README is true: its example prints what it says, its commands exist."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
from pathlib import Path

import pytest
from typer.testing import CliRunner

from support.tree import ROOT
from weightsync.cli import app

README = (ROOT / "README.md").read_text(encoding="utf-8")


def fenced(language: str) -> list[str]:
    """The contents of all code blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.timeout(120)
def test_the_example_prints_what_the_readme_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, (output,) = fenced("python")[0], fenced("text")
    script = tmp_path / "example.py"
    script.write_text(code, encoding="utf-8")
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out == output


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([\w-]+)|`make ([\w-]+)`", README, re.MULTILINE))
    names = {first or second for first, second in named}
    assert names >= {"demo", "setup", "test"}
    assert names <= targets


def test_what_fragments_import_exists() -> None:
    fragments = fenced("python")[1:]
    assert len(fragments) >= 2
    for fragment in fragments:
        imports = [n for n in ast.walk(ast.parse(fragment)) if isinstance(n, ast.ImportFrom)]
        assert imports
        for node in imports:
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, name.name) for name in node.names), fragment


def test_every_option_exists() -> None:
    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})
    commands = (["demo"], ["bench", "transfer"], ["load"], ["export"], ["plan"])
    helps = "".join(runner.invoke(app, [*command, "--help"]).output for command in commands)
    ours = "\n".join(line for line in README.splitlines() if "vllm serve" not in line)
    options = set(re.findall(r"--[a-z]+", ours))
    assert options >= {"--kill", "--mode", "--model"}
    assert {option for option in options if option not in helps} == set()
