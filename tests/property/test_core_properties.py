"""Random lives of a fleet: whatever happens, the invariants of docs/protocol.md hold."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from support.fleet import Fleet
from weightsync.service import weightsync_pb2 as pb

LABELS = ["source 0", "source 1", "sink a/0", "sink a/1", "sink b/0"]
SOURCE_STEPS = ["publish", "bind", "connect", "write"]
SINK_STEPS = ["bind", "armed", "vote", "ready", "applied"]
LAGS = [(n, s) for n in LABELS for s in (SINK_STEPS if n.startswith("sink") else SOURCE_STEPS)]


class FleetLife(RuleBasedStateMachine):
    """Members die, freeze, lag and come back; the coordinator crashes and starts again."""

    def __init__(self) -> None:
        super().__init__()
        self.fleet = Fleet(sources=2, replicas={"a": 2, "b": 1}, lease_s=5.0)
        self.generation = 1

    @rule()
    def publish(self) -> None:
        self.fleet.publish_all(timeout_s=20.0)

    @rule()
    def refit(self) -> None:
        self.fleet.refit_all()

    @rule(label=st.sampled_from(LABELS))
    def kill(self, label: str) -> None:
        if self.fleet.actors[label].alive:
            self.fleet.kill(label)

    @rule(label=st.sampled_from(LABELS))
    def start_again(self, label: str) -> None:
        if not self.fleet.actors[label].alive:
            self.generation += 1
            self.fleet.start(label, generation=self.generation)

    @rule(lag=st.sampled_from(LAGS))
    def lag(self, lag: tuple[str, str]) -> None:
        """One member does not take one step yet; then a version goes its way."""
        self.recover()
        self.fleet.stall(lag[0], at=lag[1])
        self.fleet.publish_all(timeout_s=20.0)
        self.fleet.refit_all()

    @rule()
    def recover(self) -> None:
        """All who lag catch up, all who are gone start again."""
        for label in LABELS:
            if self.fleet.actors[label].alive:
                self.fleet.resume(label)
            else:
                self.start_again(label)

    @rule(label=st.sampled_from(LABELS))
    def catch_up(self, label: str) -> None:
        self.fleet.resume(label)

    @rule(label=st.sampled_from(LABELS))
    def freeze(self, label: str) -> None:
        if self.fleet.actors[label].alive:
            self.fleet.freeze(label)

    @rule(seconds=st.sampled_from([1.0, 6.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.fleet.advance(seconds)

    @precondition(lambda self: self.fleet.core_alive)
    @rule(when=st.sampled_from(["now", "before persist", "after persist"]))
    def crash(self, when: str) -> None:
        if when == "now":
            self.fleet.crash_now()
        else:
            self.fleet.crash = when

    @precondition(lambda self: not self.fleet.core_alive)
    @rule()
    def restart(self) -> None:
        self.fleet.restart_coordinator()

    @invariant()
    def every_answer_is_the_recorded_decision(self) -> None:
        recorded = dict(self.fleet.log)
        for actor in self.fleet.actors.values():
            for message in actor.received:
                if message.HasField("decide") and message.decide.commit:
                    assert recorded.get(message.decide.version) is True, actor.label

    @invariant()
    def what_is_active_was_committed(self) -> None:
        recorded = dict(self.fleet.log)
        for actor in self.fleet.actors.values():
            if actor.active:
                assert recorded.get(actor.active) is True, actor.label

    @invariant()
    def no_replica_serves_two_versions(self) -> None:
        if not self.fleet.core_alive:
            return
        for replica, version in self.fleet.serving().items():
            ranks = [
                actor
                for actor in self.fleet.actors.values()
                if actor.hello.replica == replica and actor.alive and not actor.frozen
            ]
            assert {actor.active for actor in ranks} <= {version}
            assert all(actor.state != pb.TORN for actor in ranks)

    @invariant()
    def ranks_that_serve_agree(self) -> None:
        serving: dict[str, set[int]] = {}
        for actor in self.fleet.actors.values():
            if actor.alive and actor.state == pb.ACTIVE:
                serving.setdefault(actor.hello.replica, set()).add(actor.active)
        assert all(len(versions) == 1 for versions in serving.values()), serving

    @invariant()
    def a_commit_has_the_vote_of_every_rank_that_hears_of_it(self) -> None:
        for actor in self.fleet.actors.values():
            for message in actor.received:
                if message.HasField("decide") and message.decide.commit and actor.hello.replica:
                    assert message.decide.version in actor.prepared, actor.label

    def teardown(self) -> None:
        """Whatever happened: with everybody healthy again, the next version is committed."""
        fleet = self.fleet
        if not fleet.core_alive:
            fleet.restart_coordinator()
        fleet.crash = ""
        for label in LABELS:
            actor = fleet.actors[label]
            actor.stalled_at, actor.held = "", []
            if actor.alive:
                fleet.kill(label)
            self.generation += 1
            fleet.start(label, generation=self.generation)
        fleet.advance(30.0)
        fleet.publish_all()
        assert fleet.decisions[-1][1], fleet.decisions
        fleet.refit_all()
        assert set(fleet.serving()) == {"a", "b"}


FleetLife.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestFleetLife = FleetLife.TestCase
