"""Fabric `local`: processes of one host, one user and one pid namespace.

Push: the target's memory was allocated by the sink's engine. Sources map it and write it
themselves, at the speed of memcpy. A fence abandons the pages: a writer that wakes up late writes
into memory that nobody reads.

Pull: the target's memory is private (live weights). The sink's engine reads the sources with
`process_vm_readv`, so nobody else can ever write there; a fence stops its own threads.

Nothing is created in the file system or in /dev/shm: what a killed process had is gone with it.
"""

from __future__ import annotations

import itertools
import os

from weightsync.errors import ConfigError
from weightsync.transport.base import Engine
from weightsync.transport.native import _native

__all__ = ["open_local"]

_numbers = itertools.count()


def open_local(*, name: str | None = None, threads: int | None = None) -> Engine:
    """Open an engine on this host's memory.

    Args:
        name: For messages; None makes one from the process id.
        threads: Copying threads, 1 .. 64; None takes min(2, cores). They sleep when idle.

    Returns:
        The engine; its threads and its socket start with their first use.

    Raises:
        ConfigError: Bad number of threads.
    """
    if threads is not None and threads < 1:
        raise ConfigError(f"threads={threads}: give 1 or more, or None")
    return _native.open_local(
        f"local-{os.getpid()}-{next(_numbers)}" if name is None else name,
        0 if threads is None else threads,
    )
