"""Where Python and the engine meet: the GIL, Ctrl-C, idle cost, error classes."""

from __future__ import annotations

import pickle
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from support.fabrics import CASES, Case, Link, address_of, no_leaks, random_bytes, rows
from weightsync import errors
from weightsync.errors import ConfigError, TransferTimeoutError, WeightSyncError
from weightsync.transport.fabrics import open_fabric

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=CASES[:3], ids=lambda case: case.name)
def link(request: pytest.FixtureRequest) -> Iterator[Link]:
    case: Case = request.param
    with no_leaks():
        made = case.open()
        yield made
        made.close()


def test_other_threads_run_while_one_waits(link: Link) -> None:
    target, _, remote = link.connected(64, [1])
    entered = threading.Event()

    def wait() -> None:
        entered.set()
        target.wait([0], 10.0)

    thread = threading.Thread(target=wait)
    thread.start()
    entered.wait(10.0)
    # With the GIL held inside wait() this thread could not post, and the wait would time out.
    remote.post(rows((0, 0, 0, 0))).wait(10.0)
    thread.join(10.0)
    assert not thread.is_alive()


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """As at a terminal: shells have what they start in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_a_wait(link: Link) -> None:
    target, _, _ = link.connected(64, [1])
    main = threading.main_thread().ident
    assert main is not None
    threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        target.wait([0], 30.0)
    with pytest.raises(TransferTimeoutError):  # and the target is as it was
        target.wait([0], 0.0)


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_waiting_costs_next_to_nothing(case: Case) -> None:
    link = case.open()
    target, _, remote = link.connected(64, [1])
    remote.post(rows((0, 0, 0, 0))).wait(10.0)
    target.reset([0])
    before = time.process_time()
    with pytest.raises(TransferTimeoutError):
        target.wait([0], 1.0)
    # All threads of the process together; a spinning one would take the whole second.
    assert time.process_time() - before < 0.05
    link.close()


def test_errors_survive_pickle_with_their_facts(link: Link) -> None:
    target, _, _ = link.connected(64, [3])
    with pytest.raises(TransferTimeoutError) as raised:
        target.wait([0], 0.0)
    copy = pickle.loads(pickle.dumps(raised.value))  # noqa: S301 - our own bytes
    assert type(copy) is TransferTimeoutError
    assert str(copy) == str(raised.value)
    assert raised.value.chunks == [0, 1, 2]
    assert re.fullmatch(r"\w+\.cpp:\d+", raised.value.where)


def test_every_scope_has_a_class() -> None:
    header = (ROOT / "native/include/weightsync/error.hpp").read_text()
    body = header.split("enum class Scope")[1].split("};")[0]
    scopes = set(re.findall(r"^ +(k\w+),", body, re.MULTILINE))
    source = (ROOT / "native/src/bindings/py_errors.cpp").read_text()
    classes = dict(re.findall(r'case Scope::(k\w+):\s+return "(\w+)";', source))
    assert set(classes) == scopes
    assert len(scopes) > 8
    for name in classes.values():
        assert issubclass(getattr(errors, name), WeightSyncError)
    assert len(set(classes.values())) == len(classes)


def test_only_the_bindings_know_python() -> None:
    for path in (ROOT / "native").rglob("*.?pp"):
        is_binding = path.parent.name == "bindings"
        text = path.read_text()
        assert is_binding or not re.search(r"pybind11|Python\.h", text), path


def test_a_posted_table_is_copied(link: Link) -> None:
    target, view, remote = link.connected(1 << 20, [1])
    payload = link.source_array(random_bytes(1 << 20))
    table = rows((address_of(payload), 0, 1 << 20, 0))
    operation = remote.post(table)
    table[:] = -1
    operation.wait(10.0)
    target.wait([0], 10.0)
    assert np.array_equal(view, payload)


def test_objects_keep_what_they_need_alive() -> None:
    with no_leaks():
        sink, source = open_fabric("local"), open_fabric("local")
        memory = sink.allocate(1 << 20)
        view = np.frombuffer(memory, np.uint8)
        target = sink.export([(0, memory, 0, 1 << 20)], [1], 8, 1)
        remote = source.connect(target.descriptor)
        payload = random_bytes(1 << 20)
        lease = source.register(address_of(payload), payload.nbytes, payload)
        # Dropped in the worst order: parents first, the lease and the remote while it copies.
        del memory, sink
        operation = remote.post(rows((address_of(payload), 0, 1 << 20, 0)))
        expected = payload.copy()
        del source, remote, lease, payload
        operation.wait(10.0)
        target.wait([0], 10.0)
        assert np.array_equal(view, expected)
        del operation, target
        assert np.array_equal(view, expected)
        del view


def test_fabrics_and_options_are_refused_by_name() -> None:
    for name, message in (("cuda", "unknown"), ("ofi", "unknown"), ("x", "unknown")):
        with pytest.raises(ConfigError, match=message):
            open_fabric(name)
    with pytest.raises(ConfigError, match="colour"):
        open_fabric("local", colour="red")
    for threads in (0, -1, 1000):
        with pytest.raises(ConfigError, match="threads"):
            open_fabric("local", threads=threads)


def test_bad_arguments_are_config_errors(link: Link) -> None:
    engine = link.sink
    for nbytes in (0, -1):
        with pytest.raises(ConfigError):
            engine.allocate(nbytes)
    for address, nbytes in ((0, 8), (8, 0), (8, -1), ((1 << 64) - 4, 8)):
        with pytest.raises(ConfigError):
            engine.register(address, nbytes)
    with pytest.raises(ConfigError, match="needs a Lease or a Memory"):
        engine.export([(0, object(), 0, 8)], [1], 8, 1)  # type: ignore[list-item]
    memory, _ = link.memory(64)
    with pytest.raises(ConfigError, match="negative"):
        engine.export([(0, memory, 0, 8)], [1], 8, -1)
