"""Publishing from `transformers.Trainer`, and from trainers made of it (TRL's among them).

Trainer(..., callbacks=[WeightSyncCallback(job=url)])        # on every rank, as always
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Mapping, Sequence
from types import CodeType, FrameType
from typing import Any, Final

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightsync.client import Job, Source, Stage, VersionReport
from weightsync.errors import ConfigError
from weightsync.integrations.publisher import OnAbort, Publisher, check_options

__all__ = ["WeightSyncCallback"]

_LOOP_NAME: Final = "_inner_training_loop"  # of Trainer; the frame that training lives in
_WATCH_S: Final = 0.2


class WeightSyncCallback(TrainerCallback):
    """Publishes the model as training begins, after optimizer steps, and at the end. On every rank.

    Reads the sharded parameters where they lie (FSDP2, DDP or a plain module), whatever Accelerate
    wrapped around them; never a gathered state dict. The tag of a version is the global step.
    A step that the gradient scaler skipped changes nothing and publishes nothing (a fused optimizer
    hides that it skipped: the same weights are published again). Training waits
    in the callback until the version is `until`.

    The source leaves the job in `on_train_end`; when training raises; with `close()`; or, used as a
    context manager, at its end.

    Args:
        job: Where to publish; None: the job that `vllm` starts, else $WEIGHTSYNC_JOB.
        vllm: URLs of vLLM servers that follow this trainer. Rank 0 attaches them to the job before
            the first version; see `weightsync.integrations.vllm.attach`.
        every_steps: Publish after so many optimizer steps.
        until: "adopted": training goes on when every live replica serves the version;
            "committed": when it is certain that they will.
        on_abort: "raise" an aborted version's error out of `train()`, or "warn" (log it) and go on
            with the old version serving. Errors that every version would meet, such as a layout
            that does not fit, are raised in any case.
        timeout_s: Deadline of one version.
        fabric: As for `Source`, like the following; of the engines in `vllm` as well.
        fabric_options: Of that fabric. Where engines need other ones, attach them and pass `job`.
        threads: Of copy and digest kernels.

    Raises:
        ConfigError: An argument makes no sense.
    """

    def __init__(
        self,
        *,
        job: Job | str | None = None,
        vllm: Sequence[str] = (),
        every_steps: int = 1,
        until: Stage = "adopted",
        on_abort: OnAbort = "raise",
        timeout_s: float = 120.0,
        fabric: str = "local",
        fabric_options: Mapping[str, Any] | None = None,
        threads: int = 1,
    ) -> None:
        check_options(every_steps, until, on_abort)
        if isinstance(vllm, str):
            raise ConfigError(f"vllm={vllm!r}: a sequence of URLs")
        self._job, self._vllm = job, tuple(vllm)
        self._options: dict[str, Any] = {
            "every_steps": every_steps,
            "until": until,
            "on_abort": on_abort,
            "timeout_s": timeout_s,
            "fabric": fabric,
            "fabric_options": fabric_options,
            "threads": threads,
        }
        self._lock = threading.Lock()
        self._publisher: Publisher | None = None
        self._last: Publisher | None = None  # open or not
        self._attached: Job | None = None  # hosted for `vllm`
        self._closed = threading.Event()  # of this training

    @property
    def source(self) -> Source | None:
        """What publishes; None while no training runs."""
        return self._publisher.source if self._publisher is not None else None

    @property
    def report(self) -> VersionReport | None:
        """Of the last version that went through; None before. Stays after training."""
        return self._last.report if self._last is not None else None

    @property
    def num_aborted(self) -> int:
        """Versions of this training that were given up; stays after it."""
        return self._last.num_aborted if self._last is not None else 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Join the job and publish what training begins with."""
        self.close()  # of a training that is begun again, as with auto_find_batch_size
        self._closed = threading.Event()
        try:
            job = self._find_job(args)
            self._publisher = self._last = Publisher(
                kwargs["model"],
                job=job,
                rank=args.process_index,
                world_size=args.world_size,
                **self._options,
            )
            _watch(self, self._closed)
            self._publisher.publish(state.global_step)
        except BaseException:
            self.close()
            raise

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Publish after an optimizer step, when it is one of every `every_steps`."""
        if self._publisher is None:
            raise ConfigError("WeightSyncCallback was closed, or added after training had begun")
        skipped = getattr(kwargs.get("optimizer"), "step_was_skipped", False)
        try:
            self._publisher.after_step(state.global_step, is_changed=not skipped)
        except BaseException:
            self.close()
            raise

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Publish the last steps, or the best model if that was loaded, and leave the job."""
        try:
            if self._publisher is not None:
                is_changed = args.load_best_model_at_end and state.best_model_checkpoint is not None
                self._publisher.finish(state.global_step, is_changed=is_changed)
        finally:
            self.close()

    def close(self) -> None:
        """Leave the job; the engines go on serving the last version. Idempotent."""
        self._close(self._closed)

    def _close(self, training: threading.Event) -> None:
        """Leave the job if it is still this training that is in it."""
        with self._lock:
            if self._closed is not training:
                return
            publisher, self._publisher = self._publisher, None
            attached, self._attached = self._attached, None
            self._closed.set()
        if publisher is not None:
            publisher.close()
        if attached is not None and self._job is None:
            attached.close()

    def __enter__(self) -> WeightSyncCallback:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _find_job(self, args: TrainingArguments) -> Job | str | None:
        """The job to publish to; rank 0 attaches the engines first, the others wait for it."""
        if not self._vllm:
            return self._job
        if args.process_index == 0:
            with _told_on_error(args):
                from weightsync.integrations.vllm import attach

                self._attached = attach(
                    self._vllm,
                    job=self._job,
                    fabric=self._options["fabric"],
                    fabric_options=self._options["fabric_options"],
                )
        url = _tell(self._attached.url if self._attached is not None else "", args)
        if self._attached is not None:
            return self._attached
        return self._job if self._job is not None else url


