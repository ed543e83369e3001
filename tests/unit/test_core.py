"""The coordinator's core, driven by hand: no sockets, no threads, time is a number."""

from __future__ import annotations

import pytest

from support.fleet import Fleet
from weightsync.service import weightsync_pb2 as pb
from weightsync.service.digests import unpack_digests


def test_a_version_goes_from_publish_to_adopted() -> None:
    fleet = Fleet(sources=2, replicas={"a": 2, "b": 2}, min_replicas=2)
    fleet.publish_all()
    assert fleet.decisions == [(1, True)]
    assert fleet.outcomes("source 0") == [(1, True, "")]
    fleet.refit_all()
    assert fleet.serving() == {"a": 1, "b": 1}
    assert "adopted" in fleet.kinds("source 1")


def test_sources_hear_the_seconds_of_the_slowest_sink_of_their_version() -> None:
    fleet = Fleet(sources=1, replicas={"a": 1, "b": 2})
    fleet.actors["sink a/0"].fill_s, fleet.actors["sink b/0"].fill_s = 1.0, 5.0
    fleet.publish_all()
    fleet.refit_all()
    fleet.stall("sink b/1", at="vote")
    fleet.publish_all()
    fleet.kill("sink b/1")  # its replica goes on with version 1
    fleet.refit_all()
    adopted = [m.adopted for m in fleet.actors["source 0"].received if m.HasField("adopted")]
    assert [(a.version, a.slowest.fill) for a in adopted] == [(1, 5.0), (2, 1.0)]


def test_nobody_hears_of_a_commit_before_it_is_recorded() -> None:
    fleet = Fleet(sources=2, replicas={"a": 2})
    fleet.publish_all()
    trace = fleet.trace
    assert trace.index(("persist", 1, True)) < trace.index(("decide", 1, True))


def test_a_lost_source_aborts_and_everyone_binds_again() -> None:
    fleet = Fleet(sources=2, replicas={"a": 2})
    fleet.stall("source 1", at="write")
    fleet.publish_all()
    epoch = fleet.core.epoch
    fleet.kill("source 1")
    assert fleet.decisions == [(1, False)]
    assert "source 1 was lost" in fleet.outcomes("source 0")[0][2]
    fleet.start("source 1")
    assert fleet.core.epoch == epoch + 1
    fleet.publish_all()
    assert fleet.decisions[-1] == (2, True)


def test_a_source_lost_after_its_writes_does_not_stop_the_commit() -> None:
    fleet = Fleet(sources=2, replicas={"a": 2})
    fleet.stall("sink a/0", at="vote")
    fleet.publish_all()
    fleet.kill("source 1")
    fleet.resume("sink a/0")
    assert fleet.decisions == [(1, True)]


def test_a_lost_sink_takes_its_replica_out_only() -> None:
    fleet = Fleet(sources=2, replicas={"a": 2, "b": 2}, min_replicas=1)
    fleet.stall("sink b/1", at="vote")
    fleet.publish_all()
    fleet.kill("sink b/1")
    assert fleet.decisions == [(1, True)]
    assert fleet.kinds("sink b/0")[-1] == "drop"
    fleet.refit_all()
    assert fleet.serving() == {"a": 1}


def test_too_few_replicas_left_aborts() -> None:
    fleet = Fleet(sources=2, replicas={"a": 2, "b": 2}, min_replicas=2)
    fleet.stall("sink b/1", at="vote")
    fleet.publish_all()
    fleet.kill("sink b/1")
    assert fleet.decisions == [(1, False)]


def test_one_bad_digest_aborts_for_all() -> None:
    fleet = Fleet(sources=1, replicas={"a": 1, "b": 1})
    fleet.fail_vote("sink b/0", "IntegrityError")
    fleet.publish_all()
    assert fleet.decisions == [(1, False)]
    assert fleet.problem("source 0") == "IntegrityError"


@pytest.mark.parametrize(
    ("stalled", "at", "named"),
    [
        ("source 1", "publish", "source 1"),
        ("sink a/1", "armed", "sink a/1"),
        ("source 0", "write", "source 0"),
        ("sink a/0", "vote", "sink a/0"),
    ],
)
def test_a_deadline_names_who_was_waited_for(stalled: str, at: str, named: str) -> None:
    fleet = Fleet(sources=2, replicas={"a": 2}, lease_s=1e9)
    fleet.stall(stalled, at=at)
    fleet.publish_all(timeout_s=5.0)
    fleet.advance(6.0)
    assert fleet.decisions == [(1, False)]
    reason = fleet.outcomes("source 0")[0][2]
    assert named in reason
    assert "source 1" not in reason or named == "source 1"


