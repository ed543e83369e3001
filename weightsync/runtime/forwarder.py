"""A sink's side of hops: which buckets are there, and passing them on to other sinks.

A bucket is passed on as soon as it is complete and visible; that its bytes are right every receiver
finds by itself, from the digest that this sink takes of what it sends, by its own layout. A sink
that received wrong bytes fails its own check, and nobody takes the version.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from weightsync.errors import TransferTimeoutError
from weightsync.runtime.executor import Executor, Outcome
from weightsync.runtime.program import BucketProgram

__all__ = ["Arrivals", "Forwarder"]

_POLL_S = 0.05  # how often a waiting forwarder looks for a cancel


class Arrivals:
    """The slots of one version that are complete and visible, in the order in which they came."""

    def __init__(self) -> None:
        self._slots: list[int] = []
        self._changed = threading.Condition()

    def clear(self) -> None:
        """Begin a version."""
        with self._changed:
            self._slots = []

    def add(self, slots: list[int]) -> None:
        """Take note of slots whose bytes can be read."""
        with self._changed:
            self._slots += slots
            self._changed.notify_all()

    def follow(self, deadline: float, cancel: threading.Event) -> Iterator[int]:
        """Yield every slot once, until cancelled; waits for those to come.

        Raises:
            TransferTimeoutError: The deadline passed before the next one came.
        """
        seen = 0
        while not cancel.is_set():
            with self._changed:
                if seen == len(self._slots):
                    self._changed.wait(_POLL_S)
                found = self._slots[seen:]
            if not found and time.monotonic() >= deadline:
                raise TransferTimeoutError(
                    "what this sink passes on did not arrive in time; see what its own buckets "
                    "wait for"
                )
            seen += len(found)
            yield from found


class Forwarder:
    """Passes on one sink's buckets.

    Args:
        executor: Runs the sink's `hop_program` against the sinks that it passes on to.
        arrivals: Told by whoever receives.
    """

    def __init__(self, executor: Executor, arrivals: Arrivals) -> None:
        self._executor, self._arrivals = executor, arrivals

    def forget(self, sinks: set[int]) -> None:
        """See `Executor.forget`."""
        self._executor.forget(sinks)

    def run(
        self,
        version: int,
        bases: npt.NDArray[np.int64],
        *,
        deadline: float,
        cancel: threading.Event,
    ) -> Outcome | None:
        """Pass on one version; blocks until every write is locally complete. See `Executor.run`."""
        ready = self._ready(deadline, cancel)
        return self._executor.run(version, bases, deadline=deadline, cancel=cancel, ready=ready)

    def close(self) -> None:
        """Hang up. Nothing reads this sink's memory afterwards."""
        for remote in self._executor.remotes.values():
            remote.close()

    def _ready(self, deadline: float, cancel: threading.Event) -> Iterator[BucketProgram]:
        programs = self._executor.programs
        missing = {program.bucket: len(program.after) for program in programs}
        waiting: dict[int, list[BucketProgram]] = {}
        for program in programs:
            for slot in program.after:
                waiting.setdefault(slot, []).append(program)
        num_left = len(programs)
        for slot in self._arrivals.follow(deadline, cancel) if programs else ():
            for program in waiting.get(slot, ()):
                missing[program.bucket] -= 1
                if missing[program.bucket] == 0:
                    num_left -= 1
                    yield program
            if num_left == 0:
                return