@contextlib.contextmanager
def _told_on_error(args: TrainingArguments) -> Any:
    """Let the other ranks fail as well, instead of waiting for what will not come."""
    try:
        yield
    except BaseException:
        _tell("", args)
        raise


def _tell(text: str, args: TrainingArguments) -> str:
    """Rank 0's text on every rank, as plain bytes. Blocks for all ranks.

    Raises:
        ConfigError: Rank 0 has none.
    """
    if args.world_size > 1:
        device = args.device if dist.get_backend() == "nccl" else torch.device("cpu")
        data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
        length = torch.tensor([len(data)], device=device)
        dist.broadcast(length, 0)
        data = data if args.process_index == 0 else data.new_empty(int(length))
        dist.broadcast(data, 0)
        text = bytes(data.tolist()).decode()
    if not text and args.process_index != 0:
        raise ConfigError("rank 0 could not attach the vLLM servers; its error says why")
    return text


def _watch(callback: WeightSyncCallback, closed: threading.Event) -> None:
    """Close the callback when training has raised: Trainer tells its callbacks nothing of it.

    A thread looks a few times a second whether this one is still inside of Trainer's loop.
    """
    loop = _loop_of(sys._getframe())
    if loop is None:
        return  # driven by something else than Trainer
    trainer = threading.get_ident()

    def look() -> None:
        while not closed.wait(_WATCH_S):
            if _loop_of(sys._current_frames().get(trainer), loop) is None:
                callback._close(closed)

    threading.Thread(target=look, name="weightsync-training", daemon=True).start()


def _loop_of(frame: FrameType | None, loop: CodeType | None = None) -> CodeType | None:
    """The code of Trainer's loop, if a frame is inside of it (of `loop`, where that is given)."""
    while frame is not None:
        if frame.f_code is loop or (loop is None and frame.f_code.co_name == _LOOP_NAME):
            return frame.f_code
        frame = frame.f_back
    return None
