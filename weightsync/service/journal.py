"""The coordinator's durable memory: one row per decided version, in SQLite.

A decision is on disk before anyone hears of it, so a coordinator that is killed and started
again on the same journal tells every member the same outcome. What is not recorded was
aborted (presumed abort).
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from weightsync.errors import ConfigError, FencedError
from weightsync.service.core_types import Log

__all__ = ["Journal"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS decision (
    version INTEGER PRIMARY KEY,
    is_commit INTEGER NOT NULL,
    reason TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS incarnation (number INTEGER PRIMARY KEY AUTOINCREMENT);
"""


class Journal:
    """Decisions of one job.

    Args:
        path: SQLite file, created when absent; None keeps the journal in memory, so that a
            restart of the coordinator starts a new job.

    Raises:
        ConfigError: The file cannot be opened or is no journal.

    Thread safety: use from one thread.
    """

    def __init__(self, path: Path | None) -> None:
        try:
            self._db = sqlite3.connect(str(path) if path is not None else ":memory:")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
            self._db.execute("INSERT INTO incarnation DEFAULT VALUES")
            self._db.commit()
        except sqlite3.Error as error:
            raise ConfigError(
                f"cannot open the job journal {path}: {error}; remove it to start a new job"
            ) from error

    def load(self) -> Log:
        """What was decided so far."""
        row = self._db.execute("SELECT MAX(number) FROM incarnation").fetchone()
        last = self._db.execute("SELECT MAX(version) FROM decision").fetchone()
        committed = self._db.execute(
            "SELECT MAX(version) FROM decision WHERE is_commit = 1"
        ).fetchone()
        return Log(
            incarnation=int(row[0]),
            last_version=int(last[0]) if last[0] is not None else 0,
            committed_version=int(committed[0]) if committed[0] is not None else 0,
            commits=frozenset(
                int(v)
                for (v,) in self._db.execute("SELECT version FROM decision WHERE is_commit = 1")
            ),
        )

    def record(self, version: int, *, commit: bool, reason: str) -> None:
        """Write one decision; on return it survives a crash. Blocks for one fsync.

        Raises:
            FencedError: The version is decided already, by another coordinator on this journal. A
                record is never replaced, and who comes second must not go on.
        """
        try:
            with self._db:
                self._db.execute(
                    "INSERT INTO decision (version, is_commit, reason) VALUES (?, ?, ?)",
                    (version, int(commit), reason),
                )
        except sqlite3.IntegrityError as error:
            raise FencedError(
                f"version {version} is decided already: another coordinator serves this job",
                version=version,
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._db.close()
