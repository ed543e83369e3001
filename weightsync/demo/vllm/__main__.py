"""Where a worker begins: `python -m weightsync.demo.vllm ROLE READ_FD WRITE_FD PARENT_PID`."""

from __future__ import annotations

import importlib
import sys

from weightsync.demo.worker import die_with, serve

_ROLES = ("trainer", "server", "engine")


def main() -> None:
    """Tie this process to its parent, and only then import what takes seconds."""
    role, read_fd, write_fd, parent = sys.argv[1:]
    die_with(int(parent))
    if role not in _ROLES:
        raise SystemExit(f"no role {role!r}")
    module = f"weightsync.demo.vllm.{role}"
    serve(int(read_fd), int(write_fd), lambda: importlib.import_module(module))


if __name__ == "__main__":
    main()
