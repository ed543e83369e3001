"""Digests on their way from sources over the coordinator to sinks.

A fleet of 256 sources and 128 sinks has 32,768 pairs. What they have to say travels in columns, so
that the coordinator sorts all of it by sink in some milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from weightsync.ir.tables import IntArray, expand, starts_of
from weightsync.service import weightsync_pb2 as pb

__all__ = ["by_sink", "digests_fault", "pack_digests", "unpack_digests"]

Digests = NDArray[np.uint64]


def pack_digests(digests: Mapping[int, Digests]) -> pb.Digests:
    """Puts the digests of several peers into a message.

    Args:
        digests: Of each peer, `(buckets,)` in the order of the plan.
    """
    peers = sorted(digests)
    columns = [np.ascontiguousarray(digests[peer], "<u8") for peer in peers]
    return pb.Digests(
        peers=np.array(peers, "<u4").tobytes(),
        counts=np.array([len(column) for column in columns], "<u4").tobytes(),
        values=b"".join(column.tobytes() for column in columns),
    )


def digests_fault(message: pb.Digests) -> str:
    """Says how a message contradicts itself; empty where it does not."""
    num_peers, num_values = len(message.peers) // 4, len(message.values) // 8
    whole = len(message.peers) == 4 * num_peers and len(message.values) == 8 * num_values
    counts = np.frombuffer(message.counts, np.uint8)
    if not whole or len(counts) != 4 * num_peers or int(counts.view("<u4").sum()) != num_values:
        return (
            f"digests of {num_peers} peers: {len(counts)} bytes of counts and "
            f"{len(message.values)} of values do not fit them"
        )
    return ""


def unpack_digests(message: pb.Digests) -> dict[int, Digests]:
    """Returns the digests by peer, of a message that was checked."""
    peers, counts, values = _columns(message)
    ends = starts_of(counts).tolist()
    return {
        peer: values[first:last]
        for peer, first, last in zip(peers.tolist(), ends[:-1], ends[1:], strict=True)
    }


def by_sink(of_source: Mapping[int, pb.Digests]) -> dict[int, pb.Digests]:
    """Sorts what sources said of their sinks into what each sink needs of its sources.

    Args:
        of_source: By source; peers in it are sinks. Checked.

    Returns:
        By sink; peers in it are sources.

    Cost: 2 ms for 256 sources of 128 sinks.
    """
    if not of_source:
        return {}
    sources = sorted(of_source)
    messages = [of_source[source] for source in sources]
    sink = np.frombuffer(b"".join(message.peers for message in messages), "<u4")
    counts = np.frombuffer(b"".join(message.counts for message in messages), "<u4")
    values = np.frombuffer(b"".join(message.values for message in messages), "<u8")
    source = np.repeat(np.array(sources, "<u4"), [len(message.peers) // 4 for message in messages])
    order = np.argsort(sink, kind="stable")  # sources of a sink stay in order
    owner, local = expand(counts[order].astype(np.int64))
    values = values[starts_of(counts)[:-1][order][owner] + local]
    source, sink, counts = source[order], sink[order], counts[order]
    first = np.flatnonzero(np.diff(sink, prepend=sink[:1] + 1))
    rows = [*first.tolist(), len(sink)]
    at = starts_of(counts)[rows].tolist()
    return {
        number: pb.Digests(
            peers=source[rows[i] : rows[i + 1]].tobytes(),
            counts=counts[rows[i] : rows[i + 1]].tobytes(),
            values=values[at[i] : at[i + 1]].tobytes(),
        )
        for i, number in enumerate(sink[first].tolist())
    }


def _columns(message: pb.Digests) -> tuple[IntArray, IntArray, Digests]:
    return (
        np.frombuffer(message.peers, "<u4").astype(np.int64),
        np.frombuffer(message.counts, "<u4").astype(np.int64),
        np.frombuffer(message.values, "<u8").astype(np.uint64),
    )
