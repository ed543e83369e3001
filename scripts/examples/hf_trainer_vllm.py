"""transformers.Trainer, and a `vllm serve` that speaks with the new weights after every step.

    scripts/stack trl -- python scripts/examples/tiny_model.py /tmp/tiny
    VLLM_SERVER_DEV_MODE=1 scripts/stack vllm -- vllm serve /tmp/tiny --host 127.0.0.1 \
        --port 8000 --dtype float32 --enforce-eager --enable-scale-out --skip-tokenizer-init \
        --weight-transfer-config '{"backend": "weightsync"}'
    scripts/stack trl -- python scripts/examples/hf_trainer_vllm.py --model /tmp/tiny \
        --vllm http://127.0.0.1:8000

The two environments never meet: the trainer speaks HTTP to the server, and weights go from process
to process. The two lines that weightsync needs are marked; everything else is any Trainer.
With `--checkpoints FOLDER` in place of `--vllm` it saves a checkpoint at every step instead.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from weightsync.integrations.transformers import WeightSyncCallback  # weightsync, line 1 of 2

PROMPTS = ["The value of ", "A function", "If an object ", "while ", "Python ", "3.14"]
NUM_TOKENS = 16
LENGTH = 64


class Lines(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The help pages of Python, cut into pieces of `LENGTH` tokens."""

    def __init__(self, tokenizer: Any) -> None:
        text = "\n".join(topics[name] for name in sorted(topics))[: 1 << 17]
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        self._pieces = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._pieces[index], "labels": self._pieces[index]}


class Listens(TrainerCallback):
    """Has the servers continue `PROMPTS`, before training and after every step.

    Args:
        urls: Of the servers; all of them must say the same.
        tokenizer: Of the model.
    """

    def __init__(self, urls: Sequence[str], tokenizer: Any) -> None:
        self.steps: list[dict[str, Any]] = []
        self._urls, self._tokenizer = urls, tokenizer
        self._prompts = tokenizer(PROMPTS, add_special_tokens=False)["input_ids"]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the callback before this one has published."""
        self._listen(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Likewise."""
        self._listen(state.global_step)

    def _listen(self, step: int) -> None:
        said = [[greedy(url, prompt) for prompt in self._prompts] for url in self._urls]
        if any(tokens != said[0] for tokens in said):
            raise RuntimeError(f"step {step}: the servers do not say the same: {said}")
        self.steps.append({"step": step, "tokens": said[0]})
        print(f"step {step}: {PROMPTS[0]}{self._tokenizer.decode(said[0][0])!r}")


def greedy(url: str, prompt: list[int]) -> list[int]:
    """The most likely tokens after a prompt (`vllm serve --enable-scale-out`)."""
    sampling = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    request = urllib.request.Request(
        url + "/inference/v1/generate",
        data=json.dumps({"token_ids": prompt, "sampling_params": sampling}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        tokens: list[int] = json.loads(reply.read())["choices"][0]["token_ids"]
    return tokens


class Saves(TrainerCallback):
    """The slow way, for comparison: a checkpoint of every step, for engines to be started from.

    Args:
        folder: Takes `0`, `1` and so on.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first step."""
        kwargs["model"].save_pretrained(self._folder / str(state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After every step."""
        kwargs["model"].save_pretrained(self._folder / str(state.global_step))


def main() -> None:
    """Parse arguments, train, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder, or a name on the hub")
    parser.add_argument("--vllm", nargs="+", default=[], metavar="URL", help="vLLM servers")
    parser.add_argument("--checkpoints", type=Path, metavar="FOLDER", help="save, publish nothing")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--output", default="/tmp/hf-trainer-vllm", help="the trainer's own folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    options = parser.parse_args()
    if bool(options.vllm) == bool(options.checkpoints):
        parser.error("give --vllm or --checkpoints")

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    listens = Listens(options.vllm, tokenizer)
    callbacks: list[TrainerCallback] = [Saves(options.checkpoints)] if options.checkpoints else []
    if options.vllm:
        callbacks.append(WeightSyncCallback(vllm=options.vllm))  # weightsync, line 2 of 2
        callbacks.append(listens)
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        train_dataset=Lines(tokenizer),
        callbacks=callbacks,
        args=TrainingArguments(
            output_dir=options.output,
            max_steps=options.steps,
            seed=options.seed,
            learning_rate=options.lr,
            lr_scheduler_type="constant",
            per_device_train_batch_size=4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if options.json is not None:
        result = {"seed": options.seed, "losses": losses, "steps": listens.steps}
        options.json.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
