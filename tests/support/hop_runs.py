"""Versions that sinks pass on, over the engines of any fabric: no torch, no coordinator.

The service's own parts do the work (executors, receivers, `PassingOn`), one engine to a rank. What
a sink must hold is computed element by element from the tensor's name, the element's number and
the version; nothing of the package is asked for it.
"""

from __future__ import annotations

import contextlib
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import numpy as np

from support.fabrics import Case, Link, settle
from weightsync.errors import WeightSyncError
from weightsync.ir import Manifest, ManifestBuilder, Plan, PlanOptions
from weightsync.planners.planner import plan_transfer
from weightsync.runtime.executor import Executor
from weightsync.runtime.program import chunk_bits, source_program
from weightsync.runtime.receiver import Receiver
from weightsync.runtime.staging import StagingPool
from weightsync.service import weightsync_pb2 as pb
from weightsync.service.digests import unpack_digests
from weightsync.service.passing_on import PassingOn

__all__ = ["NUM_SOURCES", "WAYS", "HopFleet", "part"]

NUM_SOURCES: Final = 2
TP: Final = 2
WAIT_S: Final = 20.0
# name -> shape, what sources hold, what sinks hold, whether the ranks of a replica cut its rows
TENSORS: Final = {
    "embed": ((37, 16), np.float32, np.uint16, False),  # cast on the way, kept whole by all
    "codes": ((30, 24), np.uint8, np.uint8, False),  # raw bytes
    "up": ((24, 16), np.float32, np.uint16, True),
}
DTYPES: Final = {np.float32: "F32", np.uint16: "BF16", np.uint8: "U8"}
WAYS: Final[dict[str, dict[str, Any]]] = {
    "node_dedup": {"ranks_per_node": TP, "node_dedup": "on"},
    "relays": {"relays": "on", "node_dedup": "off"},
    "both": {"ranks_per_node": TP, "node_dedup": "on", "relays": "on"},
}


def part(name: str, rows: slice, version: int, *, as_stored: bool) -> np.ndarray:
    """Rows of a tensor at a version; the numbers are small enough to be exact in bfloat16."""
    (height, width), held, stored, _ = TENSORS[name]
    number = np.arange(height * width, dtype=np.int64).reshape(height, width)[rows]
    values = (zlib.crc32(name.encode()) + 7 * number + 31 * version) % 251
    if not as_stored or stored is np.uint8:
        return values.astype(stored if as_stored else held)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return (bits >> 16).astype(np.uint16)  # bfloat16 is the upper half


