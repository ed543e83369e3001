"""The tcp fabric on rails that break, with writers that freeze, forge and idle."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import pytest

from support.fabrics import RAILS, Bytes, Handle, address_of, no_leaks, random_bytes, rows
from support.peers import Peer, PeerError
from support.proxy import Rail, endpoints
from weightsync.errors import ConfigError, PeerLostError
from weightsync.transport.base import Engine, Target
from weightsync.transport.fabrics import open_fabric

WAIT_S = 20.0
BOUNDED_S = 5.0
MIB = 1 << 20
NBYTES = 64 * MIB


@pytest.fixture
def sink() -> Iterator[Engine]:
    with no_leaks():
        handle = Handle(open_fabric("tcp", name="sink", addresses=RAILS))
        yield cast(Engine, handle)
        handle.close()


@pytest.fixture
def source(sink: Engine) -> Iterator[Engine]:
    handle = Handle(open_fabric("tcp", name="source", addresses=RAILS))
    yield cast(Engine, handle)
    handle.close()


def export(
    engine: Engine, nbytes: int, slots: list[int], generation: int = 1
) -> tuple[Target, Bytes]:
    memory = engine.allocate(nbytes)
    view = np.frombuffer(memory, np.uint8)
    return engine.export([(0, memory, 0, nbytes)], slots, 8, generation), view


def table_of(payload: Bytes, num_chunks: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    size = payload.nbytes // num_chunks
    return rows(*[(address_of(payload) + i * size, i * size, size, i) for i in range(num_chunks)])


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def states(engine: Engine) -> list[str]:
    return [rail["state"] for rail in engine.rails()]


def test_a_small_window_spreads_a_single_bucket_over_all_rails(sink: Engine) -> None:
    # 1 MiB is one block of the default window, which a single rail would take.
    handle = Handle(open_fabric("tcp", name="source", addresses=RAILS, window_bytes=64 << 10))
    source = cast(Engine, handle)
    try:
        target, view = export(sink, MIB, [16])
        payload = random_bytes(MIB, 9)
        lease = source.register(address_of(payload), MIB, payload)
        remote = source.connect(target.descriptor, WAIT_S)
        remote.post(table_of(payload, 16)).wait(WAIT_S)
        target.wait([0], WAIT_S)
        target.flush()
        assert np.array_equal(view, payload)
        sent = [rail["bytes_out"] for rail in source.rails()]
        assert sum(sent) == MIB
        assert min(sent) > 0, sent
        remote.close()
        target.close()
        lease.release()
    finally:
        handle.close()


@pytest.mark.parametrize("window", [0, 65535, (1 << 30) + 1])
def test_windows_that_cannot_be_are_refused(window: int) -> None:
    with pytest.raises(ConfigError, match=r"give 64 KiB \.\. 1 GiB"):
        open_fabric("tcp", window_bytes=window)


def test_rails_share_the_work_and_a_slow_one_gets_less(sink: Engine, source: Engine) -> None:
    target, view = export(sink, NBYTES, [64])
    payload = random_bytes(NBYTES, 1)
    lease = source.register(address_of(payload), NBYTES, payload)
    assert states(source) == ["idle"] * 3
    with Rail(target.descriptor, 2) as slow:
        slow.limit(100e6)
        remote = source.connect(slow.descriptor, WAIT_S)
        assert states(source) == ["active"] * 3
        remote.post(table_of(payload, 64)).wait(WAIT_S)
        target.wait([0], WAIT_S)
        assert np.array_equal(view, payload)
        sent = [rail["bytes_out"] for rail in source.rails()]
        assert sum(sent) == NBYTES
        assert [rail["bytes_in"] for rail in sink.rails()] == sent
        assert 0 < sent[2] < min(sent[:2])
        assert [rail["outstanding"] for rail in source.rails()] == [0, 0, 0]
        assert [rail["address"] for rail in source.rails()] == list(RAILS)
        remote.close()
    lease.release()


@pytest.mark.parametrize("index", [0, 2], ids=["with-control", "data-only"])
def test_a_cut_rail_gives_its_work_to_the_others_and_comes_back(
    sink: Engine, source: Engine, index: int
) -> None:
    target, view = export(sink, NBYTES, [64, 1])
    payload = random_bytes(NBYTES, 2)
    lease = source.register(address_of(payload), NBYTES, payload)
    with Rail(target.descriptor, index) as rail:
        rail.limit(200e6)
        remote = source.connect(rail.descriptor, WAIT_S)
        operation = remote.post(table_of(payload, 64))
        until(lambda: rail.nbytes > MIB)
        rail.cut()
        operation.wait(WAIT_S)
        assert target.is_complete([0])
        assert np.array_equal(view, payload)
        until(lambda: states(source)[index] == "quarantined")
        rail.mend()
        until(lambda: states(source)[index] == "probing")
        before = rail.nbytes
        again = rows(*[(address_of(payload) + i * MIB, i * MIB, MIB, -1) for i in range(16)])

        def comes_back() -> bool:
            remote.post(again).wait(WAIT_S)
            return states(source)[index] == "active"

        until(comes_back)
        assert rail.nbytes > before
        remote.close()
    lease.release()


@pytest.mark.parametrize("index", [0, 1], ids=["with-control", "data-only"])
def test_a_rail_that_stands_still_is_given_up_while_others_move(
    sink: Engine, source: Engine, index: int
) -> None:
    target, view = export(sink, NBYTES, [64])
    payload = random_bytes(NBYTES, 3)
    lease = source.register(address_of(payload), NBYTES, payload)
    with Rail(target.descriptor, index) as rail:
        rail.limit(200e6)
        remote = source.connect(rail.descriptor, WAIT_S)
        operation = remote.post(table_of(payload, 64))
        until(lambda: rail.nbytes > MIB)
        rail.hold()
        operation.wait(WAIT_S)
        assert target.is_complete([0])
        assert np.array_equal(view, payload)
        assert states(source)[index] != "active"
        # What the dead rail still held comes out of it now, and finds nobody.
        before = view.copy()
        rail.mend()
        remote.close()
        target.fence()
        assert np.array_equal(view, before)
    lease.release()


def test_the_last_rail_gone_is_a_typed_error(sink: Engine, source: Engine) -> None:
    alone = open_fabric("tcp", addresses=RAILS[:1])
    target, _ = export(alone, NBYTES, [64])
    payload = random_bytes(NBYTES, 4)
    lease = source.register(address_of(payload), NBYTES, payload)
    with Rail(target.descriptor, 0) as rail:
        rail.limit(100e6)
        single = open_fabric("tcp", streams=1)
        held = single.register(address_of(payload), NBYTES, payload)
        remote = single.connect(rail.descriptor, WAIT_S)
        operation = remote.post(table_of(payload, 64))
        until(lambda: rail.nbytes > MIB)
        rail.cut()
        with pytest.raises(PeerLostError, match="gone"):
            operation.wait(BOUNDED_S)
        with pytest.raises(PeerLostError):
            remote.post(table_of(payload, 64)).wait(BOUNDED_S)
        held.release(0.0)
        single.close()
    lease.release()
    alone.close()


def test_a_rail_that_is_down_at_first_is_used_later(sink: Engine, source: Engine) -> None:
    target, _ = export(sink, MIB, [1])
    with Rail(target.descriptor, 1) as rail:
        rail.cut()
        remote = source.connect(rail.descriptor, WAIT_S)
        assert states(source) == ["active", "quarantined", "active"]
        payload = random_bytes(MIB)
        lease = source.register(address_of(payload), MIB, payload)
        remote.post(table_of(payload, 1)).wait(WAIT_S)
        target.wait([0], WAIT_S)
        rail.mend()
        until(lambda: states(source)[1] == "probing")
        remote.close()
        lease.release()


def test_a_writer_frozen_inside_a_transfer_changes_nothing_after_the_fence(sink: Engine) -> None:
    memory = sink.allocate(NBYTES)
    view = np.frombuffer(memory, np.uint8)
    target = sink.export([(0, memory, 0, NBYTES)], [64], 8, 1)
    with Peer("tcp", addresses=list(RAILS)) as peer:
        peer.call("connect", descriptor=target.descriptor.hex())
        peer.call("load", nbytes=NBYTES, seed=5)
        peer.start("post", table=[[i * MIB, i * MIB, MIB, i] for i in range(64)])
        until(lambda: len(target.missing(0)) < 64)
        peer.stop()
        start = time.monotonic()
        target.fence()
        assert time.monotonic() - start < BOUNDED_S
        before = view.copy()
        again = sink.export([(0, memory, 0, NBYTES)], [64], 8, 2)
        assert np.array_equal(view, before)
        peer.go_on()
        peer.result()
        with contextlib.suppress(PeerError):
            peer.call("finish", timeout_s=WAIT_S)
        peer.call("post", table=[[0, 0, MIB, 0]])
        with pytest.raises(PeerError, match="FencedError"):
            peer.call("finish", timeout_s=WAIT_S)
        assert np.array_equal(view, before)
        assert len(again.missing(0)) == 64
        again.close()


def test_a_frozen_sink_is_waited_for(sink: Engine, source: Engine) -> None:
    payload = random_bytes(4 * MIB, 6)
    lease = source.register(address_of(payload), payload.nbytes, payload)
    with Peer("tcp", addresses=list(RAILS)) as peer:
        descriptor = peer.call("export", nbytes=4 * MIB, slots=[4], is_private=True)
        remote = source.connect(bytes.fromhex(descriptor), WAIT_S)
        peer.stop()
        operation = remote.post(table_of(payload, 4))
        # Longer than it takes to call a rail dead when the peer answers.
        time.sleep(3.0)
        assert not operation.done
        assert states(source) == ["active"] * 3
        peer.go_on()
        operation.wait(WAIT_S)
        assert peer.call("holds", nbytes=4 * MIB, seed=6)
        remote.close()
    lease.release()


@pytest.mark.parametrize("host", ["::1", "127.0.0.1"])
def test_addresses_of_both_families(host: str) -> None:
    try:
        with socket.create_server(
            (host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        ):
            pass
    except OSError as error:
        pytest.skip(f"no {host} on this system: {error}")
    with open_fabric("tcp", addresses=[host]) as engine:
        target, view = export(engine, 64, [1])
        payload = random_bytes(64)
        lease = engine.register(address_of(payload), 64, payload)
        with engine.connect(target.descriptor, WAIT_S) as remote:
            remote.post(table_of(payload, 1)).wait(WAIT_S)
        target.wait([0], WAIT_S)
        assert np.array_equal(view, payload)
        assert engine.rails()[0]["address"] == host
        lease.release()


@pytest.mark.parametrize(
    "options",
    [
        {"addresses": []},
        {"addresses": "127.0.0.1"},
        {"addresses": ["localhost"]},
        {"addresses": ["0.0.0.0"]},
        {"addresses": ["127.0.0.1"] * 65},
        {"streams": 0},
        {"streams": 33},
        {"threads": 2},
    ],
)
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        open_fabric("tcp", **options)


def test_an_address_of_another_host_is_refused_when_it_is_used() -> None:
    with (
        open_fabric("tcp", addresses=["192.0.2.1"]) as engine,
        pytest.raises(ConfigError, match=r"192\.0\.2\.1"),
    ):
        export(engine, 64, [1])


# ---- what a hostile source can say; the handshake spoken by hand ----


class Stranger:
    """A connection to the first address of a target, authenticated unless the key is another."""

    def __init__(
        self, descriptor: bytes, kind: int, session: int, key: bytes | None = None
    ) -> None:
        body = descriptor[4 + 2 + 1 + len("tcp") :]
        _, target_id, generation = struct.unpack_from("<IQQ", body)
        key = body[20:52] if key is None else key
        hello = struct.pack(
            "<4sHBBQQQHHI", b"WSN1", 1, kind, 0, target_id, generation, session, 0, 0, 0
        )
        hello += os.urandom(16)
        self.socket = socket.create_connection(endpoints(descriptor)[0], WAIT_S)
        self.socket.settimeout(WAIT_S)
        self.socket.sendall(hello)
        challenge = self.read(56)
        assert challenge[0] == 0
        nonce = challenge[8:24]
        self.is_genuine = challenge[24:] == _mac(key, b"server", hello, nonce)
        self.socket.sendall(_mac(key, b"client", hello, nonce))
        self.verdict = self.read(1)[0]

    def read(self, nbytes: int) -> bytes:
        found = b""
        while len(found) < nbytes:
            found += (more := self.socket.recv(nbytes - len(found)))
            assert more, "hung up"
        return found

    def is_over(self) -> bool:
        """True once the sink has hung up; fails when it does not."""
        try:
            while self.socket.recv(4096):
                pass
        except ConnectionError:
            pass
        return True

    def close(self) -> None:
        self.socket.close()


def _mac(key: bytes, side: bytes, hello: bytes, nonce: bytes) -> bytes:
    return hmac.new(key, side + hello + nonce, hashlib.sha256).digest()


def block(
    *writes: tuple[int, int, int], number: int = 0, magic: int = 0x5742, flags: int = 0
) -> bytes:
    head = struct.pack("<HHIII", magic, len(writes), number, flags, 0)
    return head + b"".join(struct.pack("<QQiI", *write, 0) for write in writes)


@pytest.fixture
def holed(sink: Engine) -> Iterator[list[Any]]:
    # A hole in the middle, and both ends left out.
    memory = sink.allocate(4096)
    ranges = [(0, memory, 512, 512), (1024, memory, 2048, 512)]
    pair = [sink.export(ranges, [8], 8, 1), np.frombuffer(memory, np.uint8)]
    del memory
    yield pair
    pair.clear()  # pytest keeps fixtures longer than their tests


@pytest.fixture
def control(holed: list[Any]) -> Iterator[Stranger]:
    opened = Stranger(holed[0].descriptor, 1, session=9)
    assert opened.is_genuine
    assert opened.verdict == 0
    yield opened
    opened.close()


@pytest.mark.usefixtures("control")
def test_an_honest_block_by_hand_is_placed_and_answered(holed: list[Any]) -> None:
    target, view = holed
    data = Stranger(target.descriptor, 2, session=9)
    first, second = random_bytes(512, 1), random_bytes(100, 2)
    data.socket.sendall(block((1024, 512, 3), (0, 100, -1)) + first.tobytes() + second.tobytes())
    assert struct.unpack("<4sI", data.read(8)) == (b"WACK", 0)
    assert np.array_equal(view[2048:2560], first)
    assert np.array_equal(view[512:612], second)
    assert target.missing(0) == [0, 1, 2, 4, 5, 6, 7]
    # Byte by byte is the same.
    for byte in block((4, 2, 4), number=1) + b"ab":
        data.socket.sendall(bytes([byte]))
    assert struct.unpack("<4sI", data.read(8)) == (b"WACK", 1)
    assert view[516:518].tobytes() == b"ab"
    data.close()


@pytest.mark.usefixtures("control")
@pytest.mark.parametrize(
    "bad",
    [
        block((0, 513, 1)),  # one byte past the range
        block((600, 8, 1)),  # the hole
        block((0, 8, 1), ((1 << 64) - 512, 512, 1)),
        block((0, (1 << 64) - 1, 1)),
        block((1 << 63, 8, 1)),
        block((1536, 1, 1)),
        block((0, 8, -2)),
        block((0, 8, 1), magic=0x1111),
        block((0, 8, 1), number=1),
        block((0, 8, 1), flags=1),
        block((0, 8, 1))[:2] + struct.pack("<H", 65) + block((0, 8, 1))[4:],
        block((0, 8, 1))[:2] + struct.pack("<H", 0) + block((0, 8, 1))[4:],
    ],
)
def test_a_forged_block_changes_nothing_and_hangs_up(holed: list[Any], bad: bytes) -> None:
    target, view = holed
    data = Stranger(target.descriptor, 2, session=9)
    data.socket.sendall(bad + bytes(range(256)))
    assert data.is_over()
    until(lambda: target.counters()["protocol_errors"] == 1)
    assert not view.any()
    assert len(target.missing(0)) == 8
    data.close()


def test_a_wrong_key_is_refused_and_counted(sink: Engine, holed: list[Any]) -> None:
    for kind in (1, 2):
        before = sink.counters()["refused_connections"]
        stranger = Stranger(holed[0].descriptor, kind, session=1, key=bytes(32))
        assert not stranger.is_genuine
        assert stranger.verdict == 2
        assert stranger.is_over()
        until(lambda before=before: sink.counters()["refused_connections"] == before + 1)
        stranger.close()
    assert sink.counters()["connections"] == 0


def test_data_without_a_session_is_refused(sink: Engine, holed: list[Any]) -> None:
    data = Stranger(holed[0].descriptor, 2, session=77)
    assert data.is_over()
    until(lambda: sink.counters()["refused_connections"] == 1)
    data.close()


def test_a_source_that_reads_no_answers_harms_only_itself(
    sink: Engine, source: Engine, holed: list[Any], control: Stranger
) -> None:
    target, view = holed
    rude = Stranger(target.descriptor, 2, session=9)
    rude.socket.settimeout(0.2)
    with contextlib.suppress(TimeoutError):
        for number in range(20_000):
            rude.socket.sendall(block((0, 0, -1), number=number))
    remote = source.connect(target.descriptor, WAIT_S)
    payload = random_bytes(512)
    lease = source.register(address_of(payload), 512, payload)
    remote.post(rows((address_of(payload), 0, 512, 0))).wait(WAIT_S)
    assert np.array_equal(view[512:1024], payload)
    remote.close()
    target.fence()
    rude.close()
    lease.release()
