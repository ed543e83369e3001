"""Element types, which of them may be cast into which, and the codes of constants."""

from __future__ import annotations

import enum
import math
import struct

import numpy as np
from numpy.typing import NDArray

from weightsync.errors import ConfigError, EncodingError

__all__ = ["CASTS", "CAST_TABLE", "ITEMSIZE", "Dtype", "fill_code"]


class Dtype(enum.IntEnum):
    """Element type of a buffer, spelled as in safetensors. The value is its number in tables."""

    BOOL = 0
    U8 = 1
    I8 = 2
    F8_E4M3 = 3
    F8_E5M2 = 4
    U16 = 5
    I16 = 6
    F16 = 7
    BF16 = 8
    U32 = 9
    I32 = 10
    F32 = 11
    U64 = 12
    I64 = 13
    F64 = 14

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return int(ITEMSIZE[self])

    @classmethod
    def parse(cls, value: Dtype | str | int) -> Dtype:
        """Return the dtype of a member, a safetensors name or a table number.

        Raises:
            ConfigError: No such dtype.
        """
        try:
            return cls[value] if isinstance(value, str) else cls(value)
        except (KeyError, ValueError):
            names = ", ".join(cls.__members__)
            raise ConfigError(f"unknown dtype {value!r}; known: {names}") from None


ITEMSIZE: NDArray[np.int64] = np.array([1, 1, 1, 1, 1, 2, 2, 2, 2, 4, 4, 4, 8, 8, 8], np.int64)
ITEMSIZE.setflags(write=False)

# Identity for all, what a trainer's FP32 master weights need (round to nearest even), and what
# engines keep wider than the trainer does: routers.
CASTS: frozenset[tuple[Dtype, Dtype]] = frozenset(
    [(d, d) for d in Dtype]
    + [(Dtype.F32, Dtype.BF16), (Dtype.F32, Dtype.F16), (Dtype.BF16, Dtype.F32)]
)

CAST_TABLE: NDArray[np.bool_] = np.zeros((len(Dtype), len(Dtype)), np.bool_)
for _pair in CASTS:
    CAST_TABLE[_pair] = True
CAST_TABLE.setflags(write=False)

# Exponent bits, mantissa bits and bias of the float formats; E4M3 is the "fn" variant without inf.
_FLOATS = {
    Dtype.F8_E4M3: (4, 3, 7),
    Dtype.F8_E5M2: (5, 2, 15),
    Dtype.F16: (5, 10, 15),
    Dtype.BF16: (8, 7, 127),
    Dtype.F32: (8, 23, 127),
    Dtype.F64: (11, 52, 1023),
}


def fill_code(dtype: Dtype, value: float) -> int:
    """Return the stored bits of a constant, as an unsigned integer of the dtype's size.

    Args:
        dtype: Element type of the buffer.
        value: Constant; must be finite and exactly representable.

    Raises:
        EncodingError: The dtype cannot hold the value exactly.
    """
    fault = EncodingError(f"{dtype.name} cannot hold the constant {value!r} exactly")
    if not math.isfinite(value):
        raise fault
    if dtype in _FLOATS:
        return _float_code(dtype, value, fault)
    bits = 8 * dtype.itemsize
    low = -(1 << (bits - 1)) if dtype.name.startswith("I") else 0
    high = 1 if dtype is Dtype.BOOL else low + (1 << bits) - 1
    if value != int(value) or not low <= int(value) <= high:
        raise fault
    return int(value) % (1 << bits)


def _float_code(dtype: Dtype, value: float, fault: EncodingError) -> int:
    """Encode a finite float exactly into sign, exponent and mantissa bits."""
    exponent_bits, mantissa_bits, bias = _FLOATS[dtype]
    sign = int(math.copysign(1.0, value) < 0) << (exponent_bits + mantissa_bits)
    if dtype is Dtype.F64:
        return int.from_bytes(struct.pack("<d", value), "little")
    if value == 0.0:
        return sign
    fraction, exponent = math.frexp(abs(value))  # abs(value) = fraction * 2**exponent, in [0.5, 1)
    biased = max(exponent - 1 + bias, 0)
    # Subnormals (biased exponent 0) share the scale of exponent 1 and have no hidden bit.
    scaled = math.ldexp(fraction, exponent + bias - max(biased, 1) + mantissa_bits)
    if scaled != int(scaled):
        raise fault
    code = int(scaled) + (max(biased, 1) - 1 << mantissa_bits)
    last = (1 << exponent_bits + mantissa_bits) - (2 if dtype is Dtype.F8_E4M3 else 1)
    if dtype is not Dtype.F8_E4M3:
        last -= 1 << mantissa_bits  # the top exponent is inf and NaN
    if code > last:
        raise fault
    return sign | code
