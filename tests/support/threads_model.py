"""An executor of pretended threads and queues, step by step: slow, plain, independent.

Each stage of each source is a generator that waits for conditions, as the threads of
`weightsync.runtime.pipeline` wait for their queues. The network raises all rates together.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator, Sequence

from support.fluid import water_filling

Process = Generator[Callable[[], bool], None, None]


@dataclasses.dataclass
class Bucket:
    """What one bucket takes: seconds in each stage, staging, ports on the wire and bytes."""

    read_s: float
    cast_s: float
    write_s: float
    staging_bytes: int
    ports: tuple[int, ...]
    nbytes: int
    start_s: float = math.nan
    end_s: float = math.nan
    complete_s: float = math.nan


class ThreadsModel:
    """Run with `run`; afterwards every bucket has its times."""

    def __init__(
        self,
        programs: Sequence[Sequence[Bucket]],
        budgets: Sequence[int],
        capacity: Sequence[float],
        *,
        ack_s: float,
        begin_s: float,
        depth: int,
    ) -> None:
        self.now = begin_s
        self._capacity, self._ack_s, self._depth = capacity, ack_s, depth
        self._flows: list[tuple[Bucket, float]] = []  # and the bytes that are left
        self._times: list[float] = []
        self._waiting: list[tuple[Process, Callable[[], bool]]] = []
        for buckets, budget in zip(programs, budgets, strict=True):
            for process in self._source(list(buckets), budget):
                self._resume(process)

    def run(self) -> None:
        """Go from event to event until nothing is left."""
        while True:
            self._settle()
            # The first bucket of each pair of ports is on the wire, others wait behind it.
            pairs = [bucket.ports for bucket, _ in self._flows]
            heads = [i for i, pair in enumerate(pairs) if pairs.index(pair) == i]
            shares = water_filling([pairs[i] for i in heads], self._capacity)
            rates = [0.0] * len(pairs)
            for i, share in zip(heads, shares, strict=True):
                rates[i] = float(share)
                if math.isnan(self._flows[i][0].start_s):
                    self._flows[i][0].start_s = self.now
            ends = [
                self.now + left / rate if rate else math.inf
                for (_, left), rate in zip(self._flows, rates, strict=True)
            ]
            coming = [t for t in self._times if t > self.now] + ends
            if not coming:
                assert not self._waiting
                return
            until = min(coming)
            moved = []
            for (bucket, left), rate, end in zip(self._flows, rates, ends, strict=True):
                if end <= until * (1 + 1e-12):
                    bucket.end_s = end
                    self._times.append(end + self._ack_s)
                else:
                    moved.append((bucket, left - rate * (until - self.now)))
            self._flows, self.now = moved, until

    def _settle(self) -> None:
        """Let every process go on that can, until none can."""
        progress = True
        while progress:
            progress = False
            waiting, self._waiting = self._waiting, []
            for process, condition in waiting:
                if condition():
                    self._resume(process)
                    progress = True
                else:
                    self._waiting.append((process, condition))

    def _resume(self, process: Process) -> None:
        condition = next(process, None)
        if condition is not None:
            self._waiting.append((process, condition))

    def _sleep(self, seconds: float) -> Callable[[], bool]:
        until = self.now + seconds
        self._times.append(until)
        return lambda: self.now >= until

    def _source(self, buckets: list[Bucket], budget: int) -> list[Process]:
        queues: list[list[Bucket]] = [[], [], [], []]
        in_use = [0]

        def has_room(queue: list[Bucket]) -> Callable[[], bool]:
            return lambda: len(queue) < self._depth

        def feed() -> Process:
            for bucket in buckets:
                yield has_room(queues[0])
                queues[0].append(bucket)

        def stage(number: int, act: Callable[[Bucket], Process]) -> Process:
            for _ in buckets:
                yield lambda: bool(queues[number])
                bucket = queues[number].pop(0)
                yield from act(bucket)
                if number < 3:
                    yield has_room(queues[number + 1])
                    queues[number + 1].append(bucket)

        def read(bucket: Bucket) -> Process:
            if bucket.staging_bytes:
                yield lambda: in_use[0] + bucket.staging_bytes <= budget
            in_use[0] += bucket.staging_bytes
            yield self._sleep(bucket.read_s)

        def cast(bucket: Bucket) -> Process:
            yield self._sleep(bucket.cast_s)

        def write(bucket: Bucket) -> Process:
            yield self._sleep(bucket.write_s)
            self._flows.append((bucket, float(bucket.nbytes)))

        def complete(bucket: Bucket) -> Process:
            yield lambda: self.now >= bucket.end_s + self._ack_s
            bucket.complete_s = self.now
            in_use[0] -= bucket.staging_bytes

        actions = (read, cast, write, complete)
        return [feed(), *(stage(number, act) for number, act in enumerate(actions))]
