"""Max-min fair rates by raising all flows together until a port is full: slow and plain."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


def water_filling(ports: Sequence[Sequence[int]], capacity: Sequence[int]) -> list[Fraction]:
    """Return the exact rate of each flow."""
    rates = [Fraction(0)] * len(ports)
    growing = set(range(len(ports)))
    left = [Fraction(c) for c in capacity]
    while growing:
        users = [sum(p in ports[f] for f in growing) for p in range(len(capacity))]
        step = min(left[p] / users[p] for p in range(len(capacity)) if users[p])
        for flow in growing:
            rates[flow] += step
        left = [space - step * num for space, num in zip(left, users, strict=True)]
        full = {p for p in range(len(capacity)) if users[p] and left[p] == 0}
        growing = {f for f in growing if not full & set(ports[f])}
    return rates
