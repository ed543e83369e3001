"""What every link carried, held against the plan."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any, Final

import numpy as np

from weightsync.fleet.fleet import Observed
from weightsync.ir.tables import IntArray
from weightsync.planners.traffic import Traffic
from weightsync.scale.topology import Counters, Shape

__all__ = ["links_report"]

# Wire bytes beyond headers and segments sent again: frames and acknowledgements of the fabric.
_MOST_EXTRA: Final = 0.03
_LEAST_EXTRA: Final = -0.001  # frames that are a little fuller than MTU and headers make them
_MOST_ACKS: Final = 0.02
_BITS: Final = 8
_ETHERNET: Final = 14


def links_report(
    shape: Shape,
    rails: int,
    hosts: tuple[Sequence[int], Sequence[int]],
    traffic: Traffic,
    placed_bytes: IntArray,
    seen: Sequence[Observed],
    counted: Sequence[Counters],
) -> dict[str, Any]:
    """Compare the byte counters of every link with the plan.

    With the stream go the plan's bytes over TCP's share of a frame, what the host's TCP says that
    it sent again (full frames at most), and up to 3 % more; against it acknowledgements only. The
    fabrics' own counters say how many bytes of weights were sent and placed, without headers and
    what TCP sent again: these must be the plan's.

    Args:
        shape: Of the links.
        rails: Links of each host.
        hosts: Hosts of the plan's sources and sinks.
        traffic: What the plan moves.
        placed_bytes: What each sink is to hold afterwards, whoever sends it, `(sinks,)`.
        seen: Versions, as their members saw them.
        counted: What the links carried meanwhile.

    Returns:
        `match`; `extra_min, extra_max`: share of bytes beyond headers and what was sent again, or
        beyond headers alone for the least; `resent`: segments sent again; `acks_max`: bytes against
        the stream, as a share of it; `rail_uneven_max`: by how much of its share a rail carried
        more; `sink_utilisation`: of the busiest sink link while bytes were on the wire; `dropped`;
        `wrong`: what the fabrics' counters say; bytes planned for each rank.
    """
    sent, received = traffic.pair_bytes.sum(axis=1), traffic.pair_bytes.sum(axis=0)
    least, extra, acks, uneven, wrong = [], [], [], [], []
    for one, counters in zip(seen, counted, strict=True):
        flows = (
            (sent, hosts[0], counters.sent, counters.received),
            (received, hosts[1], counters.received, counters.sent),
        )
        for planned, ranks, along, against in flows:
            for host, nbytes in zip(ranks, planned.tolist(), strict=True):
                wire = np.array(along[host], np.float64)
                if nbytes == 0:
                    wrong += [f"host {host} carried {wire.sum():.0f} bytes"] * bool(wire.sum())
                    continue
                again = counters.resent[host] * (shape.mtu + _ETHERNET)
                least.append(float(wire.sum()) * shape.payload_fraction / nbytes - 1)
                extra.append(float(wire.sum() - again) * shape.payload_fraction / nbytes - 1)
                uneven.append(float(wire.max() * rails / wire.sum() - 1))
                acks.append(sum(against[host]) / nbytes)
        placed = [int(event["placed"]) for event in one.sinks]
        out = [int(event["bytes"]) for event in one.sources]
        if out != sent.tolist() or placed != placed_bytes.tolist():
            wrong.append(f"sources sent {out}, sinks placed {placed}")
    rate = shape.mbit_per_s * 1e6 / _BITS
    return {
        "match": min(least) > _LEAST_EXTRA
        and max(extra) < _MOST_EXTRA
        and max(acks) < _MOST_ACKS
        and not wrong,
        "extra_min": min(least),
        "extra_max": max(extra),
        "acks_max": max(acks),
        "rail_uneven_max": max(uneven),
        "sink_utilisation": median(
            max(max(counters.received[host]) for host in hosts[1]) / (rate * one.stages_s["wire"])
            for one, counters in zip(seen, counted, strict=True)
        ),
        "resent": [sum(counters.resent) for counters in counted],
        "dropped": [counters.dropped for counters in counted],
        "wrong": wrong,
        "rank_bytes_sent": sent.tolist(),
        "rank_bytes_received": received.tolist(),
    }
