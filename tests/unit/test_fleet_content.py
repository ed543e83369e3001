"""Made-up weights: they tell every element, version and misplacement apart."""

from __future__ import annotations

import numpy as np
import pytest

from weightsync.errors import ConfigError
from weightsync.fleet.content import Held, codes
from weightsync.ir import Manifest, ManifestBuilder, Side

SHAPE = (6, 4)


def _rank(side: Side, dtype: str = "BF16", *, transposed: bool = False, lo: int = 0) -> Manifest:
    """Three rows of a matrix from row `lo` on, as they are or with axes exchanged."""
    builder = ManifestBuilder(side, f"{side} 0")
    builder.tensor("a.weight", SHAPE)
    builder.buffer("own", dtype, 12)
    stride = (1, 3) if transposed else (4, 1)
    builder.piece("a.weight", "own", lo=(lo, 0), n=(3, 4), step=(1, 1), offset=0, stride=stride)
    return builder.build()


def _matrix(held: Held) -> np.ndarray[tuple[int, ...], np.dtype[np.uint16]]:
    return held.memory[:24].view(np.uint16).reshape(3, 4)


def test_an_element_has_the_same_bits_wherever_a_layout_puts_it() -> None:
    plain = Held(_rank("source"), is_filled=True)
    turned = Held(_rank("source", transposed=True), is_filled=True)
    there = turned.memory[:24].view(np.uint16).reshape(4, 3)
    assert np.array_equal(_matrix(plain), there.T)
    other = Held(_rank("source", lo=1), is_filled=True)
    assert np.array_equal(_matrix(plain)[1:], _matrix(other)[:2])


def test_single_precision_holds_the_same_numbers() -> None:
    half = Held(_rank("source"), is_filled=True)
    single = Held(_rank("source", "F32"), is_filled=True)
    words = single.memory[:48].view(np.uint32)
    assert np.array_equal(words >> 16, _matrix(half).ravel().astype(np.uint32))
    assert np.all(words & 0xFFFF == 0)
    assert np.isfinite(single.memory[:48].view(np.float32)).all()


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_a_version_is_told_from_another_and_from_a_wrong_element(dtype: str) -> None:
    held = Held(_rank("sink", dtype), is_filled=True)
    assert held.difference(0) is None
    held.change(5)
    assert held.difference(5) is None
    assert "12 of 12 elements are wrong" in str(held.difference(0))
    item = 2 if dtype == "BF16" else 4
    words = held.memory[: 12 * item].reshape(12, item)
    words[[3, 7]] = words[[7, 3]]  # two elements exchanged
    assert "2 of 12 elements are wrong" in str(held.difference(5))


def test_padding_must_stay_zero() -> None:
    builder = ManifestBuilder("sink", "sink 0")
    builder.tensor("a", (3,))
    builder.buffer("own", "BF16", 5)
    builder.place("a", "own", (3,))
    builder.constant("own", 3, (2,), (1,), 0.0)
    held = Held(builder.build(), is_filled=True)
    assert held.difference(0) is None
    held.memory[8] = 1
    assert "padding of own" in str(held.difference(0))


def test_bits_differ_by_tensor_and_number_and_are_finite() -> None:
    number = np.arange(1 << 16, dtype=np.uint32)
    a, b = codes("a", number), codes("b", number)
    assert np.mean(a == b) < 0.001
    assert np.mean(a[1:] == a[:-1]) < 0.001
    assert np.all((a & 0x4000) == 0)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ConfigError, match="BF16 or F32, not F16"):
        Held(_rank("source", "F16"), is_filled=True)
