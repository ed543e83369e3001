"""Sizes, casts and the codes of constants, against numpy and exhaustive decoding."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest

from weightsync.errors import ConfigError, EncodingError
from weightsync.ir import CASTS, Dtype, fill_code


def _decode_f8(code: int, exponent_bits: int, mantissa_bits: int, bias: int, *, fn: bool) -> float:
    sign = -1.0 if code >> 7 else 1.0
    exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissa = code & ((1 << mantissa_bits) - 1)
    if exponent == (1 << exponent_bits) - 1 and (not fn or mantissa == (1 << mantissa_bits) - 1):
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


@pytest.mark.parametrize(
    ("dtype", "layout", "fn"),
    [(Dtype.F8_E4M3, (4, 3, 7), True), (Dtype.F8_E5M2, (5, 2, 15), False)],
)
def test_every_f8_code_is_found_from_its_value(
    dtype: Dtype, layout: tuple[int, int, int], fn: bool
) -> None:
    for code in range(256):
        value = _decode_f8(code, *layout, fn=fn)
        if math.isfinite(value):
            assert fill_code(dtype, value) == code
    largest = max(v for c in range(128) if math.isfinite(v := _decode_f8(c, *layout, fn=fn)))
    with pytest.raises(EncodingError):
        fill_code(dtype, 2 * largest)


@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, -3.25, 2.0**-20, 65504.0, 2.0**-24]
)
def test_float_codes_equal_numpy(value: float) -> None:
    assert fill_code(Dtype.F16, value) == int(np.array(value, np.float16).view(np.uint16))
    assert fill_code(Dtype.F32, value) == int(np.array(value, np.float32).view(np.uint32))
    assert fill_code(Dtype.F64, value) == int(np.array(value, np.float64).view(np.uint64))
    high = struct.unpack("<I", struct.pack("<f", value))[0]
    if high & 0xFFFF == 0:
        assert fill_code(Dtype.BF16, value) == high >> 16


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (Dtype.F16, 65536.0),
        (Dtype.BF16, 1 + 2.0**-8),
        (Dtype.F32, 0.1),
        (Dtype.F64, math.inf),
        (Dtype.U8, 256.0),
        (Dtype.U8, -1.0),
        (Dtype.I8, 128.0),
        (Dtype.BOOL, 2.0),
        (Dtype.I64, 0.5),
    ],
)
def test_what_a_dtype_cannot_hold_is_refused(dtype: Dtype, value: float) -> None:
    with pytest.raises(EncodingError, match=f"{dtype.name} cannot hold"):
        fill_code(dtype, value)


def test_integers_are_twos_complement() -> None:
    assert fill_code(Dtype.I8, -1) == 0xFF
    assert fill_code(Dtype.I16, -2) == 0xFFFE
    assert fill_code(Dtype.U32, 7) == 7
    assert fill_code(Dtype.BOOL, 1) == 1


def test_casts_and_names() -> None:
    assert all((d, d) in CASTS for d in Dtype)
    assert (Dtype.F32, Dtype.BF16) in CASTS
    assert (Dtype.F64, Dtype.F32) not in CASTS
    assert Dtype.parse("F8_E4M3") is Dtype.parse(3) is Dtype.parse(Dtype.F8_E4M3)
    assert [d.itemsize for d in (Dtype.U8, Dtype.BF16, Dtype.F32, Dtype.I64)] == [1, 2, 4, 8]
    with pytest.raises(ConfigError, match="unknown dtype 99"):
        Dtype.parse(99)
