"""Barriers and small messages of peer groups, over every fabric that keeps F1."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest

from support.fabrics import CASES, QUIET_CASES, Case, Link, groups, no_leaks, random_bytes, settle
from weightsync.errors import ConfigError, FencedError, TransferTimeoutError, WeightSyncError
from weightsync.transport.fabrics import open_fabric
from weightsync.transport.progress import Progress
from weightsync.transport.sim import SimWire

WAIT_S = 10.0


@pytest.fixture(params=QUIET_CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


def in_threads(*calls: Any) -> None:
    """Run calls side by side; the first error is raised."""
    errors: list[Exception] = []

    def run(call: Any) -> None:
        try:
            call()
        except (WeightSyncError, AssertionError) as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * WAIT_S)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


# --- barriers


@pytest.mark.parametrize("size", [1, 2, 5])
def test_nobody_passes_a_barrier_before_all_have_come(link: Link, size: int) -> None:
    members = groups(link, size, window=1)
    for _ in range(40):  # more rounds than there are slots for
        rounds = []
        for group in members:
            assert not any(earlier.done for earlier in rounds)
            rounds.append(group.start_barrier())
        for waited in rounds:
            waited.wait(WAIT_S)
            assert waited.done
            assert waited.error is None
            assert waited.num_writes == size - 1


def test_members_that_run_ahead_are_not_lost(link: Link) -> None:
    """Each member takes its time; the others are a round ahead of it whenever they can be."""
    size, rounds = 4, 30
    members = groups(link, size, window=1)
    passed = [0] * size

    def run(member: int) -> None:
        for number in range(rounds):
            if number % size == member:
                time.sleep(0.001)  # a laggard, another one in each round
            members[member].barrier(WAIT_S)
            passed[member] += 1
            # Nobody is a whole round behind, as it would have to pass this one first.
            assert min(passed) >= number
            assert max(passed) <= number + 2

    in_threads(*[lambda member=member: run(member) for member in range(size)])
    assert passed == [rounds] * size


def test_a_barrier_names_who_is_missing_and_goes_on(link: Link) -> None:
    members = groups(link, 4, window=1)
    first = members[0].start_barrier()
    members[2].start_barrier()
    with pytest.raises(TransferTimeoutError, match=r"round 0 of 4.*member 1 .*member 3 ") as late:
        members[0].barrier(0.05)
    assert late.value.members == [1, 3]
    assert not first.done
    members[1].start_barrier()
    members[3].barrier(WAIT_S)
    members[0].barrier(WAIT_S)  # the same round, not the next one, though it was over before
    assert first.done
    members[1].barrier(WAIT_S)
    settle(lambda: members[2].start_barrier().done)  # it may hear of it last
    for group in members[:3]:
        assert not group.start_barrier().done
    members[3].barrier(WAIT_S)


def test_a_barrier_needs_everybody_connected(link: Link) -> None:
    pair = groups(link, 2)
    lonely = link.source.open_group(0, 4)
    with pytest.raises(ConfigError, match="members 1-3 are not connected") as absent:
        lonely.barrier(WAIT_S)
    assert absent.value.members == [1, 2, 3]
    assert lonely.is_connected(0)
    assert not lonely.is_connected(3)
    pair[0].start_barrier()
    pair[1].barrier(WAIT_S)


def test_a_barrier_with_a_closed_member_fails(link: Link) -> None:
    members = groups(link, 3)
    members[1].close()
    with pytest.raises(WeightSyncError, match=r"member 1 .* could not be told") as failed:
        members[0].barrier(WAIT_S)
    assert failed.value.member == 1
    with pytest.raises(WeightSyncError):
        members[0].barrier(WAIT_S)
    with pytest.raises(ConfigError, match="closed"):
        members[1].barrier(WAIT_S)


def test_a_waiting_member_learns_that_its_group_was_closed(link: Link) -> None:
    members = groups(link, 2)
    raised: list[BaseException] = []
    entered = threading.Barrier(3)

    def wait(call: Any) -> None:
        entered.wait(WAIT_S)
        try:
            call()
        except WeightSyncError as error:
            raised.append(error)

    calls = (lambda: members[0].barrier(WAIT_S), lambda: members[0].recv(WAIT_S))
    threads = [threading.Thread(target=wait, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    entered.wait(WAIT_S)
    members[0].close()
    for thread in threads:
        thread.join(WAIT_S)
    assert [type(error) for error in raised] == [ConfigError, ConfigError]


# --- messages


@pytest.mark.parametrize("size", [0, 1, 15, 16, 4096, 65536])
def test_messages_of_any_length_arrive_whole(link: Link, size: int) -> None:
    one, two = groups(link, 2, message_bytes=max(size, 1), window=2)
    for seed in range(5):
        data = random_bytes(size, seed)
        operation = one.send(1, data, WAIT_S)
        data[:] = 0  # it was copied
        assert two.recv(WAIT_S) == (0, random_bytes(size, seed).tobytes())
        operation.wait(WAIT_S)
        two.send(0, b"", WAIT_S)
        assert one.recv(WAIT_S, 1) == (1, b"")
    assert two.try_recv() is None
    assert not two.can_recv()


def test_a_sender_keeps_its_order_and_the_window(link: Link) -> None:
    one, two = groups(link, 2, message_bytes=64, window=3)
    sent = received = 0
    rng = np.random.default_rng(4)
    while received < 200:
        for _ in range(rng.integers(0, 5)):
            if one.try_send(1, f"message {sent}".encode()) is None:
                link.source.drive()  # full, or a credit is on its way; the sim moves by this only
                break
            sent += 1
            assert sent - received <= 3
        for _ in range(rng.integers(0, 5)):
            if sent == received:
                assert two.try_recv(0) is None
                break
            assert two.recv(WAIT_S) == (0, f"message {received}".encode())
            received += 1


def test_a_full_mailbox_blocks_its_sender_until_the_deadline(link: Link) -> None:
    one, two = groups(link, 2, window=2)
    one.send(1, b"a", WAIT_S)
    one.send(1, b"b", WAIT_S)
    assert not one.can_send(1)
    assert one.try_send(1, b"c") is None
    with pytest.raises(TransferTimeoutError, match="no room for a message to member 1") as full:
        one.send(1, b"c", 0.05)
    assert full.value.member == 1
    in_threads(lambda: one.send(1, b"d", WAIT_S), lambda: two.recv(WAIT_S))
    assert [two.recv(WAIT_S)[1], two.recv(WAIT_S)[1]] == [b"b", b"d"]
    with pytest.raises(TransferTimeoutError, match="no message from any of 1 other"):
        two.recv(0.01)
    with pytest.raises(TransferTimeoutError, match="no message from member 0"):
        two.recv(0.01, 0)


def test_many_senders_are_all_heard(link: Link) -> None:
    size, count = 4, 60
    members = groups(link, size, message_bytes=32, window=4)

    def send(member: int) -> None:
        for number in range(count):
            members[member].send(0, bytes([member, number]), WAIT_S)

    heard: list[list[int]] = [[] for _ in range(size)]

    def listen() -> None:
        for _ in range(count * (size - 1)):
            member, data = members[0].recv(WAIT_S)
            assert data[0] == member
            heard[member].append(data[1])

    in_threads(listen, *[lambda member=member: send(member) for member in range(1, size)])
    assert heard[1:] == [list(range(count))] * (size - 1)


def test_several_threads_share_a_mailbox(link: Link) -> None:
    count = 60
    one, two = groups(link, 2, message_bytes=32, window=4)
    heard: list[int] = []

    def listen() -> None:
        for _ in range(count // 3):
            heard.append(int(two.recv(WAIT_S)[1]))

    def send(first: int) -> None:
        for number in range(first, count, 2):
            one.send(1, str(number).encode(), WAIT_S)

    in_threads(listen, listen, listen, lambda: send(0), lambda: send(1))
    assert sorted(heard) == list(range(count))


def test_messages_that_came_before_the_connection_are_heard(link: Link) -> None:
    early = link.source.open_group(0, 2, window=2)
    late = link.sink.open_group(1, 2, window=2)
    early.connect(1, late.descriptor, WAIT_S)
    early.send(1, b"first", WAIT_S)
    early.send(1, b"second", WAIT_S)
    assert late.recv(WAIT_S) == (0, b"first")
    with pytest.raises(ConfigError, match="member 0 is not connected"):
        late.send(0, b"", WAIT_S)
    with pytest.raises(TransferTimeoutError):
        early.send(1, b"third", 0.05)  # the credit is owed until there is a way to give it
    late.connect(0, early.descriptor, WAIT_S)
    early.send(1, b"third", WAIT_S)
    assert [late.recv(WAIT_S)[1] for _ in range(2)] == [b"second", b"third"]


def test_wrong_messages_and_members_are_refused(link: Link) -> None:
    one, two = groups(link, 2, message_bytes=8)
    with pytest.raises(ConfigError, match=r"9 bytes.*message_bytes=8"):
        one.send(1, b"123456789", WAIT_S)
    with pytest.raises(ConfigError, match="contiguous"):
        one.send(1, np.zeros((4, 4), np.uint8).T[:2], WAIT_S)
    for member in (0, 2, -1):
        with pytest.raises(ConfigError):
            one.send(member, b"", WAIT_S)
        with pytest.raises(ConfigError):
            one.recv(0.0, member)
    assert two.try_recv() is None
    with pytest.raises(ConfigError, match="connected already"):
        one.connect(1, two.descriptor)
    one.connect(0, b"anything")  # itself
    for other in (
        link.sink.open_group(1, 2, message_bytes=9),
        link.sink.open_group(1, 2, message_bytes=8, window=9),
        link.sink.open_group(1, 3, message_bytes=8),
    ):
        with pytest.raises(ConfigError, match="the descriptor is of member 1"):
            link.source.open_group(0, 2, message_bytes=8).connect(1, other.descriptor)
    target, _ = link.target(64, [1])
    for damaged in (b"", b"x" * 40, target.descriptor, two.descriptor[:-3]):
        with pytest.raises(WeightSyncError):
            link.source.open_group(0, 2, message_bytes=8).connect(1, damaged, 1.0)


@pytest.mark.parametrize(
    "options",
    [
        {"index": 2, "size": 2},
        {"index": 0, "size": 0},
        {"index": 0, "size": 5000},
        {"index": 0, "size": 2, "message_bytes": 0},
        {"index": 0, "size": 2, "message_bytes": 65537},
        {"index": 0, "size": 2, "window": 0},
        {"index": 0, "size": 2, "window": 1025},
        {"index": 0, "size": 2, "generation": -1},
    ],
)
def test_absurd_groups_are_refused(link: Link, options: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        link.source.open_group(**options)


def test_a_send_to_a_closed_member_fails_and_none_can_follow(link: Link) -> None:
    one, two = groups(link, 2)
    two.close()
    operation = one.send(1, b"lost", WAIT_S)
    with pytest.raises(WeightSyncError):
        operation.wait(WAIT_S)
    with pytest.raises(WeightSyncError, match=r"an earlier message to member 1 .* failed"):
        one.send(1, b"more", WAIT_S)
    with pytest.raises(WeightSyncError, match="an earlier message"):
        one.can_send(1)
    with pytest.raises(ConfigError, match="closed"):
        two.recv(WAIT_S)


def test_groups_and_what_they_gave_out_keep_what_they_need(link: Link) -> None:
    one, two = groups(link, 2)
    barrier, operation = one.start_barrier(), one.send(1, b"kept", WAIT_S)
    del one
    operation.wait(WAIT_S)
    two.barrier(WAIT_S)
    assert two.recv(WAIT_S) == (0, b"kept")
    barrier.wait(WAIT_S)


# --- event loops


def test_barriers_and_messages_are_awaited(link: Link) -> None:
    one, two = groups(link, 2, window=2)
    count = 20

    async def run() -> None:
        with Progress(link.source) as at_source, Progress(link.sink) as at_sink:
            await asyncio.gather(at_source.barrier(one, WAIT_S), at_sink.barrier(two, WAIT_S))

            async def listen() -> list[bytes]:
                return [(await at_sink.recv(two, WAIT_S))[1] for _ in range(count)]

            sends = [at_source.send(one, 1, str(i).encode(), WAIT_S) for i in range(count)]
            heard, *operations = await asyncio.gather(listen(), *sends)
            assert heard == [str(i).encode() for i in range(count)]
            for operation in operations:
                await at_source.wait_operation(operation, WAIT_S)

    asyncio.run(run())


def test_deadlines_of_awaited_barriers_and_messages(link: Link) -> None:
    one, two = groups(link, 2, window=1)

    async def run() -> None:
        with Progress(link.source) as progress:
            with pytest.raises(TransferTimeoutError, match=r"member 1 .* has not come"):
                await progress.barrier(one, 0.05)
            with pytest.raises(TransferTimeoutError, match="no message from any"):
                await progress.recv(one, 0.05)
            await progress.send(one, 1, b"a", WAIT_S)
            with pytest.raises(TransferTimeoutError, match="no room for a message to member 1"):
                await progress.send(one, 1, b"b", 0.05)
            receiving = asyncio.ensure_future(progress.recv(one, WAIT_S))
            await asyncio.sleep(0)
            receiving.cancel()
            two.send(0, b"not lost", WAIT_S)
            assert await progress.recv(one, WAIT_S) == (1, b"not lost")

    asyncio.run(run())
    assert two.recv(WAIT_S) == (0, b"a")


# --- what a seed decides


def test_a_thousand_messages_over_a_wire_that_sends_again() -> None:
    with no_leaks():
        wire = SimWire(3, blocking=False)
        wire.set_faults(reorder=True, delay_s=0.01, rails=4, resend=0.5, late_s=0.05, invisible=0.3)
        engines = [open_fabric("sim", wire=wire, name=f"e{i}") for i in range(3)]
        members = [engine.open_group(i, 3, window=2) for i, engine in enumerate(engines)]
        for group in members:
            for other in members:
                group.connect(other.index, other.descriptor)
        for number in range(350):
            data = random_bytes(number % 100, number).tobytes()
            rounds = [group.start_barrier() for group in members]
            for group in members:
                group.send((group.index + 1) % 3, data, 1.0)
            for group in members:
                assert group.recv(1.0) == ((group.index - 1) % 3, data)
            for waited in rounds:
                waited.wait(1.0)
        assert wire.counts()["resent"] > 1000
        for group in members:
            assert group.try_recv() is None
        for engine in engines:
            engine.close()
        del group, members, rounds, waited, other, engine, engines, wire


def test_every_case_is_quiet_but_the_one_that_breaks_the_promise() -> None:
    assert [case.name for case in CASES if case not in QUIET_CASES] == ["sim-adverse"]


def test_a_closed_peer_is_fenced_or_lost_at_its_senders(link: Link) -> None:
    one, two = groups(link, 2)
    two.close()
    with pytest.raises(FencedError):
        one.send(1, b"", WAIT_S).wait(WAIT_S)
