"""What the fabric benchmark moves: words that both sides can make from a key, without torch."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["Words", "address_of", "changed", "first_difference", "make"]

Words = npt.NDArray[np.uint64]

_SEED: Final = 20261122
_SPREAD: Final = 0x9E3779B97F4A7C15  # so that keys differ in all bytes


def make(nbytes: int, key: int = 0) -> Words:
    """The first `nbytes` (a multiple of 8) of the payload of `key`."""
    generator = np.random.SFC64(np.random.SeedSequence((_SEED, 1)))
    words: Words = generator.random_raw(nbytes // 8)
    return words if key == 0 else words ^ _mask(key)


def changed(words: Words, old: int, new: int) -> None:
    """Turn the payload of one key into that of another, in place."""
    np.bitwise_xor(words, _mask(old) ^ _mask(new), out=words)


def first_difference(found: Words, base: Words, key: int) -> str | None:
    """Where `found` is not the payload of `key`; `base` is that of key 0."""
    wrong = found != (base[: found.size] ^ _mask(key))
    if not wrong.any():
        return None
    return f"{int(wrong.sum())} of {found.size} words are wrong, the first is {int(wrong.argmax())}"


def address_of(array: npt.NDArray[np.generic]) -> int:
    """Where the first byte is."""
    return int(array.__array_interface__["data"][0])


def _mask(key: int) -> np.uint64:
    return np.uint64(key * _SPREAD & 0xFFFFFFFFFFFFFFFF)
