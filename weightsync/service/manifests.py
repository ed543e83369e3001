"""Manifests on the wire: deflated, and each content once.

Columns of numbers shrink to a twentieth. The ranks of equal replicas have equal manifests, so that
the 384 of a fleet of 256 sources and 128 sinks, 240 MB of numbers, are 5 MB in every Bind.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Final

from weightsync.errors import ConfigError
from weightsync.service import weightsync_pb2 as pb

__all__ = ["deflate", "fill_bind", "inflate", "members_of", "place_of"]

Members = list[tuple[str, bytes]]

_MOST: Final = 1 << 30  # what a message might have carried as it is


def deflate(manifest: bytes) -> bytes:
    """Shrink a serialised manifest. About 0.5 GB/s."""
    return zlib.compress(manifest, 1)


def inflate(members: Iterable[tuple[str, bytes]]) -> Members:
    """Return labels with manifests as they were. Equal ones are inflated once, and are one object.

    Raises:
        ConfigError: Bytes that were never deflated, or that would be more than 1 GiB.
    """
    known: dict[bytes, bytes] = {}
    found = []
    for label, data in members:
        if data not in known:
            known[data] = _inflated(label, data)
        found.append((label, known[data]))
    return found


def _inflated(label: str, data: bytes) -> bytes:
    stream = zlib.decompressobj()
    try:
        manifest = stream.decompress(data, _MOST)
    except zlib.error as error:
        raise ConfigError(f"the manifest of {label} cannot be read: {error}") from error
    if not stream.eof or stream.unused_data:
        raise ConfigError(f"the manifest of {label} is cut off, or larger than {_MOST} bytes")
    return manifest


def fill_bind(
    bind: pb.Bind, sources: Iterable[tuple[str, bytes]], sinks: Iterable[tuple[str, bytes]]
) -> None:
    """Put labels and deflated manifests into a Bind."""
    number: dict[bytes, int] = {}
    for side, members in ((bind.sources, sources), (bind.sinks, sinks)):
        for label, manifest in members:
            side.add(label=label, manifest=number.setdefault(manifest, len(number)))
    bind.manifests.extend(number)


def members_of(bind: pb.Bind) -> tuple[Members, Members]:
    """Return labels and deflated manifests of sources and of sinks."""
    sources, sinks = (
        [(member.label, bind.manifests[member.manifest]) for member in side]
        for side in (bind.sources, bind.sinks)
    )
    return sources, sinks


def place_of(side: Iterable[pb.MemberManifest], label: str) -> int:
    """Return a member's index within its side."""
    return [member.label for member in side].index(label)
