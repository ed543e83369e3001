"""What the protocol adds to a transfer: opening a version, deciding it, adopting it.

Follows docs/protocol.md. The coordinator takes one message at a time; gateways, where a job has
them, take several beside each other.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Final

import numpy as np
from numpy.typing import NDArray

from weightsync.ir.plan import Plan
from weightsync.ir.tables import IntArray, sum_by
from weightsync.planners.cluster import Cluster, Quality
from weightsync.units import GB

__all__ = [
    "MAX_GATEWAYS",
    "armed_s",
    "decided_s",
    "gateways_for",
    "in_turn",
    "pause_s",
    "through_gateways",
]

MAX_GATEWAYS: Final = 64
"""Most gateways that a job takes."""

Floats = NDArray[np.float64]

# Pairs of source and sink whose digests the coordinator sorts while it decides about one message.
_PAIRS_A_MESSAGE: Final = 100
_FEW_MEMBERS: Final = 128
_MEMBERS_A_GATEWAY: Final = 48


def gateways_for(num_members: int) -> int:
    """Return how many gateways a job of so many ranks does well to have; 0 for a small one."""
    if num_members < _FEW_MEMBERS:
        return 0
    return min(-(-num_members // _MEMBERS_A_GATEWAY), MAX_GATEWAYS)


def through_gateways(cluster: Cluster, num_gateways: int) -> Cluster:
    """Return a cluster whose messages cost what they do through gateways.

    Gateways and coordinator work beside each other, so that the slower one sets the pace; a message
    passes through both.
    """
    if num_gateways == 0:
        return cluster
    alone_s = cluster.control_message_s
    return dataclasses.replace(
        cluster,
        control_message_s=max(cluster.control_core_s, alone_s / num_gateways),
        control_round_trip_s=cluster.control_round_trip_s + 2 * alone_s,
    )


def armed_s(num_sources: int, num_sinks: int, cluster: Cluster) -> float:
    """Return the time from the last publish to the first write, in seconds.

    Publish of each source, Arm of each sink, Armed of each sink, of which all but the last are
    handled while that is on its way, Write of each source.
    """
    round_trip_s, message_s = cluster.control_round_trip_s, cluster.control_message_s
    armed = max(round_trip_s + message_s, num_sinks * message_s)
    return round_trip_s + (2 * num_sources + num_sinks) * message_s + armed


def in_turn(lane: IntArray, arrival: Floats, work: Floats, num_lanes: int) -> Floats:
    """Return when each item is done if every lane works on one at a time, in order of arrival.

    Args:
        lane: Lane of each item.
        arrival: When it is there.
        work: What it takes.
        num_lanes: Lanes are 0 .. num_lanes - 1.
    """
    done = np.zeros(len(lane))
    order = np.lexsort((arrival, lane))
    ends = np.searchsorted(lane[order], np.arange(num_lanes + 1))
    for first, last in itertools.pairwise(ends.tolist()):
        mine = order[first:last]
        total = np.cumsum(work[mine])
        # Item k is done when the busy period that it is in began, plus all work since then.
        done[mine] = total + np.maximum.accumulate(arrival[mine] - total + work[mine])
    return done


def decided_s(
    plan: Plan, cluster: Cluster, written: Floats, verified: Floats, begin_s: float
) -> float:
    """Return when the last source hears the decision.

    When all senders have sent WritesDone, the coordinator sorts what they say by sink and sends
    each sink one Expect; a sink votes when it has that and has verified all; the decision is on
    disk before anybody is told, sources first.

    Args:
        plan: Who sends to which sink.
        cluster: Times of messages and of the disk.
        written: When each sender knows that all its writes are done: sources, then sinks that pass
            on, `(S,)` or `(S + D,)`.
        verified: When each bucket was verified, `(B,)`.
        begin_s: When writing began.
    """
    way_s, message = cluster.control_round_trip_s / 2, cluster.control_message_s
    num_sources, num_sinks = len(plan.source.ranks), len(plan.sink.ranks)
    dst = plan.buckets.dst_rank.astype(np.int64)
    sender = plan.sender
    num_pairs = len(np.unique(sender * num_sinks + dst))
    # Sinks that pass nothing on have nothing to report.
    tells = np.arange(len(written)) < num_sources
    tells[sender] = True
    handling = np.where(tells, message, 0.0)
    heard = in_turn(np.zeros(len(written), np.int64), written + way_s, handling, 1)
    sorted_s = (
        float(heard[tells].max(initial=begin_s))
        + num_pairs * cluster.control_core_s / _PAIRS_A_MESSAGE
    )
    told = sorted_s + message * np.arange(1, num_sinks + 1)
    ready = np.full(num_sinks, begin_s)  # where there is nothing to compare
    np.maximum.at(ready, dst, np.maximum(verified, told[dst] + way_s))
    # Votes are handled after the last Expect: no sink is ready much earlier.
    busy_until = float(told.max(initial=sorted_s))
    votes = np.maximum(ready + way_s, busy_until)
    voted = in_turn(np.zeros(num_sinks, np.int64), votes, np.full(num_sinks, message), 1)
    decided = float(voted.max(initial=busy_until)) + cluster.journal_s
    return decided + num_sources * message + way_s


def pause_s(plan: Plan, cluster: Cluster, quality: Quality) -> float:
    """Return how long sinks stand still while staged weights become the live ones.

    A copy inside the GPU reads and writes each byte; from host memory it passes PCIe. Around it are
    ReadyToApply, Apply, Applied and Activate of every sink.
    """
    sink = plan.sink.buffers
    largest = int(
        sum_by(sink.rank, sink.numel * sink.itemsize, len(plan.sink.ranks)).max(initial=0)
    )
    if cluster.is_gpu_direct:
        copy_s = 2 * largest / (cluster.hbm_gb_per_s.of(quality) * GB)
    else:
        copy_s = largest / (cluster.h2d_gb_per_s.of(quality) * GB)
    messages = 4 * len(plan.sink.ranks) * cluster.control_message_s
    return copy_s + 2 * cluster.control_round_trip_s + messages
