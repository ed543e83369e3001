"""The model of the fault runs: what every version holds, and where, by plain numpy slicing.

Nothing here comes from the package: this is what the outcome is compared with.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from pathlib import Path

import numpy as np

# name -> (rows, columns, how tensor parallelism cuts it)
TENSORS = {
    "embed": (70, 64, "rows"),
    "up": (96, 64, "rows"),
    "down": (64, 96, "columns"),
    "norm": (1, 64, "all"),
}
NUM_SOURCES = 2
REPLICAS = {"a": 2, "b": 1}
PADDED_ROWS = {"embed": 72}


def tensor(name: str, version: int) -> np.ndarray:
    """Content of one tensor at a version: different in every element and version."""
    rows, columns, _ = TENSORS[name]
    seed = int.from_bytes(hashlib.sha256(f"{name}/{version}".encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def source_shard(name: str, rank: int) -> slice:
    """Rows that a source rank holds: chunks of ceil(n / world), as FSDP2 cuts."""
    rows = TENSORS[name][0]
    chunk = -(-rows // NUM_SOURCES)
    return slice(min(rank * chunk, rows), min((rank + 1) * chunk, rows))


def sink_shape(name: str, tp: int) -> tuple[int, int]:
    """Shape of one sink rank's tensor."""
    rows, columns, cut = TENSORS[name]
    rows = PADDED_ROWS.get(name, rows)
    return (rows // tp if cut == "rows" else rows, columns // tp if cut == "columns" else columns)


def sink_shard(name: str, values: np.ndarray, tp: int, rank: int) -> np.ndarray:
    """What a sink rank must hold of a whole tensor, padding included."""
    padded = np.zeros((PADDED_ROWS.get(name, values.shape[0]), values.shape[1]), np.float32)
    padded[: values.shape[0]] = values
    cut = TENSORS[name][2]
    if cut == "rows":
        return np.split(padded, tp, axis=0)[rank]
    if cut == "columns":
        return np.split(padded, tp, axis=1)[rank]
    return padded


def truth_path(folder: Path, version: int, source: int) -> Path:
    """Where a trainer leaves what it holds at a version."""
    return folder / f"truth-{version}-{source}"


def write_truth(folder: Path, version: int, source: int, shards: dict[str, np.ndarray]) -> None:
    """Record a trainer's own weights, before they are published."""
    path = truth_path(folder, version, source)
    data = b"".join(np.ascontiguousarray(shards[name]).tobytes() for name in TENSORS)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    temporary.rename(path)


def read_truth(folder: Path, version: int) -> dict[str, np.ndarray] | None:
    """Whole tensors of a version from all trainers' records; None while some are missing."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in TENSORS}
    for source in range(NUM_SOURCES):
        path = truth_path(folder, version, source)
        if not path.exists():
            return None
        data, offset = path.read_bytes(), 0
        for name, (_, columns, _) in TENSORS.items():
            shard = source_shard(name, source)
            count = (shard.stop - shard.start) * columns
            found = np.frombuffer(data, np.float32, count, offset)
            parts[name].append(found.reshape(-1, columns))
            offset += 4 * count
    return {name: np.concatenate(found) for name, found in parts.items()}


def expected_hash(folder: Path, version: int, replica: str, rank: int) -> str | None:
    """Hash of what one sink rank must hold."""
    whole = read_truth(folder, version)
    if whole is None:
        return None
    digest = hashlib.sha256()
    for name in TENSORS:
        shard = sink_shard(name, whole[name], REPLICAS[replica], rank)
        digest.update(np.ascontiguousarray(shard).tobytes())
    return digest.hexdigest()


class SinkMemory:
    """One sink rank's live weights and what it says that it serves, in a file that all map."""

    HEADER = 64

    def __init__(self, folder: Path, replica: str, rank: int, *, create: bool = False) -> None:
        tp = REPLICAS[replica]
        self.shapes = {name: sink_shape(name, tp) for name in TENSORS}
        self.nbytes = sum(4 * rows * columns for rows, columns in self.shapes.values())
        path = folder / f"sink-{replica}-{rank}"
        if create:
            with path.open("wb") as file:
                file.truncate(self.HEADER + self.nbytes)
        with path.open("r+b") as file:
            self.map = mmap.mmap(file.fileno(), self.HEADER + self.nbytes)

    @property
    def serving(self) -> int:
        """Version that the rank answers requests from; 0: none at the moment."""
        return int(struct.unpack_from("<q", self.map, 0)[0])

    @serving.setter
    def serving(self, version: int) -> None:
        count = int(struct.unpack_from("<q", self.map, 8)[0])
        struct.pack_into("<q", self.map, 8, count + 1)
        struct.pack_into("<q", self.map, 0, version)

    @property
    def state(self) -> tuple[int, int]:
        """Serving version and how often it was set: equal before and after means unchanged."""
        return (self.serving, int(struct.unpack_from("<q", self.map, 8)[0]))

    def hash(self) -> str:
        """Hash of the live weights as they are now."""
        return hashlib.sha256(self.map[self.HEADER :]).hexdigest()

    def arrays(self) -> dict[str, np.ndarray]:
        """Views of the live weights."""
        offset, found = self.HEADER, {}
        for name, shape in self.shapes.items():
            count = shape[0] * shape[1]
            found[name] = np.frombuffer(self.map, np.float32, count, offset).reshape(shape)
            offset += 4 * count
        return found


def note(folder: Path, who: str, **what: object) -> None:
    """Append one line to a process's log; survives a kill right after."""
    line = json.dumps(what) + "\n"
    fd = os.open(folder / f"log-{who}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, line.encode())
    os.close(fd)


def notes(folder: Path, who: str) -> list[dict[str, object]]:
    """What a process has noted so far."""
    path = folder / f"log-{who}"
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines]


def goal(folder: Path) -> int:
    """Version that the driver wants published now; 0: none yet; -1: stop."""
    try:
        return int((folder / "goal").read_text())
    except (OSError, ValueError):
        return 0


def set_goal(folder: Path, version: int) -> None:
    """Ask everybody for the next version."""
    temporary = folder / "goal.tmp"
    temporary.write_text(str(version))
    temporary.rename(folder / "goal")
