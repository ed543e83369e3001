"""What drop-ins for trainers share: a source, when it publishes, and what an abort means."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

from weightsync.client import Job, Source, Stage, VersionReport
from weightsync.errors import (
    ConfigError,
    NoQuorumError,
    SourceMutatedError,
    TransferTimeoutError,
    VersionAbortedError,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["OnAbort", "Publisher"]

OnAbort = Literal["raise", "warn"]

_log = logging.getLogger(__name__)

_TIMEOUT_S: Final = 120.0

# A version that failed, while the old one serves: the next may go through. Anything else (layouts,
# plans, credentials) fails every time and is raised whatever `on_abort` says.
_ABORTS: Final = (VersionAbortedError, SourceMutatedError, NoQuorumError, TransferTimeoutError)


class Publisher:
    """Publishes the weights of one trainer rank after every few steps.

    Args:
        weights: Module or tensors of this rank; or a `Source`, which stays the caller's.
        job: Where to publish; None reads $WEIGHTSYNC_JOB.
        every_steps: Publish after so many steps.
        until: What a publish waits for.
        on_abort: "raise" an aborted version's error, or "warn" (log it) and go on.
        timeout_s: Deadline of one version; None: that of a given `Source`, else 120.
        options: Further keywords of `Source`.

    Attributes:
        report: Of the last version that went through; None before.
        num_aborted: Versions that were given up.

    Raises:
        ConfigError: `every_steps`, `until` or `on_abort` make no sense. Others: as `Source`.
    """

    def __init__(
        self,
        weights: Source | nn.Module | Mapping[str, torch.Tensor],
        *,
        job: Job | str | None,
        every_steps: int,
        until: Stage,
        on_abort: OnAbort,
        timeout_s: float | None,
        **options: Any,
    ) -> None:
        check_options(every_steps, until, on_abort)
        self.report: VersionReport | None = None
        self.num_aborted = 0
        self._every_steps, self._until, self._on_abort = every_steps, until, on_abort
        self._timeout_s = timeout_s
        self._is_changed = False
        self._tried: int | None = None  # step of the last publish
        self._is_mine = not isinstance(weights, Source)
        self.source = (
            weights
            if isinstance(weights, Source)
            else Source(
                weights,
                job=job,
                timeout_s=_TIMEOUT_S if timeout_s is None else timeout_s,
                **options,
            )
        )

    def publish(self, step: int) -> None:
        """Publish now, tagged with the step. Blocks until `until`; call on every rank.

        Raises:
            WeightSyncError: As `Source.publish`; what an abort raises only with on_abort="raise".
        """
        self._tried = step
        try:
            self.report = self.source.publish(
                tag=str(step), until=self._until, timeout_s=self._timeout_s
            )
        except _ABORTS as error:
            self.num_aborted += 1
            if self._on_abort == "raise":
                raise
            _log.warning("step %d was not published, the old version serves: %s", step, error)
        else:
            self._is_changed = False

    def after_step(self, step: int, *, is_changed: bool = True) -> None:
        """Publish if a publish is due and weights have changed since the last one.

        Args:
            step: Optimizer steps so far, counted alike on every rank.
            is_changed: False for a step that was skipped, such as after an overflow.
        """
        self._is_changed = self._is_changed or is_changed
        if step % self._every_steps == 0 and self._is_changed:
            self.publish(step)

    def finish(self, step: int, *, is_changed: bool) -> None:
        """Publish what training ends with, if that was not tried yet.

        Args:
            step: Optimizer steps of the whole training.
            is_changed: Whether weights changed after the last step, as the best ones are loaded.

        Raises:
            WeightSyncError: As `publish`.
        """
        if is_changed or (self._is_changed and self._tried != step):
            self.publish(step)

    def close(self) -> None:
        """Leave the job, unless the caller made the source. Idempotent."""
        if self._is_mine:
            self.source.close()


def check_options(every_steps: int, until: str, on_abort: str) -> None:
    """Refuse what makes no sense before training begins.

    Raises:
        ConfigError: Names the argument.
    """
    if every_steps < 1:
        raise ConfigError(f"every_steps={every_steps}: at least 1")
    if until not in ("local", "committed", "adopted"):
        raise ConfigError(f"until={until!r}: 'local', 'committed' or 'adopted'")
    if on_abort not in ("raise", "warn"):
        raise ConfigError(f"on_abort={on_abort!r}: 'raise' or 'warn'")
