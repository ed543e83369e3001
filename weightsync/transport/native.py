"""The extension, or an error that says how to build it."""

from __future__ import annotations

from weightsync.errors import NativeUnavailableError

try:
    from weightsync import _native
except ImportError as _error:
    raise NativeUnavailableError(
        f"the compiled extension weightsync._native cannot be loaded ({_error}); run `make setup` "
        "in a checkout, or `pip install weightsync`"
    ) from _error

__all__ = ["_native", "live_object_count", "live_objects"]


def live_object_count() -> int:
    """Native objects alive in this process; returns to its start value when all are dropped."""
    return _native.live_object_count()


def live_objects() -> dict[str, int]:
    """The same, by kind: engines, leases, targets, remotes, mappings, descriptors, threads, ..."""
    return _native.live_objects()
