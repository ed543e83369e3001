"""Files that a command is to write: asked about before the work, not found wanting after it."""

from __future__ import annotations

import os
from pathlib import Path

from weightsync.errors import ConfigError

__all__ = ["check_output"]


def check_output(option: str, path: Path, example: str) -> None:
    """Check that a file can be written, as far as can be told without writing.

    Args:
        option: That names it on the command line.
        path: The file.
        example: A name that would do.

    Raises:
        ConfigError: It is a folder, or in one that is not there or not this user's to write in.
    """
    folder = path.absolute().parent
    if path.is_dir():
        what = "is a folder"
    elif not folder.is_dir():
        what = "lies in a folder that does not exist"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        what = "may not be written by this user"
    else:
        return
    raise ConfigError(f"{option} {path} {what}; name a file such as {example}", path=path)
