"""Plain counters over every fabric: early arrivals are kept, none is lost, targets do not mix."""

from __future__ import annotations

import asyncio
import threading

import pytest

from support.fabrics import Case, Link, address_of, random_bytes, rows, settle
from weightsync.errors import ConfigError, FencedError, TransferTimeoutError
from weightsync.transport.base import COUNTER, Pages
from weightsync.transport.progress import Progress

WAIT_S = 10.0
# A slot with chunks, a counter, a slot, a counter.
SLOTS = [2, COUNTER, 1, COUNTER]
FIRST, SECOND = 1 << 8, 3 << 8  # immediates of the counters


def tell(count: int, immediate: int) -> object:
    return rows(*[(0, 0, 0, immediate + i % 7) for i in range(count)])  # any chunk number counts


def test_early_arrivals_count(case: Case, link: Link) -> None:
    target, _, remote = link.connected(64, SLOTS)
    remote.post(tell(5, FIRST)).wait(WAIT_S)
    settle(lambda: target.count(1) >= 5)
    counted = target.count(1)
    assert counted >= 5 if case.has_duplicates else counted == 5
    assert not target.is_complete([1])  # nobody expects anything yet
    assert target.poll() == []
    target.expect_count(1, 5)
    target.wait([1], 0.0)
    assert target.poll() == [1]
    assert target.poll() == []
    assert target.count(3) == 0
    assert target.missing(0) == [0, 1]
    assert target.num_slots == 4


def test_a_counter_is_complete_with_its_last_arrival(case: Case, link: Link) -> None:
    target, _, remote = link.connected(64, SLOTS)
    target.expect_count(3, 1000)
    remote.post(tell(10, SECOND)).wait(WAIT_S)
    assert not target.is_complete([3])
    with pytest.raises(TransferTimeoutError, match=r"counter 3 stands at \d+ of 1000") as late:
        target.wait([0, 3], 0.0)
    assert late.value.slots == [0, 3]
    waiter = threading.Thread(target=target.wait, args=([3], WAIT_S))
    waiter.start()
    remote.post(tell(990, SECOND)).wait(WAIT_S)
    waiter.join(WAIT_S)
    assert not waiter.is_alive()
    assert target.poll(WAIT_S) == [3]
    if not case.has_duplicates:
        assert target.count(3) == 1000
        assert target.counters()["duplicates"] == 0


def test_a_reset_keeps_what_came_on_top(case: Case, link: Link) -> None:
    target, _, remote = link.connected(64, SLOTS)
    for _ in range(4):
        # The next round's writers are early each time: 3 wanted, 4 sent.
        remote.post(tell(4, FIRST)).wait(WAIT_S)
        target.expect_count(1, 3)
        target.wait([1], WAIT_S)
        assert target.poll() == [1]
        target.reset([1])
        assert not target.is_complete([1])
    settle(lambda: target.count(1) >= 4)
    if not case.has_duplicates:
        assert target.count(1) == 4
    target.expect_count(1, target.count(1) + 1)
    assert not target.is_complete([1])
    target.reset([1])  # given up before it was complete: what came is gone with it
    assert target.count(1) == 0


def test_an_expectation_can_be_raised_and_lowered(link: Link) -> None:
    target, _, remote = link.connected(64, SLOTS)
    remote.post(tell(2, FIRST)).wait(WAIT_S)
    target.expect_count(1, 2)
    assert target.poll(WAIT_S) == [1]
    target.expect_count(1, 1 << 40)
    assert not target.is_complete([1])
    waiter = threading.Thread(target=target.wait, args=([1], WAIT_S))
    waiter.start()
    target.expect_count(1, 1)  # wakes who waits
    waiter.join(WAIT_S)
    assert not waiter.is_alive()
    assert target.poll() == [1]


def test_no_increment_is_lost_between_threads(case: Case, link: Link) -> None:
    target, view, remote = link.connected(64, SLOTS)
    payload = link.source_array(random_bytes(64))
    other = link.source.connect(target.descriptor, WAIT_S)
    each = 300

    def write(thread: int) -> None:
        to = remote if thread % 2 else other
        for _ in range(3):
            pages = Pages([0] * (each // 3), 0, address_of(payload))
            to.write_paged(64, pages, Pages(pages.indices, 0, 0), [FIRST] * (each // 3))

    target.expect_count(1, 4 * each)
    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    target.wait([1], WAIT_S)
    for thread in threads:
        thread.join(WAIT_S)
    target.flush()
    assert bytes(view) == bytes(payload)
    if not case.has_duplicates:
        assert target.count(1) == 4 * each


def test_counters_of_one_number_in_two_targets_are_two(case: Case, link: Link) -> None:
    one, _, to_one = link.connected(64, SLOTS)
    two, _, to_two = link.connected(64, SLOTS)
    to_one.post(tell(3, FIRST)).wait(WAIT_S)
    settle(lambda: one.count(1) >= 3)
    assert two.count(1) == 0
    to_two.post(tell(1, FIRST)).wait(WAIT_S)
    settle(lambda: two.count(1) >= 1)
    if not case.has_duplicates:
        assert (one.count(1), two.count(1)) == (3, 1)


def test_counters_are_awaited(link: Link) -> None:
    target, _, remote = link.connected(64, SLOTS)

    async def run() -> None:
        with Progress(link.sink) as progress:
            target.expect_count(1, 3)
            done = progress.slots(target, [1])
            remote.post(tell(2, FIRST)).wait(WAIT_S)
            target.expect_count(3, 1)
            remote.post(tell(4, FIRST))
            remote.post(tell(1, SECOND))
            await asyncio.wait_for(done, WAIT_S)
            await progress.wait_slots(target, [1, 3], WAIT_S)

    asyncio.run(run())


def test_counters_and_slots_are_not_mixed_up(link: Link) -> None:
    target, _, _ = link.connected(64, SLOTS)
    with pytest.raises(ConfigError, match="slot 0 has chunks"):
        target.expect_count(0, 1)
    with pytest.raises(ConfigError, match="slot 2 has chunks"):
        target.count(2)
    with pytest.raises(ConfigError, match="is a counter"):
        target.missing(1)
    with pytest.raises(ConfigError, match="slot 4 does not exist"):
        target.expect_count(4, 1)
    for bad in (0, -1):
        with pytest.raises(ConfigError, match="1 or more"):
            target.expect_count(1, bad)
    target.fence()
    with pytest.raises(FencedError):
        target.expect_count(1, 1)
    with pytest.raises(FencedError):
        target.count(1)
