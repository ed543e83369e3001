"""Fabrics by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from weightsync.errors import ConfigError
from weightsync.transport.base import Engine

__all__ = ["FABRICS", "open_fabric"]

# Names of docs/interfaces.md; those that are not built yet are refused by name.
FABRICS = ("local", "sim", "ofi:PROVIDER")
_PLANNED = ("tcp", "verbs", "cuda_ipc")


def open_fabric(fabric: str, **options: Any) -> Engine:
    """Open an engine.

    Args:
        fabric: One of `FABRICS`; `ofi:PROVIDER` names a provider of libfabric, as `ofi:tcp`.
        options: Of that fabric: see `local.open_local`, `ofi.open_ofi` and `sim.open_sim`.

    Returns:
        An engine; close it, or use it as a context manager.

    Raises:
        ConfigError: Unknown fabric or option.
        NativeUnavailableError: The extension is not built.
    """
    kind, _, provider = fabric.partition(":")
    if fabric not in ("local", "sim") and not (kind == "ofi" and provider):
        if kind in _PLANNED:
            raise ConfigError(f"fabric {fabric!r} is not built yet; there are {FABRICS}")
        raise ConfigError(f"unknown fabric {fabric!r}; there are {FABRICS}")
    # Imported here: naming fabrics and their errors needs no extension.
    from weightsync.transport.local import open_local
    from weightsync.transport.ofi import open_ofi
    from weightsync.transport.sim import open_sim

    openers: dict[str, Callable[..., Engine]] = {
        "local": open_local,
        "sim": open_sim,
        "ofi": partial(open_ofi, provider),
    }
    opener = openers[kind]
    try:
        inspect.signature(opener).bind(**options)
    except TypeError as error:
        raise ConfigError(f"fabric {fabric!r}: {error}") from error
    return opener(**options)
