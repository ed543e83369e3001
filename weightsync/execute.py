"""How every command runs and ends.

With `--json` stdout is one JSON object on one line, everything else goes to stderr. Exit status:
0 ok, 1 failed or unverified, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, Final

import typer
from rich.console import Console
from rich.text import Text

from weightsync.errors import ConfigError, WeightSyncError

__all__ = ["execute"]

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_BAD_INPUT: Final = 2
EXIT_INTERRUPTED: Final = 130


def execute(
    command: str,
    run: Callable[[Console], dict[str, Any]],
    *,
    as_json: bool,
    debug: bool,
    bad_input: tuple[type[WeightSyncError], ...] = (ConfigError,),
) -> None:
    """Run one command the way all commands behave, and exit.

    Args:
        command: Its name in the schema, with underscores: "demo", "bench_transfer".
        run: Does the work; gets the console to print on, returns the keys of the JSON object.
            A false "ok" or "verified" makes the exit status 1.
        as_json: Print that object on stdout.
        debug: Let errors of the package through with their traceback.
        bad_input: Errors that are the user's: exit status 2.

    Raises:
        typer.Exit: Always, with the exit status.
    """
    result: dict[str, Any]
    try:
        result = run(Console(stderr=as_json))
        good = bool(result.get("ok", True)) and bool(result.get("verified", True))
        status = EXIT_OK if good else EXIT_FAILED
    except KeyboardInterrupt:
        result, status = {"ok": False, "error": "interrupted"}, EXIT_INTERRUPTED
        _say_error("interrupted")
    except WeightSyncError as error:
        if debug:
            raise
        status = EXIT_BAD_INPUT if isinstance(error, bad_input) else EXIT_FAILED
        result = {"ok": False, "error": type(error).__name__, "message": str(error)}
        _say_error(f"{type(error).__name__}: {error}")
    if as_json:
        line = json.dumps({"schema": f"weightsync.{command}/1", **result})
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    raise typer.Exit(status)


def _say_error(text: str) -> None:
    Console(stderr=True).print(Text(text, "bold red"), soft_wrap=True)
