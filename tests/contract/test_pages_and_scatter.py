"""Paged writes, and writes to several peers as one operation, over every fabric."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from support.fabrics import (
    Link,
    address_of,
    arrive,
    no_leaks,
    random_bytes,
    rows,
    settle,
)
from weightsync.errors import (
    ConfigError,
    FencedError,
    PeerLostError,
    RailError,
    TransferTimeoutError,
)
from weightsync.transport.base import Pages, Remote
from weightsync.transport.fabrics import open_fabric
from weightsync.transport.sim import SimWire

WAIT_S = 10.0


def peers_of(link: Link, count: int, nbytes: int, chunks: int) -> tuple[list[Any], list[Remote]]:
    """Targets with their views, and the source's connections to them."""
    made = [link.target(nbytes, [chunks]) for _ in range(count)]
    return made, [link.source.connect(target.descriptor, WAIT_S) for target, _ in made]


# --- pages


def test_pages_land_where_both_lists_say(link: Link) -> None:
    page, count = 64, 200
    target, view, remote = link.connected(7 + count * 100, [count])
    payload = link.source_array(random_bytes(3 + count * 80))
    rng = np.random.default_rng(2)
    read, written = rng.permutation(count), rng.permutation(count).astype(np.uint16)
    operation = remote.write_paged(
        page, Pages(read, 80, address_of(payload) + 3), Pages(written, 100, 7), 0
    )
    assert (operation.num_writes, operation.nbytes) == (count, count * page)
    operation.wait(WAIT_S)
    arrive(target, [0])
    expected = np.zeros_like(view)
    for source, sink in zip(read.tolist(), written.tolist(), strict=True):
        at = 7 + sink * 100
        expected[at : at + page] = payload[3 + source * 80 : 3 + source * 80 + page]
    assert np.array_equal(view, expected)
    assert target.counters()["arrivals"] == count


def test_pages_carry_the_immediates_they_are_given(link: Link) -> None:
    target, _, remote = link.connected(64, [2, 3, 1], chunk_bits=4)
    payload = link.source_array(random_bytes(64))
    source = Pages([0, 1, 2, 3], 8, address_of(payload))
    sink = Pages([0, 1, 2, 3], 16, 0)
    remote.write_paged(8, source, sink).wait(WAIT_S)
    assert [target.missing(slot) for slot in range(3)] == [[0, 1], [0, 1, 2], [0]]
    remote.write_paged(8, source, sink, [1 << 4 | 2, -1, 0, 2 << 4]).wait(WAIT_S)
    settle(lambda: target.is_complete([2]) and target.missing(0) == [1])
    settle(lambda: target.missing(1) == [0, 1])
    assert [target.missing(slot) for slot in range(3)] == [[1], [0, 1], []]
    two = slice(0, 2)
    remote.write_paged(
        8,
        Pages(source.indices[two], 8, source.offset),
        Pages(sink.indices[two], 16, 0),
        1 << 4,
    ).wait(WAIT_S)
    arrive(target, [1, 2])
    assert target.missing(0) == [1]


def test_no_page_is_no_write(link: Link) -> None:
    target, view, remote = link.connected(64, [1])
    none: list[int] = []
    operation = remote.write_paged(8, Pages(none, 8, 0), Pages(none, 8, 0), 0)
    operation.wait(WAIT_S)
    assert operation.num_writes == 0
    assert not target.is_complete([0])
    assert not view.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"read": [0, 1]}, "do not belong together"),
        ({"immediates": [1]}, "do not belong together"),
        ({"immediates": []}, "one for each page"),
        ({"read": [0, -1, 2]}, "page 1: source index -1"),
        ({"written": [0, 1, 1 << 62]}, "page 2: destination index"),
        ({"written": [0, 1, 9]}, "leaves the exported ranges"),
        ({"read": [0, 1, 9]}, "no live lease"),
        ({"stride": -8}, "stride -8 is negative"),
        ({"offset": -8}, "offset=-8 is negative"),
        ({"stride": 1.5}, "whole numbers"),
        ({"page": -1}, "page_bytes=-1"),
        ({"immediates": 14}, "leave its slot, which has room for 2 more"),
        ({"immediates": [1, -2, 1]}, "immediate -2"),
        ({"immediates": [0.5, 1.0, 2.0]}, "whole numbers"),
        ({"read": ["a", "b", "c"]}, "whole numbers"),
    ],
)
def test_bad_pages_refuse_the_whole_batch(link: Link, change: dict[str, Any], message: str) -> None:
    target, view, remote = link.connected(64, [16], chunk_bits=4)
    payload = link.source_array(random_bytes(64))
    stride, offset = change.get("stride", 8), change.get("offset", 0)
    read, written = change.get("read", [0, 1, 2]), change.get("written", [0, 1, 2])
    with pytest.raises(ConfigError, match=message):
        remote.write_paged(
            change.get("page", 8),
            Pages(read, 8, address_of(payload)),
            Pages(written, stride, offset),
            change.get("immediates"),
        )
    assert not view.any()
    assert target.missing(0) == list(range(16))
    assert remote.counters()["operations"] == 0


