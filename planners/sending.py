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
        num_posted: Buckets whose time on the wire is known.
        num_complete: Buckets that are complete; always the first ones.
        read_start_s, cast_start_s, write_start_s, post_s: When each posted bucket entered a stage,
            and when its last write was posted.
    """

    def __init__(self, work: StageWork, begin_s: float) -> None:
        self.window = QUEUE_DEPTH + 2  # in the queue, waited for, and one handed over too early
        self.num_posted = self.num_complete = 0
        self.read_start_s: list[float] = []
        self.cast_start_s: list[float] = []
        self.write_start_s: list[float] = []
        self.post_s: list[float] = []
        self._lag = QUEUE_DEPTH + 1
        self._ready_s = [begin_s] * len(work.read_s)  # when each may be taken
        self._read_s = work.read_s.tolist()
        self._cast_s = work.cast_s.tolist()
        self._write_s = work.write_s.tolist()
        self._staged_after: list[int] = work.released_by().tolist()
        self._left_read: list[float] = []
        self._left_cast: list[float] = []
        self._left_write: list[float] = []  # of all posted but the last
        self._complete_s: list[float] = []
        self._arrived: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._read_s)

    def next_post(self) -> float | None:
        """Take the next bucket and return when its last write is posted; None while not known."""
        j, done = self.num_posted, self.num_complete
        if j == len(self._read_s) or j - self.window >= done or self._staged_after[j] >= done:
            return None
        lag = j - self._lag
        start = self._ready_s[j]
        cast_free = write_free = 0.0
        if j:
            start = max(start, self._left_read[-1])
            cast_free = self._left_cast[-1]
            write_free = self.post_s[-1]
            if lag > 0:
                write_free = max(write_free, self._complete_s[lag - 1])
            self._left_write.append(write_free)
        if self._staged_after[j] >= 0:
            start = max(start, self._complete_s[self._staged_after[j]])
        self.read_start_s.append(start)
        left = start + self._read_s[j]
        if lag >= 0:
            left = max(left, self._left_cast[lag])
        self._left_read.append(left)
        start = max(left, cast_free)
        self.cast_start_s.append(start)
        left = start + self._cast_s[j]
        if lag >= 0:
            left = max(left, self._left_write[lag])
        self._left_cast.append(left)
        start = max(left, write_free)
        self.write_start_s.append(start)
        posted: float = start + self._write_s[j]
        self.post_s.append(posted)
        self.num_posted = j + 1
        return posted

    def bucket_at(self, position: int) -> int:
        """Return which of its buckets, in program order, is sent at a position."""
        return position

    def arrive(self, bucket: int, acknowledged_s: float) -> None:
        """Take note that the last write at a position was acknowledged; in any order."""
        self._arrived[bucket] = acknowledged_s
        while (next_s := self._arrived.pop(self.num_complete, None)) is not None:
            if self._complete_s:
                next_s = max(next_s, self._complete_s[-1])
            self._complete_s.append(next_s)
            self.num_complete += 1

    @property
    def complete_s(self) -> list[float]:
        """When each bucket was complete."""
        return self._complete_s


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
