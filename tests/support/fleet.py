"""A fleet of scripted members around one `CoordinatorCore`, in one thread and on a fake clock.

The members follow docs/protocol.md with as little code as possible; they share nothing with the
real members but the messages.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from weightsync.service import weightsync_pb2 as pb
from weightsync.service.core import CoordinatorCore
from weightsync.service.core_types import (
    WIRE_VERSION,
    CoreOptions,
    Disconnect,
    Log,
    MakePlan,
    Persist,
    Send,
)
from weightsync.service.digests import pack_digests


@dataclass
class Actor:
    """One member process."""

    label: str
    hello: pb.Hello
    stream: int = 0
    alive: bool = True
    frozen: bool = False
    stalled_at: str = ""  # the step that it does not take until resumed
    held: list[pb.MemberMessage] = field(default_factory=list)
    received: list[pb.CoordinatorMessage] = field(default_factory=list)
    state: int = pb.IDLE
    version: int = 0
    active: int = 0
    open: int = 0
    vote_problem: str = ""
    apply_fails: bool = False
    fill_s: float = 0.0  # what it says that filling took
    prepared: set[int] = field(default_factory=set)  # versions that it voted for


class Fleet:
    """See the module. `trace` lists persists and decisions in the order of actions."""

    def __init__(
        self,
        *,
        sources: int,
        replicas: dict[str, int],
        min_replicas: int = 1,
        lease_s: float = 10.0,
        plan_problem: str = "",
        hops: dict[str, list[str]] | None = None,
    ) -> None:
        """`hops` says which sinks pass on, and to whom, by label."""
        self.hops = hops if hops is not None else {}
        self.options = CoreOptions(min_replicas=min_replicas, lease_s=lease_s)
        self.plan_problem = plan_problem
        self.now = 0.0
        self.log: list[tuple[int, bool]] = []
        self.trace: list[tuple[str, int, bool]] = []
        self.core = CoordinatorCore(self.options)
        self.core_alive = True
        self.crash = ""
        self.actors: dict[str, Actor] = {}
        self.streams: dict[int, Actor] = {}
        self.next_stream = 0
        self.busy = False  # sinks do not arm
        self.inbox: deque[tuple[Actor, pb.MemberMessage]] = deque()
        for rank in range(sources):
            self._add(pb.Hello(role=pb.SOURCE, rank=rank, world_size=sources))
        for replica, size in replicas.items():
            for rank in range(size):
                hello = pb.Hello(role=pb.SINK, replica=replica, rank=rank, world_size=size)
                self._add(hello)
        self.run()

    # ---- what a test does ----

    def publish_all(self, version: int = 0, timeout_s: float = 60.0) -> None:
        for actor in list(self.actors.values()):
            if actor.hello.role == pb.SOURCE and actor.alive:
                actor.open = -1
                message = pb.Publish(version=version, timeout_s=timeout_s)
                self._say(actor, "publish", publish=message)
        self.run()

    def refit_all(self) -> None:
        for actor in list(self.actors.values()):
            if actor.alive and actor.state == pb.COMMITTED:
                ready = pb.ReadyToApply(version=actor.version)
                self._say(actor, "ready", ready_to_apply=ready)
        self.run()

    def say(self, label: str, **kind: object) -> None:
        self._say(self.actors[label], "say", **kind)
        self.run()

    def stall(self, label: str, *, at: str) -> None:
        self.actors[label].stalled_at = at

    def resume(self, label: str) -> None:
        actor = self.actors[label]
        actor.stalled_at = ""
        held, actor.held = actor.held, []
        for message in held:
            self._settle(actor, message)
            self.inbox.append((actor, message))
        self.run()

    def freeze(self, label: str) -> None:
        self.actors[label].frozen = True

    def kill(self, label: str) -> None:
        actor = self.actors[label]
        actor.alive = False
        self._perform(self.core.lost(self.now, actor.stream))
        self.run()

    def start(self, label: str, generation: int = 1) -> None:
        old = self.actors[label]
        hello = pb.Hello()
        hello.CopyFrom(old.hello)
        hello.generation = generation
        self._add(hello)
        self.run()

    def fail_vote(self, label: str, error: str) -> None:
        self.actors[label].vote_problem = error

    def fail_apply(self, label: str) -> None:
        self.actors[label].apply_fails = True

    def advance(self, seconds: float) -> None:
        """Let time pass in small steps; living members send heartbeats."""
        for _ in range(20):
            self.tick_after(seconds / 20, heard_first=True)

    def tick_after(self, seconds: float, *, heard_first: bool = False) -> None:
        """Let the coordinator's clock go on at once; with heartbeats of the living, or unheard."""
        self.now += seconds
        if heard_first:
            for actor in list(self.actors.values()):
                if actor.alive and not actor.frozen:
                    self._say(actor, "heartbeat", heartbeat=pb.Heartbeat(state=actor.state))
            self.run()
        self._perform(self.core.tick(self.now))
        self.run()

    def crash_coordinator(self, *, before: str = "", after: str = "") -> None:
        self.crash = f"before {before}" if before else f"after {after}"

    def crash_now(self) -> None:
        self.core_alive = False

    def restart_coordinator(self, order: list[str] | None = None) -> None:
        """Start a new core on the log; members join in `order`, with refits where it says so."""
        self.crash = ""
        self.core_alive = True
        self.inbox.clear()
        last = max((v for v, _ in self.log), default=0)
        committed = max((v for v, commit in self.log if commit), default=0)
        commits = frozenset(v for v, commit in self.log if commit)
        self.core = CoordinatorCore(self.options, Log(2, last, committed, commits))
        for label in order if order is not None else list(self.actors):
            if label == "refit":
                self.refit_all()
                continue
            actor = self.actors[label]
            if actor.alive:
                hello = pb.Hello()
                hello.CopyFrom(actor.hello)
                hello.state, hello.version = actor.state, actor.version
                hello.active_version = actor.active
                if hello.role == pb.SOURCE:
                    hello.version = max(actor.open, 0)
                self._join(actor, hello)
                self.run()

    # ---- what a test looks at ----

    @property
    def decisions(self) -> list[tuple[int, bool]]:
        return list(self.log)

    def kinds(self, label: str) -> list[str | None]:
        return [m.WhichOneof("kind") for m in self.actors[label].received]

    def outcomes(self, label: str) -> list[tuple[int, bool, str]]:
        decided = [m.decide for m in self.actors[label].received if m.HasField("decide")]
        return [(d.version, d.commit, d.problem.message) for d in decided]

    def problem(self, label: str) -> str:
        for message in reversed(self.actors[label].received):
            kind = message.WhichOneof("kind")
            if kind in ("decide", "refused", "drop", "torn"):
                return str(getattr(message, kind).problem.error)
        return ""

    def serving(self) -> dict[str, int]:
        return {r.replica: r.version for r in self.core.status().replicas if r.serving}

    # ---- the members ----

    def _add(self, hello: pb.Hello) -> None:
        hello.wire_version = WIRE_VERSION
        hello.generation = hello.generation if hello.generation else 1
        side = "source" if hello.role == pb.SOURCE else f"sink {hello.replica}/"
        label = f"source {hello.rank}" if side == "source" else f"{side}{hello.rank}"
        actor = Actor(label, hello)
        old = self.actors.get(label)
        if old is None or not old.alive:
            self.actors[label] = actor
        else:
            actor.received = old.received  # a rival: a test looks at both under one name
        self._join(actor, hello)

    def _join(self, actor: Actor, hello: pb.Hello) -> None:
        self.next_stream += 1
        actor.stream = self.next_stream
        self.streams[actor.stream] = actor
        self.inbox.append((actor, pb.MemberMessage(hello=hello)))

    def _say(self, actor: Actor, step: str, **kind: object) -> None:
        message = pb.MemberMessage(**kind)  # type: ignore[arg-type]
        if actor.stalled_at == step:
            actor.held.append(message)
            return
        self._settle(actor, message)
        self.inbox.append((actor, message))

    def _settle(self, actor: Actor, message: pb.MemberMessage) -> None:
        """Change the actor's own state as it sends."""
        kind = message.WhichOneof("kind")
        if kind == "vote" and message.vote.prepared:
            actor.state = pb.PREPARED
            actor.prepared.add(message.vote.version)
        elif kind == "ready_to_apply":
            actor.state = pb.COMMITTED
        elif kind == "applied" and message.applied.ok:
            actor.state = pb.APPLIED

    def run(self) -> None:
        while self.inbox and self.core_alive:
            actor, message = self.inbox.popleft()
            if actor.alive and not actor.frozen:
                self._perform(self.core.receive(self.now, actor.stream, message))

    def _perform(self, actions: list[object]) -> None:
        for action in actions:
            if not self.core_alive:
                return
            if isinstance(action, Persist):
                if self.crash == "before persist":
                    self.core_alive = False
                    return
                assert action.version not in [v for v, _ in self.log], "decided twice"
                self.log.append((action.version, action.commit))
                self.trace.append(("persist", action.version, action.commit))
                if self.crash == "after persist":
                    self.core_alive = False
                    return
            elif isinstance(action, Send):
                self._deliver(self.streams[action.member], action.message)
            elif isinstance(action, MakePlan):
                problem = None
                if self.plan_problem:
                    problem = pb.Problem(error=self.plan_problem, message="planted")
                index = {label: i for i, (label, _) in enumerate(action.sinks)}
                hops = {
                    index[label]: {index[other] for other in others if other in index}
                    for label, others in self.hops.items()
                    if label in index
                }
                self.sink_index = index
                self._perform(
                    self.core.planned(
                        self.now, action.epoch, digest="d", hops=hops, problem=problem
                    )
                )
            else:
                assert isinstance(action, Disconnect)

    def _deliver(self, actor: Actor, message: pb.CoordinatorMessage) -> None:
        kind = message.WhichOneof("kind")
        if kind == "decide" and message.decide.version in [v for v, _ in self.log]:
            self.trace.append(("decide", message.decide.version, message.decide.commit))
        if not actor.alive:
            return
        actor.received.append(message)
        if actor.frozen:
            return
        is_source = actor.hello.role == pb.SOURCE
        if kind == "bind":
            ready = pb.BindReady(
                epoch=message.bind.epoch, plan_digest="d", export_descriptor=b"x" * (not is_source)
            )
            self._say(actor, "bind", bind_ready=ready)
        elif kind == "exports":
            self._say(actor, "connect", connected=pb.Connected(epoch=message.exports.epoch))
        elif kind == "arm" and self.busy:
            pass  # no room yet: the version before is not adopted
        elif kind == "arm":
            actor.state, actor.version = pb.FILLING, message.arm.version
            self._say(actor, "armed", armed=pb.Armed(version=message.arm.version))
        elif kind == "write" and not is_source:
            if actor.label in self.hops:
                sinks = [self.sink_index[other] for other in self.hops[actor.label]]
                digests = pack_digests({sink: np.array([7], np.uint64) for sink in sinks})
                done = pb.WritesDone(version=message.write.version, digests=digests)
                self._say(actor, "forward", writes_done=done)
        elif kind == "expect":
            problem = None
            if actor.vote_problem:
                problem = pb.Problem(error=actor.vote_problem, message="planted")
            vote = pb.Vote(
                version=message.expect.version, prepared=problem is None, problem=problem
            )
            if actor.stalled_at != "armed":
                self._say(actor, "vote", vote=vote)
        elif kind == "write":
            actor.open = message.write.version
            self._say(actor, "write", writes_done=pb.WritesDone(version=message.write.version))
        elif kind == "decide":
            if is_source:
                actor.open = 0
            elif message.decide.commit:
                actor.state = pb.COMMITTED
            elif actor.version == message.decide.version:
                actor.state, actor.version = pb.IDLE, 0
        elif kind == "drop":
            if actor.version == message.drop.version:
                actor.state, actor.version = pb.IDLE, 0
        elif kind == "apply":
            ok = not actor.apply_fails
            actor.apply_fails = False
            actor.state = pb.APPLYING
            if actor.stalled_at == "apply":
                actor.held.append(
                    pb.MemberMessage(applied=pb.Applied(version=message.apply.version, ok=ok))
                )
                return
            applied = pb.Applied(version=message.apply.version, ok=ok)
            applied.seconds.fill = actor.fill_s
            self._say(actor, "applied", applied=applied)
        elif kind == "activate":
            actor.state, actor.version = pb.ACTIVE, message.activate.version
            actor.active = message.activate.version
        elif kind == "torn":
            actor.state, actor.version, actor.active = pb.TORN, 0, 0
