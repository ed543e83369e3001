"""Buckets on the wire: who sends when, at which share of the ports, until when."""

from __future__ import annotations

import heapq
from collections import deque
from typing import Final

import numpy as np
from numpy.typing import NDArray

from weightsync.ir.tables import IntArray
from weightsync.planners.fairness import max_min_rates
from weightsync.planners.sending import ForwardingSender, Sender

__all__ = ["Wire"]

Floats = NDArray[np.float64]

_SAME: Final = 1e-12  # times closer than this, relatively, are one event


class Wire:
    """Moves the buckets of all senders through shared ports, event by event.

    Buckets of one source for one sink follow one another, as in a fabric's queue for that peer;
    those of different pairs share the ports that they have in common.

    Rates change only when a bucket starts or ends, so time goes from one such event to the next.
    With `step_s` above 0 the events of the following `step_s` are taken together and rates are
    worked out once for all of them. Every bucket keeps its exact times: one that ends inside a step
    leaves its share unused until the step is over, one that starts inside it gets its share from
    then on although the others have not made room yet; on average the two cancel.

    Args:
        senders: One for each source, then for each sink that passes on.
        source: Sender of each bucket, ascending, `(B,)`.
        sink: Sink of each bucket, `(B,)`.
        ports: Ports that each bucket passes, `(B, K)`.
        nbytes: `(B,)`.
        capacity: Bytes per second of each port.
        ack_s: From the end of a bucket on the wire until its sender knows.
        step_s: See above.
        edges: Pairs of buckets (before, after), `(E, 2)`: what a forwarding sender waits for.
        ready_s: From the end of a bucket on the wire until it may be passed on.
    """

    def __init__(
        self,
        senders: list[Sender],
        source: IntArray,
        sink: IntArray,
        ports: IntArray,
        nbytes: IntArray,
        capacity: Floats,
        *,
        ack_s: float,
        step_s: float = 0.0,
        edges: NDArray[np.int32] | None = None,
        ready_s: float = 0.0,
    ) -> None:
        self._senders = senders
        self._source: list[int] = source.tolist()
        self._first: list[int] = np.searchsorted(source, np.arange(len(senders))).tolist()
        num_sinks = int(sink.max(initial=0)) + 1
        self._pair: list[int] = (source * num_sinks + sink).tolist()
        self._ports, self._capacity, self._nbytes = ports, capacity, nbytes
        self._ack_s, self._step_s, self._ready_s = ack_s, step_s, ready_s
        self._waiting = [0] * len(nbytes)  # buckets that each still waits for
        self._after: dict[int, list[int]] = {}
        for before, after in (edges if edges is not None else np.zeros((0, 2), int)).tolist():
            self._after.setdefault(before, []).append(after)
            self._waiting[after] += 1
        self._position = [0] * len(nbytes)  # in its sender's order, of those that were posted
        self._posts: list[tuple[float, int]] = []  # heap of (time, bucket)
        self._queues: dict[int, deque[int]] = {}  # of pairs that have a bucket on the wire
        self._entering: list[int] = []  # buckets to be put on the wire, and since when they are
        self._since: list[float] = []
        # Each source has a place for each bucket that it may have on the wire.
        self._window = max((sender.window for sender in senders), default=1)
        num = self._window * len(senders)
        self._is_busy = np.zeros(num, np.bool_)
        self._left = np.zeros(num)
        self._late_s = np.zeros(num)  # by which a bucket was on the wire before its first step
        self._bucket = np.zeros(num, np.int64)
        self.start_s = np.zeros(len(nbytes))
        self.end_s = np.zeros(len(nbytes))

    def run(self) -> None:
        """Move everything; afterwards `start_s` and `end_s` are set."""
        for source in range(len(self._senders)):
            self._post(source)
        now = 0.0
        while True:
            if not self._is_busy.any():
                if not self._posts:
                    return
                now = self._posts[0][0]
                self._enter(now)
            now = self._advance(now)

    def _advance(self, now: float) -> float:
        """Go on to the next event, or `step_s` beyond it; return the new time."""
        places = np.flatnonzero(self._is_busy)
        rates = max_min_rates(self._ports[self._bucket[places]], self._capacity)
        begin = now - self._late_s[places]
        ends = begin + self._left[places] / rates
        following = float(ends.min())
        if self._posts:
            following = min(following, self._posts[0][0])
        until = max(now, following * (1 + _SAME) + self._step_s)
        self._left[places] -= rates * (until - begin)
        self._late_s[places] = 0
        done = np.flatnonzero(ends <= until)
        done = done[np.argsort(ends[done], kind="stable")]
        free, ends = places[done], ends[done]
        buckets = self._bucket[free]
        self._is_busy[free] = False
        self.end_s[buckets] = ends
        for bucket, end in zip(buckets.tolist(), ends.tolist(), strict=True):
            self._leave(bucket, end)
        self._enter(until)
        return until

    def _enter(self, now: float) -> None:
        """Put buckets on the wire whose turn in their pair has come, and those posted by now.

        What is posted while its pair has a bucket on the wire goes behind that.
        """
        posts, queues, pair = self._posts, self._queues, self._pair
        while posts and posts[0][0] <= now:
            start, bucket = heapq.heappop(posts)
            if (queue := queues.get(pair[bucket])) is not None:
                queue.append(bucket)
            else:
                queues[pair[bucket]] = deque()
                self._entering.append(bucket)
                self._since.append(start)
        if not self._entering:
            return
        buckets, since = np.array(self._entering), np.array(self._since)
        self._entering, self._since = [], []
        source = np.array([self._source[bucket] for bucket in buckets.tolist()])
        position = np.array([self._position[bucket] for bucket in buckets.tolist()])
        places = source * self._window + position % self._window
        self._is_busy[places] = True
        self._left[places] = self._nbytes[buckets]
        self._late_s[places] = now - since
        self._bucket[places] = buckets
        self.start_s[buckets] = since

    def _leave(self, bucket: int, end: float) -> None:
        pair, source = self._pair[bucket], self._source[bucket]
        if queue := self._queues[pair]:
            self._entering.append(queue.popleft())
            self._since.append(end)
        else:
            del self._queues[pair]
        self._senders[source].arrive(self._position[bucket], end + self._ack_s)
        self._post(source)
        for after in self._after.get(bucket, ()):
            self._waiting[after] -= 1
            if not self._waiting[after]:
                self._release(after, end + self._ready_s)

    def _release(self, bucket: int, ready_s: float) -> None:
        source = self._source[bucket]
        sender = self._senders[source]
        assert isinstance(sender, ForwardingSender)
        sender.release(bucket - self._first[source], ready_s)
        self._post(source)

    def _post(self, source: int) -> None:
        sender, first = self._senders[source], self._first[source]
        if times := sender.post():
            start = sender.num_posted - len(times)
            for position, time_s in enumerate(times, start):
                bucket = first + sender.bucket_at(position)
                self._position[bucket] = position
                heapq.heappush(self._posts, (time_s, bucket))
