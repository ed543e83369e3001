"""Sinks that pass on what they received, in whole jobs: real gRPC, real engines, both modes."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from integration.test_client import TIMEOUT_S, Fleet
from support.toy import SHAPES
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


@pytest.mark.parametrize("fabric", ["local", "tcp"])
@pytest.mark.parametrize("mode", ["staged", "in_place"])
@pytest.mark.parametrize("way", RULES)
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


@pytest.mark.parametrize("fabric", ["local", "tcp"])
def test_a_replica_lost_while_it_passes_on_aborts_and_the_old_version_serves(
    fabric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Job.start(bucket_bytes=512, relays="on") as job:
        fleet = Fleet(job, replicas="ab", fabric=fabric)
        with fleet.stack:
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

            monkeypatch.setattr(forwarder, "run", lose_the_stream)
            before = {n: t.clone() for n, t in fleet.live["b", 1].items()}
            fleet.train(2)
            for future in fleet.start_publish():
                error = future.exception(TIMEOUT_S)
                assert isinstance(error, VersionAbortedError)
                assert "sink a/0" in str(error)
            assert {s.version for s in fleet.sinks.values()} == {1}
            assert all(torch.equal(fleet.live["b", 1][n], t) for n, t in before.items())
            deadline = time.monotonic() + TIMEOUT_S
            while [len(r["ranks"]) for r in job.status()["replicas"].values()] != [2, 2]:
                assert time.monotonic() < deadline, "the lost rank did not join again"
                time.sleep(0.01)
            fleet.train(3)
            waiting = fleet.start_refit()
            reports = fleet.publish(until="adopted")
            assert reports[0].num_replicas == 2
            assert len({f.result(TIMEOUT_S) for f in waiting}) == 1
            fleet.check()


def test_rules_that_there_are_not_are_refused() -> None:
    with pytest.raises(ConfigError, match="relays must be auto, on or off"):
        Job.start(relays="always")  # type: ignore[arg-type]
