"""A line of stages, each a thread with a bounded queue in front of it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from weightsync.errors import TransferTimeoutError

__all__ = ["Pipeline", "Stage", "StageTime"]

Item = TypeVar("Item")


@dataclass(frozen=True)
class Stage(Generic[Item]):
    """One step of a pipeline.

    Args:
        name: For reports and errors.
        run: Does the work on one item; runs on the stage's thread and may block up to the
            pipeline's deadline.
    """

    name: str
    run: Callable[[Item], None]


@dataclass
class StageTime:
    """When a stage worked: `busy_s` in all, and each item's (start, end) on the monotonic clock."""

    busy_s: float = 0.0
    spans: list[tuple[float, float]] = field(default_factory=list)


class Pipeline(Generic[Item]):
    """Runs items through stages in order; stages overlap, memory is bounded by `depth` items each.

    Args:
        stages: In order.
        depth: Queue length before each stage.
        abandon: Called for every item that does not reach the end, after all stages have
            stopped, so that it can give back what it holds.
    """

    def __init__(
        self,
        stages: list[Stage[Item]],
        *,
        depth: int,
        abandon: Callable[[Item], None],
    ) -> None:
        self._stages = stages
        self._depth = depth
        self._abandon = abandon
        self.times = {stage.name: StageTime() for stage in stages}

    def run(self, items: Iterable[Item], *, deadline: float, cancel: threading.Event) -> bool:
        """Push all items through; blocks until every stage has stopped.

        Args:
            items: Consumed lazily.
            deadline: `time.monotonic()` value.
            cancel: Stops everything early when set from outside. It is also set by the first
                stage that fails.

        Returns:
            Whether every item reached the end; False after an outside cancel.

        Raises:
            TransferTimeoutError: The deadline passed; names the stage that was busy.
            Exception: What the first failing stage raised.
        """
        queues: list[queue.Queue[Item | None]] = [
            queue.Queue(maxsize=self._depth) for _ in self._stages
        ]
        failures: list[BaseException] = []
        unfinished: list[Item] = []
        lock = threading.Lock()

        def put(index: int, item: Item | None) -> bool:
            """Hand over to stage `index`; False when that cannot happen any more."""
            while not cancel.is_set():
                if time.monotonic() >= deadline:
                    name = self._stages[index].name
                    raise TransferTimeoutError(f"deadline passed while stage {name!r} was busy")
                try:
                    queues[index].put(item, timeout=0.05)
                except queue.Full:
                    continue
                return True
            return False

        def work(index: int) -> None:
            stage = self._stages[index]
            times = self.times[stage.name]
            item: Item | None = None
            try:
                while not cancel.is_set():
                    try:
                        item = queues[index].get(timeout=0.05)
                    except queue.Empty:
                        continue
                    if item is not None:
                        start = time.monotonic()
                        stage.run(item)
                        end = time.monotonic()
                        times.busy_s += end - start
                        times.spans.append((start, end))
                    if index + 1 < len(self._stages) and not put(index + 1, item):
                        break
                    if item is None:
                        return
                    item = None
            except BaseException as error:  # noqa: BLE001 - raised again by run
                with lock:
                    failures.append(error)
                cancel.set()
            finally:
                if item is not None:
                    with lock:
                        unfinished.append(item)

        threads = [
            threading.Thread(target=work, args=(i,), name=f"weightsync-{s.name}", daemon=True)
            for i, s in enumerate(self._stages)
        ]
        for thread in threads:
            thread.start()
        try:
            for item in items:
                if not put(0, item):
                    unfinished.append(item)
                    break
            else:
                put(0, None)
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)
            cancel.set()
        for thread in threads:
            thread.join()
        for waiting in queues:
            while not waiting.empty():
                left = waiting.get_nowait()
                if left is not None:
                    unfinished.append(left)
        for item in unfinished:
            self._abandon(item)
        if failures:
            raise failures[0]
        return not cancel.is_set()
