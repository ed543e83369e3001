"""Counters against the plan: what matches, and what is seen."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from weightsync.fleet.fleet import Observed
from weightsync.ir import Manifest, ManifestBuilder
from weightsync.planners.planner import plan_transfer
from weightsync.planners.traffic import Traffic, traffic_of
from weightsync.scale.links import links_report
from weightsync.scale.topology import Counters, Shape

MB = 1_000_000
SHAPE = Shape(mbit_per_s=80)  # 10 MB/s a link
FRAME = 9014 / 8948


def _traffic() -> Traffic:
    """Sources 0 and 1 send 4 and 2 MB to one sink."""
    sources = []
    for number, size in enumerate((2 * MB, MB)):  # of two bytes each
        builder = ManifestBuilder("source", f"source {number}")
        for name, held in (("t0", 2 * MB), ("t1", MB)):
            builder.tensor(name, (held,))
        builder.buffer("own", "BF16", size)
        builder.place(f"t{number}", "own", (size,))
        sources.append(builder.build())
    builder = ManifestBuilder("sink", "sink 0")
    for name, size in (("t0", 2 * MB), ("t1", MB)):
        builder.tensor(name, (size,))
        builder.buffer(name, "BF16", size)
        builder.place(name, name, (size,))
    return traffic_of(plan_transfer(Manifest.merge("source", sources), builder.build()), 1)


# Hosts 0 and 1 send, host 2 has no part, host 3 receives.
HOSTS = ([0, 1], [3])


def _seen() -> Observed:
    sources: list[dict[str, Any]] = [{"bytes": 4 * MB}, {"bytes": 2 * MB}]
    return Observed(0.4, {"wire": 0.32}, sources, [{"placed": 6 * MB}])


def _counters() -> Counters:
    def rails(nbytes: float) -> list[int]:
        return [int(nbytes / 2), int(nbytes / 2)]

    full = FRAME * 1.002
    sent = [rails(4 * MB * full), rails(2 * MB * full), [0, 0], rails(0.01 * 6 * MB)]
    received = [rails(0.01 * 4 * MB), rails(0.01 * 2 * MB), [0, 0], rails(6 * MB * full)]
    return Counters(sent, received, [0] * 4, 3)


def _report(seen: Observed, counters: Counters) -> dict[str, Any]:
    placed = np.array([6 * MB])
    return links_report(SHAPE, 2, HOSTS, _traffic(), placed, [seen], [counters])


def test_what_the_plan_says_matches() -> None:
    found = _report(_seen(), _counters())
    assert found["match"] is True
    assert found["extra_max"] == pytest.approx(0.002, abs=1e-5)
    assert found["acks_max"] == pytest.approx(0.01, abs=1e-5)
    assert found["rail_uneven_max"] == pytest.approx(0, abs=1e-5)
    assert found["sink_utilisation"] == pytest.approx(3 * MB * FRAME * 1.002 / 10 / MB / 0.32)
    assert (found["rank_bytes_sent"], found["rank_bytes_received"]) == ([4 * MB, 2 * MB], [6 * MB])
    assert found["dropped"] == [3]


@pytest.mark.parametrize(
    ("what", "host", "nbytes"),
    [("sent", 1, 150_000), ("sent", 1, -100_000), ("received", 3, 400_000), ("sent", 3, 100_000)],
)
def test_a_link_that_carries_something_else_is_seen(what: str, host: int, nbytes: int) -> None:
    counters = _counters()
    getattr(counters, what)[host][0] += nbytes
    assert _report(_seen(), counters)["match"] is False


def test_what_was_sent_again_is_known_to_the_host() -> None:
    counters = _counters()
    counters.sent[1][0] += 20 * 9014  # 9 percent of what host 1 was to send
    assert _report(_seen(), counters)["match"] is False
    counters.resent[1] = 20
    found = _report(_seen(), counters)
    assert found["match"] is True
    assert found["extra_max"] == pytest.approx(0.002, abs=1e-5)
    assert found["resent"] == [20]
    counters.resent[1], counters.resent[0] = 0, 20  # of another host
    assert _report(_seen(), counters)["match"] is False


@pytest.mark.parametrize("side", ["sources", "sinks"])
def test_bytes_of_weights_that_are_missing_are_seen(side: str) -> None:
    seen = _seen()
    key = "bytes" if side == "sources" else "placed"
    less = [{key: one[key] - 1} for one in getattr(seen, side)]
    found = _report(dataclasses.replace(seen, **{side: less}), _counters())
    assert found["match"] is False
    assert "sources sent" in found["wrong"][0]


def test_a_rail_that_carries_more_than_its_share_is_told() -> None:
    counters = _counters()
    counters.sent[0][:] = [int(4 * MB * FRAME * 0.75), int(4 * MB * FRAME * 0.25)]
    found = _report(_seen(), counters)
    assert found["match"] is True  # rails pull: shares are not planned
    assert found["rail_uneven_max"] == pytest.approx(0.5, abs=1e-4)
