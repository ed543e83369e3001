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
from weightsync.transport.native import _native

__all__ = ["open_tcp"]

_numbers = itertools.count()


def open_tcp(
    *, name: str | None = None, addresses: Sequence[str] | None = None, streams: int = 2
) -> Engine:
    """Open an engine on this host's network.

    Args:
        name: For messages; None makes one from the process id.
        addresses: Numeric IPv4 or IPv6 addresses of this host, one per rail: each gets a port and a
            thread. Connections to sinks start from them too. None: 127.0.0.1, this host only.
        streams: Connections of each pair of rails, 1 .. 32.

    Returns:
        The engine; it listens from its first export on, and its threads sleep when idle.

    Raises:
        ConfigError: Bad addresses or number of streams, or no libcrypto on this system.
    """
    if isinstance(addresses, str):
        raise ConfigError(f"addresses={addresses!r}: give a list, one address for each rail")
    if addresses is not None and not addresses:
        raise ConfigError("addresses=[]: give at least one, or None for loopback")
    return _native.open_tcp(
        f"tcp-{os.getpid()}-{next(_numbers)}" if name is None else name,
        [] if addresses is None else list(addresses),
        streams,
    )