def test_no_replica_by_the_deadline_is_no_quorum() -> None:
    fleet = Fleet(sources=1, replicas={"a": 2})
    fleet.kill("sink a/1")
    fleet.publish_all(timeout_s=5.0)
    fleet.advance(6.0)
    assert fleet.problem("source 0") == "NoQuorumError"


def test_a_silent_member_is_fenced_after_its_lease() -> None:
    fleet = Fleet(sources=1, replicas={"a": 2, "b": 2}, lease_s=1.0)
    fleet.freeze("sink b/0")
    fleet.publish_all()
    fleet.advance(1.5)
    assert fleet.problem("sink b/0") == "FencedError"
    assert fleet.decisions == [(1, True)]


def test_a_coordinator_that_stood_still_takes_nobody_for_silent() -> None:
    fleet = Fleet(sources=1, replicas={"a": 2, "b": 2}, lease_s=1.0)
    fleet.freeze("sink b/0")
    fleet.tick_after(3.0)  # the host stands still: what members sent meanwhile is not read yet
    assert fleet.problem("source 0") == fleet.problem("sink a/0") == fleet.problem("sink b/0") == ""
    fleet.publish_all()
    fleet.advance(1.5)
    assert fleet.problem("sink b/0") == "FencedError"
    assert fleet.decisions == [(1, True)]


def test_a_coordinator_that_is_always_late_finds_the_dead() -> None:
    fleet = Fleet(sources=1, replicas={"a": 1, "b": 1}, lease_s=1.0)
    fleet.freeze("sink b/0")
    for _ in range(3):
        fleet.tick_after(0.6, heard_first=True)
    assert fleet.problem("sink b/0") == "FencedError"
    assert fleet.problem("sink a/0") == fleet.problem("source 0") == ""


def test_a_deadline_counts_the_time_in_which_the_coordinator_stood_still() -> None:
    fleet = Fleet(sources=1, replicas={"a": 1})
    fleet.stall("source 0", at="write")
    fleet.publish_all(timeout_s=2.0)
    fleet.tick_after(3.0)
    assert fleet.decisions == [(1, False)]
    assert fleet.problem("source 0") == "TransferTimeoutError"


def test_versions_only_grow() -> None:
    fleet = Fleet(sources=1, replicas={"a": 1})
    fleet.publish_all(version=7)
    fleet.refit_all()
    fleet.publish_all(version=7)
    assert fleet.problem("source 0") == "StaleVersionError"
    fleet.publish_all()
    assert fleet.decisions == [(7, True), (8, True)]


def test_digests_that_contradict_themselves_abort_the_version() -> None:
    fleet = Fleet(sources=1, replicas={"a": 2})
    fleet.stall("source 0", at="write")
    fleet.publish_all()
    digests = pb.Digests(peers=bytes(4), counts=bytes(8))
    fleet.say("source 0", writes_done=pb.WritesDone(version=1, digests=digests))
    assert fleet.decisions == [(1, False)]
    assert "source 0: digests of 1 peers" in fleet.outcomes("source 0")[0][2]


def test_a_second_process_with_the_same_rank_is_refused() -> None:
    fleet = Fleet(sources=1, replicas={"a": 2})
    fleet.start("sink a/1", generation=99)
    assert fleet.problem("sink a/1") == "ConfigError"
    fleet.publish_all()
    assert fleet.decisions == [(1, True)]


def test_a_rank_lost_while_applying_tears_its_replica_only() -> None:
    fleet = Fleet(sources=1, replicas={"a": 2, "b": 2})
    fleet.publish_all()
    fleet.stall("sink a/1", at="applied")
    fleet.refit_all()
    fleet.kill("sink a/1")
    assert fleet.kinds("sink a/0")[-1] == "torn"
    assert fleet.serving() == {"b": 1}


def test_a_rank_lost_before_applying_leaves_the_old_version() -> None:
    fleet = Fleet(sources=1, replicas={"a": 2, "b": 2})
    fleet.publish_all()
    fleet.refit_all()
    fleet.publish_all()
    fleet.kill("sink a/1")
    assert fleet.kinds("sink a/0")[-1] == "drop"
    fleet.refit_all()
    assert fleet.serving() == {"b": 2}


def test_a_failed_apply_tears_the_replica() -> None:
    fleet = Fleet(sources=1, replicas={"a": 2, "b": 2})
    fleet.publish_all()
    fleet.fail_apply("sink a/0")
    fleet.refit_all()
    assert fleet.kinds("sink a/1")[-1] == "torn"
    assert fleet.serving() == {"b": 1}
    fleet.publish_all()
    fleet.refit_all()
    assert fleet.serving() == {"a": 2, "b": 2}


