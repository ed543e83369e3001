"""Proof that the sinks hold what the trainers have, by other means than those that moved it.

Nothing of the planner, its rules or the IR is used here: the memory of every replica is put
together by the engine's documented order (`weightsync.integrations.readback`), saved as a
checkpoint, and loaded by transformers itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from weightsync.demo.model import build_model, greedy, model_config
from weightsync.demo.worker import Channel, Message
from weightsync.errors import IntegrityError
from weightsync.integrations import readback

__all__ = ["check_replica", "run"]


def check_replica(
    ranks: list[Path],
    config: dict[str, Any],
    reference: Path,
    logits: Path,
    folder: Path,
    *,
    ep: bool,
) -> list[int]:
    """Compare the weights that a replica serves with the trainer's, bit for bit.

    Args:
        ranks: Dumped memory of every rank, in order.
        config: Content of the model's `config.json`.
        reference: The trainer's weights in the sinks' dtype, by transformers' names.
        logits: The trainer's `logits` and the `tokens` that it generates.
        folder: For a checkpoint.
        ep: Whether experts lie whole on the ranks.

    Returns:
        Tokens generated from the replica's weights.

    Raises:
        IntegrityError: They differ; names the first tensor, or says that only the logits do.
    """
    parts = [load_file(path) for path in ranks]
    full = readback.unshard(parts, config, tp=len(parts), ep=ep)
    model = _load(full, config, folder)
    found, wanted = model.state_dict(), load_file(reference)
    if found.keys() != wanted.keys():
        odd = sorted(found.keys() ^ wanted.keys())
        raise IntegrityError(f"one side only has {', '.join(odd[:3])}", tensor=odd[0])
    for name, value in wanted.items():
        if not _same_bits(found[name], value):
            count = int((found[name] != value).sum())
            raise IntegrityError(
                f"{name} differs from the trainer's in {count} of {value.numel()} elements",
                tensor=name,
            )
    expected = load_file(logits)
    tokens, mine = greedy(model, len(expected["tokens"]))
    if tokens != expected["tokens"].tolist() or not _same_bits(mine, expected["logits"]):
        raise IntegrityError("the weights are equal, but the logits are not the trainer's")
    return tokens


def _load(full: dict[str, torch.Tensor], config: dict[str, Any], folder: Path) -> nn.Module:
    """Make transformers load a checkpoint, so that its own code puts every tensor in its place."""
    from transformers import AutoModelForCausalLM

    keys = {k: v for k, v in config.items() if not k.endswith("_implementation")}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(keys), encoding="utf-8")
    made = {name: value.contiguous() for name, value in full.items()}
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        attn_implementation=config["attn_implementation"],
        experts_implementation=config["experts_implementation"],
    )
    return model.eval()


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    # As bytes: unlike numbers, NaN equals itself and -0 differs from 0.
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def run(channel: Channel, options: Message, commands: Iterator[Message]) -> None:
    """Check every version that the parent asks for."""
    torch.set_num_threads(1)
    config, folder = model_config(options["model"]), Path(options["folder"])
    build_model(config, torch.bfloat16)  # imports what is slow to import while others start
    channel.send(event="ready")
    for command in commands:
        started = time.monotonic()
        verdicts, tokens = {}, []
        for replica in command["replicas"]:
            try:
                tokens = check_replica(
                    [Path(path) for path in replica["ranks"]],
                    config,
                    folder / f"reference-{command['step']}.safetensors",
                    folder / f"logits-{command['step']}.safetensors",
                    folder / "checkpoint",
                    ep=bool(replica["ep"]),
                )
                verdicts[replica["name"]] = ""
            except IntegrityError as error:
                verdicts[replica["name"]] = str(error)
        spans = [("verify", f"version {command['step']}", started, time.monotonic())]
        channel.send(event="verified", problems=verdicts, tokens=tokens, spans=spans)