# --- scatter


def test_a_scatter_takes_each_row_to_its_peer(link: Link) -> None:
    count, chunks, nbytes = 5, 30, 48
    made, remotes = peers_of(link, count, chunks * nbytes, chunks)
    payload = link.source_array(random_bytes(count * chunks * nbytes))
    order = np.random.default_rng(1).permutation(count * chunks)
    table = np.empty((order.size, 4), np.int64)
    chunk, peer = order // count, order % count
    table[:, 0] = address_of(payload) + order * nbytes
    table[:, 1] = chunk * nbytes
    table[:, 2] = nbytes
    table[:, 3] = chunk
    operation = link.source.scatter(remotes, table, peer)
    operation.wait(WAIT_S)
    assert operation.done
    assert operation.error is None
    assert (operation.num_writes, operation.nbytes) == (order.size, payload.nbytes)
    pieces = payload.reshape(chunks, count, nbytes)
    for number, (target, view) in enumerate(made):
        arrive(target, [0])
        assert np.array_equal(view, pieces[:, number].ravel())
        assert target.counters()["arrivals"] == chunks


def test_a_scatter_of_nothing_is_done(link: Link) -> None:
    _, remotes = peers_of(link, 2, 64, 1)
    operation = link.source.scatter(remotes, rows(), [])
    operation.wait(0.0)
    assert operation.done
    assert operation.num_writes == 0


def test_one_bad_row_refuses_the_scatter_to_all(link: Link) -> None:
    made, remotes = peers_of(link, 3, 64, 1)
    payload = link.source_array(random_bytes(64))
    good = (address_of(payload), 0, 8, 0)
    for bad, message in (
        ((address_of(payload), 60, 8, 0), "row 2 of the scatter: .*leaves the exported ranges"),
        ((address_of(payload) + 60, 0, 8, 0), "row 2 of the scatter: .*no live lease"),
    ):
        with pytest.raises(ConfigError, match=message) as raised:
            link.source.scatter(remotes, rows(good, good, bad, good), [0, 1, 2, 2])
        assert raised.value.row == 2
    with pytest.raises(ConfigError, match="row 1 of the scatter goes to peer 3; there are 3"):
        link.source.scatter(remotes, rows(good, good), [0, 3])
    with pytest.raises(ConfigError, match="one peer for each write"):
        link.source.scatter(remotes, rows(good, good), [0])
    with pytest.raises(ConfigError, match="another engine"):
        link.sink.scatter(remotes, rows(good), [0])
    for target, view in made:
        assert not view.any()
        assert target.missing(0) == [0]
    # Nothing stayed pinned by the refused ones.
    lease = link.source.register(address_of(payload), 64)
    lease.release(0.0)


def test_a_failed_peer_is_named_when_all_are_done(link: Link) -> None:
    made, remotes = peers_of(link, 3, 64, 1)
    payload = link.source_array(random_bytes(64))
    made[1][0].fence()
    row = (address_of(payload), 0, 64, 0)
    operation = link.source.scatter(remotes, rows(row, row, row), [0, 1, 2])
    with pytest.raises(FencedError, match="1 of 3 peers failed") as failed:
        operation.wait(WAIT_S)
    assert operation.done
    assert failed.value.remotes == [1]
    assert failed.value.peer == remotes[1].peer
    for number in (0, 2):  # the others got theirs
        arrive(made[number][0], [0])
        assert np.array_equal(made[number][1], payload)


