"""Writes to a sink that was forgotten or fenced end as lost, however many were on their way."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from weightsync.errors import FencedError, TransferError, TransferTimeoutError
from weightsync.ir import ManifestBuilder, PlanOptions
from weightsync.planners.planner import plan_transfer
from weightsync.runtime.executor import Executor, Outcome
from weightsync.runtime.program import chunk_bits, source_program
from weightsync.runtime.staging import StagingPool

NUMEL = 64 << 10  # contiguous and long: written from where it is
COUNT = 4


class Stalled:
    """A connection whose peer takes nothing; writes fail when it is closed, as on every fabric."""

    address = None

    def __init__(self) -> None:
        self.is_closed = threading.Event()
        self.num_posted = 0

    def post(self, writes: Any) -> Stalled:
        self.num_posted += 1
        return self

    def wait(self, timeout_s: float) -> None:
        if self.is_closed.wait(timeout_s):
            raise TransferError("the remote was closed while an operation was in flight")
        raise TransferTimeoutError("not yet")

    def close(self) -> None:
        self.is_closed.set()


def started(remote: Stalled) -> tuple[Executor, np.ndarray[Any, Any], list[Any]]:
    manifests = []
    for side in ("source", "sink"):
        builder = ManifestBuilder(side, f"{side} 0")
        for number in range(COUNT):
            builder.tensor(f"t{number}", (NUMEL,))
            builder.buffer(f"t{number}", "F32", NUMEL)
            builder.place(f"t{number}", f"t{number}", (NUMEL,))
        manifests.append(builder.build())
    plan = plan_transfer(*manifests, PlanOptions(bucket_bytes=4 * NUMEL, chunk_bytes=4 * NUMEL))
    programs = source_program(plan, 0)
    assert len(programs) == COUNT
    memory = [np.zeros(NUMEL, np.float32) for _ in range(COUNT)]
    executor = Executor(
        programs=programs,
        remotes={0: remote},  # type: ignore[dict-item]
        num_slots={0: COUNT},
        bits=chunk_bits(plan),
        staging_address=0,
        pool=StagingPool(0),
    )
    return executor, np.array([m.ctypes.data for m in memory]), memory


def test_all_writes_to_a_forgotten_sink_are_lost() -> None:
    remote = Stalled()
    executor, bases, memory = started(remote)
    found: list[Outcome | Exception | None] = []

    def run() -> None:
        try:
            cancel = threading.Event()
            found.append(executor.run(1, bases, deadline=time.monotonic() + 20, cancel=cancel))
        except Exception as error:  # noqa: BLE001 - compared below
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    ends = time.monotonic() + 10
    while remote.num_posted < COUNT and time.monotonic() < ends:
        time.sleep(0.01)
    assert remote.num_posted == COUNT  # all on their way at once
    executor.forget({0})
    thread.join(20)
    [outcome] = found
    assert isinstance(outcome, Outcome), outcome
    assert outcome.lost_sinks == {0}
    assert outcome.digests == {}
    assert len(memory) == COUNT


class Fenced(Stalled):
    """A connection whose peer fences: what is on its way fails, and nothing more is taken."""

    def __init__(self, *, after: int) -> None:
        super().__init__()
        self.num_taken = after

    def post(self, writes: Any) -> Stalled:
        if self.num_posted == self.num_taken:
            raise FencedError("the target was fenced or closed")
        return super().post(writes)

    def wait(self, timeout_s: float) -> None:
        raise FencedError("the target was fenced or closed")


@pytest.mark.parametrize("after", [0, 1, COUNT])
def test_a_sink_that_fences_is_lost_also_before_it_is_forgotten(after: int) -> None:
    executor, bases, memory = started(Fenced(after=after))
    outcome = executor.run(1, bases, deadline=time.monotonic() + 20, cancel=threading.Event())
    assert outcome is not None
    assert outcome.lost_sinks == {0}
    assert outcome.digests == {}
    assert len(memory) == COUNT


def test_a_write_that_fails_otherwise_is_no_lost_sink() -> None:
    remote = Stalled()
    executor, bases, memory = started(remote)
    remote.close()
    with pytest.raises(TransferError, match="was closed"):
        executor.run(1, bases, deadline=time.monotonic() + 20, cancel=threading.Event())
    assert len(memory) == COUNT