def test_a_restarted_coordinator_repeats_a_recorded_commit() -> None:
    fleet = Fleet(sources=2, replicas={"a": 2})
    fleet.crash_coordinator(after="persist")
    fleet.publish_all()
    fleet.restart_coordinator()
    assert fleet.decisions == [(1, True)]
    assert fleet.outcomes("source 0") == [(1, True, "")]
    fleet.refit_all()
    assert fleet.serving() == {"a": 1}


def test_a_restarted_coordinator_aborts_what_was_not_recorded() -> None:
    fleet = Fleet(sources=2, replicas={"a": 2})
    fleet.crash_coordinator(before="persist")
    fleet.publish_all()
    fleet.restart_coordinator()
    assert fleet.decisions == [(1, False)]
    assert fleet.outcomes("source 0")[0][:2] == (1, False)
    fleet.publish_all()
    assert fleet.decisions[-1] == (2, True)


def test_a_restart_in_the_middle_of_applying_goes_on() -> None:
    fleet = Fleet(sources=1, replicas={"a": 2})
    fleet.publish_all()
    fleet.stall("sink a/1", at="apply")
    fleet.refit_all()
    fleet.crash_now()
    fleet.restart_coordinator()
    fleet.resume("sink a/1")
    assert fleet.serving() == {"a": 1}


def test_a_plan_that_cannot_be_made_fails_every_publish_with_its_reason() -> None:
    fleet = Fleet(sources=1, replicas={"a": 1}, plan_problem="CoverageError")
    fleet.publish_all()
    assert fleet.problem("source 0") == "CoverageError"
    fleet.publish_all()
    assert [kind for kind in fleet.kinds("source 0") if kind == "decide"] == ["decide"] * 2


def test_a_restart_between_ready_and_apply_tells_every_rank() -> None:
    fleet = Fleet(sources=1, replicas={"a": 2})
    fleet.publish_all()
    fleet.stall("sink a/1", at="ready")
    fleet.refit_all()
    fleet.crash_now()
    fleet.restart_coordinator(order=["sink a/0", "refit", "sink a/1", "source 0"])
    fleet.resume("sink a/1")
    assert fleet.serving() == {"a": 1}


def test_an_abort_leaves_the_adoption_of_the_version_before_alone() -> None:
    fleet = Fleet(sources=1, replicas={"a": 2}, lease_s=1e9)
    fleet.publish_all()
    fleet.busy = True  # with version 1
    fleet.publish_all(timeout_s=5.0)
    fleet.advance(6.0)
    assert fleet.decisions == [(1, True), (2, False)]
    fleet.refit_all()
    assert fleet.serving() == {"a": 1}


def test_a_withdrawn_rank_is_not_told_to_apply() -> None:
    fleet = Fleet(sources=1, replicas={"a": 2})
    fleet.publish_all()
    fleet.say("sink a/0", ready_to_apply=pb.ReadyToApply(version=1))
    fleet.say("sink a/0", ready_to_apply=pb.ReadyToApply(version=1, withdrawn=True))
    fleet.say("sink a/1", ready_to_apply=pb.ReadyToApply(version=1))
    assert "apply" not in fleet.kinds("sink a/0") + fleet.kinds("sink a/1")
    assert fleet.kinds("sink a/0")[-1] == "withdrawn"
    fleet.refit_all()
    assert fleet.serving() == {"a": 1}


def test_a_restart_tells_the_outcome_of_older_versions_too() -> None:
    fleet = Fleet(sources=1, replicas={"a": 1})
    fleet.publish_all()
    fleet.refit_all()
    fleet.publish_all()
    fleet.refit_all()
    fleet.actors["source 0"].open = 1  # it was away all the time
    fleet.crash_now()
    fleet.restart_coordinator()
    assert fleet.outcomes("source 0")[-1][:2] == (1, True)


def test_a_rank_known_torn_by_its_heartbeat_tears_a_replica_that_applies() -> None:
    fleet = Fleet(sources=1, replicas={"a": 2})
    fleet.publish_all()
    fleet.stall("sink a/1", at="applied")
    fleet.refit_all()
    fleet.say("sink a/1", heartbeat=pb.Heartbeat(state=pb.TORN))
    assert fleet.kinds("sink a/0")[-1] == "torn"
    fleet.actors["sink a/1"].stalled_at = ""
    fleet.publish_all()
    fleet.refit_all()
    assert fleet.serving() == {"a": 2}


def _relay() -> Fleet:
    """Replica a passes on to replica b."""
    return Fleet(sources=1, replicas={"a": 1, "b": 1}, hops={"sink a/0": ["sink b/0"]}, lease_s=1e9)


