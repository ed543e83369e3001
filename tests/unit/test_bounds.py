"""Bounds worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from weightsync.planners import bounds

GB = 10**9


def _rates(*values: float) -> np.ndarray:
    return np.array(values, float)


def test_what_few_sources_hold_is_forced_through_them() -> None:
    # 90 bytes that only ports 0 and 1 hold, 10 that all hold: 45 s, not 100 / 4.
    start, holder = np.array([0, 2, 6]), np.array([0, 1, 0, 1, 2, 3])
    loads = np.array([90, 10]), start, holder
    assert bounds.held_s(*loads, _rates(1, 1, 1, 1)) == 45
    assert bounds.held_s(*loads, _rates(2, 1, 1, 1)) == 30
    assert bounds.held_s(np.array([0, 0]), start, holder, _rates(1, 1, 1, 1)) == 0
    assert bounds.held_s(np.array([90, 210]), start, holder, _rates(1, 1, 1, 1)) == 75


def test_ranks_that_share_a_port_are_one_holder() -> None:
    start, holder = np.array([0, 2]), np.array([0, 0])
    assert bounds.held_s(np.array([10]), start, holder, _rates(2)) == 5


def test_relays_help_where_few_feed_many() -> None:
    # 64 trainers, 512 rollouts, equal NICs: up to 8 times (frontier.md 6.4); 256 to 128: nothing.
    needs, sinks = np.full(512, 10), np.ones(512)
    assert bounds.relay_gain(needs, np.ones(64), sinks) == 8
    assert bounds.relay_s(10, needs, np.ones(64), sinks) == 10
    assert bounds.relay_gain(np.full(128, 10), np.ones(256), np.ones(128)) == 1
    # One source of rate 1, two sinks of rate 4 up, 8 down: all must leave once, then 2 m / 9.
    needs, down = np.array([9, 9]), _rates(4, 4)
    assert bounds.relay_s(9, needs, _rates(1), down) == 9
    assert bounds.relay_s(1, needs, _rates(1), down) == pytest.approx(9 / 4)
    # Half duplex: 18 received and 18 sent over 1 + 8.
    assert bounds.relay_s(1, needs, _rates(1), down, is_full_duplex=False) == pytest.approx(4)
    assert bounds.relay_s(1, needs, _rates(9), down, is_full_duplex=False) == pytest.approx(9 / 4)


def test_a_chain_costs_little_more_than_the_wire() -> None:
    # 1 GB at 50 GB/s over 8 nodes with 20 us: 20 ms + 3.1 ms + 0.1 ms (frontier.md 6.5).
    best = bounds.chain_s(GB, 8, 50 * GB, 20e-6)
    assert best == pytest.approx(0.020 + 0.0031 + 0.0001, rel=0.005)
    every = [bounds.chain_s(GB, 8, 50 * GB, 20e-6, chunks) for chunks in range(1, 400)]
    assert best == min(every)
    assert bounds.chain_s(GB, 2, 50 * GB, 20e-6) == pytest.approx(0.02002)
    assert bounds.tree_s(GB, 8, 50 * GB, 20e-6) == pytest.approx(3 * 0.02002)


def test_a_node_receives_once_and_gathers_over_nvlink() -> None:
    assert bounds.node_trick_s(400 * GB, 8, 400 * GB, 450 * GB) == 1
    assert bounds.node_trick_s(400 * GB, 8, 4000 * GB, 100 * GB) == 3.5
    # The same as a bound on what neighbours pass on: 8 GPUs that all need 400 GB.
    passed = bounds.nvlink_s(np.full(8, 400), np.zeros(8, int), np.array([400]), 100)
    assert passed == 3.5
    assert bounds.nvlink_s(np.array([3, 5]), np.array([0, 1]), np.array([3, 5]), 1.0) == 0


def test_the_simple_ones() -> None:
    assert bounds.slowest_s(np.array([3, 8, 5]), 4.0) == 2
    assert bounds.slowest_s(np.zeros(0, int), 4.0) == 0
    assert bounds.cut_s(80, 20, 4.0) == 20
    assert bounds.cut_s(80, 20, 4.0, has_relays=True) == 5
    assert bounds.cut_s(80, 20, float("inf")) == 0
    assert bounds.message_s(np.array([3, 7]), 0.5) == 3.5
