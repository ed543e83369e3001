"""Fabrics `ofi:PROVIDER`: libfabric 1.17 or newer, loaded when an engine is opened.

The sink registers its memory, sources write it with remote CQ data as the immediate; an operation
is done when its bytes are delivered. Each target has endpoints of its own. A fence closes its
regions, so that their keys mean nothing any more, and its endpoints, since some providers go on
with a message that they have begun.

`ofi:tcp`: any two hosts, any memory; slower than the fabric `tcp`.
`ofi:shm`: one host. Sources store into the sink's address space by themselves, where no key stops
them: only memory of `Engine.allocate` can be exported. They see it at an address of its own, which
a fence points elsewhere and keeps reserved until the last of them is gone.
`ofi:verbs;ofi_rxm`: RDMA NICs over libibverbs; prefer the fabric `verbs`.
`ofi:efa`: AWS. Its NICs cannot be tried without the hardware; what they demand is honoured.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence

from weightsync.transport.base import Engine
from weightsync.transport.native import _native

__all__ = ["open_ofi"]

_numbers = itertools.count()


def open_ofi(
    provider: str,
    *,
    name: str | None = None,
    addresses: Sequence[str] = ("127.0.0.1",),
    domains: Sequence[str] = (),
    trusted_network: bool = False,
    register_sources: bool = False,
) -> Engine:
    """Open an engine on a provider of libfabric.

    Args:
        provider: As `fi_info` names it: `tcp`, `shm`, `verbs;ofi_rxm`, `efa`.
        name: For messages; None makes one from the process id.
        addresses: Numeric IP addresses of this host, one rail for each. Sources knock at the first;
            for `shm` and `efa` it is good for nothing else.
        domains: Devices, as `fi_info` names them. `efa`: one rail for each, none means all. Others:
            one for each address, where several devices have the same.
        trusted_network: Allow providers other than `shm` off loopback. Sources prove at the control
            connection that they know the target's key, but libfabric carries data of anybody who
            reaches an endpoint and guesses a 64-bit key.
        register_sources: Register source memory also where the provider does not ask for it.

    Returns:
        The engine; its threads, one per rail and one for connections, start with their first use.

    Raises:
        ConfigError: libfabric is missing or too old, the provider offers nothing that fits on such
            an address or domain, or data would leave loopback on an untrusted network.
        RailError: A domain cannot be opened.
    """
    return _native.open_ofi(
        f"ofi-{provider}-{os.getpid()}-{next(_numbers)}" if name is None else name,
        provider,
        [str(address) for address in addresses],
        [str(domain) for domain in domains],
        trusted_network,
        register_sources,
    )
