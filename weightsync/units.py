"""Bytes, seconds and bandwidth: their constants, their spelling, and back again.

The only module that spells 10^9 or 2^30: elsewhere a size is `64 * MIB` and a rate is
`gb_per_s(num_bytes, seconds)`. Memory is counted in powers of two (KiB, MiB, GiB), rates in powers
of ten (GB/s, Gbit/s), as vendors of memory and of NICs do.
"""

from __future__ import annotations

import math
import re
from typing import Final

from weightsync.errors import ConfigError

__all__ = [
    "GB",
    "GIB",
    "KB",
    "KIB",
    "MB",
    "MIB",
    "TB",
    "TIB",
    "format_bandwidth",
    "format_bytes",
    "format_seconds",
    "gb_per_s",
    "gbit_per_s",
    "parse_bandwidth",
    "parse_bytes",
    "parse_seconds",
]

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40
KB: Final = 10**3
MB: Final = 10**6
GB: Final = 10**9
TB: Final = 10**12

_BYTES: Final = {
    "": 1,
    "b": 1,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": TIB,
    "kb": KB,
    "mb": MB,
    "gb": GB,
    "tb": TB,
}
_SECONDS: Final = {
    "": 1.0,
    "s": 1.0,
    "ms": 1e-3,
    "us": 1e-6,
    "ns": 1e-9,
    "m": 60.0,
    "min": 60.0,
    "h": 3600.0,
}
_BITS: Final = {"bit": 1, "kbit": KB, "mbit": MB, "gbit": GB, "tbit": TB}
_QUANTITY: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z]*)\s*")


def _split(text: str, what: str, example: str) -> tuple[float, str]:
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"{what} {text!r} is not a number with a unit; write for example {example!r}"
        )
    return float(match[1]), match[2].lower()


def parse_bytes(text: str | int) -> int:
    """Read a size such as "64 MiB", "1.5GB" or "4096".

    Args:
        text: Number and unit (B, KiB to TiB, kB to TB; any case); a plain number is bytes.

    Returns:
        Whole bytes.

    Raises:
        ConfigError: Not a size, negative, or no whole number of bytes.
    """
    if isinstance(text, int):
        if text < 0:
            raise ConfigError(f"size {text} is negative")
        return text
    number, unit = _split(text, "size", "64 MiB")
    if unit not in _BYTES:
        raise ConfigError(f"size {text!r}: unit {unit!r} is none of B KiB MiB GiB TiB kB MB GB TB")
    size = number * _BYTES[unit]
    if not math.isfinite(size) or size != int(size):
        raise ConfigError(f"size {text!r} is no whole number of bytes")
    return int(size)


def parse_seconds(text: str | float) -> float:
    """Read a duration such as "250 ms", "2min" or "1.5".

    Args:
        text: Number and unit (ns, us, ms, s, min, h); a plain number is seconds.

    Returns:
        Seconds.

    Raises:
        ConfigError: Not a duration, negative or not finite.
    """
    if isinstance(text, int | float):
        number, unit = float(text), ""
    else:
        number, unit = _split(text, "duration", "250 ms")
    if unit not in _SECONDS:
        raise ConfigError(f"duration {text!r}: unit {unit!r} is none of ns us ms s min h")
    seconds = number * _SECONDS[unit]
    if not math.isfinite(seconds) or seconds < 0:
        raise ConfigError(f"duration {text!r} is negative or not finite")
    return seconds


def parse_bandwidth(text: str) -> float:
    """Read a rate such as "400 Gbit/s" or "12.5 GB/s".

    Args:
        text: Number and unit; bits (bit to Tbit) or bytes (as `parse_bytes`) per second. The unit
            is required: a bare number would leave bits or bytes open.

    Returns:
        Bytes per second.

    Raises:
        ConfigError: Not a rate.
    """
    amount, per, rest = text.partition("/")
    if not per or rest.strip().lower() != "s":
        raise ConfigError(
            f"bandwidth {text!r} does not end in '/s'; write for example '400 Gbit/s'"
        )
    number, unit = _split(amount, "bandwidth", "400 Gbit/s")
    if unit in _BITS:
        return number * _BITS[unit] / 8
    if unit and unit in _BYTES:
        return number * _BYTES[unit]
    raise ConfigError(f"bandwidth {text!r}: unit {unit!r} is none of Gbit/s, GB/s and their kin")


def format_bytes(num_bytes: float) -> str:
    """Spell a size for people: "0 B", "64.0 MiB", "1.41 TiB".

    Args:
        num_bytes: Bytes; may be a mean and negative (a difference).

    Returns:
        Three significant digits and a binary unit.
    """
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        # Rounding must not give "1024 MiB": the border is where the smaller unit rounds up to that.
        if abs(num_bytes) >= unit * (1 - 0.5 / KIB):
            return f"{_three_digits(num_bytes / unit)} {name}"
    return f"{num_bytes:.0f} B"


def format_seconds(seconds: float) -> str:
    """Spell a duration for people: "12.3 us", "4.56 ms", "1.23 s", "12 min 5 s", "2 h 3 min".

    Args:
        seconds: Seconds; negative durations keep their sign.

    Returns:
        Three significant digits below two minutes, whole seconds or minutes above.
    """
    size = abs(seconds)
    sign = "-" if seconds < 0 else ""
    if size == 0:
        return "0 s"
    for unit, name in ((1e-9, "ns"), (1e-6, "us"), (1e-3, "ms")):
        if size < unit * 999.5:
            return f"{sign}{_three_digits(size / unit)} {name}"
    if size < 120:
        return f"{sign}{_three_digits(size)} s"
    whole = round(size)
    if whole < 3600:
        return f"{sign}{whole // 60} min {whole % 60} s"
    minutes = round(size / 60)
    return f"{sign}{minutes // 60} h {minutes % 60} min"


def gb_per_s(num_bytes: float, seconds: float) -> float:
    """Rate in GB/s (10^9 bytes per second); 0 for a duration of 0.

    Args:
        num_bytes: Bytes moved.
        seconds: Time they took.

    Returns:
        GB/s.
    """
    return num_bytes / seconds / GB if seconds > 0 else 0.0


def gbit_per_s(num_bytes: float, seconds: float) -> float:
    """Rate in Gbit/s (10^9 bits per second); 0 for a duration of 0.

    Args:
        num_bytes: Bytes moved.
        seconds: Time they took.

    Returns:
        Gbit/s.
    """
    return 8 * gb_per_s(num_bytes, seconds)


def format_bandwidth(bytes_per_s: float) -> str:
    """Spell a rate for people: "12.3 GB/s".

    Args:
        bytes_per_s: Bytes per second.

    Returns:
        Three significant digits and a decimal unit.
    """
    for unit, name in ((TB, "TB/s"), (GB, "GB/s"), (MB, "MB/s"), (KB, "kB/s")):
        if abs(bytes_per_s) >= unit * 0.9995:
            return f"{_three_digits(bytes_per_s / unit)} {name}"
    return f"{bytes_per_s:.0f} B/s"


def _three_digits(value: float) -> str:
    size = abs(value)
    if size >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"
