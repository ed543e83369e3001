"""Max-min fair rates: how flows share the ports that they pass through."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from weightsync.ir.tables import IntArray

__all__ = ["max_min_rates"]

Floats = NDArray[np.float64]


def max_min_rates(ports: IntArray, capacity: Floats) -> Floats:
    """Share ports fairly: no flow can get more without taking from one that has no more.

    Every flow gets the fair share of its narrowest port. A port whose fair share none of its flows
    is kept from by another port is a bottleneck whatever happens elsewhere, so all such ports are
    settled at once; what they leave at the other ports is shared among the flows that remain.

    Args:
        ports: Ports of each flow, `(F, K)`; the same port is not listed twice.
        capacity: Of each port, > 0, `(P,)`.

    Returns:
        Rate of each flow, `(F,)`.

    Cost: a few passes over the flows for each level of bottlenecks; two or three levels in
    transfers that are balanced.
    """
    num_ports = len(capacity)
    rates = np.zeros(len(ports))
    left = capacity.copy()
    flows = np.arange(len(ports))
    columns = list(ports.T)
    while len(flows):
        count = np.bincount(columns[0], minlength=num_ports)
        for column in columns[1:]:
            count = count + np.bincount(column, minlength=num_ports)
        share = left / np.maximum(count, 1)
        shares = [share[column] for column in columns]
        narrowest = shares[0]
        for other in shares[1:]:
            narrowest = np.minimum(narrowest, other)
        # Flows that are kept below a port's share, by more than rounding, unsettle that port.
        limit = narrowest * (1 + 1e-12)
        unsettled = np.zeros(num_ports, np.bool_)
        for column, mine in zip(columns, shares, strict=True):
            unsettled[column[mine > limit]] = True
        settled = ~unsettled[columns[0]]
        for column in columns[1:]:
            settled |= ~unsettled[column]
        rates[flows[settled]] = narrowest[settled]
        for column in columns:
            left -= np.bincount(column[settled], weights=narrowest[settled], minlength=num_ports)
        np.maximum(left, 0, out=left)
        keep = ~settled
        flows = flows[keep]
        columns = [column[keep] for column in columns]
    return rates
