"""A sink's part in hops: connects to other sinks, and passes on beside its own receiving."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

from weightsync import failpoints
from weightsync.errors import InternalError, TransferTimeoutError, WeightSyncError
from weightsync.ir.plan import Plan
from weightsync.runtime.executor import Executor, Outcome
from weightsync.runtime.forwarder import Forwarder
from weightsync.runtime.program import BucketProgram, chunk_bits, hop_program
from weightsync.runtime.receiver import Receiver
from weightsync.runtime.staging import StagingPool
from weightsync.service import weightsync_pb2 as pb
from weightsync.service.digests import pack_digests
from weightsync.transport.base import Remote

__all__ = ["PassingOn", "writes_done"]

_log = logging.getLogger(__name__)

_POLL_S = 0.05  # how often one that may not write yet looks for a cancel


class PassingOn:
    """What a sink passes on, from binding to binding. Does nothing where the plan has no hops.

    Args:
        receiver: Owns the memory that is read.
        label: For messages.
    """

    def __init__(self, receiver: Receiver, label: str) -> None:
        self._receiver, self._label = receiver, label
        self._plan: Plan | None = None
        self._programs: list[BucketProgram] = []
        self._epoch = 0
        self._forwarder: Forwarder | None = None
        self._version = 0  # the open one
        self._may_write = threading.Event()

    def bind(self, plan: Plan, sink: int, epoch: int) -> None:
        """Take on a plan; raises what `hop_program` raises."""
        self._plan, self._epoch = plan, epoch
        self._programs = hop_program(plan, sink)

    def connect(self, message: pb.Exports, timeout_s: float) -> bool:
        """Connect to the sinks of this binding; False when it is not the present one.

        Raises:
            WeightSyncError: As `Engine.connect`.
        """
        plan = self._plan
        if plan is None or message.epoch != self._epoch:
            return False
        remotes: dict[int, Remote] = {}
        try:
            for sink in sorted({program.sink for program in self._programs}):
                remotes[sink] = self._receiver.fabric.connect(message.descriptors[sink], timeout_s)
        except BaseException:
            for remote in remotes.values():
                remote.close()
            raise
        executor = Executor(
            programs=self._programs,
            remotes=remotes,
            num_slots={sink: len(plan.inbound(sink)) for sink in remotes},
            bits=chunk_bits(plan),
            staging_address=0,
            pool=StagingPool(0),  # what is passed on is never packed
            threads=self._receiver.threads,
            on_bucket=lambda: failpoints.hit("sink.forwarding"),
        )
        self._forwarder = Forwarder(executor, self._receiver.arrivals)
        return True

    def forget(self, sinks: set[int]) -> None:
        """Do not wait for writes to these sinks any more."""
        forwarder = self._forwarder
        if forwarder is not None:
            forwarder.forget(sinks)

    def begin(self, version: int) -> None:
        """Write(v) came: who was left out before it is forgotten, everybody else is armed."""
        if version == self._version:
            self._may_write.set()

    def close(self) -> None:
        """Hang up and drop the plan; nothing may be running."""
        if self._forwarder is not None:
            self._forwarder.close()
        self._forwarder, self._plan, self._programs = None, None, []

    @contextlib.contextmanager
    def during(
        self,
        version: int,
        deadline: float,
        cancel: threading.Event,
        send: Callable[..., None],
    ) -> Iterator[None]:
        """Pass on while the body receives, from `begin` on; leave when both are done.

        The report of what was written goes out as soon as it is, since others wait for it.

        Args:
            version: The open one; its slots are empty.
            deadline: `time.monotonic()` value.
            cancel: Of the version; set when either side fails.
            send: Sends a message to the coordinator.

        Raises:
            WeightSyncError: What passing on failed with, unless the body raised.
        """
        forwarder = self._forwarder
        if forwarder is None:
            yield
            return
        problems: list[Exception] = []
        self._may_write.clear()
        self._version = version

        def run() -> None:
            try:
                # What there is to pass on may come before Write(v) does, and before a Forget.
                while not self._may_write.wait(_POLL_S):
                    if cancel.is_set():
                        return
                    if time.monotonic() >= deadline:
                        raise TransferTimeoutError(
                            f"{self._label} was not told in time that writing may begin",
                            version=version,
                        )
                bases = self._receiver.bases()
                outcome = forwarder.run(version, bases, deadline=deadline, cancel=cancel)
                if outcome is not None:
                    send(writes_done=writes_done(version, outcome))
            except Exception as error:  # noqa: BLE001 - raised again below
                problems.append(error)
                cancel.set()

        thread = threading.Thread(target=run, name="weightsync-hops", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            cancel.set()
            raise
        finally:
            thread.join()  # ends by the deadline or the cancel: nothing in it waits for ever
        for error in problems:
            if isinstance(error, WeightSyncError):
                raise error
            _log.error("%s: passing on version %d", self._label, version, exc_info=error)
            raise InternalError(f"passing on failed: {error!r}") from error


def writes_done(version: int, outcome: Outcome) -> pb.WritesDone:
    """The report of a sender whose writes are all locally complete."""
    return pb.WritesDone(
        version=version,
        digests=pack_digests(outcome.digests),
        num_bytes=outcome.nbytes,
        lost_sinks=sorted(outcome.lost_sinks),
    )
