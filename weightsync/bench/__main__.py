"""Where a worker process begins: `python -m weightsync.bench ROLE READ_FD WRITE_FD PARENT_PID`."""

from __future__ import annotations

import importlib
import sys

from weightsync.demo.worker import die_with, serve

_ROLES = ("source", "sink", "reader", "writer")


def main() -> None:
    """Tie this process to its parent, and only then import what takes seconds."""
    role, read_fd, write_fd, parent = sys.argv[1:]
    die_with(int(parent))
    if role not in _ROLES:
        raise SystemExit(f"no role {role!r}")
    serve(int(read_fd), int(write_fd), lambda: importlib.import_module(f"weightsync.bench.{role}"))


if __name__ == "__main__":
    main()
