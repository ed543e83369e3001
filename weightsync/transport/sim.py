"""Fabric `sim`: a wire inside one process with virtual time and seeded faults.

It is the reference for what a fabric may do at its worst: reorder, delay, deliver twice, drop,
land late, count before the bytes are there. Every fault that happened is counted in
`SimWire.counts()`, so a test can prove that it met it. Sources are read when a write is delivered,
not when it is posted: a source that changes too early shows.

Waits drive the wire. For one thread and one seed everything is reproducible.
"""

from __future__ import annotations

import itertools

from weightsync.errors import ConfigError
from weightsync.transport.base import Engine
from weightsync.transport.native import _native

__all__ = ["SimWire", "open_sim"]

SimWire = _native.SimWire

_numbers = itertools.count()


def open_sim(*, wire: _native.SimWire | None = None, name: str | None = None) -> Engine:
    """Attach an engine to a simulated wire.

    Args:
        wire: What connects the engines of a test; they reach only engines of the same wire.
        name: Names the engine in `freeze`, `kill` and `set_faults`; distinct on its wire. None
            makes one.

    Returns:
        The engine.

    Raises:
        ConfigError: No wire, or a name that is taken.
    """
    if wire is None:
        raise ConfigError('the sim fabric needs a wire: open_fabric("sim", wire=SimWire(seed))')
    return wire.open(f"sim-{next(_numbers)}" if name is None else name)
