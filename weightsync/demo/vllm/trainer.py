"""A trainer rank: FSDP2 over gloo, real AdamW steps, and transformers as the judge of tokens."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from weightsync import Job, Source, failpoints
from weightsync.demo.fsdp import FsdpTrainer
from weightsync.demo.model import build_model
from weightsync.demo.worker import Channel, Message
from weightsync.errors import WeightSyncError

__all__ = ["run"]

_LENGTH: Final = 64


class _Trainer(FsdpTrainer):
    """A rank that knows what transformers would say."""

    def __init__(self, options: Message) -> None:
        config = json.loads(Path(options["model"], "config.json").read_text(encoding="utf-8"))
        is_random = bool(options.get("is_random", False))
        lr = float(options["lr"])
        super().__init__(options, config, lr=lr, length=_LENGTH, is_random=is_random)
        dtype = getattr(torch, options["dtype"])
        self.judge = build_model(config, dtype).eval() if self.rank == 0 else None
        # The same weights without the roundings in between.
        self.exact = build_model(config, torch.float32).eval() if self.rank == 0 else None

    def remember(self) -> None:
        """Gather the weights for the judge: weightsync itself never does this."""
        for name, value in self.model.state_dict().items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if self.judge is not None and self.exact is not None:
                target = self.judge.state_dict()[name]
                target.copy_(whole)
                self.exact.state_dict()[name].copy_(target)

    def judge_tokens(
        self, prompts: list[list[int]], tokens: list[list[int]]
    ) -> tuple[list[list[int]], list[list[float]], list[list[float]]]:
        """What transformers would have said after each prefix, and by how much it was sure.

        Returns:
            The most likely token at every place; the lead of its probability over the second; and
            what is left of that lead if the judge and the engine each err by as much as the judge
            does there, measured against float32: two right ones that round in another order.
        """
        assert self.judge is not None
        assert self.exact is not None
        best: list[list[int]] = []
        lead: list[list[float]] = []
        sure: list[list[float]] = []
        for prompt, made in zip(prompts, tokens, strict=True):
            ids = torch.tensor([prompt + made])
            with torch.no_grad():
                logits = self.judge(input_ids=ids, use_cache=False).logits[0].float()
                exact = self.exact(input_ids=ids, use_cache=False).logits[0]
            logits, exact = logits[len(prompt) - 1 : -1], exact[len(prompt) - 1 : -1]
            top = logits.topk(2, dim=-1)
            chance = logits.softmax(dim=-1).gather(1, top.indices)
            error = 2 * (logits - exact).abs().amax(dim=-1, keepdim=True)
            best.append(top.indices[:, 0].tolist())
            lead.append((chance[:, 0] - chance[:, 1]).tolist())
            worst = chance * torch.exp(error * torch.tensor([-1.0, 1.0]))
            sure.append((worst[:, 0] - worst[:, 1]).tolist())
        return best, lead, sure


def run(channel: Channel, options: Message, commands: Iterator[Message]) -> None:
    """The life of one trainer rank."""
    torch.set_num_threads(1)
    trainer = _Trainer(options)
    source: Source | None = None
    channel.send(event="ready", parameters=sum(p.numel() for p in trainer.model.parameters()))
    for command in commands:
        if command["do"] == "join":
            source = Source(
                trainer.model,
                job=Job.connect(options["job"]),
                timeout_s=float(options["timeout_s"]),
                fabric=options["fabric"],
            )
            channel.send(event="joined")
        elif command["do"] == "train":
            loss = trainer.train()
            trainer.remember()
            channel.send(event="trained", loss=loss)
        elif command["do"] == "publish":
            assert source is not None
            if command.get("failpoint"):
                failpoints.arm(command["failpoint"])
            _publish(channel, source, command)
        elif command["do"] == "judge":
            best, lead, sure = trainer.judge_tokens(command["prompts"], command["tokens"])
            channel.send(event="judged", best=best, lead=lead, sure=sure)
    if source is not None:
        source.close()
    with contextlib.suppress(RuntimeError):  # a peer may have been killed
        dist.destroy_process_group()


def _publish(channel: Channel, source: Source, command: Message) -> None:
    try:
        report = source.publish(tag=command.get("tag", ""), until=command.get("until", "adopted"))
    except WeightSyncError as error:
        why = {"error": type(error).__name__, "message": str(error)}
        channel.send(event="aborted", **why)
        return
    channel.send(
        event="published",
        version=report.version,
        num_bytes=report.num_bytes,
        num_replicas=report.num_replicas,
        seconds=report.seconds,
        stages_s=report.stages_s,
    )
