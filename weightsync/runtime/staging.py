"""Source staging: one registered buffer, handed out in parts, never more than the budget."""

from __future__ import annotations

import threading
import time

from weightsync.errors import PlanBudgetError, TransferTimeoutError

__all__ = ["StagingPool"]

_ALIGN = 64  # one cache line, so that parts of two buckets never share one


class StagingPool:
    """Hands out byte ranges of a buffer of `capacity_bytes`; first fit, blocking.

    A range that is waited for is always granted in the end: every holder gives its range back
    without asking for another one.

    Thread safety: all methods may be called from any thread.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.peak_bytes = 0
        self._in_use: dict[int, int] = {}  # offset -> size
        self._changed = threading.Condition()

    def acquire(self, nbytes: int, *, deadline: float, cancel: threading.Event) -> int | None:
        """Wait for `nbytes` and return their offset; None when `cancel` is set.

        Args:
            nbytes: Size; 0 takes no space and returns 0.
            deadline: `time.monotonic()` value after which waiting fails.
            cancel: Ends the wait early.

        Raises:
            PlanBudgetError: `nbytes` can never fit.
            TransferTimeoutError: The deadline passed.
        """
        if nbytes == 0:
            return 0
        # The start of the next range is aligned, the end of the buffer need not be.
        size = min(-(-nbytes // _ALIGN) * _ALIGN, self.capacity_bytes)
        if nbytes > self.capacity_bytes:
            raise PlanBudgetError(
                f"a bucket needs {nbytes} bytes of staging, the budget is {self.capacity_bytes}; "
                "raise staging_bytes or make buckets smaller"
            )
        with self._changed:
            while (offset := self._first_fit(size)) is None:
                left_s = deadline - time.monotonic()
                if cancel.is_set():
                    return None
                if left_s <= 0:
                    raise TransferTimeoutError(
                        f"no {size} bytes of staging became free in time; writes to the sinks "
                        "are slower than expected"
                    )
                self._changed.wait(min(left_s, 0.05))
            self._in_use[offset] = size
            self.peak_bytes = max(self.peak_bytes, sum(self._in_use.values()))
            return offset

    def release(self, offset: int, nbytes: int) -> None:
        """Give a range back."""
        if nbytes:
            with self._changed:
                del self._in_use[offset]
                self._changed.notify_all()

    def _first_fit(self, size: int) -> int | None:
        end = 0
        for offset, used in sorted(self._in_use.items()):
            if offset - end >= size:
                return end
            end = offset + used
        return end if self.capacity_bytes - end >= size else None
