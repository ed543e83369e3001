"""Fabrics by name.

`NEAR+FAR`, such as `local+tcp`, is two as one: peers of this host go over the first, others over
the second. Who is near is found by connecting, pair by pair; see docs/fabrics/mixed.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from weightsync.errors import ConfigError
from weightsync.transport.base import Engine

__all__ = ["FABRICS", "check_fabric", "open_fabric", "open_for_job", "spares_nics"]

_NAMED = ("local", "cuda_ipc", "sim", "tcp", "verbs")
_NEAR = ("local", "cuda_ipc")
_BETWEEN_HOSTS = ("tcp", "verbs", "ofi")
FABRICS = (*_NAMED, "ofi:PROVIDER", "NEAR+FAR")


def check_fabric(fabric: str) -> None:
    """Raise a `ConfigError` if there is no such fabric."""
    near, kind, provider = _parts(fabric)
    if near and (near not in _NEAR or kind not in _BETWEEN_HOSTS):
        raise ConfigError(
            f"fabric {fabric!r}: NEAR is one of {_NEAR}, FAR one of tcp, verbs and ofi:PROVIDER"
        )
    if provider if kind == "ofi" else kind in _NAMED:
        return
    raise ConfigError(f"unknown fabric {fabric!r}; there are {FABRICS}")


def spares_nics(fabric: str) -> bool:
    """Whether bytes between processes of one host stay off its NICs."""
    near, kind, provider = _parts(fabric)
    return bool(near) or kind in (*_NEAR, "sim") or provider == "shm"


def _parts(fabric: str) -> tuple[str, str, str]:
    """What goes before it inside a host, what it is, and its provider; "" for none."""
    near, _, far = fabric.rpartition("+")
    if fabric.startswith("+"):
        raise ConfigError(f"unknown fabric {fabric!r}; there are {FABRICS}")
    kind, separator, provider = far.partition(":")
    return near, kind if kind == "ofi" or not separator else far, provider


def open_fabric(fabric: str, **options: Any) -> Engine:
    """Open an engine.

    Args:
        fabric: One of `FABRICS`; `ofi:PROVIDER` names a provider of libfabric, as `ofi:shm`, and
            `local+tcp` is `local` inside a host and `tcp` between hosts.
        options: Of that fabric: see `local.open_local`, `cuda_ipc.open_cuda_ipc`, `ofi.open_ofi`,
            `sim.open_sim`, `tcp.open_tcp` and `verbs.open_verbs`. Of `NEAR+FAR` they are those of
            FAR.

    Returns:
        An engine; close it, or use it as a context manager.

    Raises:
        ConfigError: Unknown fabric or option.
        NativeUnavailableError: The extension is not built.
    """
    check_fabric(fabric)
    near, kind, provider = _parts(fabric)
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
    opener = partial(openers[kind], near=near) if near else openers[kind]
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
    elif "+" in fabric:
        found = {"near_threads": threads, **found}
    return open_fabric(fabric, **found)
