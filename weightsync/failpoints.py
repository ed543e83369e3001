"""Named places where a process can be made to die or freeze, for fault tests.

`WEIGHTSYNC_FAILPOINT=name[@N]=kill|stop` arms one place: the N-th time (default 1) that the
process passes it, it sends itself SIGKILL or SIGSTOP. Without the variable `hit` is one
comparison. docs/protocol.md lists the names.
"""

from __future__ import annotations

import os
import signal

__all__ = ["arm", "hit"]

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


class _Armed:
    """The one armed place of this process."""

    def __init__(self, spec: str) -> None:
        place, _, action = spec.partition("=")
        name, _, count = place.partition("@")
        self.name = name
        self.passes_left = int(count) if count else 1
        self.signal = _SIGNALS[action] if spec else None


_armed: _Armed | None = None


def arm(spec: str | None = None) -> None:
    """Arm one place; None reads the environment. Call once, at the start of a process."""
    global _armed
    spec = os.environ.get("WEIGHTSYNC_FAILPOINT", "") if spec is None else spec
    _armed = _Armed(spec) if spec else None


def hit(name: str) -> None:
    """Pass the place `name`; die or freeze here if it is armed."""
    if _armed is not None and _armed.name == name and _armed.signal is not None:
        _armed.passes_left -= 1
        if _armed.passes_left == 0:
            os.kill(os.getpid(), _armed.signal)
