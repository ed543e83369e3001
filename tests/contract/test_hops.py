"""Sinks that pass on what they received, over every fabric: same bytes, same digests, same fence.

What needs a coordinator, aborts and drops, is in tests/integration/test_hops.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from support.fabrics import CASES, Case, no_leaks
from support.hop_runs import NUM_SOURCES, TENSORS, WAYS, HopFleet
from weightsync.errors import WeightSyncError

# A wire of the sim joins two engines only; hops on it are in tests/fault/test_sim_schedules.py.
HOP_CASES = [case for case in CASES if not case.name.startswith("sim")]
REPLICAS = 2


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with no_leaks(), ExitStack() as stack:
        yield stack


def _fleet(stack: ExitStack, case: Case, mode: str, way: str) -> HopFleet:
    if mode == "in_place" and not case.takes_leases:
        pytest.skip("only memory of the engine can be exported: staged alone")
    fleet = HopFleet(case, mode=mode, replicas=REPLICAS, **WAYS[way])
    stack.callback(fleet.close)
    fleet.bind()
    return fleet


def _sizes() -> tuple[int, int]:
    """Bytes at a sink of what the ranks of a replica hold alike, and of what they cut."""
    sums = {True: 0, False: 0}
    for (height, width), _, stored, is_cut in TENSORS.values():
        sums[is_cut] += height * width * stored().itemsize
    return sums[False], sums[True]


@pytest.mark.parametrize("case", HOP_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("mode", ["staged", "in_place"])
@pytest.mark.parametrize("way", WAYS)
def test_every_element_arrives_and_sources_send_it_once(
    stack: ExitStack, case: Case, mode: str, way: str
) -> None:
    fleet = _fleet(stack, case, mode, way)
    shared, cut = _sizes()
    sent = {
        "node_dedup": REPLICAS * (shared + cut),
        "relays": 2 * shared + cut,
        "both": shared + cut,
    }
    for version in (1, 2, 3):  # the third uses the slots of the first again
        transfer = fleet.transfer(version)
        assert transfer.prepared() == list(range(len(fleet.sinks)))
        transfer.apply()
        fleet.check(version)
        assert sum(transfer.num_bytes) == sent[way]


@pytest.mark.parametrize("case", HOP_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_what_a_frozen_forwarder_writes_after_the_fence_lands_nowhere(
    stack: ExitStack, case: Case, mode: str
) -> None:
    fleet = _fleet(stack, case, mode, "both")
    frozen = fleet.forwarders()[0]
    others = [i for i in range(len(fleet.sinks)) if i != frozen]
    first = fleet.transfer(1, frozen)
    assert first.stopped.wait(10.0)
    assert first.given_up(others).count(True) < len(others)  # somebody waits for it: no commit
    for index in others:
        fleet.receivers[index].fence()
    receiver, hops = fleet.start_sink(frozen) or (None, None)
    assert receiver is not None
    assert hops is not None
    stack.callback(receiver.close)
    stack.callback(hops.close)
    fleet.bind()
    second = fleet.transfer(2)
    assert second.prepared() == list(range(len(fleet.sinks)))
    first.thaw.set()  # at the worst moment: all of version 2 is verified, nothing applied
    with pytest.raises(WeightSyncError):
        first.sinks[frozen].result(30.0)
    second.apply()
    fleet.check(2)
    assert NUM_SOURCES == len(first.sources)
