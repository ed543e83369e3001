"""Fabrics by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from weightsync.errors import ConfigError
from weightsync.transport.base import Engine

__all__ = ["FABRICS", "check_fabric", "open_fabric", "open_for_job"]

_NAMED = ("local", "cuda_ipc", "sim", "tcp", "verbs")
FABRICS = (*_NAMED, "ofi:PROVIDER")


def check_fabric(fabric: str) -> None:
    """Raise a `ConfigError` if there is no such fabric."""
    kind, _, provider = fabric.partition(":")
    if fabric in _NAMED or (kind == "ofi" and provider):
        return
    raise ConfigError(f"unknown fabric {fabric!r}; there are {FABRICS}")


def open_fabric(fabric: str, **options: Any) -> Engine:
    """Open an engine.

    Args:
        fabric: One of `FABRICS`; `ofi:PROVIDER` names a provider of libfabric, as `ofi:shm`.
        options: Of that fabric: see `local.open_local`, `cuda_ipc.open_cuda_ipc`, `ofi.open_ofi`,
            `sim.open_sim`, `tcp.open_tcp` and `verbs.open_verbs`.

    Returns:
        An engine; close it, or use it as a context manager.

    Raises:
        ConfigError: Unknown fabric or option.
        NativeUnavailableError: The extension is not built.
    """
    check_fabric(fabric)
    kind, _, provider = fabric.partition(":")
    # Imported here: naming fabrics and their errors needs no extension.
    from weightsync.transport.cuda_ipc import open_cuda_ipc
    from weightsync.transport.local import open_local
    from weightsync.transport.ofi import open_ofi
    from weightsync.transport.sim import open_sim
    from weightsync.transport.tcp import open_tcp
    from weightsync.transport.verbs import open_verbs

    openers: dict[str, Callable[..., Engine]] = {
        "local": open_local,
        "cuda_ipc": open_cuda_ipc,
        "sim": open_sim,
        "tcp": open_tcp,
        "verbs": open_verbs,
        "ofi": partial(open_ofi, provider),
    }
    opener = openers[kind]
    try:
        inspect.signature(opener).bind(**options)
    except TypeError as error:
        raise ConfigError(f"fabric {fabric!r}: {error}") from error
    return opener(**options)


def open_for_job(fabric: str, *, threads: int, options: Mapping[str, Any] | None = None) -> Engine:
    """Open the engine of a source or sink.

    Args:
        fabric: As of `open_fabric`.
        threads: Threads that one member may use for copies; fabrics that copy obey.
        options: Further options of that fabric, such as `addresses`.

    Raises:
        ConfigError: Unknown fabric or option.
        NativeUnavailableError: The extension is not built.
    """
    found = {**(options or {})}
    if fabric in ("local", "cuda_ipc"):
        found = {"threads": threads, **found}
    return open_fabric(fabric, **found)