def test_sinks_that_pass_on_connect_and_report_like_sources() -> None:
    fleet = _relay()
    assert "exports" in fleet.kinds("sink a/0")
    assert "exports" not in fleet.kinds("sink b/0")
    fleet.publish_all()
    assert fleet.decisions == [(1, True)]
    [expect] = [m.expect for m in fleet.actors["sink b/0"].received if m.HasField("expect")]
    found = {number: d.tolist() for number, d in unpack_digests(expect.digests).items()}
    assert found == {1: [7]}  # behind the one source


def test_nothing_is_written_before_they_are_connected() -> None:
    fleet = Fleet(sources=1, replicas={"a": 1}, hops={"sink a/0": ["sink b/0", "sink b/1"]})
    fleet.stall("sink a/0", at="connect")
    for rank in range(2):
        fleet._add(pb.Hello(role=pb.SINK, replica="b", rank=rank, world_size=2))
    fleet.run()
    fleet.publish_all()
    assert "write" not in fleet.kinds("source 0")
    fleet.resume("sink a/0")
    assert fleet.decisions == [(1, True)]


def test_sinks_that_pass_on_hear_whom_to_forget_before_they_may_write() -> None:
    fleet = Fleet(sources=1, replicas={"a": 1, "b": 2}, hops={"sink a/0": ["sink b/0"]})
    fleet.stall("sink b/0", at="armed")
    fleet.stall("sink b/1", at="armed")
    fleet.publish_all()
    assert "write" not in fleet.kinds("sink a/0")
    fleet.kill("sink b/1")  # sink b/0 is not armed: nothing may write to it
    kinds = fleet.kinds("sink a/0")
    assert kinds.index("forget") < kinds.index("write")
    assert "write" not in fleet.kinds("sink b/0")


def test_a_sink_lost_before_it_passed_on_aborts_like_a_source() -> None:
    fleet = _relay()
    fleet.stall("sink a/0", at="forward")
    fleet.stall("sink b/0", at="vote")
    fleet.publish_all()
    fleet.kill("sink a/0")
    assert fleet.decisions == [(1, False)]
    assert "sink a/0 was lost" in fleet.outcomes("source 0")[0][2]
    fleet.resume("sink b/0")
    fleet.publish_all()  # with the replica that is left
    assert fleet.decisions[-1] == (2, True)


def test_a_sink_lost_before_it_checked_what_it_passed_on_aborts() -> None:
    fleet = _relay()
    fleet.stall("sink a/0", at="vote")
    fleet.publish_all()
    assert 1 in fleet.actors["sink b/0"].prepared  # with the digests of sink a/0 alone
    fleet.kill("sink a/0")
    assert fleet.decisions == [(1, False)]


def test_a_replica_left_out_before_it_checked_what_it_passed_on_aborts() -> None:
    fleet = Fleet(sources=1, replicas={"a": 2, "b": 1}, hops={"sink a/0": ["sink b/0"]})
    fleet.stall("sink a/0", at="vote")
    fleet.stall("sink a/1", at="vote")
    fleet.publish_all()
    fleet.kill("sink a/1")  # not the one that passes on
    assert fleet.decisions == [(1, False)]


def test_a_sink_lost_after_it_passed_on_and_voted_takes_its_replica_out_only() -> None:
    fleet = _relay()
    fleet.stall("sink b/0", at="vote")
    fleet.publish_all()
    fleet.kill("sink a/0")
    assert fleet.decisions == []
    fleet.resume("sink b/0")
    assert fleet.decisions == [(1, True)]


def test_what_was_passed_on_twice_needs_the_first_who_did() -> None:
    hops = {"sink a/0": ["sink b/0"], "sink b/0": ["sink c/0"]}
    fleet = Fleet(sources=1, replicas={"a": 1, "b": 1, "c": 1}, hops=hops, lease_s=1e9)
    fleet.stall("sink a/0", at="vote")
    fleet.stall("sink c/0", at="vote")
    fleet.publish_all()
    fleet.kill("sink b/0")  # it has voted, for what it got from sink a/0
    assert fleet.decisions == []
    fleet.kill("sink a/0")
    assert fleet.decisions == [(1, False)]


def test_sinks_that_pass_on_forget_those_that_are_lost() -> None:
    fleet = _relay()
    fleet.stall("sink a/0", at="forward")
    fleet.stall("sink b/0", at="vote")
    fleet.publish_all()
    fleet.kill("sink b/0")
    forgotten = [m.forget for m in fleet.actors["sink a/0"].received if m.HasField("forget")]
    assert [list(m.sinks) for m in forgotten] == [[1]]
    assert fleet.decisions == [(1, True)]
