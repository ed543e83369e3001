"""A checkpoint in the making: a hidden folder beside it, and the one step that gives it its name.

`.NAME.partial/rank-I` belongs to rank I, which holds a lock on it while it works. A rank that is
done leaves its files there with a `done.json`, and rank 0 puts them together. Only renames happen
under the final name.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from weightsync.checkpoint.files import read_checkpoint
from weightsync.checkpoint.model import Entry
from weightsync.errors import CheckpointError, ConfigError, TransferTimeoutError

__all__ = ["PartialFolder", "sync_file"]

_DONE_NAME: Final = "done.json"
_POLL_S: Final = 0.02
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


class PartialFolder:
    """This rank's part of a checkpoint that has no name yet.

    Args:
        path: The final folder.
        rank: Of this process.
        world_size: Ranks that write.
        overwrite: Whether a checkpoint at `path` may be replaced.

    Attributes:
        own: Where this rank makes its files.
        side: Where rank 0 puts configuration and index, and in the end everything.

    Raises:
        ConfigError: `path` is taken, or another process writes it at this moment.
        CheckpointError: The folder cannot be made.
    """

    def __init__(self, path: Path, rank: int, world_size: int, *, overwrite: bool) -> None:
        self.path, self._rank, self._world_size = path, rank, world_size
        self._overwrite = overwrite
        self._root = path.parent / f".{path.name}.partial"
        self.own = self._root / f"rank-{rank}"
        self.side = self.own / "side"
        self.is_over = False
        _require_free(path, overwrite=overwrite)
        if not path.parent.is_dir():
            raise ConfigError(f"{path}: there is no folder {path.parent}; make it first", path=path)
        try:
            self.own.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.own, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise CheckpointError(
                f"{self.own} cannot be made: {error.strerror}", path=self.own
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise ConfigError(
                f"{path}: rank {rank} of another export is writing there", path=path
            ) from error
        for left in self.own.iterdir():  # of a process that was killed
            _remove(left)
        if rank == 0:
            self.side.mkdir()

    def hand_over(self, version: int, files: Sequence[str]) -> None:
        """Say that this rank's files are complete and on disk."""
        part = self.own / f"{_DONE_NAME}.part"
        part.write_text(json.dumps({"version": version, "files": list(files)}), encoding="utf-8")
        sync_file(part)
        part.rename(self.own / _DONE_NAME)
        _sync_folder(self.own)
        if self._rank != 0:  # from here on the files are rank 0's
            self.is_over = True
            os.close(self._lock)

    def finish(self, version: int, expected: Mapping[str, Entry], deadline: float) -> None:
        """Rank 0: wait for the others, put everything together, check it, give it its name.

        Raises:
            TransferTimeoutError: A rank was not done by the deadline.
            CheckpointError: What lies there is not what was meant, or cannot be renamed.
        """
        try:
            for rank in range(self._world_size):
                folder = self._root / f"rank-{rank}"
                for name in self._wait(folder, rank, version, deadline):
                    (folder / name).rename(self.side / name)
            stored = read_checkpoint(self.side)
            found = {name: (t.dtype, t.shape) for name, t in stored.tensors.items()}
            if found != {name: (entry.dtype, entry.shape) for name, entry in expected.items()}:
                raise CheckpointError(f"{self.side}: not the files that were meant to be written")
            for path in self.side.iterdir():
                if path not in stored.files:
                    sync_file(path)
            _sync_folder(self.side)
            self._rename()
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be completed: {error}", path=self.path
            ) from error
        self.is_over = True
        os.close(self._lock)
        shutil.rmtree(self._root, ignore_errors=True)

    def discard(self) -> None:
        """Remove what is not finished. Idempotent."""
        if self.is_over:
            return
        self.is_over = True
        shutil.rmtree(self.own, ignore_errors=True)
        os.close(self._lock)
        if self._rank == 0:  # what others handed over is of no use any more
            for done in self._root.glob(f"rank-*/{_DONE_NAME}"):
                shutil.rmtree(done.parent, ignore_errors=True)
        try:
            self._root.rmdir()
        except OSError:
            return  # others are still at it

    def _wait(self, folder: Path, rank: int, version: int, deadline: float) -> list[str]:
        """Names of the files that a rank has handed over."""
        pause = threading.Event()
        while True:
            try:
                done = json.loads((folder / _DONE_NAME).read_text(encoding="utf-8"))
            except FileNotFoundError:
                done = None
            if done is not None:
                if done["version"] != version:
                    raise CheckpointError(
                        f"{folder}: rank {rank} wrote version {done['version']}, not {version}",
                        path=folder,
                        rank=rank,
                    )
                return [str(name) for name in done["files"]]
            if time.monotonic() >= deadline:
                raise TransferTimeoutError(
                    f"{self.path}: rank {rank} has not brought its files to disk in time",
                    rank=rank,
                    version=version,
                )
            pause.wait(_POLL_S)

    def _rename(self) -> None:
        """Give the finished folder its name; whoever looks sees the old one or the new one."""
        _require_free(self.path, overwrite=self._overwrite)
        if not self.path.exists():
            self.side.rename(self.path)
        elif not _exchange(self.side, self.path):
            # A file system that cannot exchange: for a moment there is neither.
            old = self.own / "old"
            self.path.rename(old)
            try:
                self.side.rename(self.path)
            except OSError:
                old.rename(self.path)
                raise
        _sync_folder(self.path.parent)


def sync_file(path: Path) -> None:
    """Bring a file to disk, with what was written through mappings of it. Blocks.

    Raises:
        CheckpointError: The disk could not take it.
    """
    try:
        # Linux writes mapped pages back here as well. mmap.flush would hold the GIL meanwhile, and
        # the heartbeats of other members in this process with it.
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be brought to disk: {error.strerror}", path=path
        ) from error


def _require_free(path: Path, *, overwrite: bool) -> None:
    """Only a checkpoint is ever replaced, never a folder that holds something else."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ConfigError(f"{path} is there and no folder; name another", path=path)
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        raise ConfigError(
            f"{path} is there already; name another, or replace it (overwrite=True, --force)",
            path=path,
        )
    if any(child.is_dir() for child in path.iterdir()) or not any(path.glob("*.safetensors")):
        raise ConfigError(
            f"{path} is no checkpoint (folders in it, or no *.safetensors), so it is not replaced",
            path=path,
        )


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    names = (os.fsencode(first), os.fsencode(second))
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(second))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
