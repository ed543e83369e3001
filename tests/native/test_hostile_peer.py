"""A source that forges what it shares with a pulling sink gains nothing."""

from __future__ import annotations

import array
import ctypes
import mmap
import os
import select
import socket
import struct
from collections.abc import Iterator

import numpy as np
import pytest

from support.fabrics import Bytes, address_of, random_bytes, rows
from weightsync.transport.base import Engine, Target
from weightsync.transport.fabrics import open_fabric

# As native/src/fabrics/local/wire.hpp has it.
MAGIC = int.from_bytes(b"WSLOCAL1", "little")
ENTRY_BYTES = 64
POSTED, DONE = 1, 3
NBYTES = 4096


class Channel:
    """The handshake and the channel of a pulled source, spoken by hand."""

    def __init__(self, descriptor: bytes) -> None:
        # magic u32, version u16, fabric text | mode u32, pid u32, target u64, generation u64,
        # key 16 bytes, socket name text
        body = descriptor[4 + 2 + 1 + len("local") :]
        _, _, target_id, generation = struct.unpack_from("<IIQQ", body)
        key = body[24:40]
        name = body[41 : 41 + body[40]].decode()
        self.probe = ctypes.c_uint64(0x1234)
        self.event = os.eventfd(0)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect("\0" + name)
        request = struct.pack("<QIIQQ", MAGIC, 2, 0, target_id, generation) + key
        request += struct.pack("<QQ", ctypes.addressof(self.probe), self.probe.value)
        socket.send_fds(self.socket, [request], [self.event])
        reply, fds, _, _ = socket.recv_fds(self.socket, 4096, 8)
        assert struct.unpack_from("<QIi", reply)[2] == -1, reply
        control, self.doorbell, channel = fds
        os.close(control)
        self.memory = mmap.mmap(channel, 0)
        os.close(channel)
        self.next = 0

    def post(
        self, table_address: int, num_rows: int, notes: tuple[int, int, int] = (0, 0, 0)
    ) -> tuple[int, int, int]:
        """Post a batch; returns the sink's scope (-1: fine), errno and row."""
        at = ENTRY_BYTES * (1 + self.next)
        self.next += 1
        head = (0, 0, 0, 0, table_address, num_rows)
        struct.pack_into("<IiiIQQQQQ", self.memory, at, *head, *notes)
        struct.pack_into("<I", self.memory, at, POSTED)
        os.eventfd_write(self.doorbell, 1)
        while True:
            state, scope, error, row = struct.unpack_from("<IiiI", self.memory, at)
            if state == DONE:
                return scope, error, row
            assert select.select([self.event], [], [], 10.0)[0], "the sink did not answer"
            os.eventfd_read(self.event)

    def close(self) -> None:
        self.socket.close()
        self.memory.close()
        os.close(self.event)
        os.close(self.doorbell)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with open_fabric("local", name="sink") as opened:
        yield opened


@pytest.fixture
def sink(engine: Engine) -> tuple[Target, Bytes]:
    # The ranges leave a hole in the middle and the ends out.
    view = np.zeros(NBYTES, np.uint8)
    lease = engine.register(address_of(view), NBYTES, view)
    ranges = [(0, lease, 512, 512), (1024, lease, 2048, 512)]
    return engine.export(ranges, [8], 8, 1), view


@pytest.fixture
def channel(sink: tuple[Target, Bytes]) -> Iterator[Channel]:
    opened = Channel(sink[0].descriptor)
    yield opened
    opened.close()


def test_an_honest_batch_passes(sink: tuple[Target, Bytes], channel: Channel) -> None:
    target, view = sink
    payload = random_bytes(512)
    table = rows((address_of(payload), 1024, 512, 3))
    assert channel.post(address_of(table), 1) == (-1, 0, 0)
    assert np.array_equal(view[2048:2560], payload)
    assert target.missing(0) == [0, 1, 2, 4, 5, 6, 7]


@pytest.mark.parametrize(
    "bad",
    [
        (0, 513, 1),  # one byte past the range
        (0, 600, 8),  # the hole
        (0, 1 << 63, 8),
        (0, 8, (1 << 63) - 1),
        (0, -512, 8),
        (0, 1536, 1),
    ],
)
def test_a_row_outside_the_ranges_stops_the_whole_batch(
    sink: tuple[Target, Bytes], channel: Channel, bad: tuple[int, int, int]
) -> None:
    target, view = sink
    payload = random_bytes(512)
    offset, nbytes = (value - (1 << 64) if value >= 1 << 63 else value for value in bad[1:])
    table = rows((address_of(payload), 0, 512, 0), (address_of(payload), offset, nbytes, 1))
    scope, _, row = channel.post(address_of(table), 2)
    assert scope >= 0
    assert row == 1
    assert not view.any()
    assert len(target.missing(0)) == 8
    assert target.counters()["protocol_errors"] == 1


def test_tables_and_sources_that_are_not_there_are_errors(
    sink: tuple[Target, Bytes], channel: Channel
) -> None:
    target, view = sink
    for address, num_rows in ((0, 1), (1 << 60, 4), (8, 1 << 40), (8, (1 << 64) - 1)):
        scope, _, _ = channel.post(address, num_rows)
        assert scope >= 0
    table = rows((16, 0, 8, 0))  # nothing is mapped at 16
    assert channel.post(address_of(table), 1)[0] >= 0
    assert not view.any()
    assert len(target.missing(0)) == 8
    payload = random_bytes(8)
    table = rows((address_of(payload), 0, 8, 0))
    assert channel.post(address_of(table), 1)[0] == -1  # the sink goes on serving


def test_a_source_behind_all_addresses_is_refused(
    sink: tuple[Target, Bytes], channel: Channel
) -> None:
    scope, _, row = channel.post(address_of(table := rows((-4, 0, 8, 0))), len(table))
    assert (scope >= 0, row) == (True, 0)
    assert len(sink[0].missing(0)) == 8


@pytest.mark.parametrize("nbytes", [0, 8, 104, 1 << 40, (1 << 64) - 1])
@pytest.mark.parametrize("is_there", [True, False])
def test_notes_of_a_source_are_believed_nothing(
    sink: tuple[Target, Bytes], channel: Channel, nbytes: int, is_there: bool
) -> None:
    """Address, bytes and version of what it says of its memory: this fabric wants none."""
    notes, payload = random_bytes(256), random_bytes(8)
    table = rows((address_of(payload), 0, 8, 0))
    address = address_of(notes) if is_there else 16
    assert channel.post(address_of(table), 1, (address, nbytes, 7))[0] >= 0
    assert len(sink[0].missing(0)) == 8
    assert channel.post(address_of(table), 1)[0] == -1


def test_garbage_instead_of_a_request_is_ignored(sink: tuple[Target, Bytes]) -> None:
    target, _ = sink
    body = target.descriptor[4 + 2 + 1 + len("local") :]
    name = "\0" + body[41 : 41 + body[40]].decode()
    rng = np.random.default_rng(0)
    for nbytes in (1, 16, 71, 72, 73, 500, 4000):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.connect(name)
            junk = rng.integers(0, 256, nbytes, dtype=np.uint8).tobytes()
            fds = array.array("i", [0, 1])
            socket.send_fds(stranger, [junk], fds)
            answer = stranger.recv(4096)
            assert answer == b"" or struct.unpack_from("<QIi", answer)[2] >= 0
    Channel(target.descriptor).close()
