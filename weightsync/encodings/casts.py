"""Casts by recipe: their versioned names, and slow references.

A recipe id names what happens to the bits, so that two sides agree on more than two dtypes: on
rounding, NaNs, denormals. A changed result is a new number behind the slash, never the old id.

* `raw`: the bits are copied.
* `f32_to_bf16_rne/1`: round to nearest, ties to even; overflow to infinity; denormals kept; every
  NaN becomes 0xFFFF. This is torch's cast of contiguous CPU tensors (its scalar and GPU code write
  0x7FC0 and 0x7FFF: torch itself has no single answer).
* `f32_to_f16_rne/1`: round to nearest, ties to even; overflow to infinity; denormals kept; a NaN
  keeps its sign and the upper ten bits of its mantissa and is made quiet, as F16C does.
* `bf16_to_f32/1`: exact; NaNs keep their bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

from weightsync.errors import ConfigError, DtypeMismatchError
from weightsync.ir.dtypes import CASTS, Dtype

__all__ = [
    "RAW",
    "RECIPES",
    "recipe_id",
    "reference_bf16",
    "reference_cast",
    "reference_f16",
]

RAW: Final = "raw"

# What is not a plain copy. Its keys and the identities are exactly the casts of the IR.
RECIPES: Final[Mapping[tuple[Dtype, Dtype], str]] = MappingProxyType(
    {
        (Dtype.F32, Dtype.BF16): "f32_to_bf16_rne/1",
        (Dtype.F32, Dtype.F16): "f32_to_f16_rne/1",
        (Dtype.BF16, Dtype.F32): "bf16_to_f32/1",
    }
)

Codes = npt.NDArray[np.unsignedinteger]


def recipe_id(source: Dtype, sink: Dtype) -> str:
    """Name of the cast from one dtype to another.

    Raises:
        DtypeMismatchError: There is none.
    """
    if (source, sink) not in CASTS:
        known = ", ".join(f"{a.name} -> {b.name}" for a, b in sorted(RECIPES))
        raise DtypeMismatchError(
            f"no cast from {source.name} to {sink.name}; besides plain copies there are: {known}"
        )
    return RAW if source == sink else RECIPES[source, sink]


def reference_cast(codes: Codes, source: Dtype, sink: Dtype) -> Codes:
    """Cast stored codes, slowly and by inspection right.

    Args:
        codes: Unsigned integers of the source's item size, any shape.
        source: Dtype of `codes`.
        sink: Dtype of the result.

    Returns:
        Unsigned integers of the sink's item size, same shape.

    Raises:
        DtypeMismatchError: There is no such cast.
    """
    if codes.dtype.itemsize != source.itemsize:
        raise ConfigError(f"codes of {source.name} have {source.itemsize} bytes, not {codes.dtype}")
    recipe = recipe_id(source, sink)
    if recipe == RAW:
        return codes.copy()
    if source == Dtype.BF16:
        return codes.astype(np.uint32) << np.uint32(16)
    values = codes.view(np.float32)
    return reference_bf16(values) if sink == Dtype.BF16 else reference_f16(values)


def reference_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """`f32_to_bf16_rne/1`: of the two neighbours of a value the nearer one, or the even one.

    Args:
        values: float32, any shape.

    Returns:
        bfloat16 codes, same shape.
    """
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    is_nan = np.isnan(values)
    magnitude = np.where(is_nan, np.uint32(0), bits & np.uint32(0x7FFFFFFF))
    below = magnitude >> np.uint32(16)
    above = np.minimum(below + 1, np.uint32(0x7F80))
    exact = magnitude.view(np.float32).astype(np.float64)

    def value_of(code: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
        value = (code << np.uint32(16)).view(np.float32).astype(np.float64)
        # The rounding boundary below infinity is that of a format with one more exponent.
        return np.where(code == 0x7F80, 2.0**128, value)

    with np.errstate(invalid="ignore"):  # infinity minus itself
        down = exact - value_of(below)
        up = value_of(above) - exact
    is_up = (up < down) | ((up == down) & (below % 2 == 1))
    code = np.where(is_up, above, below)
    code = np.where(np.isinf(values), np.uint32(0x7F80), code)
    code = code | (bits >> np.uint32(16) & np.uint32(0x8000))
    return np.where(is_nan, np.uint32(0xFFFF), code).astype(np.uint16)


def reference_f16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """`f32_to_f16_rne/1`: numpy's cast, with the NaNs of F16C.

    Args:
        values: float32, any shape.

    Returns:
        float16 codes, same shape.
    """
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    is_nan = np.isnan(values)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        code = np.where(is_nan, np.float32(0), values).astype(np.float16).view(np.uint16)
    sign = bits >> np.uint32(16) & np.uint32(0x8000)
    nan = sign | np.uint32(0x7E00) | (bits >> np.uint32(13) & np.uint32(0x3FF))
    return np.where(is_nan, nan, code).astype(np.uint16)
