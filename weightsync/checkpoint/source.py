"""A checkpoint on disk as the source of a job: cold start of engines in any layout."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from weightsync.checkpoint.files import StoredCheckpoint, read_checkpoint
from weightsync.checkpoint.header import StoredTensor
from weightsync.checkpoint.memory import map_file, same_bytes, view
from weightsync.client import Job, Source, Stage, Update, VersionReport
from weightsync.errors import CheckpointError, ConfigError
from weightsync.ir.builder import ManifestBuilder
from weightsync.ir.manifest import Manifest
from weightsync.planners.rules.config import ConfigLike
from weightsync.planners.rules.transformers import transformers_aliases

__all__ = ["CheckpointSource", "ReadersLayout"]


@dataclass(frozen=True)
class ReadersLayout:
    """How readers share the tensors of a checkpoint: an even share of the bytes each, by rows.

    Args:
        tensors: By canonical name.
        world_size: Number of readers.
    """

    tensors: Mapping[str, StoredTensor]
    world_size: int

    def rows(self, rank: int) -> dict[str, tuple[int, int]]:
        """First row and number of rows that a reader holds of each tensor; none is zero."""
        total = sum(tensor.nbytes for tensor in self.tensors.values())
        start, stop = total * rank // self.world_size, total * (rank + 1) // self.world_size
        found, before = {}, 0
        for name, tensor in self.tensors.items():
            if tensor.nbytes:
                row_bytes = tensor.nbytes // tensor.num_rows
                # Rounded alike for whoever stops here and whoever goes on here.
                first, end = (
                    min(max(-(-(cut - before) // row_bytes), 0), tensor.num_rows)
                    for cut in (start, stop)
                )
                if first < end:
                    found[name] = (first, end - first)
            before += tensor.nbytes
        return found

    def manifest(self, rank: int) -> Manifest:
        """Describes a reader's rows; see `Layout`."""
        builder = ManifestBuilder("source", f"source {rank}")
        for name, (first, count) in self.rows(rank).items():
            tensor = self.tensors[name]
            shape = tensor.shape if tensor.shape else (1,)
            n = (count, *shape[1:])
            numel = tensor.nbytes // tensor.num_rows * count // tensor.dtype.itemsize
            builder.tensor(name, shape)
            builder.buffer(name, tensor.dtype, numel)
            builder.place(name, name, n, lo=(first, *(0 for _ in shape[1:])), n=n)
        return builder.build()


class CheckpointSource:
    """Publishes a safetensors checkpoint, mapped and never loaded. Context manager.

    Bytes go from the files' pages to the sinks; this process allocates staging and the plan's
    tables, whatever the size of the checkpoint. The files must stay as they are meanwhile: one
    that is truncated under us ends the process (SIGBUS), as with every program that maps files.

    Args:
        path: A folder, an index or a file; see `read_checkpoint`.
        job: Where to publish; None reads $WEIGHTSYNC_JOB.
        rank: Of this reader.
        world_size: Readers that share the checkpoint, each an even share of the bytes. All see
            the same files.
        config: The model that it must be: a `config.json` or its content. "auto" takes the
            checkpoint's own where a rule knows its model, and else no tensor is checked; None
            checks nothing.
        staging_bytes: Budget of packed and cast bytes in flight; None takes eight buckets.
        timeout_s: Deadline of one version.
        fabric: As for `Source`, like the following.
        fabric_options: Of that fabric.
        threads: Of copy and digest kernels.

    Attributes:
        stored: What the headers say.
        skipped: Tensors that are not moved: tables that every model computes, second names of
            tied weights.
        num_bytes: Of this reader's share.

    Raises:
        CheckpointError: The checkpoint is not what it says, or not of this model.
        ConfigError, LayoutError, PlanBudgetError, PeerLostError, AuthError: As `Source`.

    Blocks for one round trip to the coordinator; reads headers only.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        job: Job | str | None = None,
        rank: int = 0,
        world_size: int = 1,
        config: ConfigLike | Literal["auto"] | None = "auto",
        staging_bytes: int | None = None,
        timeout_s: float = 120.0,
        fabric: str = "local",
        fabric_options: Mapping[str, Any] | None = None,
        threads: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank} is outside world_size={world_size}")
        self.stored = read_checkpoint(path)
        model = self.stored.known_config() if config == "auto" else config
        tensors, self.skipped = self.stored.canonical(model)
        maps = {file: map_file(file) for file in self.stored.files}
        if rank == 0:
            aliases = transformers_aliases(model) if model is not None else {}
            _check_ties(self.stored, self.skipped, aliases, maps)
        layout = ReadersLayout(tensors, world_size)
        weights = {
            name: view(maps[tensors[name].path], tensors[name], first, count)
            for name, (first, count) in layout.rows(rank).items()
        }
        self.num_bytes = sum(weight.nbytes for weight in weights.values())
        self._source = Source(
            weights,
            job=job,
            layout=layout,
            rank=rank,
            world_size=world_size,
            staging_bytes=staging_bytes,
            timeout_s=timeout_s,
            fabric=fabric,
            fabric_options=fabric_options,
            threads=threads,
        )

    def publish(
        self,
        version: int | None = None,
        *,
        tag: str = "",
        until: Stage = "committed",
        timeout_s: float | None = None,
    ) -> VersionReport:
        """Make the checkpoint a version of the job; see `Source.publish`. Call on every reader."""
        return self._source.publish(version, tag=tag, until=until, timeout_s=timeout_s)

    def start_publish(self, version: int | None = None, *, tag: str = "") -> Update:
        """As `publish`, but return at once."""
        return self._source.start_publish(version, tag=tag)

    def close(self) -> None:
        """Leave the job. Idempotent."""
        self._source.close()

    def __enter__(self) -> CheckpointSource:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _check_ties(
    stored: StoredCheckpoint,
    skipped: list[str],
    aliases: Mapping[str, str],
    maps: Mapping[Path, mmap.mmap],
) -> None:
    """A tied weight that is stored twice must be the same twice; only one of them is moved."""
    for name in skipped:
        if name not in aliases:
            continue
        mine, twin = stored.tensors[name], stored.tensors[aliases[name]]
        if not same_bytes(maps[mine.path], mine, maps[twin.path], twin):
            raise CheckpointError(
                f"{mine.path}: {name} is tied to {twin.name} by the config, but they differ",
                path=mine.path,
                tensor=name,
            )