def test_an_error_waits_until_nothing_is_in_flight() -> None:
    """One peer lost at once, another slow: the sources are in use until both are settled."""
    with no_leaks():
        wire = SimWire(1, blocking=False)
        source = open_fabric("sim", wire=wire, name="source")
        sinks = [open_fabric("sim", wire=wire, name=f"sink{i}") for i in range(2)]
        links = [Link(source, sink, is_private=True, wire=wire) for sink in sinks]
        made = [link.target(64, [1]) for link in links]
        remotes = [source.connect(target.descriptor) for target, _ in made]
        payload = random_bytes(64)
        lease = source.register(address_of(payload), 64, payload)
        wire.kill("sink0")
        row = (address_of(payload), 0, 64, 0)
        operation = source.scatter(remotes, rows(row, row), [0, 1])
        assert wire.step()  # the first peer's error is there
        assert not operation.done
        assert operation.error is None
        with pytest.raises(TransferTimeoutError, match=r"still read by 1 operation"):
            lease.release(0.0)
        # Releasing drove the wire to its deadline of no time at all, so nothing else has moved.
        with pytest.raises(PeerLostError, match="sink0 is gone") as lost:
            operation.wait(1.0)
        assert lost.value.remotes == [0]
        assert operation.done
        lease.release(0.0)
        assert np.array_equal(made[1][1], payload)
        for engine in (source, *sinks):
            engine.close()
        del made, remotes, operation, lost, links, lease, source, sinks, engine, wire


def test_a_timeout_names_the_peers_that_hold_it_up() -> None:
    with no_leaks():
        wire = SimWire(1, blocking=False)
        source = open_fabric("sim", wire=wire, name="source")
        sinks = [open_fabric("sim", wire=wire, name=f"sink{i}") for i in range(3)]
        made = [Link(source, sink, is_private=True).target(64, [1]) for sink in sinks]
        remotes = [source.connect(target.descriptor) for target, _ in made]
        payload = random_bytes(64)
        lease = source.register(address_of(payload), 64, payload)
        wire.set_faults(rails=3)
        wire.freeze("source", rail=1)
        row = (address_of(payload), 0, 64, 0)
        operation = source.scatter(remotes, rows(row, row, row), [0, 1, 2])
        with pytest.raises(
            TransferTimeoutError, match=r"writes to 1 of 3 peers .*sim sink1"
        ) as late:
            operation.wait(1.0)
        assert late.value.remotes == [1]
        assert not operation.done
        wire.thaw("source")
        operation.wait(1.0)
        wire.set_faults(drop=1.0)
        operation = source.scatter(remotes, rows(row, row), [2, 0])
        with pytest.raises(RailError, match=r"2 of 2 peers failed: sim sink0.*sim sink2") as lost:
            operation.wait(1.0)
        assert lost.value.remotes == [0, 2]
        lease.release(0.0)
        for engine in (source, *sinks):
            engine.close()
        del made, remotes, operation, late, lost, lease, source, sinks, engine, wire


def test_scatters_of_many_threads_do_not_mix(link: Link) -> None:
    count, chunks, nbytes = 3, 24, 32
    made, remotes = peers_of(link, count, chunks * nbytes, chunks)
    payload = link.source_array(random_bytes(chunks * nbytes))
    peers = np.arange(count).repeat(chunks // 4)

    def write(thread: int) -> None:
        chunk = np.tile(np.arange(thread, chunks, 4), count)
        table = np.stack(
            [
                address_of(payload) + chunk * nbytes,
                chunk * nbytes,
                np.full(chunk.size, nbytes),
                chunk,
            ],
            axis=1,
        ).astype(np.int64)
        link.source.scatter(remotes, table, peers).wait(WAIT_S)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for target, view in made:
        arrive(target, [0])
        assert np.array_equal(view, payload)
    for thread in threads:
        thread.join(WAIT_S)
