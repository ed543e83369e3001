"""Sinks that pass on what they received, over every fabric: same bytes, same digests, same fence.

What needs a coordinator, aborts and drops, is in tests/integration/test_hops.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from support import IS_LONG
from support.fabrics import CASES, Case, no_leaks
from support.hop_runs import TENSORS, WAYS, HopFleet

MODES = ("staged", "in_place")
# One of each fabric: whether sinks are pushed to or pull is said by the mode. A wire of the sim
# joins two engines only; hops on it are in tests/fault/test_sim_schedules.py.
ONCE = ("local-push", "tcp", "ofi:tcp", "ofi:shm", "local+tcp", "cuda_ipc", "verbs")
HOP_CASES = [case for case in CASES if case.name in ONCE or (IS_LONG and "sim" not in case.name)]
# In place is where bytes land, not who sends them: one way of each fabric, and all if long.
WAYS_AND_MODES = [
    (way, mode) for way in WAYS for mode in MODES if IS_LONG or mode == "staged" or way == "both"
]
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
@pytest.mark.parametrize(("way", "mode"), WAYS_AND_MODES)
def test_every_element_arrives_and_sources_send_it_once(
    stack: ExitStack, case: Case, way: str, mode: str
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
@pytest.mark.parametrize("mode", MODES)
def test_what_a_frozen_forwarder_writes_after_the_fence_lands_nowhere(
    stack: ExitStack, case: Case, mode: str
) -> None:
    fleet = _fleet(stack, case, mode, "relays")  # what it passes on comes from sources alone
    frozen = fleet.forwarders()[0]
    others = [i for i in range(len(fleet.sinks)) if i != frozen]
    first = fleet.transfer(1, frozen)
    assert first.stopped.wait(10.0)
    assert first.give_up(others) != others  # somebody lacks what it passes on: no commit
    for index in others:
        fleet.receivers[index].fence()
    for part in fleet.replace_sink(frozen):
        stack.callback(part.close)
    fleet.bind()
    second = fleet.transfer(2)
    assert second.prepared() == list(range(len(fleet.sinks)))
    # At the worst moment: all of version 2 is verified, and nothing applied.
    assert not first.writes_late(frozen)
    second.apply()
    fleet.check(2)
