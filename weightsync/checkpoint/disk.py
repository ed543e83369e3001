"""Steps on a disk that others may watch or repeat: sync, lock, remove."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import Final

from weightsync.errors import CheckpointError

__all__ = ["lock_new_folder", "remove", "sync_file", "sync_folder", "try_lock"]

_LOCK_TRIES: Final = 20


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


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to disk. Blocks.

    Raises:
        OSError: The disk could not take it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it.

    Raises:
        OSError: Something cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def lock_new_folder(path: Path) -> int | None:
    """Make a folder, unless it is there, and lock it.

    Returns:
        A descriptor of the folder; the lock lives as long as it is open. None: another has it.

    Raises:
        CheckpointError: It cannot be made or locked.
    """
    try:
        for _ in range(_LOCK_TRIES):
            try:
                path.mkdir(parents=True, exist_ok=True)
                lock = try_lock(path)
            except FileNotFoundError:
                continue  # whoever had it removed it just now
            if lock is None or _is_at(lock, path):
                return lock
            os.close(lock)  # of a folder that was removed before it was locked
    except OSError as error:
        raise CheckpointError(f"{path} cannot be made: {error.strerror}", path=path) from error
    return None


def try_lock(path: Path) -> int | None:
    """Lock a folder.

    Returns:
        A descriptor of the folder; the lock lives as long as it is open. None: another has it.

    Raises:
        OSError: It cannot be opened or locked.
    """
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except BaseException:
        os.close(lock)
        raise
    return lock


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
