from __future__ import annotations

import asyncio
import math

import pytest

from weightsync.clock import Clock, Deadline, FakeClock, MonotonicClock
from weightsync.errors import ConfigError


def test_fake_clock_moves_only_when_told() -> None:
    clock = FakeClock(start=5.0)
    assert clock.now() == clock.now() == 5.0
    assert clock.advance(2.5) == 7.5
    clock.sleep(60.0)
    asyncio.run(clock.sleep_async(30.0))
    assert clock.now() == 97.5
    assert clock.sleeps == [60.0, 30.0]


@pytest.mark.parametrize("seconds", [-1.0, math.nan])
def test_fake_clock_does_not_go_back(seconds: float) -> None:
    with pytest.raises(ConfigError, match="cannot advance"):
        FakeClock().advance(seconds)


def test_async_sleep_lets_others_run() -> None:
    order = []

    async def other() -> None:
        order.append("other")

    async def main() -> None:
        task = asyncio.create_task(other())
        await FakeClock().sleep_async(10.0)
        order.append("main")
        await task

    asyncio.run(main())
    assert order == ["other", "main"]


def test_monotonic_clock_goes_on() -> None:
    clock: Clock = MonotonicClock()
    before = clock.now()
    clock.sleep(0.0)
    asyncio.run(clock.sleep_async(0.0))
    assert clock.now() >= before


def test_deadline() -> None:
    clock = FakeClock()
    deadline = Deadline(3.0, clock)
    assert (deadline.remaining_s(), deadline.has_passed()) == (3.0, False)
    clock.advance(2.0)
    assert deadline.remaining_or_none() == 1.0
    clock.advance(2.0)
    assert (deadline.remaining_s(), deadline.has_passed()) == (0.0, True)


def test_deadline_of_zero_has_passed_and_none_never_does() -> None:
    clock = FakeClock()
    assert Deadline(0.0, clock).has_passed()
    never = Deadline(None, clock)
    clock.advance(1e9)
    assert not never.has_passed()
    assert never.remaining_or_none() is None
    assert never.remaining_s() == math.inf


@pytest.mark.parametrize("timeout_s", [-1.0, math.nan])
def test_deadline_refuses(timeout_s: float) -> None:
    with pytest.raises(ConfigError, match="timeout"):
        Deadline(timeout_s)
