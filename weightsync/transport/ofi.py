"""Fabrics `ofi:PROVIDER`: libfabric 1.17 or newer, loaded when an engine is opened.

The sink registers its memory, sources write it with remote CQ data as the immediate; an operation
is done when its bytes are delivered. Each target has endpoints of its own. A fence closes its
regions, so that their keys mean nothing any more, and its endpoints, since some providers go on
with a message that they have begun. A rail that fails is fenced alone: its part of the work goes
over the others, and it is tried again after a quarantine.

`ofi:tcp`: any two hosts, any memory; slower than the fabric `tcp`.
`ofi:shm`: one host. Sources store into the sink's address space by themselves, where no key stops
them: only memory of `Engine.allocate` can be exported. They see it at an address of its own, which
a fence points elsewhere and keeps reserved until the last of them is gone.
`ofi:verbs;ofi_rxm`: RDMA NICs over libibverbs; prefer the fabric `verbs`.
`ofi:efa`: AWS. Its NICs cannot be tried without the hardware; what they demand is honoured.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

from weightsync.transport.base import Engine
from weightsync.transport.native import _native, near_options

__all__ = ["ofi_providers", "open_ofi"]

_numbers = itertools.count()

# In a process of its own: providers leave threads and signal handlers behind. Only the first words
# of two structs are read, which never moved: fi_info (next, ..., fabric_attr at 104) and
# fi_fabric_attr (fabric, name, prov_name).
_ASK: Final = """
import ctypes, json
lib = ctypes.CDLL("libfabric.so.1")
lib.fi_version.restype = ctypes.c_uint32
version, info, names = lib.fi_version(), ctypes.c_void_p(), []
lib.fi_getinfo(ctypes.c_uint32(1 << 16 | 17), None, None, ctypes.c_uint64(0), None,
               ctypes.byref(info))
at = info.value
while at:
    attr = ctypes.c_void_p.from_address(at + 104).value
    names.append(ctypes.string_at(ctypes.c_void_p.from_address(attr + 16).value).decode())
    at = ctypes.c_void_p.from_address(at).value
print(json.dumps([f"{version >> 16}.{version & 0xffff}", sorted(set(names))]))
"""
_ASK_S: Final = 20.0


def ofi_providers() -> tuple[str, list[str]]:
    """Ask libfabric what it offers on this host; takes some hundred milliseconds.

    Returns:
        Its version and the names of its providers.

    Raises:
        OSError: There is no libfabric, or it does not answer.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK],
            capture_output=True,
            text=True,
            check=False,
            timeout=_ASK_S,
        )
        version, names = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError) as error:
        raise OSError("libfabric.so.1 does not tell its providers; see `fi_info`") from error
    return str(version), [str(name) for name in names]


def open_ofi(
    provider: str,
    *,
    name: str | None = None,
    addresses: Sequence[str] = ("127.0.0.1",),
    domains: Sequence[str] = (),
    trusted_network: bool = False,
    register_sources: bool = False,
    near: str | None = None,
    near_threads: int | None = None,
) -> Engine:
    """Open an engine on a provider of libfabric.

    Args:
        provider: As `fi_info` names it: `tcp`, `shm`, `verbs;ofi_rxm`, `efa`.
        name: For messages; None makes one from the process id.
        addresses: Numeric IP addresses of this host, one rail for each. Sources knock at the first
            that answers; for `shm` and `efa` they are good for nothing else.
        domains: Devices, as `fi_info` names them. `efa`: one rail for each, none means all. Others:
            one for each address, where several devices have the same.
        trusted_network: Allow providers other than `shm` off loopback. Sources prove at the control
            connection that they know the target's key, but libfabric carries data of anybody who
            reaches an endpoint and guesses a 64-bit key.
        register_sources: Register source memory also where the provider does not ask for it.
        near: Fabric for peers of this host, `local` or `cuda_ipc`; see docs/fabrics/mixed.md.
        near_threads: Its copying threads; None takes min(2, cores).

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
        near_options(near, near_threads),
    )
