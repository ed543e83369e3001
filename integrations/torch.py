"""Publishing from any PyTorch training script: two lines, no loop to change.

from weightsync.integrations.torch import publish_after_step
publish_after_step(optimizer, model, job=url)        # on every rank, before the loop
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from weightsync.client import Job, Source, Stage, VersionReport
from weightsync.errors import ConfigError
from weightsync.integrations.publisher import OnAbort, Publisher

__all__ = ["PublishHandle", "publish_after_step"]


class PublishHandle:
    """A hook that publishes; ends with `remove` or as a context manager.

    Attributes:
        step: Optimizer steps seen so far.
        source: What publishes.
    """

    def __init__(self, publisher: Publisher, optimizer: Optimizer) -> None:
        self.step = 0
        self.source = publisher.source
        self._publisher = publisher
        register = getattr(optimizer, "register_step_post_hook", None)
        if register is None:
            raise ConfigError(
                f"{type(optimizer).__name__} is no torch.optim.Optimizer and has no hooks; call "
                "Source.publish() after its step instead"
            )
        self._hook = register(self._after_step)

    @property
    def report(self) -> VersionReport | None:
        """Of the last version that went through; None before."""
        return self._publisher.report

    @property
    def num_aborted(self) -> int:
        """Versions that were given up, with `on_abort="warn"`."""
        return self._publisher.num_aborted

    def remove(self) -> None:
        """Publish no more; leaves the job if the source was made here. Idempotent."""
        self._hook.remove()
        self._publisher.close()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # A fused optimizer is called for steps that a gradient scaler skips, and skips them itself.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return
        self.step += 1
        self._publisher.after_step(self.step)

    def __enter__(self) -> PublishHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def publish_after_step(
    optimizer: Optimizer,
    source: Source | nn.Module | Mapping[str, torch.Tensor],
    *,
    job: Job | str | None = None,
    every_steps: int = 1,
    until: Stage = "committed",
    on_abort: OnAbort = "raise",
    timeout_s: float | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    fabric: str = "local",
    fabric_options: Mapping[str, Any] | None = None,
    threads: int = 1,
) -> PublishHandle:
    """Publish the weights after steps of an optimizer. Call on every trainer rank.

    Steps that accumulate gradients only, and steps that a gradient scaler skips, do not count:
    nothing has changed then. Accelerate's wrapper of an optimizer is looked through. Each publish
    blocks inside `optimizer.step()` until `until`.

    Args:
        optimizer: Whose steps count; with several optimizers the one that steps last.
        source: The model (FSDP2, DDP or plain) or tensors by canonical name, of which a source is
            made; or a `Source` of your own, which stays open in the end.
        job: Where to publish; None reads $WEIGHTSYNC_JOB. A `Source` of your own has these options
            already: `job`, `rank`, `world_size`, `fabric`, `fabric_options` and `threads`.
        every_steps: Publish after so many steps; the tag of a version is the number of steps.
        until: As for `Source.publish`.
        on_abort: "raise" out of `optimizer.step()` when a version is aborted, or "warn" (log it)
            and go on with the old version serving.
        timeout_s: Deadline of one version; None: that of your `Source`, else 120.
        rank: None: torch.distributed if initialised, else $RANK, else this is the only rank.
        world_size: Likewise.
        fabric: As for `Source`, like the following.
        fabric_options: Of that fabric.
        threads: Of copy and digest kernels.

    Returns:
        Ends it with `remove()`, or as a context manager.

    Raises:
        ConfigError: An option makes no sense, or is one that a given `Source` has already.
        LayoutError, PeerLostError, AuthError: As `Source`.
    """
    if isinstance(source, Source):
        options = {"job": job, "rank": rank, "world_size": world_size}
        given = [name for name, value in options.items() if value is not None]
        given += ["fabric"] * (fabric != "local") + ["fabric_options"] * bool(fabric_options)
        given += ["threads"] * (threads != 1)
        if given:
            raise ConfigError(f"{', '.join(given)}: the given Source has its own; leave them out")
    if rank is None and world_size is None and not _is_distributed():
        rank, world_size = 0, 1
    publisher = Publisher(
        source,
        job=job,
        every_steps=every_steps,
        until=until,
        on_abort=on_abort,
        timeout_s=timeout_s,
        rank=rank,
        world_size=world_size,
        fabric=fabric,
        fabric_options=fabric_options,
        threads=threads,
    )
    try:
        return PublishHandle(publisher, _innermost(optimizer))
    except BaseException:
        publisher.close()
        raise


def _is_distributed() -> bool:
    return (dist.is_available() and dist.is_initialized()) or "RANK" in os.environ


def _innermost(optimizer: Optimizer) -> Optimizer:
    """The outermost optimizer that runs hooks: Accelerate's wrapper, for one, never does."""
    inner: Any = optimizer
    while "_optimizer_step_post_hooks" not in vars(inner):
        if not isinstance(getattr(inner, "optimizer", None), Optimizer):
            break
        inner = inner.optimizer
    made: Optimizer = inner
    return made
