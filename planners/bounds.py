"""Lower bounds of the time of a transfer: what no schedule can beat, whatever the software.

Each bound is a function of plain arrays, bytes and bytes per second. T is the time; X a set of
holder classes and |X| their bytes; H(X) the sources that hold any of them; e, d, u the rates of a
source's egress, a sink's ingress and a sink's egress. Sources: Kumar and Ross (2006) and Mundinger,
Weber and Weiss (2008) for relays, Gonzalez and Sahni (1976) for why ports decide without them.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from weightsync.ir.tables import BoolArray, IntArray, sum_by

__all__ = [
    "chain_s",
    "cut_s",
    "held_s",
    "message_s",
    "node_trick_s",
    "nvlink_s",
    "relay_gain",
    "relay_s",
    "slowest_s",
    "tree_s",
]

Rates = NDArray[np.float64]

_MAX_FLOW: Final = 2**31 - 2  # scipy's maximum_flow counts in 32 bits


def slowest_s(load_bytes: IntArray | Rates, bytes_per_s: float) -> float:
    """Return `max_j load_j / rate`, in seconds; 0 without load.

    Bound 1 for receiving ports and nodes, and the bounds of PCIe, memory, encoders and digests.
    """
    return float(load_bytes.max(initial=0)) / bytes_per_s


def held_s(class_bytes: IntArray, start: IntArray, holder: IntArray, bytes_per_s: Rates) -> float:
    """Return the time in which the holders can send what they hold, in seconds.

    Bound 2, with the bytes of each class counted once: `T = max_X |X| / sum of e_i over H(X)`,
    since each byte must leave some holder. Bound 3, with the bytes of all copies: the same formula
    is `min over assignments of max_i load_i / e_i` (duality of flow and cut).

    Args:
        class_bytes: Bytes of each class, `(H,)`.
        start: Holders of class h are `holder[start[h] : start[h + 1]]`, `(H + 1,)`.
        holder: Ports, `(E,)`.
        bytes_per_s: Rate of each port.

    Cost: a few maximum flows. From the average over everything on, each minimum cut gives the
    classes that are more crowded than T, and T rises to their average until nothing is crowded
    (Dinkelbach's method). The result is the average of real classes, so never above the bound;
    rounding to 32-bit flows can hide less than 1e-6 of it.
    """
    owner = np.repeat(np.arange(len(class_bytes)), np.diff(start))
    used = class_bytes[owner] > 0
    # Ranks that share a port are one holder.
    edges = np.unique(np.stack([owner[used], holder[used]], axis=1), axis=0)
    crowded = class_bytes > 0
    seconds = 0.0
    while crowded.any():
        ports = np.unique(edges[crowded[edges[:, 0]], 1])
        average = float(class_bytes[crowded].sum()) / float(bytes_per_s[ports].sum())
        if average <= seconds * (1 + 1e-9):
            break
        seconds = average
        crowded = _crowded(class_bytes, edges, bytes_per_s, seconds)
    return seconds


def _crowded(
    class_bytes: IntArray, edges: IntArray, bytes_per_s: Rates, seconds: float
) -> BoolArray:
    """Return which classes cannot be sent in time: those on the near side of a minimum cut."""
    num_classes, num_ports = len(class_bytes), len(bytes_per_s)
    scale = (_MAX_FLOW - num_ports) / max(float(class_bytes.sum()), 1.0)
    supply = np.floor(class_bytes * scale)
    capacity = np.minimum(np.ceil(bytes_per_s * (seconds * scale)), _MAX_FLOW)
    start, end = 0, 1 + num_classes + num_ports
    tails = [np.zeros(num_classes), 1 + edges[:, 0], 1 + num_classes + np.arange(num_ports)]
    heads = [1 + np.arange(num_classes), 1 + num_classes + edges[:, 1], np.full(num_ports, end)]
    limits = np.concatenate([supply, np.full(len(edges), _MAX_FLOW), capacity]).astype(np.int32)
    ends = (np.concatenate(tails).astype(np.int32), np.concatenate(heads).astype(np.int32))
    graph = csr_array((limits, ends), shape=(end + 1, end + 1))
    result = maximum_flow(graph, start, end)
    reached = np.zeros(end + 1, np.bool_)
    if result.flow_value < supply.sum():
        residual = csr_array(graph - result.flow)
        residual.eliminate_zeros()
        reached[breadth_first_order(residual, start, return_predecessors=False)] = True
    return reached[1 : 1 + num_classes]


def relay_s(
    unique_bytes: int,
    need_bytes: IntArray,
    source_bytes_per_s: Rates,
    sink_bytes_per_s: Rates,
    *,
    is_full_duplex: bool = True,
) -> float:
    """Return the bound where sinks pass on what they received, in seconds.

    Bound 4: `T = max{ W / sum e, max_j D_j / d_j, sum D / (sum e + sum u) }`: the content leaves
    the sources once, each sink receives its own, and everything that is received was sent by
    somebody. Attained in the fluid model if all sinks need the same. A NIC that cannot send and
    receive at once has `sum d T - sum D` left to send: `T >= 2 sum D / (sum e + sum d)`, unless the
    sources alone are faster.

    Args:
        unique_bytes: W, what all sinks need, counted once.
        need_bytes: D, `(D,)`.
        source_bytes_per_s: e, `(S,)`.
        sink_bytes_per_s: d and u, `(D,)`.
        is_full_duplex: Whether sinks send and receive at full rate at once.
    """
    total = float(need_bytes.sum())
    if not total:
        return 0.0
    source, sink = float(source_bytes_per_s.sum()), float(sink_bytes_per_s.sum())
    everyone = total if is_full_duplex else 2 * total
    return max(
        unique_bytes / source,
        float((need_bytes / sink_bytes_per_s).max()),
        min(everyone / (source + sink), total / source),
    )


def relay_gain(need_bytes: IntArray, source_bytes_per_s: Rates, sink_bytes_per_s: Rates) -> float:
    """Return at most how many times faster relays make a transfer that sends every copy.

    `max(1, (sum D / sum e) / max_j D_j / d_j)`: with equal NICs relays help only if the sinks
    together need more than the sources can send while the busiest sink receives.
    """
    if not need_bytes.any():
        return 1.0
    receiver = float((need_bytes / sink_bytes_per_s).max())
    return max(1.0, float(need_bytes.sum()) / float(source_bytes_per_s.sum()) / receiver)


def cut_s(
    need_bytes: int, unique_bytes: int, cut_bytes_per_s: float, *, has_relays: bool = False
) -> float:
    """Return the time through the cut between trainers and rollouts, in seconds.

    Bound 5: `sum D / c`; `W / c` with relays, since one copy of everything is enough.
    """
    return (unique_bytes if has_relays else need_bytes) / cut_bytes_per_s


def nvlink_s(
    distinct_bytes: IntArray, node: IntArray, node_bytes: IntArray, bytes_per_s: float
) -> float:
    """Return the time of passing on inside nodes what crossed the network once, in seconds.

    Bound 6: of what the g GPUs of node v need, U_v comes in by the NICs; the rest comes from
    neighbours: `max_v (sum of D_j in v - U_v) / (g * rate)`. Where all need the same that is
    `U_v (g - 1) / (g * rate)`, an all-gather.

    Args:
        distinct_bytes: D, what a sink stores twice counted once, `(D,)`.
        node: Node of each sink, `(D,)`.
        node_bytes: U, `(nodes,)`.
        bytes_per_s: One GPU, one direction.
    """
    num = len(node_bytes)
    rest = sum_by(node, distinct_bytes, num) - node_bytes
    gpus = np.maximum(np.bincount(node, minlength=num), 1)
    return float((rest / gpus).max(initial=0.0)) / bytes_per_s


def message_s(num_writes: IntArray, gap_s: float) -> float:
    """Return the time in which the busiest rank posts its writes, in seconds.

    Bound 7: `max_n N_n * max(g, o / threads)`.
    """
    return int(num_writes.max(initial=0)) * gap_s


def node_trick_s(
    node_bytes: int, gpus: int, node_bytes_per_s: float, nvlink_bytes_per_s: float
) -> float:
    """Return the time of a node that receives what all its GPUs need once, in seconds.

    Each GPU receives 1/g over its own NIC, then all gather over NVLink, both at once:
    `T = max(U / B, U (g - 1) / (g * rate))`.
    """
    gather = node_bytes * (gpus - 1) / (gpus * nvlink_bytes_per_s)
    return max(node_bytes / node_bytes_per_s, gather)


def chain_s(
    nbytes: int, num_nodes: int, bytes_per_s: float, hop_s: float, num_chunks: int | None = None
) -> float:
    """Return the time until the last of a chain of nodes has a message, in seconds.

    `T(k) = (k + p - 2) (a + b m / k)` for k chunks, p nodes with the first one, latency a and
    `b = 1 / rate`. The best k is near `sqrt((p - 2) b m / a)`.

    Args:
        nbytes: m.
        num_nodes: p >= 2.
        bytes_per_s: Of one link.
        hop_s: a > 0.
        num_chunks: k; None takes the best.
    """
    wire = nbytes / bytes_per_s
    if num_chunks is not None:
        return (num_chunks + num_nodes - 2) * (hop_s + wire / num_chunks)
    best = math.sqrt((num_nodes - 2) * wire / hop_s)
    around = {max(1, math.floor(best)), max(1, math.ceil(best))}
    return min(chain_s(nbytes, num_nodes, bytes_per_s, hop_s, k) for k in around)


def tree_s(nbytes: int, num_nodes: int, bytes_per_s: float, hop_s: float) -> float:
    """Return the time of a binomial tree without pipelining: `ceil(log2 p) (a + b m)`, seconds."""
    return math.ceil(math.log2(num_nodes)) * (hop_s + nbytes / bytes_per_s)
