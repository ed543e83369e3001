"""Time as an argument: whatever waits or times out takes a clock, so that tests need not sleep."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from typing import Protocol

from weightsync.errors import ConfigError

__all__ = ["Clock", "Deadline", "FakeClock", "MonotonicClock"]


class Clock(Protocol):
    """A monotonic clock in seconds that can also wait."""

    def now(self) -> float:
        """Seconds since an arbitrary moment; never goes back."""
        ...

    def sleep(self, seconds: float) -> None:
        """Block the calling thread for `seconds`."""
        ...

    async def sleep_async(self, seconds: float) -> None:
        """Suspend the calling task for `seconds`."""
        ...


class MonotonicClock:
    """The machine's monotonic clock; not stopped or set back by NTP."""

    def now(self) -> float:
        """Seconds since an arbitrary moment of this machine."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Block the calling thread for `seconds`."""
        time.sleep(seconds)

    async def sleep_async(self, seconds: float) -> None:
        """Suspend the calling task for `seconds`."""
        await asyncio.sleep(seconds)


class FakeClock:
    """A clock that moves only when told, for tests of what waits.

    `sleep` moves the clock itself and returns at once, so a test of a minute's back-off takes no
    time; what was slept is kept in `sleeps`. Safe to share between threads.

    Args:
        start: First reading in seconds.
    """

    def __init__(self, start: float = 0.0) -> None:
        self._now = start
        self._lock = threading.Lock()
        self.sleeps: list[float] = []

    def now(self) -> float:
        """Seconds on this clock."""
        with self._lock:
            return self._now

    def advance(self, seconds: float) -> float:
        """Move the clock on.

        Args:
            seconds: How far; not negative.

        Returns:
            The new reading.

        Raises:
            ConfigError: `seconds` is negative: monotonic clocks do not go back.
        """
        if not seconds >= 0:
            raise ConfigError(f"a monotonic clock cannot advance by {seconds} s")
        with self._lock:
            self._now += seconds
            return self._now

    def sleep(self, seconds: float) -> None:
        """Move the clock on by `seconds` and return at once."""
        self.advance(seconds)
        self.sleeps.append(seconds)

    async def sleep_async(self, seconds: float) -> None:
        """Move the clock on by `seconds` and let other tasks run once."""
        self.sleep(seconds)
        await asyncio.sleep(0)


class Deadline:
    """A moment by which something must have happened.

    Args:
        timeout_s: Seconds from now; None never passes.
        clock: Where time comes from.

    Raises:
        ConfigError: `timeout_s` is negative or not a number.
    """

    def __init__(self, timeout_s: float | None, clock: Clock | None = None) -> None:
        if timeout_s is not None and not timeout_s >= 0:
            raise ConfigError(f"timeout of {timeout_s} s: give seconds, 0 or more, or None")
        self._clock: Clock = MonotonicClock() if clock is None else clock
        self.timeout_s = timeout_s
        self._end = math.inf if timeout_s is None else self._clock.now() + timeout_s

    def remaining_s(self) -> float:
        """Seconds left; 0 when it has passed, infinity when there is none."""
        return max(0.0, self._end - self._clock.now())

    def remaining_or_none(self) -> float | None:
        """Seconds left as blocking calls of the standard library take them: None waits for ever."""
        return None if self._end == math.inf else self.remaining_s()

    def has_passed(self) -> bool:
        """True when no time is left."""
        return self._clock.now() >= self._end
