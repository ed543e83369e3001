"""Fabric `tcp`: hosts without RDMA.

A source sends blocks of writes over a few connections per rail, straight from its memory; the
sink's threads check each write against the exported ranges and read its bytes straight into place.
There is no copy besides the kernel's. The fence is local: the sink is the one who writes, so it
takes its threads out of the memory and closes the sockets, whatever the sources do.

Every connection proves, with HMAC-SHA256 over nonces of both sides, that its source and its sink
know the key of that target and generation; the key travels in the descriptor. Nothing is encrypted:
run it on a network that you would trust with RDMA.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence

from weightsync.errors import ConfigError
from weightsync.transport.base import Engine
from weightsync.transport.native import _native, near_options
from weightsync.units import MIB

__all__ = ["open_tcp"]

_numbers = itertools.count()


def open_tcp(
    *,
    name: str | None = None,
    addresses: Sequence[str] | None = None,
    streams: int | None = None,
    window_bytes: int = 4 * MIB,
    near: str | None = None,
    near_threads: int | None = None,
) -> Engine:
    """Open an engine on this host's network.

    Args:
        name: For messages; None makes one from the process id.
        addresses: Numeric IPv4 or IPv6 addresses of this host, one per rail: each gets a port and a
            thread. Connections to sinks start from them too. None: this host only; two rails of
            127.0.0.1 (one on a single core), because there a thread is slower than memory is.
        streams: Connections of each pair of rails, 1 .. 32. None: 2, so that a lost segment does
            not hold up a rail; 1 without `addresses`, where none is lost.
        window_bytes: Most bytes that one connection holds, 64 KiB .. 1 GiB. About the rate of a
            rail times the time in which a sink answers, shared among the peers that write at once:
            what is more waits in queues of the network, or on a rail that is slower than others.
        near: Fabric for peers of this host, `local` or `cuda_ipc`; see docs/fabrics/mixed.md.
        near_threads: Its copying threads; None takes min(2, cores).

    Returns:
        The engine; it listens from its first export on, and its threads sleep when idle.

    Raises:
        ConfigError: Bad addresses, number of streams or window, or no libcrypto on this system.
    """
    if isinstance(addresses, str):
        raise ConfigError(f"addresses={addresses!r}: give a list, one address for each rail")
    if addresses is not None and not addresses:
        raise ConfigError("addresses=[]: give at least one, or None for loopback")
    if streams is None:
        streams = 1 if addresses is None else 2
    if addresses is None:
        addresses = ["127.0.0.1"] * min(2, len(os.sched_getaffinity(0)))
    return _native.open_tcp(
        f"tcp-{os.getpid()}-{next(_numbers)}" if name is None else name,
        list(addresses),
        streams,
        window_bytes,
        near_options(near, near_threads),
    )
