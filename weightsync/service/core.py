"""The coordinator's decisions as a pure state machine: no I/O, no threads, time is an argument.

`CoordinatorCore` is told what happened (`receive`, `lost`, `planned`, `tick`) and answers with
actions in the order in which they must be carried out: a `Persist` is on disk before anything
that follows it is sent. docs/protocol.md holds the protocol and its invariants; formal/ checks
a model of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from weightsync.service import weightsync_pb2 as pb
from weightsync.service.core_types import (
    Action,
    Binding,
    CoreOptions,
    Disconnect,
    Log,
    MakePlan,
    Member,
    OpenVersion,
    Persist,
    Phase,
    Roster,
    Send,
    adopted_by,
)
from weightsync.service.core_types import problem as _problem
from weightsync.service.digests import digests_fault
from weightsync.service.manifests import fill_bind

__all__ = ["CoordinatorCore"]


class CoordinatorCore:
    """State of one job: members, the binding, the open version, what each replica serves.

    Not thread safe; one event loop owns it. Every method returns the actions to carry out, in
    order, and takes `now` in seconds of any monotonic clock.
    """

    def __init__(self, options: CoreOptions, log: Log | None = None) -> None:
        log = log if log is not None else Log()
        self.options = options
        self.incarnation = log.incarnation
        self.last_version = log.last_version
        self.committed_version = log.committed_version
        self._commits = set(log.commits)
        self.epoch = 0
        self._roster = Roster()
        self._members = self._roster.members
        self._binding: Binding | None = None
        self._bind_problem: pb.Problem | None = None
        self._bind_failed_for: frozenset[tuple[tuple[int, str, int], int]] | None = None
        self._bound_at = -1  # changes of the roster that the binding is known to fit
        self._open: OpenVersion | None = None
        self._applying: dict[str, int] = {}  # replica -> version, Apply sent, not activated
        self._adopting: set[str] = set()  # replicas that hold the committed version, not active
        self._out: list[Action] = []
        self._now = self._ticked = 0.0
        self._stood_still = False

    # ---- what happened ----

    def receive(self, now: float, member_id: int, message: pb.MemberMessage) -> list[Action]:
        """A message came in on stream `member_id`; a stream begins with Hello."""
        self._now = now
        kind = message.WhichOneof("kind")
        member = self._members.get(member_id)
        if kind == "hello":
            self._hello(member_id, message.hello)
        elif member is None:
            self._refuse(member_id, "FencedError", "the stream is not joined; say Hello first")
        elif kind is not None:
            member.last_seen = now
            getattr(self, f"_on_{kind}")(member, getattr(message, kind))
        return self._finish()

    def lost(self, now: float, member_id: int) -> list[Action]:
        """The stream of a member broke."""
        self._now = now
        if member_id in self._members:
            self._remove(member_id, "its connection broke")
        return self._finish()

    def planned(
        self, now: float, epoch: int, *, digest: str = "", shares: bytes = b"",
        options_json: str = "", problem: pb.Problem | None = None,
        hops: Mapping[int, Iterable[int]] | None = None,
    ) -> list[Action]:  # fmt: skip
        """The answer to MakePlan: a plan, and which sinks pass on to whom; or why there is none."""
        self._now = now
        binding = self._binding
        if binding is None or binding.epoch != epoch:
            return self._finish()
        if problem is not None:
            self._fail_binding(problem)
            return self._finish()
        binding.plan_digest = digest
        binding.set_hops(hops or {})
        bind = pb.Bind(epoch=epoch, options_json=options_json, shares=shares, plan_digest=digest)
        fill_bind(bind, self._manifests(binding.sources), self._manifests(binding.sinks))
        self._send_all([*binding.sinks, *binding.sources], bind=bind)
        return self._finish()

    def tick(self, now: float) -> list[Action]:
        """Let time pass: leases and deadlines. Call it at least four times in a lease."""
        self._now = now
        grace = self._grace(now)
        for member in list(self._members.values()):
            member.last_seen = max(member.last_seen, grace)
            silent_s = now - member.last_seen
            if silent_s > self.options.lease_s:
                text = f"silent for {silent_s:.1f} s, longer than the lease"
                self._refuse(member.id, "FencedError", f"{member.label}: {text}; join again")
                self._remove(member.id, text)
        if self._open is not None and now >= self._open.deadline:
            self._abort(*self._roster.overdue(self._open, self.options.min_replicas))
        return self._finish()

    def _grace(self, now: float) -> float:
        """Until when all are taken as heard: the coordinator did not run, and has not read yet."""
        half_s, before, silent_s = self.options.lease_s / 2, self._stood_still, now - self._ticked
        self._stood_still, self._ticked = silent_s > half_s, now
        # Once: where every tick is late, the dead must be found all the same.
        return now - half_s if self._stood_still and not before else 0.0

    def status(self) -> pb.StatusReply:
        """What the job looks like now."""
        phase = self._open.phase.value if self._open is not None else "idle"
        reply = pb.StatusReply(
            committed_version=self.committed_version, last_version=self.last_version,
            phase=phase, epoch=self.epoch,
        )  # fmt: skip
        self._roster.describe(reply)
        return reply

    # ---- membership ----

    def _hello(self, member_id: int, hello: pb.Hello) -> None:
        member = Member(
            member_id, hello, self._now,
            state=hello.state, version=hello.version, active=hello.active_version,
        )  # fmt: skip
        refusal = self._roster.join_problem(member)
        if refusal is not None:
            self._refuse(member_id, *refusal)
            self._out.append(Disconnect(member_id))
            return
        for other in list(self._members.values()):
            if other.key == member.key:  # the same process on a new connection
                self._remove(other.id, "it connected again")
        self._roster.add(member)
        self._send(
            member_id,
            welcome=pb.Welcome(
                incarnation=self.incarnation, last_version=self.last_version,
                committed_version=self.committed_version, lease_s=self.options.lease_s,
            ),
        )  # fmt: skip
        self._bind_failed_for = None
        if member.is_source:
            if hello.version:
                self._tell_outcome(member, hello.version)
        else:
            self._resume_sink(member)

    def _resume_sink(self, member: Member) -> None:
        """Bring a sink that outlived its coordinator to the recorded decision."""
        version = member.hello.version
        if member.state in (pb.FILLING, pb.PREPARED):
            if version == self.committed_version and member.state == pb.PREPARED:
                self._tell_outcome(member, version)
                member.state = pb.COMMITTED
            elif version in self._commits:
                self._drop(member, version, "the version was committed without this rank")
            else:
                self._tell_outcome(member, version)
                member.state, member.version = pb.IDLE, 0
        self._reconcile(member.hello.replica)

    def _tell_outcome(self, member: Member, version: int) -> None:
        """Answer a member that has `version` open; no record means abort (presumed abort)."""
        if self._open is not None and self._open.version == version:
            # It lost the coordinator, not the other way round: its part of the version is gone.
            self._abort("PeerLostError", f"{member.label} connected again in the middle")
        if version > self.last_version:
            reason = "the coordinator restarted before it decided"
            self._record(version, commit=False, reason=reason)
        commit = version in self._commits
        problem = None
        if not commit:
            problem = _problem("VersionAbortedError", f"version {version} was aborted")
        self._send(member.id, decide=pb.Decide(version=version, commit=commit, problem=problem))

    def _reconcile(self, replica: str) -> None:
        """A replica whose ranks are all here again: finish its adoption, or drop the version."""
        members = self._roster.replica(replica)
        if not members or len(members) != members[0].hello.world_size:
            return
        pending = [m for m in members if m.state in (pb.COMMITTED, pb.APPLYING, pb.APPLIED)]
        if not pending:
            return
        version = pending[0].version
        all_hold = all(
            (m.state in (pb.COMMITTED, pb.APPLYING, pb.APPLIED) and m.version == version)
            or m.active == version
            for m in members
        )
        if not all_hold:
            for member in pending:
                self._drop(member, version, f"not every rank of replica {replica} holds it")
            return
        self._adopting.add(replica)
        if any(m.state in (pb.APPLYING, pb.APPLIED) or m.active == version for m in members):
            # Some rank was told to apply before the restart: go on, there is no way back.
            self._apply(replica, version)
            self._maybe_activate(replica)

    def _remove(self, member_id: int, why: str) -> None:
        member = self._roster.remove(member_id)
        self._out.append(Disconnect(member_id))
        text = f"{member.label} was lost: {why}"
        version = self._open
        if member.is_source:
            if version is not None and version.phase is Phase.OPEN:
                version.published.discard(member_id)  # it may come back before the deadline
            elif version is not None and member_id not in version.written:
                self._abort("PeerLostError", text)
        else:
            self._lose_sink(member, text)
        if member_id in self._bound_ids():
            self._binding = None
            self._bind_failed_for = None

    def _lose_sink(self, member: Member, text: str) -> None:
        replica = member.hello.replica
        survivors = self._roster.replica(replica)
        applying = self._applying.pop(replica, None)
        self._adopting.discard(replica)
        if applying is not None:
            for other in survivors:
                self._tear(other, applying, text)
        else:
            for other in survivors:
                if other.state == pb.COMMITTED:
                    self._drop(other, other.version, text)
        if self._open is not None and replica in self._open.replicas:
            self._drop_replica(replica, "PeerLostError", text)
        self._maybe_adopted()

    def _on_leave(self, member: Member, message: pb.Leave) -> None:
        self._remove(member.id, f"it left ({message.reason})" if message.reason else "it left")

    def _on_heartbeat(self, member: Member, message: pb.Heartbeat) -> None:
        # Only what the core cannot know: all else may be older than what it has sent since.
        if message.state == pb.TORN and member.state != pb.TORN:
            version = self._applying.pop(member.hello.replica, 0)
            member.state, member.active = pb.TORN, 0
            for other in self._roster.replica(member.hello.replica) if version else ():
                self._tear(other, version, f"{member.label} is torn")

    # ---- binding ----

    def _bound_ids(self) -> set[int]:
        return set() if self._binding is None else {*self._binding.sources, *self._binding.sinks}

    def _maybe_bind(self) -> None:
        if self._open is not None and self._open.phase is not Phase.OPEN:
            return
        if self._binding is not None and self._bound_at == self._roster.num_changes:
            return
        sides = self._roster.complete_sides(self.options.min_replicas)
        if sides is None:
            return
        sources, sinks = sides
        self._bound_at = self._roster.num_changes
        if self._bound_ids() == {*sources, *sinks}:
            return
        identity = self._roster.identity([*sources, *sinks])
        if identity == self._bind_failed_for:
            return  # the same members would fail again
        self.epoch += 1
        self._bind_problem = None
        self._binding = Binding(self.epoch, sources, sinks)
        budgets = [b for i in sources if (b := self._members[i].hello.staging_bytes)]
        self._out.append(
            MakePlan(
                self.epoch,
                self._manifests(sources),
                self._manifests(sinks),
                min(budgets, default=0),
                frozenset(self._members[i].hello.fabric for i in sinks),
            )
        )

    def _manifests(self, member_ids: Iterable[int]) -> tuple[tuple[str, bytes], ...]:
        members = (self._members[i] for i in member_ids)
        return tuple((member.label, member.hello.manifest) for member in members)

    def _on_bind_ready(self, member: Member, message: pb.BindReady) -> None:
        binding = self._binding
        if binding is None or message.epoch != binding.epoch:
            return
        if message.plan_digest != binding.plan_digest:
            self._fail_binding(
                _problem(
                    "PlanDigestError",
                    f"{member.label} planned {message.plan_digest[:16]}, the coordinator "
                    f"{binding.plan_digest[:16]}; install the same weightsync everywhere",
                )
            )
            return
        binding.ready.add(member.id)
        if message.export_descriptor:
            binding.descriptors[member.id] = message.export_descriptor
        if binding.ready == self._bound_ids():
            descriptors = [binding.descriptors.get(i, b"") for i in binding.sinks]
            exports = pb.Exports(epoch=binding.epoch, descriptors=descriptors)
            self._send_all(binding.writers, exports=exports)

    def _on_bind_failed(self, member: Member, message: pb.BindFailed) -> None:
        if self._binding is not None and message.epoch == self._binding.epoch:
            text = f"{member.label}: {message.problem.message}"
            self._fail_binding(_problem(message.problem.error, text))

    def _on_connected(self, member: Member, message: pb.Connected) -> None:
        binding = self._binding
        if binding is None or message.epoch != binding.epoch:
            return
        binding.connected.add(member.id)
        if binding.connected == set(binding.writers) and not binding.is_bound:
            binding.is_bound = True
            self._send_all(self._bound_ids(), bound=pb.Bound(epoch=binding.epoch))

    def _fail_binding(self, problem: pb.Problem) -> None:
        ids = self._bound_ids()
        self._bind_failed_for = self._roster.identity(ids)
        self._bind_problem = problem
        self._binding = None
        self._send_all(ids, bound=pb.Bound(epoch=self.epoch, problem=problem))
        if self._open is not None:
            self._abort(problem.error, problem.message)

    # ---- one version ----

    def _on_publish(self, member: Member, message: pb.Publish) -> None:
        version = self._open
        if version is None:
            number = message.version if message.version else self.last_version + 1
            if number <= self.last_version:
                text = (
                    f"version {number} is not newer than {self.last_version}, the last one of "
                    "this job; publish without a number to take the next"
                )
                self._reject(member, number, "StaleVersionError", text)
                return
            if self._bind_problem is not None and self._bind_failed_for is not None:
                problem = self._bind_problem
                self._reject(member, number, problem.error, problem.message)
                return
            timeout_s = message.timeout_s if message.timeout_s > 0 else self.options.timeout_s
            version = OpenVersion(number, self._now + timeout_s)
            self._open = version
        elif message.version and message.version != version.version:
            text = f"{member.label} publishes {message.version} while {version.version} is open"
            self._reject(member, message.version, "ConfigError", text)
            return
        elif member.id in version.published:
            text = f"{member.label} has published version {version.version} already"
            self._reject(member, version.version, "ConfigError", text)
            return
        version.published.add(member.id)

    def _reject(self, member: Member, version: int, error: str, text: str) -> None:
        problem = _problem(error, text)
        self._send(member.id, decide=pb.Decide(version=version, commit=False, problem=problem))

    def _maybe_arm(self) -> None:
        version, binding = self._open, self._binding
        if version is None or version.phase is not Phase.OPEN:
            return
        if binding is None or not binding.is_bound or not version.published >= set(binding.sources):
            return
        version.phase = Phase.ARMING
        version.binding = binding
        for member_id in binding.sinks:
            replica = self._members[member_id].hello.replica
            version.replicas.setdefault(replica, []).append(member_id)
        left_s = version.deadline - self._now
        self._send_all(binding.sinks, arm=pb.Arm(version=version.version, deadline_s=left_s))

    def _on_armed(self, member: Member, message: pb.Armed) -> None:
        version = self._current(message.version)
        if version is not None and version.phase is Phase.ARMING:
            version.armed.add(member.id)
            member.state, member.version = pb.FILLING, message.version

    def _maybe_write(self) -> None:
        version = self._open
        if version is None or version.phase is not Phase.ARMING:
            return
        if version.all_armed():
            version.phase = Phase.WRITING
            left_s = version.deadline - self._now
            write = pb.Write(version=version.version, deadline_s=left_s)
            told = [*sorted(version.published), *sorted(version.passing_on())]
            self._send_all(told, write=write)

    def _on_writes_done(self, member: Member, message: pb.WritesDone) -> None:
        version = self._current(message.version)
        binding = version.binding if version is not None else None
        if version is None or binding is None or member.id not in binding.writers:
            return
        if fault := digests_fault(message.digests):
            self._abort("IntegrityError", f"{member.label}: {fault}")
            return
        version.written.add(member.id)
        version.digests[binding.sender_number[member.id]] = message.digests
        for index in message.lost_sinks:
            if lost := self._members.get(binding.sinks[index]):
                text = f"{member.label} could not reach {lost.label}"
                self._drop_replica(lost.hello.replica, "PeerLostError", text)

    def _on_failed(self, member: Member, message: pb.Failed) -> None:
        if self._current(message.version) is not None:
            text = f"{member.label}: {message.problem.message}"
            self._abort(message.problem.error, text)

    def _on_vote(self, member: Member, message: pb.Vote) -> None:
        version = self._current(message.version)
        replica = member.hello.replica
        if version is None or member.id not in version.replicas.get(replica, []):
            return
        if message.prepared:
            version.voted.add(member.id)
            member.state, member.version = pb.PREPARED, message.version
            return
        problem = message.problem
        text = f"{member.label}: {problem.message}"
        if problem.error == "IntegrityError":
            # Wrong bytes may come from the plan or a source: nobody may take this version.
            self._abort(problem.error, text)
        else:
            self._drop_replica(replica, problem.error, text)

    def _maybe_decide(self) -> None:
        version = self._open
        if version is None or version.phase is not Phase.WRITING or not version.all_voted():
            return
        ranks = version.ranks()
        self._record(version.version, commit=True, reason="")
        self._open = None
        self._adopting = set(version.replicas)
        decide = pb.Decide(version=version.version, commit=True, num_replicas=len(version.replicas))
        for member in (self._members[member_id] for member_id in ranks):
            member.state, member.version = pb.COMMITTED, version.version
        # Sources first: their trainers wait for it.
        self._send_all([*(version.published & self._members.keys()), *ranks], decide=decide)

    def _drop_replica(self, replica: str, error: str, text: str) -> None:
        version = self._open
        if version is None or replica not in version.replicas:
            return
        ranks = version.replicas.pop(replica)
        is_needed = version.waits_for(ranks)  # to pass on to others: lost like a source
        if is_needed or len(version.replicas) < max(1, self.options.min_replicas):
            version.replicas[replica] = ranks  # they hear the abort with the others
            self._abort(error, text)
            return
        for member_id in ranks:
            if member_id in self._members:
                self._drop(self._members[member_id], version.version, text)
        if version.binding is not None:
            gone = [i for i, m in enumerate(version.binding.sinks) if m in ranks]
            writers = version.published | version.binding.hops.keys()
            told = sorted(writers & self._members.keys() - {*ranks})
            self._send_all(told, forget=pb.Forget(version=version.version, sinks=gone))
        self._binding = None  # what they abandoned must be exported anew

    def _abort(self, error: str, text: str) -> None:
        version = self._open
        if version is None:
            return
        self._open = None
        self._record(version.version, commit=False, reason=text)
        decide = pb.Decide(version=version.version, commit=False, problem=_problem(error, text))
        for member_id in [*sorted(version.ranks()), *sorted(version.published)]:
            member = self._members.get(member_id)
            if member is not None:
                if not member.is_source and member.version == version.version:
                    # Who was not armed keeps what it is: it may still adopt the version before.
                    member.state, member.version = pb.IDLE, 0
                self._send(member_id, decide=decide)
        if version.phase is not Phase.OPEN:
            # Sinks abandon the memory that was written to: everyone binds again.
            self._binding = None

    def _record(self, version: int, *, commit: bool, reason: str) -> None:
        self._out.append(Persist(version, commit, reason))
        self.last_version = max(self.last_version, version)
        if commit:
            self.committed_version = version
            self._commits.add(version)

    def _current(self, version: int) -> OpenVersion | None:
        opened = self._open
        return opened if opened is not None and opened.version == version else None

    # ---- adoption ----

    def _on_ready_to_apply(self, member: Member, message: pb.ReadyToApply) -> None:
        replica = member.hello.replica
        if member.version != message.version or member.state != pb.COMMITTED:
            return
        member.is_ready = not message.withdrawn
        if message.withdrawn:
            self._send(member.id, withdrawn=pb.Withdrawn(version=message.version))
        waiting = [m for m in self._roster.replica(replica) if m.is_ready]
        ready = [m for m in waiting if m.version == message.version]
        if len(ready) == member.hello.world_size and replica not in self._applying:
            self._apply(replica, message.version)

    def _apply(self, replica: str, version: int) -> None:
        """Tell every rank that has not begun; from here the replica goes on or is torn."""
        self._applying[replica] = version
        for member in self._roster.replica(replica):
            if member.state == pb.COMMITTED:
                member.state, member.is_ready = pb.APPLYING, False
                self._send(member.id, apply=pb.Apply(version=version))

    def _on_applied(self, member: Member, message: pb.Applied) -> None:
        replica = member.hello.replica
        if self._applying.get(replica) != message.version:
            return
        if not message.ok:
            del self._applying[replica]
            self._adopting.discard(replica)
            text = f"{member.label} could not apply: {message.problem.message}"
            for other in self._roster.replica(replica):
                self._tear(other, message.version, text)
            self._maybe_adopted()
            return
        member.state, member.seconds = pb.APPLIED, message.seconds
        self._maybe_activate(replica)

    def _maybe_activate(self, replica: str) -> None:
        version = self._applying[replica]
        members = self._roster.replica(replica)
        if not all(m.state == pb.APPLIED or m.active == version for m in members):
            return
        del self._applying[replica]
        self._adopting.discard(replica)
        for member in members:
            member.state, member.version, member.active = pb.ACTIVE, version, version
            self._send(member.id, activate=pb.Activate(version=version))
        self._maybe_adopted()

    def _maybe_adopted(self) -> None:
        if self._adopting or self._open is not None or self.committed_version == 0:
            return
        adopted = adopted_by(self._members.values(), self.committed_version)
        self._send_all((m.id for m in self._roster.sources()), adopted=adopted)

    def _drop(self, member: Member, version: int, text: str) -> None:
        problem = _problem("PeerLostError", text)
        if member.version == version:
            torn = member.state == pb.APPLIED
            member.state, member.version = (pb.TORN if torn else pb.IDLE), 0
            member.is_ready = False
        self._send(member.id, drop=pb.Drop(version=version, problem=problem))

    def _tear(self, member: Member, version: int, text: str) -> None:
        member.state, member.version, member.active = pb.TORN, version, 0
        self._send(member.id, torn=pb.Torn(version=version, problem=_problem("TornError", text)))

    # ---- output ----

    def _finish(self) -> list[Action]:
        """Advance whatever can advance, then hand out the actions."""
        self._maybe_bind()
        self._maybe_arm()
        self._maybe_write()
        for sink, expect in self._open.expects() if self._open is not None else ():
            self._send(sink, expect=expect)
        self._maybe_decide()
        out, self._out = self._out, []
        return out

    def _send(self, member_id: int, **kind: object) -> None:
        self._out.append(Send(member_id, pb.CoordinatorMessage(**kind)))  # type: ignore[arg-type]

    def _send_all(self, member_ids: Iterable[int], **kind: object) -> None:
        """The same message to many, made once."""
        message = pb.CoordinatorMessage(**kind)  # type: ignore[arg-type]
        self._out.extend(Send(member_id, message) for member_id in member_ids)

    def _refuse(self, member_id: int, error: str, text: str) -> None:
        self._send(member_id, refused=pb.Refused(problem=_problem(error, text)))
