"""The extension, or an error that says how to build it."""

from __future__ import annotations

from typing import Any

from weightsync.errors import ConfigError, NativeUnavailableError

try:
    from weightsync import _native
except ImportError as _error:
    raise NativeUnavailableError(
        f"the compiled extension weightsync._native cannot be loaded ({_error}); run `make setup` "
        "in a checkout, or `pip install weightsync`"
    ) from _error

__all__ = ["_native", "live_object_count", "live_objects", "near_options"]


def near_options(near: str | None, threads: int | None) -> Any:
    """What an opener takes as the fabric that goes before it inside a host.

    Args:
        near: "local", "cuda_ipc", or None for none.
        threads: Of that fabric, as its own opener takes them.

    Raises:
        ConfigError: Bad number of threads, or threads of nothing.
    """
    if threads is not None and (near is None or threads < 1):
        raise ConfigError(
            f"near_threads={threads}: give 1 or more, or None, and a fabric of the host as `near`"
        )
    return _native.Near(near or "", threads or 0)


def live_object_count() -> int:
    """Native objects alive in this process; returns to its start value when all are dropped."""
    return _native.live_object_count()


def live_objects() -> dict[str, int]:
    """The same, by kind: engines, leases, targets, remotes, mappings, descriptors, threads, ..."""
    return _native.live_objects()
