"""Fabric `cuda_ipc`: processes of one host, with memory of its GPUs on either side or both.

The sink's engine opens the allocations that the sources lease (CUDA IPC) and copies from them, so
nobody else can ever write its memory; a fence stops its own threads and waits for no peer. Bytes
are there when a slot is complete: kernels launched afterwards read them.

Memory of the host goes as in fabric `local`, and by a pinned buffer where it meets a GPU. Whatever
wrote the source's bytes must be done when they are posted: synchronize the stream first.

Needs the CUDA driver, loaded when an engine is opened, one user and one PID and IPC namespace.
Torch's expandable segments cannot be shared between processes.
"""

from __future__ import annotations

import itertools
import os

from weightsync.errors import ConfigError
from weightsync.transport.base import Engine
from weightsync.transport.native import _native

__all__ = ["cuda_ipc_problem", "open_cuda_ipc"]

_numbers = itertools.count()


def cuda_ipc_problem() -> str | None:
    """Why no such engine can be opened in this process, or None; for skips and `doctor`."""
    try:
        open_cuda_ipc().close()
    except ConfigError as error:
        return str(error)
    return None


def open_cuda_ipc(*, name: str | None = None, threads: int | None = None) -> Engine:
    """Open an engine on the memory of this host and of its GPUs.

    Args:
        name: For messages; None makes one from the process id.
        threads: Copying threads, 1 .. 64; None takes min(2, cores). They sleep when idle.

    Returns:
        The engine. Memory of a GPU is registered by its device address.

    Raises:
        ConfigError: No CUDA driver, no GPU, or a bad number of threads.
    """
    if threads is not None and threads < 1:
        raise ConfigError(f"threads={threads}: give 1 or more, or None")
    return _native.open_cuda_ipc(
        f"cuda_ipc-{os.getpid()}-{next(_numbers)}" if name is None else name,
        0 if threads is None else threads,
    )
