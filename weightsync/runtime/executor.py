"""The sender's side of one version: read shard -> cast -> write -> complete.

Each stage is a thread with a bounded queue; a bucket is the unit. The cast stage packs, casts
and digests in one pass over memory: straight into the sink's memory where that is mapped here,
else into staging, which is never larger than its budget. What needs no packing is then written
straight from the weights. Sinks that pass on what they received send in the same way, in the order
in which buckets come (`weightsync.runtime.forwarder`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from weightsync.encodings import kernels
from weightsync.encodings.digest import digest_add
from weightsync.errors import (
    FencedError,
    PeerLostError,
    TransferError,
    TransferTimeoutError,
    WeightSyncError,
)
from weightsync.ir.dtypes import ITEMSIZE
from weightsync.ir.plan import QUEUE_DEPTH
from weightsync.runtime.pipeline import Pipeline, Stage, StageTime
from weightsync.runtime.program import BucketProgram
from weightsync.runtime.staging import StagingPool
from weightsync.transport.base import Operation, Remote

__all__ = ["Executor", "Outcome"]

Int64 = npt.NDArray[np.int64]

_POLL_S = 0.05  # how often a waiting stage looks for a cancel
# A sink fences what its replica is out of; that may be heard here before Forget or an abort is.
_GONE = (PeerLostError, FencedError)


@dataclass
class Outcome:
    """What became of one version on one sender.

    Args:
        digests: Per sink index, one uint64 per bucket in slot order, for the sinks that were
            written to completely.
        lost_sinks: Sinks that could not be written to.
        nbytes: Bytes written.
        times: Busy time of each stage.
    """

    digests: dict[int, npt.NDArray[np.uint64]]
    lost_sinks: set[int]
    nbytes: int
    times: dict[str, StageTime]


@dataclass
class _Job:
    """One bucket on its way."""

    program: BucketProgram
    staging: int = -1
    operation: Operation | None = None
    digest: int = 0
    is_lost: bool = False


@dataclass
class Executor:
    """Runs one sender's program against the sinks it is connected to.

    Args:
        programs: Buckets in sending order.
        remotes: Connection per sink index.
        num_slots: Buckets that each sink receives in one version.
        bits: Bits of an immediate that number the chunk.
        staging_address: Registered memory of `pool.capacity_bytes` bytes.
        pool: Accounts for that memory.
        threads: Threads of the pack and digest kernels.
        on_bucket: Called at the beginning of each bucket.
    """

    programs: list[BucketProgram]
    remotes: Mapping[int, Remote]
    num_slots: Mapping[int, int]
    bits: int
    staging_address: int
    pool: StagingPool
    threads: int = 1
    on_bucket: Callable[[], None] = lambda: None
    _forgotten: set[int] = field(default_factory=set)

    def forget(self, sinks: set[int]) -> None:
        """Stop waiting for these sinks, now and for the rest of the version."""
        self._forgotten |= sinks

    def run(
        self,
        version: int,
        bases: Int64,
        *,
        deadline: float,
        cancel: threading.Event,
        ready: Iterable[BucketProgram] | None = None,
    ) -> Outcome | None:
        """Write one version; blocks until every write is locally complete.

        Args:
            version: Chooses the slots by its parity.
            bases: Address of every buffer of the sender, by buffer index of the plan.
            deadline: `time.monotonic()` value.
            cancel: Ends the run early; returns None once nothing reads the weights any more.
            ready: Yields all of `programs`, each when it may be sent; None: at once, in order.

        Raises:
            TransferTimeoutError: The deadline passed; names the sink that was waited for.
            TransferError: A write failed for a reason other than a lost sink.
        """
        lost = set(self._forgotten)
        finished: list[_Job] = []

        def read(job: _Job) -> None:
            self.on_bucket()
            program = job.program
            job.is_lost = program.sink in self._forgotten | lost
            if not job.is_lost and self.remotes[program.sink].address is None:
                place = self.pool.acquire(program.staging_bytes, deadline=deadline, cancel=cancel)
                job.staging = -1 if place is None else place

        def cast(job: _Job) -> None:
            program = job.program
            if job.is_lost or cancel.is_set():
                return
            table = program.copy.copy()
            table[:, 0] += bases[program.buffer]
            address = self.remotes[program.sink].address
            if address is not None:
                # The sink's memory is mapped here: pack straight into it, no staging.
                table[:, 1] += address
                job.digest = self._pack(table, program.keys)
                return
            packed, direct = program.packed, ~program.packed
            if packed.any():
                staged = table[packed]
                staged[:, 1] += program.staged_at[packed] + self.staging_address + job.staging
                job.digest = self._pack(staged, program.keys[packed])
            if direct.any():
                # Written from where they are; a direct row is one run of the stored dtype.
                rows, keys = table[direct], program.keys[direct]
                item = ITEMSIZE[rows[:, 3]][:, None]
                digest = np.concatenate(
                    [rows[:, :1], item, keys, rows[:, 4:8], rows[:, 8:12]], axis=1
                )
                group = np.zeros(len(digest), np.int32)
                found = kernels.digest(digest, group, 1, self.threads)
                job.digest = int(digest_add(np.uint64(job.digest), found[0]))

        def write(job: _Job) -> None:
            program = job.program
            if job.is_lost or cancel.is_set() or program.sink in lost | self._forgotten:
                return
            slot = program.slot + (version % 2) * self.num_slots[program.sink]
            immediates = (slot << self.bits) | program.chunks[:, 4]
            remote = self.remotes[program.sink]
            try:
                if remote.address is not None:
                    remote.notify(immediates.astype(np.int32))
                    return
                origin = program.chunks[:, 0]
                base = np.where(origin < 0, self.staging_address + job.staging, bases[origin])
                columns = [base + program.chunks[:, 1], *program.chunks[:, 2:4].T, immediates]
                job.operation = remote.post(np.ascontiguousarray(np.stack(columns, axis=1)))
            except WeightSyncError as error:
                # Also when the stage behind has closed the connection to a forgotten sink.
                if not isinstance(error, _GONE) and program.sink not in lost:
                    raise
                lost.add(program.sink)

        def complete(job: _Job) -> None:
            if job.operation is not None and not self._wait(job, deadline, cancel, lost):
                return
            self._release(job)
            if not job.is_lost and job.program.sink not in lost:
                finished.append(job)

        stages = [
            Stage("read", read),
            Stage("cast", cast),
            Stage("write", write),
            Stage("complete", complete),
        ]
        pipeline: Pipeline[_Job] = Pipeline(stages, depth=QUEUE_DEPTH, abandon=self._abandon)
        jobs = (_Job(program) for program in (self.programs if ready is None else ready))
        if not pipeline.run(jobs, deadline=deadline, cancel=cancel):
            return None
        lost |= self._forgotten
        return Outcome(
            digests=_by_sink(finished, lost),
            lost_sinks=lost,
            nbytes=sum(job.program.nbytes for job in finished),
            times=pipeline.times,
        )

    def _pack(self, table: Int64, keys: Int64) -> int:
        group = np.zeros(len(table), np.int32)
        return int(kernels.pack_digest(table, keys, group, 1, self.threads)[0])

    def _wait(self, job: _Job, deadline: float, cancel: threading.Event, lost: set[int]) -> bool:
        """Wait for local completion; False when cancelled (the caller abandons the job)."""
        sink = job.program.sink
        operation = job.operation
        assert operation is not None
        while True:
            try:
                operation.wait(_POLL_S)
            except _GONE:
                lost.add(sink)
            except TransferTimeoutError:
                if cancel.is_set():
                    self._quiesce(job)
                    return False
                if sink in self._forgotten:
                    lost.add(sink)
                    self._quiesce(job)
                elif time.monotonic() < deadline:
                    continue
                else:
                    self._quiesce(job)
                    raise TransferTimeoutError(
                        f"bucket {job.program.bucket} to sink {sink} was not taken in time",
                        peer=sink,
                    ) from None
            except TransferError:
                # Closed here, for an earlier bucket to a sink that was forgotten?
                if sink not in lost:
                    raise
            job.operation = None
            return True

    def _quiesce(self, job: _Job) -> None:
        """Make sure that nothing reads this job's memory any more."""
        if job.operation is not None:
            self.remotes[job.program.sink].close()
            job.operation = None

    def _abandon(self, job: _Job) -> None:
        self._quiesce(job)
        self._release(job)

    def _release(self, job: _Job) -> None:
        if job.staging >= 0:
            self.pool.release(job.staging, job.program.staging_bytes)
            job.staging = -1


def _by_sink(jobs: list[_Job], lost: set[int]) -> dict[int, npt.NDArray[np.uint64]]:
    by_sink: dict[int, list[tuple[int, int]]] = {}
    for job in jobs:
        if job.program.sink not in lost:
            by_sink.setdefault(job.program.sink, []).append((job.program.slot, job.digest))
    return {
        sink: np.array([digest for _, digest in sorted(found)], np.uint64)
        for sink, found in by_sink.items()
    }
