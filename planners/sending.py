"""When a source may put its next bucket on the wire: the executor's stages as a recursion.

A source works through its buckets in order, in four stages with a short queue before each (read,
cast, write, complete; `weightsync.runtime.executor`). A bucket leaves a stage when it is done there
and the next queue has room, so what came before bounds how far ahead each stage can be:

    start_s(j) = max(leave_{s-1}(j), leave_s(j-1))      the stage is free and the bucket there
    leave_s(j) = max(start_s(j) + work_s(j), leave_{s+1}(j-d-1))    d: places in a queue

`complete` waits for buckets in order. Staging is taken by `read` and given back by `complete`.

A sink that passes on does so in the order in which buckets become ready (`ForwardingSender`).
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from weightsync.ir.plan import QUEUE_DEPTH
from weightsync.ir.tables import IntArray, starts_of

__all__ = ["ForwardingSender", "Sender", "StageWork"]

Floats = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class StageWork:
    """Seconds that each bucket of a source takes in each stage, in program order.

    Attributes:
        read_s, cast_s, write_s: `(K,)`.
        staging_bytes: `(K,)`.
        budget_bytes: Staging that all buckets in flight share.
    """

    read_s: Floats
    cast_s: Floats
    write_s: Floats
    staging_bytes: IntArray
    budget_bytes: int

    def released_by(self) -> IntArray:
        """Return the last bucket that must be complete before each gets its staging; -1: none."""
        total = starts_of(self.staging_bytes)
        first = np.searchsorted(total, total[1:] - self.budget_bytes)
        return np.where(self.staging_bytes > 0, first - 1, -1)


class Sender:
    """One source's way through its program.

    Args:
        work: What its buckets take.
        begin_s: When it may start.

    Attributes:
        window: Most buckets on the wire at a time.
        read_start_s, cast_start_s, write_start_s: When each posted bucket entered a stage.
        complete_s: When each of the first buckets was complete; others are not, yet.
    """

    def __init__(self, work: StageWork, begin_s: float) -> None:
        self.window = QUEUE_DEPTH + 2  # in the queue, waited for, and one handed over too early
        self.read_start_s: list[float] = []
        self.cast_start_s: list[float] = []
        self.write_start_s: list[float] = []
        self.complete_s: list[float] = []
        self._lag = QUEUE_DEPTH + 1
        self._ready_s = [begin_s] * len(work.read_s)  # when each may be taken
        self._read_s: list[float] = work.read_s.tolist()
        self._cast_s: list[float] = work.cast_s.tolist()
        self._write_s: list[float] = work.write_s.tolist()
        self._staged_after: list[int] = work.released_by().tolist()
        # Of the last posted bucket: when it left `read`, and when its last write was posted.
        self._left_read_s = self._post_s = 0.0
        self._left_cast_s: list[float] = []
        self._left_write_s: list[float] = []  # of all posted but the last
        self._arrived_s: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._read_s)

    def post(self) -> list[float]:
        """Take all buckets that may be taken; return when the last write of each is posted."""
        posted: list[float] = []
        complete_s, left_cast_s, left_write_s = (
            self.complete_s,
            self._left_cast_s,
            self._left_write_s,
        )
        j, done = len(left_cast_s), len(complete_s)
        end = min(len(self._read_s), done + self.window)
        # Comparisons throughout: `max` would take longer than all else in here.
        while j < end and (staged_after := self._staged_after[j]) < done:
            lag = j - self._lag
            start, cast_free, write_free = self._ready_s[j], 0.0, self._post_s
            if j:
                if start < self._left_read_s:
                    start = self._left_read_s
                cast_free = left_cast_s[-1]
                if lag > 0 and write_free < complete_s[lag - 1]:
                    write_free = complete_s[lag - 1]
                left_write_s.append(write_free)
            if staged_after >= 0 and start < complete_s[staged_after]:
                start = complete_s[staged_after]
            self.read_start_s.append(start)
            left = start + self._read_s[j]
            if lag >= 0 and left < left_cast_s[lag]:
                left = left_cast_s[lag]
            self._left_read_s = left
            start = left if left > cast_free else cast_free
            self.cast_start_s.append(start)
            left = start + self._cast_s[j]
            if lag >= 0 and left < left_write_s[lag]:
                left = left_write_s[lag]
            left_cast_s.append(left)
            start = left if left > write_free else write_free
            self.write_start_s.append(start)
            self._post_s = start + self._write_s[j]
            posted.append(self._post_s)
            j += 1
        return posted

    @property
    def num_posted(self) -> int:
        """Buckets whose time on the wire is known."""
        return len(self._left_cast_s)

    def bucket_at(self, position: int) -> int:
        """Return which of its buckets, in program order, is sent at a position."""
        return position

    def arrive(self, position: int, acknowledged_s: float) -> None:
        """Take note that the last write at a position was acknowledged; in any order."""
        complete_s, arrived_s = self.complete_s, self._arrived_s
        arrived_s[position] = acknowledged_s
        while (next_s := arrived_s.pop(len(complete_s), None)) is not None:
            if complete_s and next_s < complete_s[-1]:
                next_s = complete_s[-1]
            complete_s.append(next_s)


class ForwardingSender(Sender):
    """A sink's way through what it passes on, in the order in which that becomes ready.

    Args:
        work: What its buckets take, in program order; none of them is staged.
    """

    def __init__(self, work: StageWork) -> None:
        none = np.zeros(0)
        super().__init__(StageWork(none, none, none, np.zeros(0, np.int64), 0), 0.0)
        self._work = work
        self._order: list[int] = []

    def __len__(self) -> int:
        return len(self._work.read_s)

    def release(self, bucket: int, ready_s: float) -> None:
        """Let a bucket, by its number in program order, be sent after those released before."""
        self._order.append(bucket)
        self._ready_s.append(ready_s)
        self._read_s.append(float(self._work.read_s[bucket]))
        self._cast_s.append(float(self._work.cast_s[bucket]))
        self._write_s.append(float(self._work.write_s[bucket]))
        self._staged_after.append(-1)

    def bucket_at(self, position: int) -> int:
        """See `Sender`."""
        return self._order[position]
