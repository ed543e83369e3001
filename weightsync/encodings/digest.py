"""The digest of stored codes: linear, keyed by canonical element number, so that any cut composes.

Definition. All arithmetic is modulo 2^32, in two lanes k = 0, 1 that never mix.

* A tensor has dims (i0, i1, i2, i3), padded in front with size 1. A code (the stored bits of one
  element) is split into 16-bit *units*, lowest first: 1, 2, 4, 8 bytes give 1, 1, 2, 4 units. Units
  are read as signed, except that a one-byte code is one zero-extended unit. Unit h of element i3
  has number u = i3 * units + h.
* Keys come from splitmix64. With GAMMA = 0x9E3779B97F4A7C15 and mix(z) its finaliser,
  key(family, i) = mix(mix(seed + (family + 1) * GAMMA) + (i + 1) * GAMMA) modulo 2^64; lane 0 takes
  the low half, lane 1 the high half, both made odd (| 1). Families: 0 tensor (i = 0), 1..3 dims
  0..2, 4 runs of 4096 units along the last dim.
* C_k[0..4095] are signed 16-bit keys: the low 16 bits of mix(mix(k + 1) + j * GAMMA) for
  j = 1, 2, ..., leaving out zero and every number already taken in this lane.
* lane_k = sum over units of unit * key(0, 0) * key(1, i0) * key(2, i1) * key(3, i2)
  * key(4, u // 4096) * C_k[u % 4096]; digest = lane_1 << 32 | lane_0.

`seed` is made from the tensor's name, so equal codes in another tensor count differently. Boxes of
a tensor that do not overlap add up (lane by lane) to the digest of their union, wherever and in
whatever order they lie in memory. Every change of a single unit changes the digest: |difference| *
|C| < 2^32 is not 0 and the other keys are odd. So does every swap of two unequal units of one
run. Other changes are missed with a chance of about 2^-62 when the codes look random, more for
differences with many trailing zero bits. It finds errors, not adversaries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from weightsync.encodings.rows import digest_rows, pack_keys
from weightsync.errors import ConfigError
from weightsync.ir.tables import MAX_DIMS

__all__ = [
    "digest_add",
    "digest_rows",
    "digest_sub",
    "digest_sum",
    "pack_keys",
    "reference_digest",
    "tensor_seed",
]

GAMMA: Final = 0x9E3779B97F4A7C15
SEGMENT: Final = 4096  # units that share one key along the last dim, and the size of the C tables

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

_LANE: Final = np.uint64(0xFFFFFFFF)
_HALF: Final = np.uint64(32)


def tensor_seed(name: str) -> int:
    """Seed of a tensor's keys: the first 8 bytes of sha256(name), little-endian, as int64.

    Args:
        name: Canonical name of the tensor.

    Returns:
        A signed 64-bit integer; fits an int64 column.
    """
    first = hashlib.sha256(name.encode()).digest()[:8]
    return int.from_bytes(first, "little", signed=True)


def digest_add(a: npt.ArrayLike, b: npt.ArrayLike) -> U64:
    """Digest of the union of disjoint boxes, from theirs: lanes added separately.

    Args:
        a: Digests, uint64 (or integers in 0..2^64-1), any shape.
        b: The same, broadcast against `a`.

    Returns:
        uint64 array of the broadcast shape (0-d for scalars).
    """
    x, y = np.asarray(a, np.uint64), np.asarray(b, np.uint64)
    with np.errstate(over="ignore"):  # numpy warns when scalars wrap, which is meant here
        high = (x >> _HALF) + (y >> _HALF)
        return np.asarray((high << _HALF) | ((x + y) & _LANE))


def digest_sub(a: npt.ArrayLike, b: npt.ArrayLike) -> U64:
    """Inverse of `digest_add`: digest of a box without a part of it.

    Args:
        a: Digests of the whole, uint64, any shape.
        b: Digests of the parts to take away, broadcast against `a`.

    Returns:
        uint64 array of the broadcast shape (0-d for scalars).
    """
    x, y = np.asarray(a, np.uint64), np.asarray(b, np.uint64)
    with np.errstate(over="ignore"):
        high = (x >> _HALF) - (y >> _HALF)
        return np.asarray((high << _HALF) | ((x - y) & _LANE))


def digest_sum(digests: npt.ArrayLike, axis: int = 0) -> U64:
    """Sum of digests along one axis, lanes added separately.

    Args:
        digests: uint64 array of at least one dim.
        axis: The axis to add up.

    Returns:
        uint64 array without that axis; 0 (the digest of nothing) where it is empty.
    """
    x = np.asarray(digests, np.uint64)
    # At most 2^32 summands of 32 bits each: neither sum overflows 64 bits.
    low = np.sum(x & _LANE, axis=axis, dtype=np.uint64)
    high = np.sum(x >> _HALF, axis=axis, dtype=np.uint64)
    return np.asarray((high << _HALF) | (low & _LANE), dtype=np.uint64)


def reference_digest(
    codes: npt.NDArray[np.generic], lo: Sequence[int], step: Sequence[int], seed: int
) -> int:
    """Digest of one box by the definition above; slow, for tests.

    Args:
        codes: The box in canonical order, 1..4 dims; items of 1, 2, 4 or 8 bytes, only their
            bits count.
        lo: Canonical index of the first element, per dim of `codes`.
        step: Canonical distance of neighbours, per dim of `codes`.
        seed: See `tensor_seed`.

    Returns:
        The digest, 0..2^64-1.

    Cost: about 100 bytes of temporaries per element.
    """
    item = codes.dtype.itemsize
    if not 1 <= codes.ndim <= MAX_DIMS or item not in (1, 2, 4, 8):
        raise ConfigError(f"cannot digest {codes.dtype} of shape {codes.shape}: 1..4 dims of 1..8")
    pad = MAX_DIMS - codes.ndim
    shape = (1,) * pad + codes.shape
    index = [
        first + distance * np.arange(n, dtype=np.int64)
        for first, distance, n in zip(
            (0,) * pad + tuple(lo), (1,) * pad + tuple(step), shape, strict=True
        )
    ]
    raw = np.ascontiguousarray(codes).reshape(shape)
    if item == 1:
        units_per_code = 1
        units = raw.view(np.uint8).astype(np.int64)
    else:
        units_per_code = item // 2
        units = raw.view("<i2").astype(np.int64)
    number = (index[3][:, None] * units_per_code + np.arange(units_per_code)).reshape(-1)

    digest = 0
    for lane in range(2):
        key = _keys(seed, 0, np.zeros(1, np.int64), lane).reshape(1, 1, 1, 1)
        key = key * _keys(seed, 1, index[0], lane).reshape(-1, 1, 1, 1)
        key = key * _keys(seed, 2, index[1], lane).reshape(1, -1, 1, 1)
        key = key * _keys(seed, 3, index[2], lane).reshape(1, 1, -1, 1)
        key = key * _keys(seed, 4, number // SEGMENT, lane).reshape(1, 1, 1, -1)
        key = key * short_keys()[lane][number % SEGMENT].astype(np.int64).view(np.uint64)
        total = np.sum(units.view(np.uint64) * key, dtype=np.uint64)
        digest |= int(total & _LANE) << (32 * lane)
    return digest


@lru_cache(maxsize=1)
def short_keys() -> npt.NDArray[np.int16]:
    """The two C tables, (2, 4096) int16, read-only."""
    tables = []
    for lane in range(2):
        start = int(_mix(np.array([lane + 1], np.uint64))[0])
        number = np.arange(1, 2 * SEGMENT, dtype=np.uint64)  # more candidates than are taken
        outputs = _mix(np.uint64(start) + number * np.uint64(GAMMA))
        candidates = (outputs & np.uint64(0xFFFF)).astype(np.uint16)
        _, first = np.unique(candidates, return_index=True)
        distinct = candidates[np.sort(first)]
        tables.append(distinct[distinct != 0][:SEGMENT].view(np.int16))
    made = np.stack(tables)
    made.flags.writeable = False
    return made


def _mix(z: U64) -> U64:
    """Finaliser of splitmix64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _keys(seed: int, family: int, index: I64, lane: int) -> U64:
    """One lane of key(family, index), in 0..2^32-1."""
    start = np.array([(seed + (family + 1) * GAMMA) % 2**64], np.uint64)
    key = _mix(_mix(start) + (index.astype(np.uint64) + np.uint64(1)) * np.uint64(GAMMA))
    return ((key >> np.uint64(32 * lane)) & _LANE) | np.uint64(1)
