"""Every byte exactly once: pages and scatters of any length, page size, stride and number of peers.

The expected bytes are those of plain slices in Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.fabrics import CASES, Link, address_of, random_bytes, settle
from weightsync.transport.base import Pages

WAIT_S = 10.0
ARENA = 40_000
PEERS = 5
SLOT_CHUNKS = 64
LENGTHS = st.one_of(st.sampled_from([1, 2, 8192, 8193, 16385, 32770]), st.integers(1, ARENA))


class Rig:
    """Targets and sources that live as long as the module: opening some per example takes long."""

    def __init__(self, link: Link) -> None:
        self.link = link
        made = [link.target(ARENA, [SLOT_CHUNKS], chunk_bits=6) for _ in range(PEERS)]
        self.targets = [target for target, _ in made]
        self.views = [view for _, view in made]
        self.remotes = [link.source.connect(target.descriptor, WAIT_S) for target in self.targets]
        self.payload = link.source_array(random_bytes(ARENA, 9) | 1)  # never zero

    def settle(self, operation: Any, *arrivals: int) -> None:
        """Wait for the operation, and until each sink has seen so many chunks arrive."""
        operation.wait(WAIT_S)
        if self.link.wire is not None:
            self.link.wire.run()  # second landings too
        for target, count in zip(self.targets, arrivals, strict=False):
            settle(lambda t=target, n=count: len(t.missing(0)) <= SLOT_CHUNKS - n)
        for target in self.targets:
            target.flush()

    def clear(self) -> None:
        for target, view in zip(self.targets, self.views, strict=True):
            target.reset([0])
            view[:] = 0


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    link = request.param.open()
    yield Rig(link)
    link.close()


@given(data=st.data())
def test_pages_cover_exactly_what_they_name(rig: Rig, data: st.DataObject) -> None:
    page = data.draw(LENGTHS, "page_bytes")
    fits = max(1, min(SLOT_CHUNKS, ARENA // page))
    count = data.draw(st.integers(0, fits), "pages")
    sink_stride = data.draw(st.integers(page, max(page, ARENA // max(count, 1))), "sink stride")
    room = ARENA - max(count - 1, 0) * sink_stride - page
    if room < 0:
        count = (ARENA - page) // sink_stride + 1
        room = ARENA - (count - 1) * sink_stride - page
    offset = data.draw(st.integers(0, room), "offset")
    source_stride = data.draw(st.integers(0, (ARENA - page) // max(count, 1)), "source stride")
    read = data.draw(st.lists(st.integers(0, max(count - 1, 0)), min_size=count, max_size=count))
    written = data.draw(st.permutations(range(count)))
    rig.clear()
    expected = np.zeros(ARENA, np.uint8)
    for source, sink in zip(read, written, strict=True):
        at = offset + sink * sink_stride
        begin = source * source_stride
        expected[at : at + page] = rig.payload[begin : begin + page]
    operation = rig.remotes[0].write_paged(
        page,
        Pages(np.array(read, np.int32), source_stride, address_of(rig.payload)),
        Pages(np.array(written, np.uint32), sink_stride, offset),
        np.arange(count),
    )
    rig.settle(operation, count)
    assert operation.nbytes == count * page
    assert np.array_equal(rig.views[0], expected)
    assert rig.targets[0].missing(0) == list(range(count, SLOT_CHUNKS))
    assert not any(view.any() for view in rig.views[1:])


@given(data=st.data())
def test_a_scatter_covers_every_peer_exactly(rig: Rig, data: st.DataObject) -> None:
    peers = data.draw(st.integers(1, PEERS), "peers")
    length = data.draw(LENGTHS, "length")
    num_cuts = data.draw(st.integers(0, 12), "cuts")
    cuts = sorted(data.draw(st.lists(st.integers(0, length), min_size=num_cuts, max_size=num_cuts)))
    bounds = [0, *cuts, length]
    table, to = [], []
    expected = [np.zeros(ARENA, np.uint8) for _ in range(PEERS)]
    for chunk, (low, high) in enumerate(pairwise(bounds)):
        for peer in range(peers):
            # A shard that is empty still carries its immediate, once.
            base = peer % (ARENA - length + 1)
            table.append((address_of(rig.payload) + base + low, low, high - low, chunk))
            to.append(peer)
            expected[peer][low:high] = rig.payload[base + low : base + high]
    order = data.draw(st.permutations(range(len(table))))
    rig.clear()
    rows = np.array(table, np.int64)[order]
    operation = rig.link.source.scatter(rig.remotes, rows, np.array(to)[order])
    rig.settle(operation, *[len(bounds) - 1] * peers)
    assert operation.nbytes == peers * length
    for peer in range(PEERS):
        assert np.array_equal(rig.views[peer], expected[peer])
        chunks = len(bounds) - 1 if peer < peers else 0
        assert rig.targets[peer].missing(0) == list(range(chunks, SLOT_CHUNKS))
