"""Real executors and receivers over a simulated wire that reorders, repeats, drops and freezes.

With `hops` sinks pass on what they received, inside replicas and between them, and faults strike
them as they strike sources. One run is a few versions under faults that a seed chooses. Decisions
follow the protocol in its simplest form: commit when every source has written and every sink
agrees, else abort and fence. What sinks hold is compared with `support.chaos.world`, which shares
no code with the package.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from support.chaos import world
from support.chaos.worker import SinkLayout, SourceLayout
from weightsync.errors import WeightSyncError
from weightsync.ir.plan import PlanOptions
from weightsync.runtime import program
from weightsync.runtime.executor import Executor, Outcome
from weightsync.runtime.forwarder import Forwarder
from weightsync.runtime.receiver import Receiver
from weightsync.runtime.staging import StagingPool
from weightsync.service.planning import make_plan
from weightsync.transport.sim import SimWire, open_sim

HOPS = {"ranks_per_node": 2, "node_dedup": "on", "relays": "on"}
EQUAL_REPLICAS = {"a": 2, "b": 2}  # relays need them
FAULTS = ("none", "reorder", "duplicate", "drop", "freeze", "late", "invisible", "mutate", "stall")
NUM_VERSIONS = 5
WAIT_S = 0.25
DEADLINE_S = 5.0
# Faults that a version must survive.
HARMLESS = ("none", "reorder", "duplicate", "invisible", "stall")


@dataclass
class SimResult:
    """What a run came to."""

    seed: int
    faults: list[str] = field(default_factory=list)
    decisions: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    happened: Counter[str] = field(default_factory=Counter)


class SimRun:
    """One run. `bug` plants one of `SIM_BUGS`.

    Senders are numbered as in a plan: sources, then sinks, each of which may pass on.
    """

    def __init__(self, seed: int, bug: str = "", *, hops: bool = False) -> None:
        self.replicas = EQUAL_REPLICAS if hops else world.REPLICAS
        self.sinks = [(name, rank) for name, size in self.replicas.items() for rank in range(size)]
        self.random = random.Random(seed)
        self.bug = bug
        self.result = SimResult(seed)
        self.wire = SimWire(seed)
        options = PlanOptions(bucket_bytes=4096, chunk_bytes=1024, **(HOPS if hops else {}))
        self.plan = make_plan(
            [
                (f"source {r}", SourceLayout().manifest(r).to_bytes())
                for r in range(world.NUM_SOURCES)
            ],
            [
                (f"sink {n}/{r}", SinkLayout(self.replicas[n]).manifest(r).to_bytes())
                for n, r in self.sinks
            ],
            options,
        ).plan
        self.shards = [
            {
                name: np.zeros_like(world.tensor(name, 0)[world.source_shard(name, rank)])
                for name in world.TENSORS
            }
            for rank in range(world.NUM_SOURCES)
        ]
        self.live = [
            {
                name: np.zeros(world.sink_shape(name, self.replicas[replica]), np.float32)
                for name in world.TENSORS
            }
            for replica, _ in self.sinks
        ]
        self.serving = 0
        self.num_senders = world.NUM_SOURCES + len(self.sinks)
        self.names = [""] * self.num_senders
        self.kept: list[Any] = []  # what zombies still read
        self.receivers: list[Receiver] = []
        for index in range(len(self.sinks)):
            self._start_sink(index)
        self.executors: list[Executor | None] = []
        self.forwarders: dict[int, Forwarder] = {}
        self.engines: list[Any] = [None] * world.NUM_SOURCES
        self.staging: list[Any] = [None] * world.NUM_SOURCES
        self.zombies: list[str] = []
        self.sleepers: list[threading.Thread] = []
        for rank in range(world.NUM_SOURCES):
            self._start_source(rank)
        self._bind()

    def execute(self) -> SimResult:
        """Run all versions; the last one without faults, so that every run ends in a commit."""
        for version in range(1, NUM_VERSIONS + 1):
            last = version == NUM_VERSIONS
            fault = "none" if last else self.random.choice(FAULTS)
            self.result.faults.append(fault)
            self._version(version, fault)
        self._thaw()
        self.wire.run()
        for thread in self.sleepers:
            thread.join(DEADLINE_S)
            if thread.is_alive():
                self.result.violations.append("a thawed source never ended")
        self._check("at the end")
        if self.result.decisions[-1] != "commit":
            self.result.violations.append("the version without a fault was not committed")
        self.result.happened.update({k: int(v) for k, v in self.wire.counts().items()})
        return self.result

    # ---- one version ----

    def _version(self, version: int, fault: str) -> None:
        for receiver in self.receivers:
            receiver.open_slots(version)
        for rank, shard in enumerate(self.shards):
            for name, array in shard.items():
                array[...] = world.tensor(name, version)[world.source_shard(name, rank)]
        victims = [*range(world.NUM_SOURCES), *sorted(self.forwarders)]
        victim = self.random.choice(victims)
        if fault == "mutate":
            victim %= world.NUM_SOURCES
        # A sink that passes on is struck after some buckets; a source before the first.
        self.frozen_after = self.random.randrange(4) if victim >= world.NUM_SOURCES else 0
        if fault == "freeze" and victim >= world.NUM_SOURCES:
            self.result.happened["forwarder_frozen"] += 1
        self._set_faults(fault, victim)
        commit = self._transfer(version, fault, victim)
        self.result.decisions.append("commit" if commit else "abort")
        if fault == "freeze" and victim < world.NUM_SOURCES:
            self._start_source(victim)  # somebody takes its place
        if fault == "freeze" and victim >= world.NUM_SOURCES:
            self._start_sink(victim - world.NUM_SOURCES)
            if commit:
                self.result.violations.append(f"version {version} committed without {victim}")
        if self.random.random() < 0.7:
            # Writes of the dead land at the worst moment: verified, not yet applied.
            self._thaw()
            self.wire.run()
        if commit:
            for receiver in self.receivers:
                receiver.apply()
            self.serving = version
        else:
            for receiver in self.receivers:
                receiver.fence()
        if not commit or fault == "freeze":
            self._bind()
        for name in ("", *self.names):
            self.wire.set_faults(name)
        if fault in HARMLESS and not commit:
            self.result.violations.append(f"version {version} was aborted ({fault})")
        self._check(f"after version {version} ({fault})")

    def _transfer(self, version: int, fault: str, victim: int) -> bool:
        """Sources write while sinks fill; True when all of them agree."""
        cancel = self.cancel = threading.Event()
        self.zombie_cancel = threading.Event()
        outcomes: dict[int, Outcome | None] = {}
        votes: dict[int, bool] = {}

        def write(rank: int) -> None:
            outcomes[rank] = self._write(rank, version, fault, victim)
            if outcomes[rank] is None:
                cancel.set()

        frozen = victim if fault == "freeze" else -1

        def fill(index: int) -> None:
            votes[index] = self._vote(index, version, outcomes, cancel)

        senders = [*range(world.NUM_SOURCES), *sorted(self.forwarders)]
        threads = [threading.Thread(target=write, args=(r,), daemon=True) for r in senders]
        threads += [
            threading.Thread(target=fill, args=(i,), daemon=True) for i in range(len(self.sinks))
        ]
        hasty = self.bug == "commit_before_vote"
        for thread in threads:
            thread.start()
        for rank, thread in zip(senders, threads, strict=False):
            if rank == frozen:
                # A stopped process neither gives up nor hears of a decision; it only sleeps on.
                thread.join(WAIT_S)
                self.sleepers.append(thread)
                outcomes[rank] = None
                cancel.set()
            else:
                thread.join()
        written = all(outcome is not None for outcome in outcomes.values())
        if hasty and (written or fault == "freeze"):
            cancel.set()
        for thread in threads[len(senders) :]:
            thread.join()
        if fault != "freeze":
            self.wire.run()  # what is locally complete has landed for the last time
        return hasty or (written and all(votes.values()))

    def _set_faults(self, fault: str, victim: int) -> None:
        name = self.names[victim]
        base: dict[str, Any] = {"reorder": True, "delay_s": 0.01, "late_s": 0.005}
        if fault in ("duplicate", "invisible"):
            for each in ("", *self.names):
                self.wire.set_faults(each, **base, **{fault: 0.5})
        elif fault in ("drop", "late"):
            self.wire.set_faults(name, **(base | {"late_s": 1e6}), **{fault: 0.3})
        elif fault == "freeze":
            if self.frozen_after == 0:
                self.wire.freeze(name)
            self.zombies.append(name)
        elif fault == "reorder":
            self.wire.set_faults(name, **base)
        elif fault in ("mutate", "stall"):
            self.wire.set_faults(name, **(base | {"delay_s": 10.0}))

    def _write(self, rank: int, version: int, fault: str, victim: int) -> Outcome | None:
        if rank >= world.NUM_SOURCES:
            return self._pass_on(rank, version, fault, victim)
        bases = np.zeros(len(self.plan.source.buffers), np.int64)
        for index in self.plan.source.buffers_of(rank).tolist():
            bases[index] = self.shards[rank][self.plan.source.buffers.names[index]].ctypes.data
        cancel = threading.Event()
        deadline = time.monotonic() + (60.0 if fault == "freeze" and rank == victim else DEADLINE_S)
        mutates = fault == "mutate" and rank == victim
        posted = self._mutate_when_posted(rank) if mutates else None
        try:
            return self.executors[rank].run(version, bases, deadline=deadline, cancel=cancel)
        except WeightSyncError:
            return None
        finally:
            if posted is not None:
                posted()

    def _pass_on(self, number: int, version: int, fault: str, victim: int) -> Outcome | None:
        """What a sink sends; frozen after some of its buckets if it is the victim."""
        is_frozen = fault == "freeze" and number == victim
        forwarder, index = self.forwarders[number], number - world.NUM_SOURCES
        executor, name, left = forwarder._executor, self.names[number], self.frozen_after
        programs = executor.programs
        if is_frozen:
            post = {sink: remote.post for sink, remote in executor.remotes.items()}

            class Freezing:
                address = None

                def __init__(self, wire: SimWire, remote: Any, sink: int) -> None:
                    self._wire, self._remote, self._sink = wire, remote, sink

                def post(self, table: np.ndarray) -> Any:
                    nonlocal left
                    left -= 1
                    operation = post[self._sink](table)
                    if left <= 0:
                        self._wire.freeze(name)
                    return operation

                def close(self) -> None:
                    self._remote.close()

            executor.remotes = {
                sink: Freezing(self.wire, remote, sink) for sink, remote in executor.remotes.items()
            }
        self.kept += [programs, self.receivers[index]._memory] if is_frozen else []
        deadline = time.monotonic() + (60.0 if is_frozen else DEADLINE_S)
        try:
            return forwarder.run(
                version,
                self.receivers[index].bases(),
                deadline=deadline,
                cancel=self.zombie_cancel if is_frozen else self.cancel,
            )
        except WeightSyncError:
            return None

    def _mutate_when_posted(self, rank: int) -> Callable[[], None]:
        """Change the weights after their digest was taken and before the wire reads them."""
        executor = self.executors[rank]
        remotes = dict(executor.remotes)
        shard = self.shards[rank]["up"]

        class Late:
            def __init__(self, remote: Any) -> None:
                self._remote = remote
                self.address = None

            def post(self, table: np.ndarray) -> Any:
                operation = self._remote.post(table)
                shard[...] += 1.0
                return operation

            def close(self) -> None:
                self._remote.close()

        executor.remotes = {sink: Late(remote) for sink, remote in remotes.items()}

        def restore() -> None:
            executor.remotes = remotes

        return restore

    def _vote(
        self, index: int, version: int, outcomes: dict[int, Outcome | None], cancel: threading.Event
    ) -> bool:
        def expected(source: int) -> Any:
            outcome = outcomes.get(source)
            return None if outcome is None else outcome.digests.get(index)

        try:
            nbytes = self.receivers[index].fill(
                version, expected, deadline=time.monotonic() + DEADLINE_S, cancel=cancel
            )
        except WeightSyncError:
            return False
        return nbytes is not None

    def _check(self, when: str) -> None:
        for (replica, rank), live in zip(self.sinks, self.live, strict=True):
            for name, found in live.items():
                if self.serving == 0:
                    wanted = np.zeros_like(found)
                else:
                    whole = world.tensor(name, self.serving)
                    wanted = world.sink_shard(name, whole, self.replicas[replica], rank)
                if not np.array_equal(found, wanted):
                    self.result.violations.append(
                        f"{when}: {replica}/{rank} {name} is not version {self.serving}"
                    )

    # ---- set-up ----

    def _thaw(self) -> None:
        for name in self.zombies:
            self.wire.thaw(name)
        self.zombies = []

    def _start_source(self, rank: int) -> None:
        """A new process for this rank; what the old one had stays as it was, connections too."""
        if self.executors:
            self.kept.append(self.executors[rank])
            self.executors[rank] = None
        self.kept += [self.engines[rank], self.shards[rank], self.staging[rank]]
        self.names[rank] = f"source-{rank}-{len(self.kept)}"
        self.shards[rank] = {name: array.copy() for name, array in self.shards[rank].items()}
        self.staging[rank] = np.zeros(1 << 16, np.uint8)
        engine = self.engines[rank] = open_sim(wire=self.wire, name=self.names[rank])
        for array in [*self.shards[rank].values(), self.staging[rank]]:
            if array.nbytes:
                self.kept.append(engine.register(array.ctypes.data, array.nbytes, array))

    def _start_sink(self, index: int) -> None:
        """A new process for this sink; the old one keeps its memory, its target and its writes."""
        if index < len(self.receivers):
            self.kept.append(self.receivers[index])
        number = world.NUM_SOURCES + index
        self.names[number] = f"sink-{index}-{len(self.kept)}"
        live = self.live[index]
        replica, rank = self.sinks[index]
        engine = open_sim(wire=self.wire, name=self.names[number])
        manifest = SinkLayout(self.replicas[replica]).manifest(rank)
        addresses = np.array([live[n].ctypes.data for n in manifest.buffers.names], np.int64)
        receiver = Receiver(engine, live=addresses, live_owner=live, mode="staged")
        self.receivers[index : index + 1] = [receiver]

    def _bind(self) -> None:
        plan = self.plan
        for executor in self.executors:
            for remote in executor.remotes.values() if executor is not None else ():
                remote.close()
        for number, forwarder in self.forwarders.items():
            if self.names[number] not in self.zombies:
                forwarder.close()
        descriptors = [receiver.bind(plan, i) for i, receiver in enumerate(self.receivers)]
        self.executors = []
        for rank, engine in enumerate(self.engines):
            programs = program.source_program(plan, rank)
            self.executors.append(
                Executor(
                    programs=programs,
                    remotes={s: engine.connect(d, 5.0) for s, d in enumerate(descriptors)},
                    num_slots={s: len(plan.inbound(s)) for s in range(len(self.sinks))},
                    bits=program.chunk_bits(plan),
                    staging_address=self.staging[rank].ctypes.data,
                    pool=StagingPool(self.staging[rank].nbytes),
                )
            )
        self.forwarders = {}
        for index, receiver in enumerate(self.receivers):
            programs = program.hop_program(plan, index)
            if programs:
                executor = Executor(
                    programs=programs,
                    remotes={
                        s: receiver.fabric.connect(descriptors[s], 5.0)
                        for s in sorted({p.sink for p in programs})
                    },
                    num_slots={s: len(plan.inbound(s)) for s in range(len(self.sinks))},
                    bits=program.chunk_bits(plan),
                    staging_address=0,
                    pool=StagingPool(0),
                )
                number = world.NUM_SOURCES + index
                self.forwarders[number] = Forwarder(executor, receiver.arrivals)
