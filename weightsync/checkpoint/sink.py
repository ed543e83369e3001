"""A checkpoint on disk as a sink of a job: one version, written in place into the final files."""

from __future__ import annotations

import mmap
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from weightsync.checkpoint.disk import sync_file
from weightsync.checkpoint.folder import PartialFolder
from weightsync.checkpoint.header import StoredTensor
from weightsync.checkpoint.memory import create_mapped, view
from weightsync.checkpoint.model import FilesLayout, ModelFiles
from weightsync.client import Job, Sink
from weightsync.errors import ConfigError, TornError
from weightsync.ir.dtypes import Dtype
from weightsync.planners.rules.config import ModelConfig

__all__ = ["CheckpointSink", "Written"]

MAX_FILE_BYTES: Final = 5_000_000_000  # what most published checkpoints are cut into


@dataclass(frozen=True)
class Written:
    """One checkpoint as one rank wrote it.

    Args:
        path: The folder.
        version: What it holds.
        files: Names of the files that this rank wrote.
        num_bytes: Of weights in them.
        seconds: From the call until everything was on disk; with waiting for the version.
        receive_s: Of that, from the first byte to the last digest.
    """

    path: Path
    version: int
    files: tuple[str, ...]
    num_bytes: int
    seconds: float
    receive_s: float


