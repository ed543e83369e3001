"""A temporary folder that is gone afterwards whatever happens, and signals handled cleanly."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final

__all__ = ["Interrupts", "workspace"]

# Waits until the last holder of the pipe is gone; workers may still be dying while it removes.
_JANITOR: Final = """
cat >/dev/null
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    rm -rf -- "$1" 2>/dev/null
    [ -e "$1" ] || exit 0
    sleep 0.1
done
"""
# sockaddr_un holds 107 characters, and the job's socket lies in the folder.
_MAX_SOCKET_DIR: Final = 80


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A fresh private folder. It is removed on the way out, and by a janitor after kill -9."""
    parent = tempfile.gettempdir()
    folder = Path(
        tempfile.mkdtemp(
            prefix="weightsync-demo-", dir=parent if len(parent) < _MAX_SOCKET_DIR else "/tmp"
        )
    )
    try:
        janitor = subprocess.Popen(
            ["/bin/sh", "-c", _JANITOR, "janitor", str(folder)],
            stdin=subprocess.PIPE,  # closed by the kernel when this process ends
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C must not reach it
            cwd="/",
        )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        assert janitor.stdin is not None
        janitor.stdin.close()
        janitor.wait()


class Interrupts:
    """Turns SIGINT and SIGTERM into one KeyboardInterrupt, and only where that does no harm.

    Context manager: while it is entered, a signal is kept until `allowed` code runs, or until
    the context is left. What is entered outside of `allowed` is thus set up and cleaned up whole.
    """

    def __init__(self) -> None:
        self._is_allowed = False
        self._is_pending = False
        self._before: dict[signal.Signals, Any] = {}

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Let signals interrupt the body."""
        self._is_allowed = True
        try:
            self._raise_pending()
            yield
        finally:
            self._is_allowed = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self._is_pending = True
        if self._is_allowed:
            self._is_allowed = False
            self._raise_pending()

    def _raise_pending(self) -> None:
        if self._is_pending:
            self._is_pending = False
            raise KeyboardInterrupt

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None:
            self._raise_pending()
