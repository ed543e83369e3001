"""What the processes of sources and sinks of a fleet have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Generic, TypeVar

from weightsync.demo.worker import Message
from weightsync.errors import ConfigError
from weightsync.fleet.content import Held
from weightsync.service.member import Member
from weightsync.transport.base import Engine
from weightsync.transport.fabrics import open_for_job

__all__ = ["Rank"]

M = TypeVar("M", bound=Member)


class Rank(Generic[M]):
    """One rank: holds memory, joins and leaves jobs, does what the parent says.

    Args:
        options: `fabric`, `fabric_options` and `token_file` of the jobs.
    """

    COMMANDS: ClassVar[tuple[str, ...]]
    """Names of the methods that are commands."""

    def __init__(self, options: Message) -> None:
        self._options = options
        self._held: Held | None = None
        self._fabric: Engine | None = None
        self._member: M | None = None

    def do(self, what: str, command: Message) -> Message:
        """Follow one command; what the parent hears of it.

        Raises:
            ConfigError: There is no such command.
        """
        if what not in self.COMMANDS:
            raise ConfigError(f"no command {what!r}; there are {', '.join(self.COMMANDS)}")
        follow: Callable[..., Message] = getattr(self, what)
        return follow(**command)

    def leave_job(self) -> Message:
        """Leave the job; the weights stay."""
        if self._member is not None:
            self._member.close()
            self._member = None
        if self._fabric is not None:
            self._fabric.close()
            self._fabric = None
        return {}

    def _open_fabric(self) -> Engine:
        options = self._options
        return open_for_job(options["fabric"], threads=1, options=options["fabric_options"])
