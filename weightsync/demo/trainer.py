"""A trainer rank of the demo: FSDP2 over gloo, real AdamW steps, `Source.publish` after each."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from weightsync import Job, Source, failpoints
from weightsync.demo.fsdp import FsdpTrainer
from weightsync.demo.model import build_model, greedy, model_config
from weightsync.demo.worker import Channel, Message
from weightsync.errors import ConfigError, LayoutError, PlanError, VersionError

__all__ = ["run"]

# Large, so that every step changes nearly every bf16 weight.
_LEARNING_RATE: Final = 3e-3
_LENGTH: Final = 96
# They follow one another; the stages of the pipeline, inside "transfer", overlap.
_PHASES: Final = ("wait_open", "transfer", "decide", "adopt")


class _Trainer(FsdpTrainer):
    """A rank that can tell what an engine must hold and say."""

    def __init__(self, options: Message) -> None:
        self.config = model_config(options["model"])
        super().__init__(options, self.config, lr=_LEARNING_RATE, length=_LENGTH)
        self.folder = Path(options["folder"])
        self.num_tokens = int(options["num_tokens"])
        # What the engine would build, for the reference's logits.
        self.served = build_model(self.config, torch.bfloat16).eval() if self.rank == 0 else None

    def write_reference(self, step: int) -> None:
        """Gather the weights, for the verification only: weightsync itself never does this."""
        full: dict[str, torch.Tensor] = {}
        for name, value in self.model.state_dict().items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            full[name] = whole.to(torch.bfloat16)
        if self.served is not None:
            self.served.load_state_dict(full)
            tokens, logits = greedy(self.served, self.num_tokens)
            save_file(full, self.folder / f"reference-{step}.safetensors")
            made = {"tokens": torch.tensor(tokens), "logits": logits}
            save_file(made, self.folder / f"logits-{step}.safetensors")


def run(channel: Channel, options: Message, commands: Iterator[Message]) -> None:
    """The life of one trainer rank."""
    torch.set_num_threads(1)
    trainer = _Trainer(options)
    channel.send(event="progress", parameters=sum(p.numel() for p in trainer.model.parameters()))
    source = Source(
        trainer.model,
        job=Job.connect(options["job"], token_file=options["token_file"]),
        timeout_s=float(options["timeout_s"]),
    )
    with source:
        channel.send(event="ready")
        for command in commands:
            step = int(command["step"])
            if command["do"] == "train":
                _train(channel, trainer, step)
            elif command["do"] == "publish":
                if command["die"]:
                    failpoints.arm(f"source.writing@{command['bucket']}=kill")
                _publish(channel, source, step)
    with contextlib.suppress(RuntimeError):  # a peer may have been killed
        dist.destroy_process_group()


def _train(channel: Channel, trainer: _Trainer, step: int) -> None:
    started = time.monotonic()
    loss = trainer.train()
    trained = time.monotonic()
    trainer.write_reference(step)
    done = time.monotonic()
    spans = [("train", "forward, backward, AdamW", started, trained)]
    spans.append(("train", "gather a reference (verification only)", trained, done))
    channel.send(event="trained", loss=loss, spans=spans)


def _publish(channel: Channel, source: Source, step: int) -> None:
    started = time.monotonic()
    try:
        report = source.publish(tag=f"step {step}")
    except (ConfigError, LayoutError, PlanError, VersionError) as error:
        why = {"error": type(error).__name__, "message": str(error), "reason": error.reason}
        channel.send(
            event="aborted", spans=[("publish", "aborted", started, time.monotonic())], **why
        )
        return
    spans = [("publish", f"version {report.version}", started, time.monotonic())]
    for name, start, end in report.spans:
        spans.append(("version" if name in _PHASES else name, name, start, end))
    channel.send(
        event="published",
        version=report.version,
        num_bytes=report.num_bytes,
        num_replicas=report.num_replicas,
        seconds=report.seconds,
        stages_s=report.stages_s,
        spans=spans,
    )
