"""A rollout rank in a job: joins, receives and checks versions, adopts them with its replica."""

from __future__ import annotations

import logging
import threading
import time
from typing import Protocol

import numpy as np
import numpy.typing as npt

from weightsync import failpoints
from weightsync.errors import (
    FencedError,
    InternalError,
    PlanDigestError,
    TornError,
    TransferTimeoutError,
    WeightSyncError,
)
from weightsync.runtime.receiver import Receiver
from weightsync.service import weightsync_pb2 as pb
from weightsync.service.core_types import WIRE_VERSION
from weightsync.service.credentials import MemberCredentials
from weightsync.service.digests import unpack_digests
from weightsync.service.manifests import deflate, place_of
from weightsync.service.member import Member
from weightsync.service.passing_on import PassingOn
from weightsync.service.planning import PlanCache
from weightsync.service.session import problem_of, to_error

__all__ = ["SinkHooks", "SinkMember"]

_log = logging.getLogger(__name__)

_DRAIN_S = 5.0
_WITHDRAW_S = 2.0  # one answer of a living coordinator
_SETTLE_S = 5.0  # the other ranks copy in the same pause; a lost one is said at its lease's end


class SinkHooks(Protocol):
    """What an engine does around an in-place update; called on a thread of the sink."""

    def pause(self) -> None:
        """Stop generating; on return nothing reads the weights."""

    def resume(self, version: int) -> None:
        """Generate again, from the weights of `version`."""


