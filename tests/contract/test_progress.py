"""Futures on an event loop, over every fabric."""

from __future__ import annotations

import asyncio

import pytest

from support.fabrics import Link, address_of, random_bytes, rows
from weightsync.errors import FencedError, TransferTimeoutError
from weightsync.transport.progress import Progress

WAIT_S = 10.0


def test_operations_and_slots_are_awaited(link: Link) -> None:
    target, view, remote = link.connected(64, [2, 1])
    payload = link.source_array(random_bytes(64))

    async def run() -> int:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        with Progress(link.source) as at_source, Progress(link.sink) as at_sink:
            slots = at_sink.slots(target, [0])
            both = asyncio.gather(at_sink.slots(target, [1]), at_sink.slots(target, [0, 1]))
            await asyncio.sleep(0)
            assert not slots.done()
            for chunk in range(2):
                table = rows((address_of(payload) + 32 * chunk, 32 * chunk, 32, chunk))
                await at_source.wait_operation(remote.post(table), WAIT_S)
            await asyncio.wait_for(slots, WAIT_S)
            assert not both.done()
            remote.post(rows((0, 0, 0, 1 << 8)))
            await asyncio.wait_for(both, WAIT_S)
        ticking.cancel()
        return ticks

    assert asyncio.run(run()) > 1
    target.flush()
    assert bytes(view) == bytes(payload)


def test_errors_and_deadlines_reach_the_task(link: Link) -> None:
    target, _, remote = link.connected(64, [2])
    payload = link.source_array(random_bytes(64))

    async def run() -> None:
        with Progress(link.source) as at_source, Progress(link.sink) as at_sink:
            with pytest.raises(TransferTimeoutError, match="slot 0 lacks chunks 0-1"):
                await at_sink.wait_slots(target, [0], 0.01)
            waiting = at_sink.slots(target, [0])
            target.fence()
            with pytest.raises(FencedError):
                await asyncio.wait_for(waiting, WAIT_S)
            operation = remote.post(rows((address_of(payload), 0, 64, 0)))
            with pytest.raises(FencedError):
                await at_source.wait_operation(operation, WAIT_S)

    asyncio.run(run())


def test_a_cancelled_future_is_forgotten_and_close_cancels_the_rest(link: Link) -> None:
    target, _, remote = link.connected(64, [1])

    async def run() -> None:
        progress = Progress(link.sink)
        first = progress.slots(target, [0])
        second = progress.slots(target, [0])
        first.cancel()
        remote.post(rows((0, 0, 0, 0))).wait(WAIT_S)
        await asyncio.wait_for(second, WAIT_S)
        target.reset([0])
        third = progress.slots(target, [0])
        progress.close()
        assert first.cancelled()
        assert third.cancelled()

    if link.wire is not None:
        link.wire.set_faults()  # a second landing would complete the slot that was reset
    asyncio.run(run())