class CheckpointSink:
    """Joins a job as a replica of its own and writes one version to disk. Context manager.

    Files are made in their final size beside `path`, mapped, and filled in place: a version never
    lies in this process's memory a second time. Once every rank has the version, committed and
    with all its digests right, and all of it is on disk, the folder gets its name in one step.
    Until then, and after any failure, what was under that name before is untouched. A killed
    process leaves `.NAME.partial` beside it, which the next one of that name removes; where the
    file system cannot swap two folders, the old checkpoint may lie in it and is put back first.

    Args:
        path: The folder to write. Ranks must share its file system.
        job: Where the version comes from; None reads $WEIGHTSYNC_JOB.
        config: The model, as the path or the content of a `config.json`, which is written too.
        like: A checkpoint of the same model instead: the new one gets its tensors, their dtypes,
            and copies of its `config.json`, tokenizer and other small files; of a single
            safetensors file only those whose names say that they belong to a model.
        dtype: Of the stored weights; None: as in `like`, else BF16.
        rank: Of this process; each writes whole files.
        world_size: Ranks that share the files.
        replica: Its name in the job; None makes one of `path`.
        max_file_bytes: Weights are cut into files of at most so much (or one tensor).
        overwrite: Whether a checkpoint under that name is replaced. What holds anything else, such
            as the state of a trainer, is refused.
        mode: "in_place" as above. "staged" receives into memory first and copies from there;
            for fabrics that cannot write into the pages of files (`verbs`).
        timeout_s: Default deadline of `write`.
        fabric: As for `Sink`, like the following.
        fabric_options: Of that fabric.
        threads: Of copy and digest kernels.

    Raises:
        ConfigError: `path` is taken, the model is not known, or the ranks are more than the files.
        CheckpointError: `like` is no sound checkpoint, or there is no room on the disk, or what a
            killed process left cannot be removed.
        LayoutError, PeerLostError, AuthError: As `Sink`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        job: Job | str | None = None,
        config: ModelConfig | Mapping[str, Any] | str | Path | None = None,
        like: str | Path | None = None,
        dtype: str | Dtype | None = None,
        rank: int = 0,
        world_size: int = 1,
        replica: str | None = None,
        max_file_bytes: int = MAX_FILE_BYTES,
        overwrite: bool = False,
        mode: Literal["in_place", "staged"] = "in_place",
        timeout_s: float = 120.0,
        fabric: str = "local",
        fabric_options: Mapping[str, Any] | None = None,
        threads: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank} is outside world_size={world_size}")
        self.path = Path(path).absolute()
        self.rank, self.world_size = rank, world_size
        self._timeout_s = timeout_s
        self._model = ModelFiles.of(config, like, dtype, world_size, max_file_bytes)
        self._folder = PartialFolder(
            self.path, rank, world_size, overwrite=overwrite, side_names=self._model.side_names()
        )
        try:
            self._maps: dict[Path, mmap.mmap] = {}
            self._num_bytes = 0
            weights = self._make_files()
            if rank == 0:
                self._model.write_side_files(self._folder.side)
            self._sink = Sink(
                weights,
                layout=FilesLayout(self._model),
                replica=f"checkpoint:{self.path}" if replica is None else replica,
                rank=rank,
                world_size=world_size,
                job=job,
                mode=mode,
                timeout_s=timeout_s,
                fabric=fabric,
                fabric_options=fabric_options,
                threads=threads,
            )
        except BaseException:
            self._folder.discard()
            raise

    def write(self, version: int | None = None, *, timeout_s: float | None = None) -> Written:
        """Receive a version and make it the checkpoint. Call once, on every rank.

        Blocks until the version is committed and on disk, all ranks are done and the folder has
        its name, which rank 0 gives it. A version that the fleet gives up is waited over: the next
        one is taken.

        Args:
            version: Smallest version to accept; None: the next one that is committed.
            timeout_s: Deadline; None takes the constructor's.

        Returns:
            What this rank wrote.

        Raises:
            TransferTimeoutError: Nothing was committed in time, or a rank did not come.
            CheckpointError: It could not be brought to disk, `path` is taken by now, or rank 0 gave
                up.
            LayoutError, PlanError: The two sides do not fit.
        """
        if self._folder.is_over:
            raise ConfigError(f"{self.path}: this sink has written its version; make another")
        started = time.monotonic()
        deadline = started + (self._timeout_s if timeout_s is None else timeout_s)
        try:
            found = self._receive(version, deadline)
            fill_s = self._sink.seconds.get("fill", 0.0)
            # Out of the job before the folder has a name: a later version must not land in it.
            self._sink.close()
            for path in self._maps:
                sync_file(path)
            self._folder.hand_over(found, [path.name for path in self._maps])
            self._folder.finish(found, self._model.expected, deadline)
        except BaseException:
            self.close()
            raise
        return Written(
            path=self.path,
            version=found,
            files=tuple(path.name for path in self._maps),
            num_bytes=self._num_bytes,
            seconds=time.monotonic() - started,
            receive_s=fill_s,
        )

    def close(self) -> None:
        """Leave the job; what was not finished is removed. Idempotent."""
        self._sink.close()
        self._folder.discard()

    def __enter__(self) -> CheckpointSink:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _make_files(self) -> dict[str, Any]:
        weights: dict[str, Any] = {}
        for file in self._model.files_of(self.rank):
            path = self._folder.own / file.name
            head, offsets = file.head()
            mapped = create_mapped(path, offsets[-1], head)
            self._maps[path] = mapped
            for entry, start, end in zip(file.entries, offsets, offsets[1:], strict=False):
                stored = StoredTensor(
                    entry.name, entry.dtype, entry.shape, path, start, end - start
                )
                if stored.nbytes:  # of empty tensors there is nothing but the header
                    weights[entry.name] = view(mapped, stored, 0, stored.num_rows)
                self._num_bytes += stored.nbytes
        return weights

    def _receive(self, version: int | None, deadline: float) -> int:
        while True:
            try:
                left_s = max(0.0, deadline - time.monotonic())
                found = self._sink.refit(timeout_s=left_s)
            except TornError:
                # Parts of a version that was given up: nobody reads them, and the next version
                # overwrites every byte.
                if time.monotonic() >= deadline:
                    raise
            else:
                # Older ones are adopted and overwritten: a replica that waited for a later one
                # would hold up the fleet.
                if version is None or found >= version:
                    return found
