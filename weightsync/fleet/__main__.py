"""Where a process of a fleet begins: `python -m weightsync.fleet ROLE READ_FD WRITE_FD PARENT`."""

from __future__ import annotations

import importlib
import sys

from weightsync.demo.worker import die_with, serve

_ROLES = ("coordinator", "source", "sink", "gather")


def main() -> None:
    """Tie this process to its parent, and only then import what takes time."""
    role, read_fd, write_fd, parent = sys.argv[1:]
    die_with(int(parent))
    if role not in _ROLES:
        raise SystemExit(f"no role {role!r}")
    serve(int(read_fd), int(write_fd), lambda: importlib.import_module(f"weightsync.fleet.{role}"))


if __name__ == "__main__":
    main()
