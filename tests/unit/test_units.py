from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightsync.errors import ConfigError
from weightsync.units import (
    GB,
    GIB,
    KIB,
    MIB,
    format_bandwidth,
    format_bytes,
    format_seconds,
    gb_per_s,
    gbit_per_s,
    parse_bandwidth,
    parse_bytes,
    parse_seconds,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64 MiB", 67_108_864),
        ("64mib", 67_108_864),
        ("1.5GB", 1_500_000_000),
        ("0.5 KiB", 512),
        ("1e3 B", 1000),
        (" 2 TiB ", 2_199_023_255_552),
        (7, 7),
    ],
)
def test_parse_bytes(text: str | int, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "MiB", "-1", "12 parsec", "0.3 B", "nan", "1 2", "1e999", -1])
def test_parse_bytes_refuses(text: str | int) -> None:
    with pytest.raises(ConfigError):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("250 ms", 0.25), ("2min", 120.0), ("1.5", 1.5), ("3 us", 3e-6), ("1h", 3600.0), (2, 2.0)],
)
def test_parse_seconds(text: str | float, expected: float) -> None:
    assert parse_seconds(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["soon", "1 day", -0.5, float("inf"), float("nan")])
def test_parse_seconds_refuses(text: str | float) -> None:
    with pytest.raises(ConfigError):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("text", "expected"), [("400 Gbit/s", 50e9), ("12.5GB/s", 12.5e9), ("1 GiB/s", float(1 << 30))]
)
def test_parse_bandwidth(text: str, expected: float) -> None:
    assert parse_bandwidth(text) == expected


@pytest.mark.parametrize("text", ["400", "400 Gbit", "400/s", "4 apples/s", "1 GB/h"])
def test_parse_bandwidth_refuses(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_bandwidth(text)


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1000, "1000 B"),
        (64 * MIB, "64.0 MiB"),
        (MIB - 1, "1.00 MiB"),
        (1.41 * 1024 * GIB, "1.41 TiB"),
        (-3 * KIB, "-3.00 KiB"),
    ],
)
def test_format_bytes(num_bytes: float, expected: str) -> None:
    assert format_bytes(num_bytes) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0 s"),
        (12.3e-6, "12.3 us"),
        (4.56e-3, "4.56 ms"),
        (0.9996, "1.00 s"),
        (1.234, "1.23 s"),
        (725, "12 min 5 s"),
        (7380, "2 h 3 min"),
        (-0.25, "-250 ms"),
    ],
)
def test_format_seconds(seconds: float, expected: str) -> None:
    assert format_seconds(seconds) == expected


def test_rates() -> None:
    assert gb_per_s(3 * GB, 2.0) == 1.5
    assert gbit_per_s(GB, 1.0) == 8.0
    assert gb_per_s(5, 0.0) == 0.0
    assert format_bandwidth(12.34e9) == "12.3 GB/s"
    assert format_bandwidth(999) == "999 B/s"
    assert format_bandwidth(2.5e12) == "2.50 TB/s"


@given(st.integers(min_value=0, max_value=1 << 49))
def test_formatted_size_reads_back_within_three_digits(num_bytes: int) -> None:
    number, unit = format_bytes(num_bytes).split()
    assert abs(float(number) * parse_bytes(f"1 {unit}") - num_bytes) <= 0.0051 * num_bytes
    assert float(number) < 1024


@given(st.floats(min_value=1e-9, max_value=119))
def test_formatted_duration_reads_back_within_three_digits(seconds: float) -> None:
    assert parse_seconds(format_seconds(seconds)) == pytest.approx(seconds, rel=0.0051)
