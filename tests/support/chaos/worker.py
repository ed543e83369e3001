"""What the processes of a fault run do: coordinator, source, sink or watcher."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from pathlib import Path
from typing import Any

from support.chaos import world

_POLL_S = 0.003
FAULT_VERSION = 2
LEASE_S = 0.8
PUBLISH_TIMEOUT_S = 2.5
FIRST_TIMEOUT_S = 10.0  # everything starts at once, on few cores
TOKENS_S = 0.03  # between hearing of a commit and asking for it: some tokens are generated


def main(spec: dict[str, Any]) -> None:
    """Run one process to its end.

    Args:
        spec: `folder`, `role`, `rank`, `replica`, `mode`, `failpoint` (name and action, armed
            when the fault version is asked for, at once for `bind`), `bug`.
    """
    folder = Path(spec["folder"])
    threading.Thread(target=_tell_of_stalls, daemon=True).start()
    from support.chaos import bugs

    if spec.get("bug"):
        bugs.plant(spec["bug"])
    if spec.get("flip"):
        bugs.flip_one_byte(spec["flip"])
    if spec.get("failpoint") and ".bind" in spec["failpoint"]:
        _arm(spec)
    {"coordinator": _coordinator, "source": _source, "sink": _sink, "watcher": _watcher}[
        spec["role"]
    ](folder, spec)


def _tell_of_stalls() -> None:
    """Print where all threads stand whenever none of them may run Python for half a lease."""
    while True:
        faulthandler.dump_traceback_later(LEASE_S / 2, file=sys.stderr)
        time.sleep(LEASE_S / 8)


def _arm(spec: dict[str, Any]) -> None:
    from weightsync import failpoints

    failpoints.arm(spec["failpoint"])
    spec["failpoint"] = ""


def _arm_when_due(folder: Path, spec: dict[str, Any]) -> None:
    if spec.get("failpoint") and world.goal(folder) >= FAULT_VERSION:
        _arm(spec)


def _url(folder: Path) -> str:
    return f"unix:{folder}/job.sock"


def _coordinator(folder: Path, spec: dict[str, Any]) -> None:
    from weightsync.client import Job

    with Job.start(
        _url(folder),
        lease_s=LEASE_S,
        journal=folder / "job.db",
        bucket_bytes=4096,
        min_replicas=spec.get("min_replicas", 1),
        ranks_per_node=2 if spec.get("hops") else 1,
        node_dedup="on",
    ):
        world.note(folder, spec["name"], event="ready")
        while world.goal(folder) >= 0:
            _arm_when_due(folder, spec)
            time.sleep(_POLL_S)


class SourceLayout:
    def manifest(self, rank: int) -> Any:
        from weightsync.ir import ManifestBuilder

        builder = ManifestBuilder("source", f"source {rank}")
        for name, (rows, columns, _) in world.TENSORS.items():
            shard = world.source_shard(name, rank)
            n = shard.stop - shard.start
            builder.tensor(name, (rows, columns))
            if n > 0:
                builder.buffer(name, "F32", n * columns)
                builder.place(
                    name, name, (n, columns), at=(0, 0), lo=(shard.start, 0), n=(n, columns)
                )
        return builder.build()


class SinkLayout:
    def __init__(self, tp: int) -> None:
        self.tp = tp

    def manifest(self, rank: int) -> Any:
        from weightsync.ir import ManifestBuilder

        builder = ManifestBuilder("sink", f"sink {rank}")
        for name, (rows, columns, cut) in world.TENSORS.items():
            shape = world.sink_shape(name, self.tp)
            lo = [0, 0]
            if cut != "all":
                axis = 0 if cut == "rows" else 1
                lo[axis] = rank * shape[axis]
            n = (min(shape[0], rows - lo[0]), min(shape[1], columns - lo[1]))
            builder.tensor(name, (rows, columns))
            builder.buffer(name, "F32", shape[0] * shape[1])
            builder.place(name, name, shape, at=(0, 0), lo=tuple(lo), n=n)
            if n[0] < shape[0]:
                pad = (shape[0] - n[0], shape[1])
                builder.constant(name, n[0] * shape[1], pad, (shape[1], 1), 0.0)
        return builder.build()


def _fabric(spec: dict[str, Any]) -> dict[str, Any]:
    options = {"addresses": ["127.0.0.1"]} if spec["fabric"] == "tcp" else {}
    return {"fabric": spec["fabric"], "fabric_options": options}


def _source(folder: Path, spec: dict[str, Any]) -> None:
    import torch

    from weightsync.client import Source
    from weightsync.errors import WeightSyncError

    rank, name = spec["rank"], spec["name"]
    shards = {n: world.tensor(n, 0)[world.source_shard(n, rank)].copy() for n in world.TENSORS}
    weights = {n: torch.from_numpy(a) for n, a in shards.items() if a.size}
    done = spec.get("done", 0)
    with Source(
        weights,
        layout=SourceLayout(),
        rank=rank,
        world_size=world.NUM_SOURCES,
        job=_url(folder),
        timeout_s=PUBLISH_TIMEOUT_S,
        **_fabric(spec),
    ) as source:
        world.note(folder, name, event="ready")
        while (goal := world.goal(folder)) >= 0:
            _arm_when_due(folder, spec)
            if goal <= done:
                time.sleep(_POLL_S)
                continue
            done = goal
            for key, array in shards.items():
                array[...] = world.tensor(key, goal)[world.source_shard(key, rank)]
            world.write_truth(folder, goal, rank, shards)
            started = time.monotonic()
            try:
                patience = (
                    FIRST_TIMEOUT_S if goal < FAULT_VERSION and not spec.get("hurry") else None
                )
                report = source.publish(goal, timeout_s=patience)
            except WeightSyncError as error:
                outcome = {"outcome": type(error).__name__, "why": str(error)}
            else:
                outcome = {"outcome": "committed", "why": f"{report.num_replicas} replica(s)"}
            seconds = time.monotonic() - started
            world.note(folder, name, event="publish", version=goal, seconds=seconds, **outcome)
            # Training goes on: an aborted version must not depend on these bytes any more.
            for array in shards.values():
                array[...] = -1.0


class _Hooks:
    """In place: stop serving around the update."""

    def __init__(self, memory: world.SinkMemory) -> None:
        self.memory = memory

    def pause(self) -> None:
        self.memory.serving = 0

    def resume(self, version: int) -> None:
        self.memory.serving = version


def _sink(folder: Path, spec: dict[str, Any]) -> None:
    import torch

    from weightsync.client import Sink
    from weightsync.errors import TornError, TransferTimeoutError

    replica, rank, name = spec["replica"], spec["rank"], spec["name"]
    memory = world.SinkMemory(folder, replica, rank)
    memory.serving = 0
    weights = {n: torch.from_numpy(a) for n, a in memory.arrays().items()}
    tp = world.REPLICAS[replica]
    in_place = spec["mode"] == "in_place"
    hooks = _Hooks(memory) if in_place else None
    with Sink(
        weights, layout=SinkLayout(tp), replica=replica, rank=rank, world_size=tp,
        job=_url(folder), mode=spec["mode"], hooks=hooks, timeout_s=3.0,
        **_fabric(spec),
    ) as sink:  # fmt: skip
        world.note(folder, name, event="ready")
        while world.goal(folder) >= 0:
            _arm_when_due(folder, spec)
            committed, active = sink.committed_version, sink.version
            if committed is None or (active is not None and committed <= active):
                time.sleep(_POLL_S)
                continue
            time.sleep(TOKENS_S)
            if not in_place:  # the hooks do it there
                memory.serving = 0
            try:
                version = sink.refit(timeout_s=1.5)
            except TornError as error:
                world.note(folder, name, event="torn", why=str(error))
            except TransferTimeoutError as error:
                world.note(folder, name, event="waited", why=str(error))
                if not in_place:
                    memory.serving = sink.version if sink.version is not None else 0
                time.sleep(0.02)
            else:
                if not in_place:
                    memory.serving = version
                world.note(folder, name, event="adopted", version=version)


def _watcher(folder: Path, spec: dict[str, Any]) -> None:
    """Look at what every replica serves, from outside, until the run ends."""
    known: dict[tuple[int, str, int], str | None] = {}
    checks = 0
    memories = {
        replica: [world.SinkMemory(folder, replica, rank) for rank in range(size)]
        for replica, size in world.REPLICAS.items()
    }
    while world.goal(folder) >= 0:
        for replica, ranks in memories.items():
            before = [memory.state for memory in ranks]
            versions = {version for version, _ in before}
            if 0 in versions:
                continue  # some rank is not serving: the replica is not
            hashes = [memory.hash() for memory in ranks]
            if [memory.state for memory in ranks] != before:
                continue
            checks += 1
            if len(versions) > 1:
                world.note(
                    folder, "watcher", event="mixed", replica=replica, versions=sorted(versions)
                )
                continue
            version = versions.pop()
            for rank, found in enumerate(hashes):
                key = (version, replica, rank)
                if known.get(key) is None:
                    known[key] = world.expected_hash(folder, version, replica, rank)
                if found != known[key]:
                    world.note(
                        folder,
                        "watcher",
                        event="wrong",
                        replica=replica,
                        rank=rank,
                        version=version,
                    )
        time.sleep(0.002)
    world.note(folder, "watcher", event="end", checks=checks)
