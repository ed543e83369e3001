"""A trainer rank in a job: joins, binds, writes the versions that its user publishes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from weightsync import failpoints
from weightsync.errors import (
    FencedError,
    InternalError,
    PlanDigestError,
    SourceMutatedError,
    TransferTimeoutError,
    VersionError,
    WeightSyncError,
)
from weightsync.ir.plan import STAGED_BUCKETS, Plan
from weightsync.report import Stage, VersionReport
from weightsync.runtime.executor import Executor, Outcome
from weightsync.runtime.program import chunk_bits, source_program
from weightsync.runtime.staging import StagingPool
from weightsync.service import weightsync_pb2 as pb
from weightsync.service.core_types import WIRE_VERSION
from weightsync.service.credentials import MemberCredentials
from weightsync.service.manifests import deflate
from weightsync.service.member import Member, abort_error
from weightsync.service.passing_on import writes_done
from weightsync.service.planning import PlanCache
from weightsync.service.session import problem_of
from weightsync.transport.base import Engine, Lease, Remote

__all__ = ["OpenVersion", "SourceMember"]

_log = logging.getLogger(__name__)

_STAGES: tuple[Stage, ...] = ("local", "prepared", "committed", "adopted")
_GRACE_S = 5.0  # the coordinator's own deadline comes first and has the better message


@dataclass
class OpenVersion:
    """One publish of this rank, from the call to adoption. Guarded by `SourceMember.changed`."""

    requested: int
    tag: str
    deadline: float
    started: float = field(default_factory=time.monotonic)
    version: int = 0  # 0 until the coordinator numbered it
    stage: Stage | None = None  # highest reached
    error: WeightSyncError | None = None
    outcome: Outcome | None = None
    num_replicas: int = 0
    cancel: threading.Event = field(default_factory=threading.Event)
    marks: dict[str, float] = field(default_factory=dict)
    sink_seconds: pb.SinkSeconds | None = None  # of the slowest rank, when adopted

    @property
    def is_decided(self) -> bool:
        """Whether the weights may change again."""
        return self.error is not None or self.stage is not None

    def reached(self, until: Stage) -> bool:
        """Whether `until` or a later stage was reached."""
        return self.stage is not None and _STAGES.index(self.stage) >= _STAGES.index(until)


class SourceMember(Member):
    """See the module.

    Args:
        url: Job URL.
        manifest: Serialised manifest of this rank.
        rank: Of the source side.
        world_size: Of the source side.
        fabric: Writes go through it.
        bases: Gives the address of every buffer of this rank's manifest, in its order; called
            when a version opens.
        fingerprint: Gives a value that changes when the weights change; compared while a
            version is open. Returns the name of what changed, or None, when given the old one.
        owner: Keeps the weights' memory alive.
        sizes: Bytes of every buffer, in manifest order.
        staging_bytes: Budget; 0 takes eight of its largest buckets.
        threads: Kernel threads.
        connect_timeout_s: For joining.
        credentials: Token and CA, for grpcs://.
    """

    def __init__(
        self,
        url: str,
        *,
        manifest: bytes,
        rank: int,
        world_size: int,
        fabric: Engine,
        fabric_name: str,
        bases: Callable[[], npt.NDArray[np.int64]],
        sizes: npt.NDArray[np.int64],
        changed_since: Callable[[object], str | None],
        fingerprint: Callable[[], object],
        owner: object,
        staging_bytes: int,
        threads: int,
        connect_timeout_s: float,
        credentials: MemberCredentials | None = None,
    ) -> None:
        super().__init__(url, connect_timeout_s=connect_timeout_s, credentials=credentials)
        self.rank, self.world_size = rank, world_size
        self._manifest = deflate(manifest)
        self._fabric, self._fabric_name = fabric, fabric_name
        self._bases, self._sizes = bases, sizes
        self._fingerprint, self._changed_since = fingerprint, changed_since
        self._owner = owner
        self._staging_bytes = staging_bytes
        self._threads = threads
        self._plans = PlanCache()
        self._epoch = 0
        self._plan: Plan | None = None
        self._remotes: dict[int, Remote] = {}
        self._leases: dict[tuple[int, int], Lease] = {}
        self._leased = np.zeros(0, np.int64)  # addresses that `_leases` belongs to
        self._staging: Lease | None = None
        self._executor: Executor | None = None
        self._open: OpenVersion | None = None
        self._taken: object = None

    # ---- for the user's thread ----

    def start(self, version: int, tag: str, timeout_s: float) -> OpenVersion:
        """Begin a publish; returns at once.

        Raises:
            VersionError: The last one is not decided yet.
            WeightSyncError: The member was refused and cannot go on.
        """
        with self.changed:
            if self._open is not None and not self._open.is_decided:
                raise VersionError(
                    f"source {self.rank}: version {self._open.version or 'next'} is still open; "
                    "wait for it before the next publish",
                    rank=self.rank,
                )
            if self.refused is not None:
                raise self.refused
            opened = OpenVersion(version, tag, time.monotonic() + timeout_s)
            self._open = opened
            self._taken = self._fingerprint()
            if self.session is not None:  # else `rejoined` sends it
                self.send(publish=pb.Publish(version=version, timeout_s=timeout_s))
        failpoints.hit("source.published")
        return opened

    def wait(self, opened: OpenVersion, until: Stage, timeout_s: float | None) -> None:
        """Block until the version reached `until`.

        Raises:
            VersionAbortedError: The fleet aborted it. Other typed errors name what to mend.
            TransferTimeoutError: `timeout_s`, or the version's own deadline, passed.
        """
        deadline = opened.deadline + _GRACE_S
        if timeout_s is not None:
            deadline = min(deadline, time.monotonic() + timeout_s)
        with self.changed:
            while not opened.reached(until):
                if opened.error is not None:
                    raise opened.error
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    break
                self.changed.wait(min(left_s, 0.5))
            else:
                return
        raise self._timed_out(opened, until)

    def _timed_out(self, opened: OpenVersion, until: Stage) -> WeightSyncError:
        where = f"at {opened.stage}" if opened.stage else "not decided"
        why = f"; {self.lost}" if self.lost is not None else ""
        error = TransferTimeoutError(
            f"source {self.rank}: version {opened.version or 'next'} did not reach {until} in "
            f"time ({where}){why}",
            rank=self.rank,
            version=opened.version,
        )
        if opened.stage is None and time.monotonic() >= opened.deadline:
            # Nobody tells us the decision any more. A commit needs this rank's word that all was
            # written, so the weights are the user's again as soon as nothing reads them. What is
            # still on its way to us was meant for this version, and must not meet the next one.
            opened.cancel.set()
            session = self.session
            if session is not None:
                session.reset(_GRACE_S)
            if self.drain(_GRACE_S):
                with self.changed:
                    opened.error = error
                    self.changed.notify_all()
        return error

    def report(self, opened: OpenVersion) -> VersionReport:
        """What is known of a publish so far."""
        with self.changed:
            marks = dict(opened.marks)
            now = max(marks.values(), default=time.monotonic())
            spans: list[tuple[str, float, float]] = []
            previous = opened.started
            for name in ("wait_open", "transfer", "decide", "adopt"):
                if name in marks:
                    spans.append((name, previous, marks[name]))
                    previous = marks[name]
            stages_s = {name: end - start for name, start, end in spans}
            if opened.sink_seconds is not None:
                slowest = opened.sink_seconds
                stages_s |= {"sink_fill": slowest.fill, "sink_verify": slowest.verify}
                stages_s |= {"sink_pause": slowest.pause}
            nbytes = 0
            if opened.outcome is not None:
                nbytes = opened.outcome.nbytes
                for name, times in opened.outcome.times.items():
                    stages_s[name] = times.busy_s
                    spans += [(name, start, end) for start, end in times.spans]
            return VersionReport(
                version=opened.version,
                tag=opened.tag,
                stage=opened.stage if opened.stage is not None else "local",
                num_bytes=nbytes,
                num_replicas=opened.num_replicas,
                seconds=now - opened.started,
                stages_s=stages_s,
                spans=spans,
                peak_staging_bytes=self._executor.pool.peak_bytes if self._executor else 0,
            )

    def close(self) -> None:
        """Leave; an open version is aborted by the fleet unless its writes are done."""
        if self._open is not None:
            self._open.cancel.set()
        super().close()
        self._unbind()
        for lease in self._leases.values():
            lease.release()
        self._leases.clear()
        self._leased = np.zeros(0, np.int64)
        if self._staging is not None:
            self._staging.release()
            self._staging = None

    # ---- messages ----

    def hello(self) -> pb.Hello:
        """See `Member`."""
        opened = self._open
        version = 0
        if opened is not None and not opened.is_decided:
            version = opened.version
        return pb.Hello(
            wire_version=WIRE_VERSION,
            role=pb.SOURCE,
            rank=self.rank,
            world_size=self.world_size,
            generation=self.generation,
            manifest=self._manifest,
            staging_bytes=self._staging_bytes,
            fabric=self._fabric_name,
            version=version,
        )

    def handle(self, message: pb.CoordinatorMessage) -> None:
        """See `Member`."""
        kind = message.WhichOneof("kind")
        if kind == "bind":
            self.submit(lambda: self._bind(message.bind))
        elif kind == "exports":
            self.submit(lambda: self._connect_sinks(message.exports))
        elif kind == "write":
            self._mark_opened(message.write)
            self.submit(lambda: self._write(message.write))
        elif kind == "forget":
            if self._executor is not None:
                self._executor.forget(set(message.forget.sinks))
        elif kind == "decide":
            self._decide(message.decide)
        elif kind == "adopted":
            self._adopted(message.adopted)

    def _mark_opened(self, message: pb.Write) -> None:
        """Take the number that the version has got."""
        with self.changed:
            opened = self._open
            if opened is not None and not opened.is_decided:
                opened.version = message.version
                opened.marks["wait_open"] = time.monotonic()

    def _decide(self, message: pb.Decide) -> None:
        failpoints.hit("source.decided")
        with self.changed:
            opened = self._open
            if opened is None or opened.is_decided:
                return
            if opened.version not in (0, message.version):
                return
            opened.version = message.version
            opened.marks["decide"] = time.monotonic()
            if message.commit:
                opened.num_replicas = message.num_replicas
                opened.stage = "committed"
            else:
                opened.cancel.set()
                opened.error = abort_error(message.problem, message.version)
            self.changed.notify_all()

    def _adopted(self, message: pb.Adopted) -> None:
        with self.changed:
            opened, version = self._open, message.version
            if opened is not None and opened.version <= version and opened.stage == "committed":
                opened.stage = "adopted"
                if opened.version == version:
                    opened.sink_seconds = message.slowest
                opened.marks["adopt"] = time.monotonic()
                self.changed.notify_all()

    # ---- slow work, on the worker ----

    def _bind(self, message: pb.Bind) -> None:
        failpoints.hit("source.bind")
        try:
            plan = self._plans.plan(message)
            if plan.digest != message.plan_digest:
                raise PlanDigestError(
                    f"source {self.rank} planned {plan.digest[:16]}, the coordinator "
                    f"{message.plan_digest[:16]}; install the same weightsync everywhere"
                )
            self._unbind()
            self._plan, self._epoch = plan, message.epoch
            self._programs = source_program(plan, self.rank)
        except Exception as error:  # noqa: BLE001 - reported to the coordinator
            self._bind_failed(message.epoch, error)
            return
        self.send(bind_ready=pb.BindReady(epoch=message.epoch, plan_digest=plan.digest))

    def _connect_sinks(self, message: pb.Exports) -> None:
        plan = self._plan
        if plan is None or message.epoch != self._epoch:
            return
        try:
            sinks = sorted({program.sink for program in self._programs})
            for sink in sinks:
                self._remotes[sink] = self._fabric.connect(
                    message.descriptors[sink], self.connect_timeout_s
                )
            budget = self._staging_bytes
            if budget == 0:
                budget = STAGED_BUCKETS * max((p.staging_bytes for p in self._programs), default=0)
            address = self._allocate_staging(budget)
            self._executor = Executor(
                programs=self._programs,
                remotes=self._remotes,
                num_slots={sink: len(plan.inbound(sink)) for sink in sinks},
                bits=chunk_bits(plan),
                staging_address=address,
                pool=StagingPool(budget),
                threads=self._threads,
                on_bucket=lambda: failpoints.hit("source.writing"),
            )
        except Exception as error:  # noqa: BLE001 - reported to the coordinator
            self._bind_failed(message.epoch, error)
            return
        self.send(connected=pb.Connected(epoch=message.epoch))

    def _write(self, message: pb.Write) -> None:
        opened, executor, plan = self._open, self._executor, self._plan
        if opened is None or executor is None or plan is None or opened.is_decided:
            return
        if opened.version != message.version:
            return
        deadline = min(opened.deadline, time.monotonic() + message.deadline_s)
        try:
            bases = self._plan_bases(plan)
            outcome = executor.run(message.version, bases, deadline=deadline, cancel=opened.cancel)
            changed = self._changed_since(self._taken)
            if changed is not None:
                raise SourceMutatedError(
                    f"tensor {changed} changed on source {self.rank} while version "
                    f"{message.version} was open; change weights only after publish returned, "
                    "or wait for the Update",
                    tensor=changed,
                    rank=self.rank,
                    version=message.version,
                )
        except Exception as error:  # noqa: BLE001 - reported to the coordinator
            if not isinstance(error, WeightSyncError):
                _log.exception("source %d: writing version %d", self.rank, message.version)
            self.send(failed=pb.Failed(version=message.version, problem=problem_of(error)))
            return
        if outcome is None:
            return  # cancelled: the decision is known
        failpoints.hit("source.written")
        with self.changed:
            opened.outcome = outcome
            opened.marks["transfer"] = time.monotonic()
        self.send(writes_done=writes_done(message.version, outcome))
        failpoints.hit("source.undecided")

    def _plan_bases(self, plan: Plan) -> npt.NDArray[np.int64]:
        """Address of every source buffer of the plan; those of other ranks stay 0."""
        mine = np.flatnonzero(plan.source.buffers.rank == self.rank)
        addresses = self._bases()
        self._lease(addresses)
        bases = np.zeros(len(plan.source.buffers.rank), np.int64)
        bases[mine] = addresses
        return bases

    def _lease(self, addresses: npt.NDArray[np.int64]) -> None:
        """Register what is not registered yet; give up what is not used any more."""
        if np.array_equal(addresses, self._leased):
            return  # as for every version but the first
        wanted = {
            (int(address), int(size))
            for address, size in zip(addresses, self._sizes, strict=True)
            if size > 0
        }
        for key in self._leases.keys() - wanted:
            self._leases.pop(key).release()
        for key in wanted - self._leases.keys():
            self._leases[key] = self._fabric.register(key[0], key[1], self._owner)
        self._leased = addresses

    def _allocate_staging(self, nbytes: int) -> int:
        if self._staging is not None and self._staging.nbytes < nbytes:
            self._staging.release()
            self._staging = None
        if self._staging is None and nbytes > 0:
            buffer = np.empty(nbytes, np.uint8)
            self._staging = self._fabric.register(buffer.ctypes.data, nbytes, buffer)
        return self._staging.address if self._staging is not None else 0

    def _bind_failed(self, epoch: int, error: Exception) -> None:
        if not isinstance(error, WeightSyncError):
            _log.exception("source %d: binding failed", self.rank)
            error = InternalError(f"binding failed: {error!r}")
        self.send(bind_failed=pb.BindFailed(epoch=epoch, problem=problem_of(error)))

    def _unbind(self) -> None:
        self._executor = None
        for remote in self._remotes.values():
            remote.close()
        self._remotes = {}

    # ---- losing and finding the coordinator ----

    def disconnected(self, why: WeightSyncError) -> None:
        """See `Member`: a version whose writes are not reported is over for this rank."""
        opened = self._open
        if opened is None or opened.is_decided:
            return
        opened.cancel.set()
        if isinstance(why, FencedError) or opened.version == 0:
            with self.changed:
                opened.error = why
                self.changed.notify_all()

    def rejoined(self) -> None:
        """See `Member`: publish what was asked for in between."""
        with self.changed:
            opened = self._open
            if opened is not None and not opened.is_decided and opened.version == 0:
                left_s = max(0.1, opened.deadline - time.monotonic())
                self.send(publish=pb.Publish(version=opened.requested, timeout_s=left_s))

    def prepare_rejoin(self, why: WeightSyncError) -> None:
        """See `Member`."""
        self.drain(_GRACE_S)

    def given_up(self, why: WeightSyncError) -> None:
        """See `Member`: whoever waits is told now; the decision, if any, never gets here."""
        opened = self._open
        if opened is None or opened.is_decided:
            return
        if self.drain(_GRACE_S):  # else `wait` ends at its deadline: something reads the weights
            with self.changed:
                opened.error = why
                self.changed.notify_all()
