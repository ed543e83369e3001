"""Two engines of one fabric, for the contract suite. A new fabric is one line in `CASES`."""

from __future__ import annotations

import functools
import gc
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from support import IS_LONG
from support.cuda import device_address, in_gpu, is_faked
from weightsync.errors import ConfigError
from weightsync.transport.base import Engine, Lease, Memory, Remote, Target
from weightsync.transport.fabrics import open_fabric
from weightsync.transport.native import live_object_count, live_objects
from weightsync.transport.sim import SimWire
from weightsync.transport.verbs import rdma_ports, verbs_problem

Bytes = npt.NDArray[np.uint8]

__all__ = [
    "ALL_CASES",
    "CASES",
    "QUIET_CASES",
    "Bytes",
    "Case",
    "Handle",
    "Link",
    "address_of",
    "fake_gpu_problem",
    "groups",
    "no_leaks",
    "ofi_problem",
    "place_of",
    "random_bytes",
    "rows",
    "settle",
]


def address_of(array: npt.NDArray[Any]) -> int:
    return device_address(int(array.__array_interface__["data"][0]))


def random_bytes(nbytes: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def rows(*table: Sequence[int]) -> npt.NDArray[np.int64]:
    """A table of writes; columns as weightsync.transport.base.WRITE_COLUMNS."""
    return np.array(table, dtype=np.int64).reshape(-1, 4)


class Handle:
    """An engine that can be let go of: pytest keeps fixtures longer than their tests."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def close(self) -> None:
        self._engine.close()
        del self._engine


def _stay(array: Bytes) -> Bytes:
    return array


def place_of(fabric: str) -> Callable[[Bytes], Bytes]:
    """How memory of that fabric's tests is made from an array."""
    return in_gpu if fabric == "cuda_ipc" else _stay


@dataclass
class Link:
    """A source and a sink that can reach each other, and how the sink's memory is made."""

    source: Engine
    sink: Engine
    is_private: bool
    wire: Any = None
    # Makes a copy where sources, and private sinks, have their memory.
    place_source: Callable[[Bytes], Bytes] = _stay
    place_sink: Callable[[Bytes], Bytes] = _stay
    _kept: list[object] = field(default_factory=list)

    def memory(self, nbytes: int) -> tuple[Lease | Memory, Bytes]:
        """Sink memory that reads as zero, and a view of it."""
        if self.is_private:
            array = self.place_sink(np.zeros(nbytes, np.uint8))
            return self.sink.register(address_of(array), nbytes, array), array
        memory = self.sink.allocate(nbytes)
        return memory, np.frombuffer(memory, np.uint8)

    def source_array(self, array: Bytes) -> Bytes:
        """Register an array with the source for as long as the link lives: this or a copy."""
        array = self.place_source(array)
        self._kept.append(self.source.register(address_of(array), max(array.nbytes, 1), array))
        return array

    def target(
        self, nbytes: int, slots: Sequence[int], chunk_bits: int = 8, generation: int = 1
    ) -> tuple[Target, Bytes]:
        """One range over a whole arena of `nbytes`."""
        memory, view = self.memory(nbytes)
        ranges = [(0, memory, 0, nbytes)]
        return self.sink.export(ranges, np.array(slots, np.int32), chunk_bits, generation), view

    def connected(
        self, nbytes: int, slots: Sequence[int], chunk_bits: int = 8
    ) -> tuple[Target, Bytes, Remote]:
        target, view = self.target(nbytes, slots, chunk_bits)
        return target, view, self.source.connect(target.descriptor, 10.0)

    def close(self) -> None:
        self._kept.clear()
        self.source.close()
        self.sink.close()
        # pytest keeps fixtures longer than their tests: let go here, so that leaks can be counted.
        del self.source, self.sink, self.wire


@dataclass(frozen=True)
class Case:
    name: str
    open: Callable[[], Link]
    has_duplicates: bool = False  # the fabric itself delivers twice
    # Promise F1 of docs/protocol.md: no copy of a write lands after its operation is done. The sim
    # breaks it on request; slots stand that, whatever uses memory again and again cannot.
    is_quiet_when_done: bool = True
    takes_leases: bool = True  # a target may export memory that the engine did not allocate
    problem: Callable[[], str | None] = lambda: None  # why it cannot run on this machine


def _local(is_private: bool) -> Callable[[], Link]:
    return lambda: Link(
        open_fabric("local", name="source"), open_fabric("local", name="sink"), is_private
    )


def _tcp(source: Sequence[str], sink: Sequence[str], *, is_private: bool) -> Callable[[], Link]:
    return lambda: Link(
        open_fabric("tcp", name="source", addresses=source),
        open_fabric("tcp", name="sink", addresses=sink),
        is_private,
    )


# What a local descriptor says where to knock: nobody listens there by another name.
_KNOCK: Final = re.compile(rb"weightsync-[0-9a-f]{32}")


class Elsewhere(Handle):
    """An engine on another host, as far as the others' near fabric can tell."""

    def connect(self, descriptor: bytes, timeout_s: float | None = 30.0) -> Remote:
        changed = _KNOCK.sub(b"weightsync-" + 32 * b"0", descriptor)
        return cast(Remote, self._engine.connect(changed, timeout_s))


def _mixed(
    fabric: str,
    *,
    is_near: bool,
    is_private: bool,
    place: Callable[[Bytes], Bytes] = _stay,
    **options: Any,
) -> Callable[[], Link]:
    def make() -> Link:
        source = open_fabric(fabric, name="source", **options)
        sink = open_fabric(fabric, name="sink", **options)
        if not is_near:
            source = cast(Engine, Elsewhere(source))
        return Link(source, sink, is_private, place_source=place, place_sink=place)

    return make


def _cuda_ipc(source: str, sink: str) -> Callable[[], Link]:
    place = {"gpu": in_gpu, "host": _stay}
    return lambda: Link(
        open_fabric("cuda_ipc", name="source"),
        open_fabric("cuda_ipc", name="sink"),
        is_private=True,
        place_source=place[source],
        place_sink=place[sink],
    )


def fake_gpu_problem() -> str | None:
    """Why tests cannot look into a GPU's memory."""
    return None if is_faked() else "no fake GPU here: tests/contract/test_cuda_ipc.py starts one"


# Every address of 127.0.0.0/8 is this host's: each is as good as a NIC of its own.
RAILS: Final = ("127.0.0.1", "127.0.0.2", "127.0.0.3")


def _sim(**faults: Any) -> Callable[[], Link]:
    def make() -> Link:
        wire = SimWire(7)
        wire.set_faults(**faults)
        source = open_fabric("sim", wire=wire, name="source")
        sink = open_fabric("sim", wire=wire, name="sink")
        return Link(source, sink, is_private=True, wire=wire)

    return make


def _verbs(num_source: int, num_sink: int) -> Callable[[], Link]:
    """Rails of their own on either side, as far as there are ports."""

    def make() -> Link:
        names = [port.name for port in rdma_ports() if port.is_active]
        source = open_fabric("verbs", name="source", devices=names[:num_source])
        sink = open_fabric("verbs", name="sink", devices=names[-num_sink:])
        return Link(source, sink, is_private=True)

    return make


def _ofi(provider: str, is_private: bool, **options: Any) -> Callable[[], Link]:
    def make() -> Link:
        source = open_fabric(f"ofi:{provider}", name="source", **options)
        sink = open_fabric(f"ofi:{provider}", name="sink", **options)
        return Link(source, sink, is_private)

    return make


@functools.cache
def ofi_problem() -> str | None:
    """Why there is no libfabric here."""
    try:
        # Not loaded by hand: a provider's library takes SIGINT over, the engine gives it back.
        open_fabric("ofi:tcp").close()
    except ConfigError as error:
        return str(error)
    return None


ALL_CASES: Final = (
    Case("local-push", _local(is_private=False)),
    Case("local-pull", _local(is_private=True)),
    Case("tcp", _tcp(RAILS[:1], RAILS[:1], is_private=True)),
    Case("tcp-3-rails", _tcp(RAILS, RAILS, is_private=False)),
    Case("tcp-2-to-3-rails", _tcp(RAILS[:2], RAILS, is_private=True)),
    Case("local+tcp", _mixed("local+tcp", is_near=True, is_private=False, addresses=RAILS[:1])),
    Case(
        "local+tcp-far",
        _mixed("local+tcp", is_near=False, is_private=True, addresses=RAILS[:1]),
        problem=lambda: None if IS_LONG else "as tcp, but for the way there: make test-long",
    ),
    Case("sim", _sim()),
    Case(
        "sim-adverse",
        _sim(reorder=True, delay_s=0.01, duplicate=0.3, late_s=0.01, invisible=0.3),
        has_duplicates=True,
        is_quiet_when_done=False,
    ),
    Case(
        "sim-resend",
        _sim(reorder=True, delay_s=0.01, rails=3, resend=0.3, late_s=0.01, invisible=0.3),
        has_duplicates=True,
    ),
    Case("ofi:tcp", _ofi("tcp", is_private=True, register_sources=True), problem=ofi_problem),
    Case("ofi:shm", _ofi("shm", is_private=False), takes_leases=False, problem=ofi_problem),
    Case("cuda_ipc", _cuda_ipc("gpu", "gpu"), problem=fake_gpu_problem),
    Case("cuda_ipc-from-host", _cuda_ipc("host", "gpu"), problem=fake_gpu_problem),
    Case("cuda_ipc-to-host", _cuda_ipc("gpu", "host"), problem=fake_gpu_problem),
    Case(
        "cuda_ipc+tcp",
        _mixed("cuda_ipc+tcp", is_near=True, is_private=True, place=in_gpu),
        problem=lambda: fake_gpu_problem() if IS_LONG else "as cuda_ipc: make test-long",
    ),
    Case(  # both want to know of leased memory
        "cuda_ipc+ofi:tcp",
        _mixed("cuda_ipc+ofi:tcp", is_near=True, is_private=True, register_sources=True),
        problem=lambda: (
            fake_gpu_problem() or ofi_problem() if IS_LONG else "as cuda_ipc: make test-long"
        ),
    ),
    Case("verbs", _verbs(1, 1), problem=verbs_problem),
    Case("verbs-2-to-3", _verbs(2, 3), problem=verbs_problem),
    Case(
        "local+verbs",
        _mixed("local+verbs", is_near=True, is_private=False),
        problem=lambda: verbs_problem() if IS_LONG else "as local: make test-long",
    ),
)
# Those that this machine can run; test_fabric.py says which are left out, and why.
CASES: Final = tuple(case for case in ALL_CASES if case.problem() is None)
# For what is built on F1: barriers, messages.
QUIET_CASES: Final = tuple(case for case in CASES if case.is_quiet_when_done)


def groups(link: Link, size: int, **options: Any) -> list[Any]:
    """A connected peer group whose members live in turns on both engines of a link."""
    engines = (link.source, link.sink)
    members = [engines[i % 2].open_group(i, size, **options) for i in range(size)]
    for group in members:
        for other in members:
            group.connect(other.index, other.descriptor, 10.0)
    return members


def arrive(target: Target, slots: list[int]) -> None:
    """Wait for slots, and make what arrived readable."""
    target.wait(slots, 20.0)
    target.flush()


def settle(is_so: Callable[[], bool], limit_s: float = 10.0) -> None:
    """Wait until the sink has seen what arrived; an operation that is done says nothing of that."""
    end = time.monotonic() + limit_s
    while not is_so() and time.monotonic() < end:
        threading.Event().wait(0.001)


@contextmanager
def no_leaks() -> Iterator[None]:
    """Every native object made inside is gone at the end."""
    before = live_object_count()
    yield
    if live_object_count() != before:
        gc.collect()  # slow, and cycles are rare
    assert live_object_count() <= before, live_objects()