def _rows(name: str, rank: int, world: int) -> slice:
    height = TENSORS[name][0][0]
    chunk = -(-height // world)
    return slice(min(rank * chunk, height), min((rank + 1) * chunk, height))


def _sink_rows(name: str, rank: int) -> slice:
    return _rows(name, rank, TP) if TENSORS[name][3] else slice(0, TENSORS[name][0][0])


def _manifest(side: Any, label: str, rows_of: Callable[[str], slice]) -> Manifest:
    builder = ManifestBuilder(side, label)
    for name, (shape, held, stored, _) in TENSORS.items():
        rows = rows_of(name)
        n = (rows.stop - rows.start, shape[1])
        builder.tensor(name, shape)
        builder.buffer(name, DTYPES[held if side == "source" else stored], n[0] * n[1])
        builder.place(name, name, n, at=(0, 0), lo=(rows.start, 0), n=n)
    return builder.build()


def _source_manifest(rank: int) -> Manifest:
    return _manifest("source", f"source {rank}", lambda name: _rows(name, rank, NUM_SOURCES))


def _sink_manifest(replica: int, rank: int) -> Manifest:
    return _manifest("sink", f"sink {replica}/{rank}", lambda name: _sink_rows(name, rank))


class HopFleet:
    """Two sources and replicas of two sinks, each with an engine of its own.

    Args:
        case: Whose engines.
        mode: Of the receivers.
        replicas: How many.
        rules: Of `PlanOptions`, such as one of `WAYS`.
    """

    def __init__(self, case: Case, *, mode: str, replicas: int, **rules: Any) -> None:
        self._mode: Any = mode
        self.sinks = [(r, rank) for r in range(replicas) for rank in range(TP)]
        self.links: list[Link] = [
            case.open() for _ in range(-(-(NUM_SOURCES + len(self.sinks)) // 2))
        ]
        # Sources have the sources' engines, as cases may cut sides differently; sinks what is left.
        self.engines = [link.source for link in self.links[:NUM_SOURCES]]
        self.engines += [link.sink for link in self.links]
        self.engines += [link.source for link in self.links[NUM_SOURCES:]]
        self._manifests = [_sink_manifest(r, rank) for r, rank in self.sinks]
        self.plan: Plan = plan_transfer(
            Manifest.merge("source", [_source_manifest(rank) for rank in range(NUM_SOURCES)]),
            Manifest.merge("sink", self._manifests),
            PlanOptions(bucket_bytes=512, chunk_bytes=256, **rules),
        )
        self.shards = [
            {n: part(n, _rows(n, i, NUM_SOURCES), 0, as_stored=False) for n in TENSORS}
            for i in range(NUM_SOURCES)
        ]
        self.staging = [np.zeros(1 << 14, np.uint8) for _ in range(NUM_SOURCES)]
        self.leases = [
            self.engines[i].register(array.ctypes.data, array.nbytes, array)
            for i in range(NUM_SOURCES)
            for array in (*self.shards[i].values(), self.staging[i])
        ]
        self.live: list[dict[str, np.ndarray]] = [{} for _ in self.sinks]
        self.receivers: list[Receiver] = []
        self.hops: list[PassingOn] = []
        self.executors: list[Executor] = []
        self.pool = ThreadPoolExecutor(32)
        self.epoch = 0
        for index in range(len(self.sinks)):
            self._start_sink(index)

    # ---- set-up ----

    def replace_sink(self, index: int) -> tuple[PassingOn, Receiver]:
        """Another process for this rank; what the old one had stays as it was, for the caller."""
        old = self.hops[index], self.receivers[index]
        self._start_sink(index)
        return old

    def _start_sink(self, index: int) -> None:
        rank = self.sinks[index][1]
        live = {n: np.zeros_like(part(n, _sink_rows(n, rank), 0, as_stored=True)) for n in TENSORS}
        names = self._manifests[index].buffers.names
        addresses = np.array([live[name].ctypes.data for name in names], np.int64)
        engine = self.engines[NUM_SOURCES + index]
        receiver = Receiver(engine, live=addresses, live_owner=live, mode=self._mode)
        self.live[index] = live
        self.receivers[index : index + 1] = [receiver]
        self.hops[index : index + 1] = [PassingOn(receiver, f"sink {self.sinks[index]}")]

    def bind(self) -> None:
        """Every sink exports anew, every sender connects: one epoch."""
        self.epoch += 1
        self.hang_up()
        for hops in self.hops:
            hops.close()
        descriptors = [r.bind(self.plan, i) for i, r in enumerate(self.receivers)]
        bits = chunk_bits(self.plan)
        for rank in range(NUM_SOURCES):
            programs = source_program(self.plan, rank)
            sinks = sorted({program.sink for program in programs})
            self.executors.append(
                Executor(
                    programs=programs,
                    remotes={s: self.engines[rank].connect(descriptors[s], WAIT_S) for s in sinks},
                    num_slots={s: len(self.plan.inbound(s)) for s in sinks},
                    bits=bits,
                    staging_address=self.staging[rank].ctypes.data,
                    pool=StagingPool(self.staging[rank].nbytes),
                )
            )
        for index, hops in enumerate(self.hops):
            hops.bind(self.plan, index, self.epoch)
            assert hops.connect(pb.Exports(epoch=self.epoch, descriptors=descriptors), WAIT_S)

    def hang_up(self) -> None:
        for executor in self.executors:
            for remote in executor.remotes.values():
                remote.close()
        self.executors = []

    def close(self) -> None:
        self.hang_up()
        for hops in self.hops:
            hops.close()
        for receiver in self.receivers:
            receiver.close()
        self.pool.shutdown()
        for lease in self.leases:
            lease.release()
        # pytest keeps fixtures longer than their tests: let go, so that leaks can be counted.
        self.leases, self.receivers, self.hops, self.engines = [], [], [], []
        for link in self.links:
            link.close()

    # ---- one version ----

    def forwarders(self) -> list[int]:
        """Sinks that pass something on."""
        return [i for i in range(len(self.sinks)) if len(self.plan.hops(i))]

    def transfer(self, version: int, frozen: int | None = None) -> Transfer:
        """Begin a version; `frozen` is a sink that stops when it would pass on its first bucket."""
        for rank, shard in enumerate(self.shards):
            for name, array in shard.items():
                array[...] = part(name, _rows(name, rank, NUM_SOURCES), version, as_stored=False)
        return Transfer(self, version, frozen)

    def check(self, version: int) -> None:
        """Every sink's live weights hold the version, element by element."""
        for (_, rank), live in zip(self.sinks, self.live, strict=True):
            for name, found in live.items():
                wanted = part(name, _sink_rows(name, rank), version, as_stored=True)
                np.testing.assert_array_equal(found, wanted, err_msg=name)


class Transfer:
    """One version on its way."""

    def __init__(self, fleet: HopFleet, version: int, frozen: int | None) -> None:
        self._fleet, self._version = fleet, version
        self.cancel = threading.Event()  # what all but the frozen hear
        self._end = threading.Event()  # what the frozen one hears, at last
        self._thaw = threading.Event()
        self.stopped = threading.Event()  # the frozen one is
        self._reports: dict[int, dict[int, Any]] = {}
        self.num_bytes = [0] * NUM_SOURCES
        self._deadline = time.monotonic() + WAIT_S
        if frozen is not None:
            forwarder = fleet.hops[frozen]._forwarder
            assert forwarder is not None
            forwarder._executor.on_bucket = self._freeze
        for receiver in fleet.receivers:
            receiver.open_slots(version)
        start = fleet.pool.submit
        self.sinks: list[Future[int | None]] = [
            start(self._fill, index, self._end if index == frozen else self.cancel)
            for index in range(len(fleet.sinks))
        ]
        self.sources = [start(self._write, rank) for rank in range(NUM_SOURCES)]

    def _freeze(self) -> None:
        self.stopped.set()
        assert self._thaw.wait(WAIT_S)

    def _write(self, rank: int) -> None:
        fleet = self._fleet
        bases = np.zeros(len(fleet.plan.source.buffers), np.int64)
        for buffer in fleet.plan.source.buffers_of(rank).tolist():
            name = fleet.plan.source.buffers.names[buffer]
            bases[buffer] = fleet.shards[rank][name].ctypes.data
        outcome = fleet.executors[rank].run(
            self._version, bases, deadline=self._deadline, cancel=self.cancel
        )
        if outcome is not None:
            self.num_bytes[rank] = outcome.nbytes
            self._reports[rank] = outcome.digests

    def _fill(self, index: int, cancel: threading.Event) -> int | None:
        def send(writes_done: pb.WritesDone) -> None:
            self._reports[NUM_SOURCES + index] = unpack_digests(writes_done.digests)

        def expected(sender: int) -> Any:
            report = self._reports.get(sender)
            return None if report is None else report[index]

        hops, receiver = self._fleet.hops[index], self._fleet.receivers[index]
        with hops.during(self._version, self._deadline, cancel, send):
            hops.begin(self._version)
            return receiver.fill(self._version, expected, deadline=self._deadline, cancel=cancel)

    def prepared(self) -> list[int]:
        """Wait for every sink; those that hold the whole version, verified."""
        for source in self.sources:
            source.result(2 * WAIT_S)
        return [i for i, f in enumerate(self.sinks) if f.result(2 * WAIT_S) is not None]

    def apply(self) -> None:
        """Make it live everywhere."""
        for receiver in self._fleet.receivers:
            receiver.apply()

    def give_up(self, sinks: list[int]) -> list[int]:
        """Cancel, as an abort does, when sources have written; those of the sinks that prepared."""
        for source in self.sources:
            source.result(2 * WAIT_S)
        self.cancel.set()
        return [i for i in sinks if self.sinks[i].result(2 * WAIT_S) is not None]

    def writes_late(self, frozen: int) -> bool:
        """Let the frozen sink go on, and wait; whether any sink took all that it still wrote."""
        self._thaw.set()
        settle(lambda: NUM_SOURCES + frozen in self._reports or self.sinks[frozen].done(), WAIT_S)
        self._end.set()
        with contextlib.suppress(WeightSyncError):  # what it wrote to is fenced
            self.sinks[frozen].result(2 * WAIT_S)
        return bool(self._reports.get(NUM_SOURCES + frozen))
