"""A checkpoint in the making: a hidden folder beside it, and the one step that gives it its name.

`.NAME.partial/rank-I` belongs to rank I, which holds a lock on it while it works. A rank that is
done leaves its files there with a `done.json` and waits. Rank 0 puts the files together, gives the
folder its name, and then removes the others' parts: that tells them. If it gives up instead, the
name of its run is gone from its own part, and each rank removes its own. Only renames happen under
the final name.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from weightsync.checkpoint.disk import lock_new_folder, remove, sync_file, sync_folder, try_lock
from weightsync.checkpoint.files import read_checkpoint
from weightsync.checkpoint.model import Entry
from weightsync.checkpoint.side import require_free
from weightsync.errors import CheckpointError, ConfigError, TransferTimeoutError

__all__ = ["PartialFolder"]

_DONE_NAME: Final = "done.json"
_OLD_NAME: Final = "old"
_RUN_NAME: Final = "run"
_POLL_S: Final = 0.02
# What rank 0 has for renames after its own deadline: its error says more than that of a clock.
_GRACE_S: Final = 5.0
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


class PartialFolder:
    """This rank's part of a checkpoint that has no name yet.

    Args:
        path: The final folder.
        rank: Of this process.
        world_size: Ranks that write.
        overwrite: Whether a checkpoint at `path` may be replaced.
        side_names: Small files of the new checkpoint; old ones of these names may be replaced.

    Attributes:
        own: Where this rank makes its files.
        side: Where rank 0 puts configuration and index, and in the end everything.

    Raises:
        ConfigError: `path` is taken, or another process writes it at this moment.
        CheckpointError: The folder cannot be made, or not cleared of what a killed process left.
    """

    def __init__(
        self,
        path: Path,
        rank: int,
        world_size: int,
        *,
        overwrite: bool,
        side_names: Collection[str] = (),
    ) -> None:
        self.path, self._rank, self._world_size = path, rank, world_size
        self._overwrite, self._side_names = overwrite, side_names
        self._root = path.parent / f".{path.name}.partial"
        self.own = self._root / f"rank-{rank}"
        self.side = self.own / "side"
        self.is_over = False
        self._run: str | None = None
        self._require_free()
        if not path.parent.is_dir():
            raise ConfigError(f"{path}: there is no folder {path.parent}; make it first", path=path)
        lock = lock_new_folder(self.own)
        if lock is None:
            raise ConfigError(f"{path}: rank {rank} of another export is writing there", path=path)
        self._lock = lock
        try:
            self._clear()
        except BaseException as error:
            with suppress(OSError):
                self.own.rmdir()  # if it is empty: an old checkpoint may lie in it
            self._leave()
            if isinstance(error, OSError):
                raise CheckpointError(
                    f"{self.own} cannot be cleared of what a killed export left: {error}",
                    path=self.own,
                ) from error
            raise

    def hand_over(self, version: int, files: Sequence[str]) -> None:
        """Say that this rank's files are complete and on disk.

        Raises:
            CheckpointError: That cannot be written.
        """
        part = self.own / f"{_DONE_NAME}.part"
        try:
            self._run = self._current_run()
            part.write_text(
                json.dumps({"version": version, "files": list(files)}), encoding="utf-8"
            )
            sync_file(part)
            part.rename(self.own / _DONE_NAME)
            sync_folder(self.own)
        except OSError as error:
            raise CheckpointError(f"{part} cannot be written: {error}", path=part) from error

    def finish(self, version: int, expected: Mapping[str, Entry], deadline: float) -> None:
        """Rank 0: put everything together, check it, give it its name. Others: wait for that.

        Args:
            version: What was handed over.
            expected: All tensors of the checkpoint.
            deadline: Until when rank 0 waits for the others. These wait for rank 0 until then, and
                for some seconds at least: it minds the deadline itself.

        Raises:
            TransferTimeoutError: A rank was not done by the deadline.
            CheckpointError: What lies there is not what was meant, or cannot be renamed; or a rank
                gave up.
        """
        try:
            if self._rank == 0:
                self._assemble(version, expected, deadline)
                self._remove_parts()
            else:
                self._await_name(version, max(deadline, time.monotonic() + _GRACE_S))
        except TransferTimeoutError:  # an OSError, too, as every TimeoutError is
            raise
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be completed: {error}", path=self.path
            ) from error
        self.is_over = True
        self._leave()

    def discard(self) -> None:
        """Remove what is not finished. Idempotent."""
        if self.is_over:
            return
        self.is_over = True
        # An old checkpoint that cannot be put back stays; the next export of this name says so.
        with suppress(OSError, CheckpointError):
            self._restore()
            # Rank 0 may have finished with it just now, and a later export made another.
            if os.path.samestat(os.fstat(self._lock), self.own.stat()):
                shutil.rmtree(self.own, ignore_errors=True)
        self._leave()

    def _clear(self) -> None:
        """Make this part a new one, whatever a killed process left in it."""
        self._restore()
        for left in self.own.iterdir():
            remove(left)
        if self._rank == 0:
            self._require_free()  # an old checkpoint may have its name back
            self.side.mkdir()
            (self.own / _RUN_NAME).write_text(uuid.uuid4().hex, encoding="utf-8")

    def _leave(self) -> None:
        """Give up the lock. From here on, what lies under this part's name is another's."""
        os.close(self._lock)
        with suppress(OSError):  # others are still at it
            self._root.rmdir()

    def _require_free(self) -> None:
        require_free(self.path, overwrite=self._overwrite, side_names=self._side_names)

    def _current_run(self) -> str | None:
        """The name of the run that rank 0 is at; None where it is at none."""
        try:
            return (self._root / "rank-0" / _RUN_NAME).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def _is_handed_over(self) -> bool:
        """Whether rank 0 has not finished with this part yet."""
        try:
            # In the folder that is locked, not in one that a later export made under its name.
            os.stat(_DONE_NAME, dir_fd=self._lock)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            return False
        return True

    def _await_name(self, version: int, deadline: float) -> None:
        """Wait until rank 0 has given the folder its name."""
        pause = threading.Event()
        while True:
            # Before the next look: rank 0 removes the parts of the others first.
            is_at_it = self._run is not None and self._run == self._current_run()
            if not self._is_handed_over():
                return
            if not is_at_it:
                raise CheckpointError(
                    f"{self.path}: rank 0 gave up, so there is no new checkpoint; its error says "
                    "why",
                    path=self.path,
                    rank=0,
                    version=version,
                )
            if time.monotonic() >= deadline:
                raise TransferTimeoutError(
                    f"{self.path}: rank 0 has not completed the checkpoint in time; see whether it "
                    "still runs",
                    rank=0,
                    version=version,
                )
            pause.wait(_POLL_S)

    def _assemble(self, version: int, expected: Mapping[str, Entry], deadline: float) -> None:
        """Make the folder of the final name from the files of all ranks."""
        folders = [self._root / f"rank-{rank}" for rank in range(self._world_size)]
        for rank, folder in enumerate(folders):
            for name in self._wait(folder, rank, version, deadline):
                (folder / name).rename(self.side / name)
        stored = read_checkpoint(self.side)
        found = {name: (t.dtype, t.shape) for name, t in stored.tensors.items()}
        if found != {name: (entry.dtype, entry.shape) for name, entry in expected.items()}:
            raise CheckpointError(f"{self.side}: not the files that were meant to be written")
        for path in self.side.iterdir():
            if path not in stored.files:
                sync_file(path)
        sync_folder(self.side)
        for rank, folder in enumerate(folders):
            # One that gave up meanwhile has reported an error: there must be no checkpoint.
            if not (folder / _DONE_NAME).exists():
                raise CheckpointError(
                    f"{self.path}: rank {rank} gave up; its error says why",
                    path=self.path,
                    rank=rank,
                )
        self._rename()

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
        self._require_free()
        if not self.path.exists():
            self.side.rename(self.path)
        elif not _exchange(self.side, self.path):
            # A file system that cannot exchange: for a moment there is neither.
            try:
                self.path.rename(self.own / _OLD_NAME)
                self.side.rename(self.path)
            except BaseException:  # Ctrl-C, too: the only copy of the old one lies in our part
                self._restore()
                raise
        sync_folder(self.path.parent)

    def _restore(self) -> None:
        """Give an old checkpoint its name back, if it was put aside and nothing took its place.

        Raises:
            CheckpointError: What has its name by now is not the new one.
            OSError: It cannot be renamed.
        """
        old = self.own / _OLD_NAME
        try:
            old.rename(self.path)  # never over a folder that holds something
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            if self.side.exists():
                raise CheckpointError(
                    f"{self.path} was taken while the checkpoint of that name was replaced, which "
                    f"lies in {old} now; move it to where you want it",
                    path=old,
                ) from error
            return  # the new one has the name, and the old one may go
        sync_folder(self.path.parent)

    def _remove_parts(self) -> None:
        """Remove the parts of all ranks, which tells the others that the folder has its name."""
        for part in self._root.glob("rank-*"):
            if part == self.own:
                continue
            with suppress(OSError):
                if (part / _DONE_NAME).exists():
                    shutil.rmtree(part, ignore_errors=True)
                elif (lock := try_lock(part)) is not None:  # of a killed export by more ranks
                    shutil.rmtree(part, ignore_errors=True)
                    os.close(lock)
        shutil.rmtree(self.own, ignore_errors=True)


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
