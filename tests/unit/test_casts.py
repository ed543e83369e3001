"""Recipes of casts: complete, and right where it is easy to say what is right."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from weightsync.encodings.casts import RAW, RECIPES, recipe_id, reference_bf16, reference_cast
from weightsync.encodings.rows import fill_rows, pack_rows
from weightsync.errors import ConfigError, DtypeMismatchError
from weightsync.ir.dtypes import CASTS, Dtype


def floats(*codes: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.array(codes, np.uint32).view(np.float32)


def test_every_cast_of_the_ir_has_one_recipe() -> None:
    assert {(d, d) for d in Dtype} | set(RECIPES) == CASTS
    names = [recipe_id(a, b) for a, b in CASTS if a != b]
    assert len(set(names)) == len(names)
    assert all("/" in name for name in names)
    assert recipe_id(Dtype.F8_E4M3, Dtype.F8_E4M3) == RAW


def test_other_casts_are_refused() -> None:
    with pytest.raises(DtypeMismatchError, match="no cast from F64 to F32"):
        recipe_id(Dtype.F64, Dtype.F32)
    with pytest.raises(DtypeMismatchError):
        reference_cast(np.zeros(1, np.uint16), Dtype.BF16, Dtype.F16)
    with pytest.raises(ConfigError, match="codes of F32"):
        reference_cast(np.zeros(1, np.uint16), Dtype.F32, Dtype.BF16)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (0x3F800000, 0x3F80),  # one
        (0x3F808000, 0x3F80),  # a tie, down to even
        (0x3F818000, 0x3F82),  # a tie, up to even
        (0x3F808001, 0x3F81),  # just above a tie
        (0xBF818000, 0xBF82),  # negative
        (0x7F7F7FFF, 0x7F7F),  # the last value that does not overflow
        (0x7F7F8000, 0x7F80),  # the first that does
        (0xFF800000, 0xFF80),  # minus infinity
        (0x00000001, 0x0000),  # the smallest denormal
        (0x00018000, 0x0002),  # denormals are rounded like all others
        (0x80000000, 0x8000),  # minus zero
        (0x7FC00000, 0xFFFF),  # NaN
        (0xFF800001, 0xFFFF),  # signalling NaN
    ],
)
def test_bf16_by_hand(code: int, expected: int) -> None:
    assert reference_bf16(floats(code)).tolist() == [expected]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (0x3F800000, 0x3C00),  # one
        (0x477FEFFF, 0x7BFF),  # 65519.996, the last value that does not overflow
        (0x477FF000, 0x7C00),  # 65520
        (0x33000000, 0x0000),  # 2^-25 ties to zero
        (0x33000001, 0x0001),
        (0x38800000, 0x0400),  # 2^-14, the smallest normal
        (0x387FFFFF, 0x0400),  # rounds up into the normals
        (0x7F800001, 0x7E00),  # NaNs become quiet
        (0xFF812345, 0xFE09),  # and keep their upper bits
    ],
)
def test_f16_by_hand(code: int, expected: int) -> None:
    codes = np.array([code], np.uint32)
    assert reference_cast(codes, Dtype.F32, Dtype.F16).tolist() == [expected]


def test_f16_equals_the_standard_library() -> None:
    random = np.random.default_rng(0)
    values = (random.standard_normal(2000) * 10.0 ** random.integers(-9, 4, 2000)).astype("f4")
    expected = [int.from_bytes(struct.pack("<e", float(v)), "little") for v in values]
    found = reference_cast(values.view(np.uint32), Dtype.F32, Dtype.F16)
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (0x3F80, 1.0),
        (0xC2F7, -123.5),
        (0x0001, 2.0**-133),  # the smallest denormal is one in F32, too
        (0x8000, -0.0),
        (0x7F80, float("inf")),
    ],
)
def test_f32_of_bf16_by_hand(code: int, expected: float) -> None:
    found = reference_cast(np.array([code], np.uint16), Dtype.BF16, Dtype.F32)
    assert found.tolist() == [int.from_bytes(struct.pack("<f", expected), "little")]


def test_f32_of_bf16_is_undone_by_rounding() -> None:
    codes = np.arange(65536, dtype=np.uint16)
    wide = reference_cast(codes, Dtype.BF16, Dtype.F32)
    is_nan = np.isnan(wide.view(np.float32))
    back = reference_cast(wide, Dtype.F32, Dtype.BF16)
    assert (back == np.where(is_nan, np.uint16(0xFFFF), codes)).all()
    assert is_nan.sum() == 2 * 127


def test_raw_copies() -> None:
    codes = np.arange(5, dtype=np.uint8)
    copied = reference_cast(codes, Dtype.F8_E5M2, Dtype.F8_E5M2)
    assert copied.tolist() == codes.tolist()
    assert not np.shares_memory(copied, codes)


def test_tables_put_every_column_in_its_place() -> None:
    n, src, dst = (np.arange(4).reshape(1, 4) + 10 * k for k in (1, 2, 3))
    row = pack_rows([100], [200], Dtype.F32, Dtype.BF16, n, src, dst)
    assert row.tolist() == [[100, 200, 11, 8, *n[0], *src[0], *dst[0]]]
    assert fill_rows([100], Dtype.U8, n, src).tolist() == [[100, 1, *n[0], *src[0]]]
