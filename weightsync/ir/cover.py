"""Proof that strided rows cover every element of a buffer exactly once.

Rows may interleave in any way (gate and up rows, transposes, columns), so sorting intervals does
not decide disjointness, and a mask of every element costs as much as the weights. Instead the
multiset of addresses is compared as a polynomial: rows cover `[0, N)` exactly once if and only if

    sum over rows of x**offset * prod over dims of (1 + x**stride + ... + x**(stride * (n - 1)))
        ==  1 + x + ... + x**(N - 1).

Both sides are evaluated in closed form modulo the prime 2**61 - 1 at two points. Two different
polynomials of degree N agree at a random point with probability below N / 2**61 (Schwartz-Zippel);
at both points below 2**-50 for buffers up to 2**36 elements. Volume and bounds are checked exactly.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from weightsync.ir.pieces import hull_elements
from weightsync.ir.tables import (
    MAX_DIMS,
    BoolArray,
    IntArray,
    any_dim,
    sum_by,
    unique_rows,
    volume_of,
)

__all__ = ["covers_once"]

_U64 = NDArray[np.uint64]

_PRIME: Final = 2**61 - 1
# The first 61 bits of sha256(b"weightsync cover 0") and of b"weightsync cover 1": points that
# nobody chose. Fixed, so that a plan is accepted or refused alike everywhere.
_POINTS: Final = (0x1974EAF19072591B, 0x1C91D17BEC8B6696)
_BLOCK: Final = 1 << 14  # rows at a time: a dozen temporaries stay in the L2 cache
_WINDOW: Final = 11  # bits per power table: 2048 entries stay in the L1 cache


def _reduce(value: _U64) -> _U64:
    """Reduce values below 2**64 modulo the prime."""
    value = (value & np.uint64(_PRIME)) + (value >> np.uint64(61))
    return np.where(value >= np.uint64(_PRIME), value - np.uint64(_PRIME), value)


def _multiply(a: _U64, b: _U64) -> _U64:
    """Multiply values below 2**61 modulo the prime, in 64-bit arithmetic."""
    a_high, a_low = a >> np.uint64(31), a & np.uint64(2**31 - 1)
    b_high, b_low = b >> np.uint64(31), b & np.uint64(2**31 - 1)
    middle = a_low * b_high + a_high * b_low
    # 2**61 == 1, hence 2**62 == 2 and middle * 2**31 == (middle >> 30) + (its low bits << 31).
    low = (middle & np.uint64(2**30 - 1)) << np.uint64(31)
    result: _U64 = _reduce(
        a_high * b_high * np.uint64(2) + (middle >> np.uint64(30)) + low + a_low * b_low
    )
    return result


@functools.cache  # at most six per point: exponents have fewer than 64 bits
def _power_table(point: int, number: int) -> _U64:
    """Return `x**(i << (_WINDOW * number))` for i below `2**_WINDOW`, where x is the point."""
    base = pow(point, 1 << (_WINDOW * number), _PRIME)
    table = np.ones(1, np.uint64)
    for _ in range(_WINDOW):  # doubles the table: the upper half is the lower times base
        table = np.concatenate([table, _multiply(table, np.full_like(table, base))])
        base = base * base % _PRIME
    return table


class _Powers:
    """Powers of one point, by table lookup of `_WINDOW` exponent bits at a time."""

    def __init__(self, point: int, largest: int) -> None:
        num_tables = -(-largest.bit_length() // _WINDOW)
        self.tables = [_power_table(point, number) for number in range(num_tables)]

    def __call__(self, exponent: IntArray) -> _U64:
        result = np.ones(exponent.shape, np.uint64)
        for number, table in enumerate(self.tables):
            digit = (exponent >> (_WINDOW * number)) & (2**_WINDOW - 1)
            result = _multiply(result, table[digit]) if number else table[digit]
        return result


def _geometric(powers: _Powers, n: IntArray, stride: IntArray) -> _U64:
    """Return `1 + x**stride + ... + x**(stride * (n - 1))` elementwise; 1 where n is 1."""
    stride = np.where(n > 1, stride, 1)
    distinct, inverse = np.unique(stride, return_inverse=True)
    one = np.uint64(1)
    minus_one = np.uint64(_PRIME - 1)
    # Python's big integers invert: there are few distinct strides, however many rows.
    inverses = [pow(int(v) - 1, -1, _PRIME) for v in powers(distinct)]
    denominator = np.array(inverses, np.uint64)
    numerator = _reduce(powers(np.where(n > 1, n * stride, 0)) + minus_one)
    series = _multiply(numerator, denominator[inverse.reshape(n.shape)])
    return np.where(n > 1, series, one)


class _Sums:
    """Sums of values below 2**61 per group modulo the prime; at most 2**31 values."""

    def __init__(self, num_groups: int) -> None:
        self._low = np.zeros(num_groups, np.uint64)
        self._high = np.zeros(num_groups, np.uint64)

    def add(self, group: IntArray, values: _U64) -> None:
        np.add.at(self._low, group, values & np.uint64(2**31 - 1))
        np.add.at(self._high, group, values >> np.uint64(31))

    def total(self) -> _U64:
        shift = np.full(len(self._high), 2**31, np.uint64)
        return _reduce(_multiply(_reduce(self._high), shift) + _reduce(self._low))


def covers_once(
    buffer: IntArray,
    offset: IntArray,
    n: IntArray,
    stride: IntArray,
    numel: IntArray,
    nest: NDArray[Any] | None = None,
) -> BoolArray:
    """Tell for each buffer whether the rows cover each of its elements exactly once.

    Args:
        buffer: Buffer of each row, `(R,)`.
        offset: First element of each row, `(R,)`, >= 0.
        n: Counts per dim, >= 1, `(N, 4)`.
        stride: Strides in elements, >= 0, `(N, 4)`.
        numel: Elements of each buffer, `(B,)`, below 2**47.
        nest: Which of `n` and `stride` each row has, `(R,)`; None: they are listed row by row.

    Returns:
        `(B,)` booleans. False for certain if a row leaves its buffer, steps on the spot, or the
        volumes differ; otherwise decided by the polynomial identity above.

    Cost: about 0.2 us a row.
    """
    num_buffers = len(numel)
    if nest is None:
        # The product over dims depends on (n, stride) alone, and few of those are distinct.
        first, nest = unique_rows([n, stride])
        n, stride = n[first], stride[first]
    volume = sum_by(buffer, volume_of(n)[nest], num_buffers)
    bad = (offset < 0) | (offset + hull_elements(n, stride)[nest] > numel[buffer])
    bad |= any_dim((n > 1) & (stride < 1))[nest]  # holds an element twice
    good: BoolArray = volume == numel
    good[buffer[bad]] = False
    if not good.any() or not len(buffer):
        return good
    largest = int(numel.max(initial=1)) * 2
    for point in _POINTS:
        powers = _Powers(point, largest)
        series = _geometric(powers, n, np.clip(stride, 1, largest))
        factor = series[:, 0]
        for dim in range(1, MAX_DIMS):
            factor = _multiply(factor, series[:, dim])
        sums = _Sums(num_buffers)
        for start in range(0, len(buffer), _BLOCK):
            rows = slice(start, start + _BLOCK)
            terms = _multiply(powers(np.where(bad[rows], 0, offset[rows])), factor[nest[rows]])
            sums.add(buffer[rows], terms)
        total = sums.total()
        expected = _geometric(powers, np.maximum(numel, 1), np.ones_like(numel))
        good &= (total == expected) | (numel == 0)
    return good
