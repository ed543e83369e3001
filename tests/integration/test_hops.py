"""Sinks that pass on what they received, in whole jobs: real gRPC, real engines, both modes."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from integration.test_client import TIMEOUT_S, Fleet
from support import IS_LONG
from support.cuda import is_faked
from support.toy import SHAPES, expected_sink
from weightsync.client import Job
from weightsync.errors import ConfigError, VersionAbortedError

REPLICAS = "abc"


def _nbytes(name: str) -> int:
    rows, *rest = SHAPES[name]
    return 2 * rows * (rest[0] if rest else 1)


SHARED = _nbytes("embed") + _nbytes("norm")  # what both ranks of a replica store whole
CUT = _nbytes("up") + _nbytes("down")
SENT = {
    "direct": len(REPLICAS) * (2 * SHARED + CUT),
    "node_dedup": len(REPLICAS) * (SHARED + CUT),
    "relays": 2 * SHARED + CUT,
    "both": SHARED + CUT,
}
RULES = {
    "direct": {},
    "node_dedup": {"ranks_per_node": 2, "node_dedup": "on"},
    "relays": {"relays": "on"},
    "both": {"ranks_per_node": 2, "node_dedup": "on", "relays": "on"},
}


# With the fake GPU driver alone, whose run tests/contract/test_cuda_ipc.py starts.
FABRICS = ["cuda_ipc"] if is_faked() else ["local", "tcp", "local+tcp"]
# Each way and mode over each fabric is in tests/contract/test_hops.py; here they are whole jobs.
CASES = [
    (way, mode, fabric)
    for way in RULES
    for mode in ("staged", "in_place")
    for fabric in FABRICS
    if IS_LONG or way == "both" or (mode == "staged" and fabric in ("local", "tcp"))
]


@pytest.mark.parametrize(("way", "mode", "fabric"), CASES)
def test_sources_send_once_what_sinks_pass_on(way: str, mode: str, fabric: str) -> None:
    with Job.start(bucket_bytes=512, **RULES[way]) as job:  # type: ignore[arg-type]
        fleet = Fleet(job, mode=mode, replicas=REPLICAS, fabric=fabric)
        with fleet.stack:
            for step in range(1, 5):
                fleet.train(step)
                waiting = fleet.start_refit()
                reports = fleet.publish(until="adopted")
                assert [f.result(TIMEOUT_S) for f in waiting] == [step] * 2 * len(REPLICAS)
                assert sum(report.num_bytes for report in reports) == SENT[way]
                fleet.check()


@pytest.mark.skipif(is_faked(), reason="fabrics of the host's memory and of loopback")
def test_nodes_deduplicate_by_themselves_where_that_spares_their_nics() -> None:
    for fabric, sent in {"local+tcp": SENT["node_dedup"], "tcp": SENT["direct"]}.items():
        with Job.start(bucket_bytes=512, ranks_per_node=2) as job:
            fleet = Fleet(job, replicas=REPLICAS, fabric=fabric)
            with fleet.stack:
                fleet.train(1)
                waiting = fleet.start_refit()
                reports = fleet.publish(until="adopted")
                assert [f.result(TIMEOUT_S) for f in waiting] == [1] * 2 * len(REPLICAS)
                assert sum(report.num_bytes for report in reports) == sent
                fleet.check()


class Loss:
    """A fleet of two replicas that holds version 1, and sink a/0, which is lost in version 2."""

    def __init__(self, job: Job, fabric: str, patch: pytest.MonkeyPatch) -> None:
        self.fleet = Fleet(job, replicas="ab", fabric=fabric)
        self._job, self._patch = job, patch

    def strike(self) -> dict[tuple[str, int], dict[str, torch.Tensor]]:
        """Let it be lost when it would pass on; what every sink held before."""
        fleet = self.fleet
        fleet.train(1)
        waiting = fleet.start_refit()
        fleet.publish(until="adopted")
        assert [f.result(TIMEOUT_S) for f in waiting] == [1] * 4
        victim = fleet.sinks["a", 0]._member
        forwarder = victim._hops._forwarder
        assert forwarder is not None

        def lose_the_stream(*args: Any, **kwargs: Any) -> None:
            assert victim.session is not None
            victim.session._channel.close()

        self._patch.setattr(forwarder, "run", lose_the_stream)
        before = {k: {n: t.clone() for n, t in live.items()} for k, live in fleet.live.items()}
        fleet.train(2)
        return before

    def recover(self) -> None:
        """Wait until it joined again; the next version is everybody's."""
        fleet = self.fleet
        deadline = time.monotonic() + TIMEOUT_S
        while [len(r["ranks"]) for r in self._job.status()["replicas"].values()] != [2, 2]:
            assert time.monotonic() < deadline, "the lost rank did not join again"
            time.sleep(0.01)
        fleet.train(3)
        waiting = fleet.start_refit()
        reports = fleet.publish(until="adopted")
        assert reports[0].num_replicas == 2
        assert len({f.result(TIMEOUT_S) for f in waiting}) == 1
        fleet.check()


def _unchanged(live: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(live[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("fabric", FABRICS)
def test_a_replica_lost_while_it_passes_on_aborts_and_the_old_version_serves(
    fabric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Job.start(bucket_bytes=512, relays="on") as job:
        loss = Loss(job, fabric, monkeypatch)
        fleet = loss.fleet
        with fleet.stack:
            before = loss.strike()
            for future in fleet.start_publish():
                error = future.exception(TIMEOUT_S)
                assert isinstance(error, VersionAbortedError)
                assert "sink a/0" in str(error)
            assert {s.version for s in fleet.sinks.values()} == {1}
            assert _unchanged(fleet.live["b", 1], before["b", 1])
            loss.recover()


@pytest.mark.parametrize("fabric", FABRICS)
def test_a_rank_lost_while_it_passes_on_to_its_node_takes_its_replica_alone(
    fabric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Job.start(bucket_bytes=512, ranks_per_node=2, node_dedup="on") as job:
        loss = Loss(job, fabric, monkeypatch)
        fleet = loss.fleet
        with fleet.stack:
            before = loss.strike()
            waiting = [fleet.pool.submit(fleet.sinks["b", rank].refit) for rank in range(2)]
            reports = fleet.publish()
            assert {report.num_replicas for report in reports} == {1}
            assert [f.result(TIMEOUT_S) for f in waiting] == [2, 2]
            for rank in range(2):
                held = expected_sink(fleet.values, rank, 2)
                assert _unchanged(fleet.live["b", rank], held)
                assert _unchanged(fleet.live["a", rank], before["a", rank])
                assert fleet.sinks["a", rank].version == 1
            loss.recover()


def test_rules_that_there_are_not_are_refused() -> None:
    with pytest.raises(ConfigError, match="relays must be auto, on or off"):
        Job.start(relays="always")  # type: ignore[arg-type]
