"""`weightsync load` and `weightsync export`: a checkpoint into a job, a version out of one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from weightsync.checkpoint.sink import CheckpointSink
from weightsync.checkpoint.source import CheckpointSource
from weightsync.client import Job
from weightsync.errors import ConfigError
from weightsync.report import Stage
from weightsync.telemetry.progress import LiveProgress
from weightsync.units import format_bytes, format_seconds, gb_per_s

__all__ = ["ExportOptions", "LoadOptions", "run_export", "run_load"]


@dataclass(frozen=True)
class _Member:
    """What both commands say of their place in the job.

    Args:
        job: URL; None reads $WEIGHTSYNC_JOB.
        rank: Of this process.
        world_size: Processes that share the work.
        fabric: Name.
        addresses: Of this host's rails, for `tcp`.
        threads: Of copy and digest kernels.
        timeout_s: For the whole version.
    """

    job: str | None
    rank: int
    world_size: int
    fabric: str
    addresses: Sequence[str]
    threads: int
    timeout_s: float

    def keywords(self) -> dict[str, Any]:
        """For `CheckpointSource` and `CheckpointSink`."""
        return {
            "job": Job.connect(self.job),
            "rank": self.rank,
            "world_size": self.world_size,
            "fabric": self.fabric,
            "fabric_options": {"addresses": list(self.addresses)} if self.addresses else None,
            "threads": self.threads,
            "timeout_s": self.timeout_s,
        }


@dataclass(frozen=True)
class LoadOptions(_Member):
    """Of `weightsync load`.

    Args:
        checkpoint: Folder, index or file.
        version: Number; None takes the next.
        tag: Carried along.
        until: When to return.
        staging_bytes: Budget of packed bytes; None takes eight buckets.
    """

    checkpoint: Path
    version: int | None
    tag: str
    until: str
    staging_bytes: int | None


@dataclass(frozen=True)
class ExportOptions(_Member):
    """Of `weightsync export`.

    Args:
        out: Folder to write.
        config: A `config.json`, or None.
        like: A checkpoint of the same model, or None.
        dtype: Of the weights; None: as in `like`, else BF16.
        max_file_bytes: Size of one file.
        overwrite: Whether a checkpoint at `out` is replaced.
        version: Smallest to accept; None: the next.
        replica: Name in the job; None makes one of `out`.
    """

    out: Path
    config: Path | None
    like: Path | None
    dtype: str | None
    max_file_bytes: int
    overwrite: bool
    version: int | None
    replica: str | None


def run_load(options: LoadOptions, console: Console) -> dict[str, Any]:
    """Publish a checkpoint. Blocks until the version reached `until`.

    Returns:
        The keys of `weightsync.load/1`, without "schema".

    Raises:
        ConfigError: Bad options.
        WeightSyncError: As `CheckpointSource` and its `publish`.
    """
    until: Stage = "adopted" if options.until == "adopted" else "committed"
    if options.until != until:
        raise ConfigError(f"--until {options.until}: committed or adopted")
    with LiveProgress(console, 2) as progress:
        progress.now(f"reading headers of {options.checkpoint}")
        source = CheckpointSource(
            options.checkpoint, staging_bytes=options.staging_bytes, **options.keywords()
        )
        with source:
            stored = source.stored
            progress.say(
                f"{options.checkpoint}: {len(stored.tensors)} tensors in {len(stored.files)} "
                f"file(s), {format_bytes(stored.nbytes)}; joined as reader {options.rank} of "
                f"{options.world_size}"
            )
            progress.advance()
            progress.now("waiting for sinks, then sending")
            report = source.publish(options.version, tag=options.tag, until=until)
            progress.advance()
    transfer_s = report.stages_s.get("transfer", report.seconds)
    rate = gb_per_s(report.num_bytes, transfer_s)
    progress.say(
        f"version {report.version} is {report.stage} in {report.num_replicas} replica(s): "
        f"{format_bytes(report.num_bytes)} in {format_seconds(transfer_s)} ({rate:.2f} GB/s), "
        f"{format_seconds(report.seconds)} with waiting"
    )
    return {
        "ok": True,
        "checkpoint": str(options.checkpoint),
        "files": len(stored.files),
        "tensors": len(stored.tensors),
        "skipped": source.skipped,
        "version": report.version,
        "tag": report.tag,
        "stage": report.stage,
        "num_replicas": report.num_replicas,
        "rank": options.rank,
        "world_size": options.world_size,
        "bytes": report.num_bytes,
        "seconds": report.seconds,
        "transfer_s": transfer_s,
        "gb_per_s": rate,
        "stages": report.stages_s,
    }


def run_export(options: ExportOptions, console: Console) -> dict[str, Any]:
    """Join as a replica, write one version to disk. Blocks until the folder has its name.

    Returns:
        The keys of `weightsync.export/1`, without "schema".

    Raises:
        WeightSyncError: As `CheckpointSink` and its `write`.
    """
    started = time.monotonic()
    with LiveProgress(console, 2) as progress:
        progress.now("making files")
        sink = CheckpointSink(
            options.out,
            config=options.config,
            like=options.like,
            dtype=options.dtype,
            replica=options.replica,
            max_file_bytes=options.max_file_bytes,
            overwrite=options.overwrite,
            **options.keywords(),
        )
        with sink:
            progress.advance()
            progress.now("joined; waiting for a version")
            written = sink.write(options.version)
            progress.advance()
    rate = gb_per_s(written.num_bytes, written.receive_s)
    progress.say(
        f"{written.path}: version {written.version}, {format_bytes(written.num_bytes)} in "
        f"{len(written.files)} file(s) of rank {options.rank}; received in "
        f"{format_seconds(written.receive_s)} ({rate:.2f} GB/s), on disk "
        f"{format_seconds(time.monotonic() - started)} after the start"
    )
    return {
        "ok": True,
        "path": str(written.path),
        "version": written.version,
        "files": list(written.files),
        "rank": options.rank,
        "world_size": options.world_size,
        "bytes": written.num_bytes,
        "seconds": written.seconds,
        "receive_s": written.receive_s,
        "gb_per_s": rate,
    }