class SinkMember(Member):
    """See the module.

    Args:
        url: Job URL.
        manifest: Serialised manifest of this rank.
        replica: Name of the replica.
        rank: Inside the replica.
        world_size: Ranks of the replica.
        receiver: Owns the memory.
        fabric_name: For messages.
        hooks: Pause and resume for in-place updates without a waiting `refit`.
        connect_timeout_s: For joining.
        credentials: Token and CA, for grpcs://.
    """

    def __init__(
        self,
        url: str,
        *,
        manifest: bytes,
        replica: str,
        rank: int,
        world_size: int,
        receiver: Receiver,
        fabric_name: str,
        hooks: SinkHooks | None,
        connect_timeout_s: float,
        credentials: MemberCredentials | None = None,
    ) -> None:
        super().__init__(url, connect_timeout_s=connect_timeout_s, credentials=credentials)
        self.label = f"sink {replica}/{rank}"
        self._manifest = deflate(manifest)
        self._replica, self._rank, self._world_size = replica, rank, world_size
        self._receiver = receiver
        self._fabric_name = fabric_name
        self._hooks = hooks
        self._plans = PlanCache()
        self._hops = PassingOn(receiver, self.label)
        # All below is guarded by `changed`.
        self.state: pb.SinkState.ValueType = pb.IDLE
        self.state_version = 0
        self.active_version = 0
        self.committed_version = 0
        self._expected: dict[int, npt.NDArray[np.uint64]] = {}
        self._cancel = threading.Event()
        self._may_apply = 0  # version that the replica applies now
        self._refitting = False
        self._withdrawn = 0  # version that this rank need not apply, by the coordinator's word
        self._resume_due = 0  # version that the engine may generate from again; worker only
        self._torn: WeightSyncError | None = None
        self._problem: WeightSyncError | None = None  # binding failed, for refit to raise
        self.spans: dict[str, tuple[float, float]] = {}  # of the last version, monotonic clock

    # ---- for the user's thread ----

    def refit(self, version: int | None, timeout_s: float) -> int:
        """Wait for a committed version newer than the active one and adopt it.

        Args:
            version: Smallest version to accept, after older ones if they come first; None: any
                newer one.
            timeout_s: Deadline of the whole call; a rank that has applied by then waits up to 5 s
                longer for the others.

        Returns:
            The version that the weights now hold.

        Raises:
            TornError: The replica holds mixed weights; it serves nothing until a later version
                repairs it.
            TransferTimeoutError: Nothing was committed, or a rank of the replica did not come.
        """
        deadline = time.monotonic() + timeout_s
        with self.changed:
            if version is not None and self.state != pb.TORN and self.active_version >= version:
                return self.active_version
            self._torn = None
            self._refitting = True
            self.changed.notify_all()
        try:
            while True:
                wanted = self._wait_committed(version, deadline)
                self.send(ready_to_apply=pb.ReadyToApply(version=wanted))
                if self._wait_apply(wanted, deadline):
                    self._apply(wanted)
                    is_active = self._wait_active(wanted, deadline)
                    if is_active and (version is None or wanted >= version):
                        return wanted
        finally:
            with self.changed:
                self._refitting = False

    @property
    def is_torn(self) -> bool:
        """Whether this rank must serve nothing."""
        return self.state == pb.TORN

    def wait_ready(self, timeout_s: float) -> int | None:
        """Wait until `refit` has something to adopt; the version, or None when time is up."""
        deadline = time.monotonic() + timeout_s
        with self.changed:
            while self.state != pb.COMMITTED or self.session is None:
                left_s = deadline - time.monotonic()
                if left_s <= 0 or self.closing.is_set():
                    return None
                self.changed.wait(min(left_s, 0.5))
            return self.state_version

    def _wait_committed(self, version: int | None, deadline: float) -> int:
        with self.changed:
            while True:
                self._raise_if_torn()
                # An older one too: the next is written only when this one is adopted.
                if self.state == pb.COMMITTED and self.session is not None:
                    return self.state_version
                if self._problem is not None:
                    raise self._problem
                wanted = f"version {version}" if version is not None else "a new version"
                self._wait(deadline, f"{wanted} was not committed for {self.label} in time")

    def _wait_apply(self, version: int, deadline: float) -> bool:
        """Wait until the whole replica is ready; False when it dropped the version."""
        with self.changed:
            session = self.session
            while self._may_apply != version:
                self._raise_if_torn()
                if self.state != pb.COMMITTED or self.state_version != version:
                    return False
                if self.session is not session:
                    return False  # say ReadyToApply again on the new session
                try:
                    self._wait(
                        deadline,
                        f"{self.label} is ready for version {version}, but not every rank of "
                        f"replica {self._replica} called refit in time",
                    )
                except TransferTimeoutError:
                    if not self._withdraw(version):
                        raise
            self.state = pb.APPLYING
            return True

    def _withdraw(self, version: int) -> bool:
        """Stop being ready, by agreement; call with `changed` held.

        Returns:
            True when the replica is applying by now, so that this rank must as well; False when
            the coordinator has let it go.

        Raises:
            TornError: No answer came, or in place, where the weights hold the version already.
        """
        self._withdrawn = 0
        self.send(ready_to_apply=pb.ReadyToApply(version=version, withdrawn=True))
        deadline = time.monotonic() + _WITHDRAW_S
        while self._may_apply != version:
            self._raise_if_torn()
            if self._withdrawn == version and self._receiver.mode == "staged":
                return False
            left_s = deadline - time.monotonic()
            if left_s <= 0 or self._withdrawn == version:
                why = TornError(
                    f"{self.label} was ready for version {version} when its refit ran out of "
                    "time, and cannot go back; it serves again after the next version",
                    version=version,
                )
                self._tear(why)
                self.send(applied=pb.Applied(version=version, ok=False, problem=problem_of(why)))
                raise why
            self.changed.wait(left_s)
        return True

    def _apply(self, version: int) -> None:
        failpoints.hit("sink.applying")
        start = time.monotonic()
        try:
            self._receiver.apply()
        except Exception as error:
            self.send(applied=pb.Applied(version=version, ok=False, problem=problem_of(error)))
            with self.changed:
                self._tear(TornError(f"{self.label} could not apply version {version}: {error}"))
            raise
        with self.changed:
            self.spans["pause"] = (start, time.monotonic())
            self._raise_if_torn()  # another rank failed meanwhile, and this one was told
            self.state = pb.APPLIED
        self.send(applied=pb.Applied(version=version, ok=True, seconds=self._seconds()))

    def _seconds(self) -> pb.SinkSeconds:
        spans = {name: end - start for name, (start, end) in self.spans.items()}
        verify = self._receiver.verify_s
        return pb.SinkSeconds(fill=spans.get("fill", 0.0), verify=verify, pause=spans["pause"])

    def _wait_active(self, version: int, deadline: float) -> bool:
        # The weights have changed: giving up now would only tear the replica.
        deadline = max(deadline, time.monotonic() + _SETTLE_S)
        with self.changed:
            while self.active_version != version:
                self._raise_if_torn()
                if self.state not in (pb.APPLIED, pb.ACTIVE):
                    return False
                try:
                    self._wait(deadline, f"replica {self._replica} did not finish in time")
                except WeightSyncError:
                    # Whether the others applied is not known: this rank must not serve.
                    why = TornError(
                        f"{self.label} applied version {version}, but its replica did not "
                        "acknowledge it in time; it serves again after the next version",
                        version=version,
                    )
                    self._tear(why)
                    self.send(
                        applied=pb.Applied(version=version, ok=False, problem=problem_of(why))
                    )
                    self._raise_if_torn()
        failpoints.hit("sink.active")
        return True

    def _wait(self, deadline: float, what: str) -> None:
        """Wait for a change; call with `changed` held."""
        if self.refused is not None:
            raise self.refused
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            why = f"; {self.lost}" if self.lost is not None else ""
            raise TransferTimeoutError(f"{what}{why}", rank=self._rank)
        self.changed.wait(min(left_s, 0.5))

    def _raise_if_torn(self) -> None:
        if self._torn is not None:
            raise self._torn

    def close(self) -> None:
        """Leave the job; the live weights stay as they are."""
        self._cancel.set()
        super().close()
        self._hops.close()
        self._receiver.close()

    # ---- messages ----

    def hello(self) -> pb.Hello:
        """See `Member`."""
        with self.changed:
            return pb.Hello(
                wire_version=WIRE_VERSION,
                role=pb.SINK,
                replica=self._replica,
                rank=self._rank,
                world_size=self._world_size,
                generation=self.generation,
                manifest=self._manifest,
                in_place=self._receiver.mode == "in_place",
                fabric=self._fabric_name,
                state=self.state,
                version=self.state_version,
                active_version=self.active_version,
                committed_version=self.committed_version,
            )

    def heartbeat(self) -> pb.Heartbeat:
        """See `Member`."""
        with self.changed:
            return pb.Heartbeat(state=self.state, active_version=self.active_version)

    def handle(self, message: pb.CoordinatorMessage) -> None:
        """See `Member`."""
        kind = message.WhichOneof("kind")
        if kind == "bind":
            self.submit(lambda: self._bind(message.bind))
        elif kind == "exports":
            self.submit(lambda: self._connect_peers(message.exports))
        elif kind == "write":
            self._hops.begin(message.write.version)
        elif kind == "forget":
            self._hops.forget(set(message.forget.sinks))
        elif kind == "bound":
            with self.changed:
                failed = message.bound.HasField("problem")
                self._problem = to_error(message.bound.problem) if failed else None
                self.changed.notify_all()
        elif kind == "arm":
            with self.changed:
                self._cancel = threading.Event()
                self._expected = {}
            self.submit(lambda: self._fill(message.arm))
        elif kind == "expect":
            with self.changed:
                self._expected.update(unpack_digests(message.expect.digests))
        elif kind == "decide":
            self._decide(message.decide)
        elif kind == "apply":
            self._told_to_apply(message.apply.version)
        elif kind == "withdrawn":
            with self.changed:
                self._withdrawn = message.withdrawn.version
                self.changed.notify_all()
        elif kind == "activate":
            self._activate(message.activate.version)
        elif kind == "drop":
            self._dropped(message.drop.version, to_error(message.drop.problem))
        elif kind == "torn":
            with self.changed:
                self._tear(to_error(message.torn.problem, version=message.torn.version))

    def _decide(self, message: pb.Decide) -> None:
        with self.changed:
            if message.commit:
                failpoints.hit("sink.committed")
                self.committed_version = message.version
                if self.state == pb.PREPARED and self.state_version == message.version:
                    self.state = pb.COMMITTED
                self.changed.notify_all()
                return
        self._dropped(message.version, to_error(message.problem))

    def _told_to_apply(self, version: int) -> None:
        with self.changed:
            if self._refitting:
                self._may_apply = version
                self.changed.notify_all()
                return
            # It withdrew too late: the others go on, so this replica cannot be whole.
            why = TornError(
                f"{self.label} was told to apply version {version} after its refit had ended",
                version=version,
            )
            self._tear(why)
        self.send(applied=pb.Applied(version=version, ok=False, problem=problem_of(why)))

    def _activate(self, version: int) -> None:
        with self.changed:
            if self.state != pb.APPLIED or self.state_version != version:
                return  # meant for what this rank is not any more
            self.state, self.state_version = pb.ACTIVE, version
            self.active_version = version
            self._may_apply = 0
            self.changed.notify_all()
        self._resume_due = version
        self.submit(self._resume)

    def _dropped(self, version: int, why: WeightSyncError) -> None:
        """The version is not for this rank any more: abandon what arrived of it."""
        _log.info("%s gives up version %d: %s", self.label, version, why)
        self._cancel.set()
        with self.changed:
            if self.state in (pb.APPLYING, pb.APPLIED) and self.state_version == version:
                self._tear(TornError(str(why), version=version))
        self.submit(lambda: self._abandon(version, why))

    def _tear(self, why: WeightSyncError) -> None:
        """This rank holds mixed or unconfirmed weights; call with `changed` held."""
        self.state, self.active_version = pb.TORN, 0
        self._may_apply = 0
        self._torn = why
        self.changed.notify_all()

    # ---- slow work, on the worker ----

    def _bind(self, message: pb.Bind) -> None:
        failpoints.hit("sink.bind")
        try:
            plan = self._plans.plan(message)
            if plan.digest != message.plan_digest:
                raise PlanDigestError(
                    f"{self.label} planned {plan.digest[:16]}, the coordinator "
                    f"{message.plan_digest[:16]}; install the same weightsync everywhere"
                )
            self._hops.close()
            index = place_of(message.sinks, self.label)
            descriptor = self._receiver.bind(plan, index)
            self._hops.bind(plan, index, message.epoch)
        except Exception as error:  # noqa: BLE001 - reported to the coordinator
            self._bind_failed(message.epoch, error)
            return
        self.send(
            bind_ready=pb.BindReady(
                epoch=message.epoch, plan_digest=plan.digest, export_descriptor=descriptor
            )
        )

    def _connect_peers(self, message: pb.Exports) -> None:
        try:
            is_connected = self._hops.connect(message, self.connect_timeout_s)
        except Exception as error:  # noqa: BLE001 - reported to the coordinator
            self._bind_failed(message.epoch, error)
            return
        if is_connected:
            self.send(connected=pb.Connected(epoch=message.epoch))

    def _bind_failed(self, epoch: int, error: Exception) -> None:
        if not isinstance(error, WeightSyncError):
            _log.exception("%s: binding failed", self.label)
            error = InternalError(f"binding failed: {error!r}")
        self.send(bind_failed=pb.BindFailed(epoch=epoch, problem=problem_of(error)))

    def _fill(self, message: pb.Arm) -> None:
        version, cancel = message.version, self._cancel
        deadline = time.monotonic() + message.deadline_s
        started = time.monotonic()
        try:
            if not self._make_room(version, deadline, cancel):
                return
            self._receiver.open_slots(version)
            failpoints.hit("sink.armed")
            with self._hops.during(version, deadline, cancel, self.send):
                self.send(armed=pb.Armed(version=version))
                nbytes = self._receiver.fill(
                    version, self._expected.get, deadline=deadline, cancel=cancel
                )
        except Exception as error:  # noqa: BLE001 - reported to the coordinator
            if not isinstance(error, WeightSyncError):
                _log.exception("%s: receiving version %d", self.label, version)
            self.send(vote=pb.Vote(version=version, prepared=False, problem=problem_of(error)))
            return
        if nbytes is None:
            return
        with self.changed:
            if cancel.is_set():
                return
            self.state = pb.PREPARED
            self.spans["fill"] = (started, time.monotonic())
        failpoints.hit("sink.prepared")
        self.send(vote=pb.Vote(version=version, prepared=True, num_bytes=nbytes))

    def _pause(self) -> None:
        if self._hooks is not None and self._receiver.mode == "in_place":
            self._hooks.pause()

    def _resume(self) -> None:
        """Let the engine generate again, once per adopted or restored version."""
        version, self._resume_due = self._resume_due, 0
        if version and self._hooks is not None and self._receiver.mode == "in_place":
            self._hooks.resume(version)

    def _make_room(self, version: int, deadline: float, cancel: threading.Event) -> bool:
        """Wait until the memory for `version` may be written to; False when cancelled."""
        in_place = self._receiver.mode == "in_place"
        with self.changed:
            while True:
                if cancel.is_set():
                    return False
                busy = self.state in (pb.COMMITTED, pb.APPLYING, pb.APPLIED)
                serving = in_place and self._hooks is None and not self._refitting
                if not busy and not serving:
                    break
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return False  # the coordinator's deadline names this rank
                self.changed.wait(min(left_s, 0.05))
            self.state, self.state_version = pb.FILLING, version
        self._resume()  # of the version before, if it was adopted while this waited
        self._pause()
        return True

    def _abandon(self, version: int, why: WeightSyncError) -> None:
        with self.changed:
            holds = self.state in (pb.FILLING, pb.PREPARED, pb.COMMITTED)
            if not holds or self.state_version != version:
                return
            in_place = self._receiver.mode == "in_place"
        self._receiver.fence()
        torn = not self._receiver.is_untouched()
        with self.changed:
            if torn:
                self._tear(
                    TornError(
                        f"{self.label} holds part of version {version}, which was given up: "
                        f"{why}; it serves again after the next version",
                        version=version,
                    )
                )
            else:
                self.state = pb.ACTIVE if self.active_version else pb.IDLE
                self.state_version = self.active_version
                self.changed.notify_all()
        if in_place and not torn:
            self._resume_due = self.active_version
            self._resume()

    # ---- losing and finding the coordinator ----

    def disconnected(self, why: WeightSyncError) -> None:
        """See `Member`: a version that is not prepared cannot be committed any more."""
        with self.changed:
            self._may_apply = 0  # what was said on the old stream ended with it
            fenced = isinstance(why, FencedError)
            if self.state == pb.FILLING or (fenced and self.state == pb.PREPARED):
                version = self.state_version
                self._cancel.set()
                self.submit(lambda: self._abandon(version, why))

    def prepare_rejoin(self, why: WeightSyncError) -> None:
        """See `Member`."""
        self.drain(_DRAIN_S)
