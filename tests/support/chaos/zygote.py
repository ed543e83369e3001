"""Starts worker processes quickly: imports torch once, then forks on request.

Reads one JSON object per line, {"key", "folder", ...}; writes {"key", "pid"} after a start and
{"key", "pid", "status"} after an end. Its children die with it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve requests until standard input ends; then kill what is left."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch  # noqa: F401 - the point of forking

    import weightsync.client
    import weightsync.encodings.kernels
    import weightsync.ir.validate
    import weightsync.live.weights
    import weightsync.planners.planner
    import weightsync.transport.local  # noqa: F401
    from support.chaos import worker

    # A full collection in a worker would look at all that was imported here, and so copy it: 0.2 s
    # of CPU for each worker, which on few cores is a lease for all of them.
    gc.collect()
    gc.freeze()
    names: dict[int, str] = {}
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    _say({"event": "ready"})
    buffer = b""
    while True:
        readable, _, _ = select.select([0, wake_read], [], [])
        if wake_read in readable:
            os.read(wake_read, 4096)
            _reap(names)
        if 0 in readable:
            data = os.read(0, 65536)
            if not data:
                break
            buffer += data
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                spec = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    _child(spec, worker.main)
                names[pid] = spec["key"]
                _say({"key": spec["key"], "pid": pid})
    for pid in names:
        os.kill(pid, signal.SIGKILL)


def _reap(names: dict[int, str]) -> None:
    for pid in list(names):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            _say({"key": names.pop(pid), "pid": pid, "status": os.waitstatus_to_exitcode(status)})


def _child(spec: dict[str, Any], run: Any) -> None:
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        log = os.open(
            Path(spec["folder"]) / f"out-{spec['name']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND
        )
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        run(spec)
        code = 0
    except BaseException:  # noqa: BLE001 - the child must never return into the parent's loop
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _say(message: dict[str, Any]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main()
