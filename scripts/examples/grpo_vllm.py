"""TRL's GRPOTrainer with completions from `vllm serve`, which has new weights after every step.

    scripts/stack trl -- python scripts/examples/tiny_model.py /tmp/tiny
    VLLM_SERVER_DEV_MODE=1 scripts/stack vllm -- vllm serve /tmp/tiny --host 127.0.0.1 \
        --port 8000 --dtype float32 --enforce-eager --enable-scale-out --skip-tokenizer-init \
        --weight-transfer-config '{"backend": "weightsync"}'
    scripts/stack trl -- python scripts/examples/grpo_vllm.py --model /tmp/tiny \
        --vllm http://127.0.0.1:8000

The two environments never meet: the trainer speaks HTTP to the server, and weights go from process
to process. TRL's own transfer (`use_vllm=True`) stays off; `rollout_func` is its hook for
completions that come from somewhere else. The two lines that weightsync needs are marked.

What is learned is to write lower-case letters: a reward that even a tiny model with random weights
finds in a minute on two cores. `--stop-publishing-after 1` shows what happens without weightsync:
the engine keeps saying what it said, and the trainer learns from that.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import string
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from weightsync.integrations.transformers import WeightSyncCallback  # weightsync, line 1 of 2

PROMPTS = ["Write a word: ", "Say something. ", "The name of my cat is ", "Letters, please: "]
TEMPERATURE = 1.0
NUM_LOOKED_AT = 16  # greedy tokens that `Notes` asks for
LETTERS = frozenset(string.ascii_lowercase)


class Engine:
    """Completions from vLLM servers, token ids in and out (`--enable-scale-out`)."""

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = list(urls)
        self._pool = ThreadPoolExecutor(16)

    def complete(self, requests: Sequence[tuple[list[int], dict[str, Any]]]) -> list[Any]:
        """Send prompts with their sampling parameters, all at once; choices of each, in order."""
        return list(self._pool.map(self._complete, range(len(requests)), requests))

    def _complete(self, index: int, request: tuple[list[int], dict[str, Any]]) -> Any:
        prompt, sampling = request
        # 2: whole completions. Else the server answers with those alone that were ready last.
        body = {"token_ids": prompt, "sampling_params": {**sampling, "output_kind": 2}}
        call = urllib.request.Request(
            self.urls[index % len(self.urls)] + "/inference/v1/generate",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(call, timeout=120) as reply:
            choices = json.loads(reply.read())["choices"]
        return sorted(choices, key=lambda choice: choice["index"])


class Rollouts:
    """What GRPOTrainer calls for completions: one for each prompt, repeated ones included.

    Args:
        engine: To ask.
        seed: Equal seeds, equal completions.

    Attributes:
        completions: All of them so far, as token ids, by step.
    """

    def __init__(self, engine: Engine, seed: int) -> None:
        self.completions: list[list[list[int]]] = []
        self._engine, self._seed = engine, seed

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        """Ask for as many completions of each prompt as it is repeated."""
        ids = trainer.processing_class(prompts, add_special_tokens=False)["input_ids"]
        requests = []
        for prompt, group in groupby(ids):
            # Every group of every step on every rank has a seed of its own, the same in every run.
            where = f"{self._seed}/{trainer.state.global_step}/{trainer.args.process_index}"
            sampling = {
                "n": len(list(group)),
                "seed": random.Random(f"{where}/{len(requests)}").getrandbits(31),
                "temperature": TEMPERATURE,
                "max_tokens": trainer.max_completion_length,
                "logprobs": 0,  # of the sampled tokens
            }
            requests.append((prompt, sampling))
        choices = [choice for answer in self._engine.complete(requests) for choice in answer]
        self.completions.append([choice["token_ids"] for choice in choices])
        return {
            "prompt_ids": ids,
            "completion_ids": self.completions[-1],
            "logprobs": [
                [place["logprob"] for place in choice["logprobs"]["content"]] for choice in choices
            ],
        }


def share_of_letters(completions: list[str], **_: Any) -> list[float]:
    """The reward: how much of a completion is lower-case letters."""
    return [sum(c in LETTERS for c in text) / max(1, len(text)) for text in completions]


class Notes(TrainerCallback):
    """Writes down what the engine says greedily, before training and after every step.

    Args:
        engine: To ask.
        prompts: As token ids.
    """

    def __init__(self, engine: Engine, prompts: Sequence[list[int]]) -> None:
        self.steps: list[dict[str, Any]] = []
        self._engine, self._prompts = engine, prompts

    def look(self, step: int) -> None:
        """Ask the engine."""
        greedy = {"temperature": 0.0, "max_tokens": NUM_LOOKED_AT, "ignore_eos": True}
        answers = self._engine.complete([(prompt, greedy) for prompt in self._prompts])
        self.steps.append(
            {"step": step, "tokens": [choices[0]["token_ids"] for choices in answers]}
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the callback before this one has published."""
        self.look(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Likewise."""
        self.look(state.global_step)


class StopsPublishing(WeightSyncCallback):
    """For comparison: after a while the engine gets no more weights, and training goes on.

    Args:
        last_step: What is published last.
        options: Of `WeightSyncCallback`.
    """

    def __init__(self, last_step: int, **options: Any) -> None:
        super().__init__(**options)
        self._last_step = last_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Publish, for as long as that goes."""
        if state.global_step <= self._last_step:
            super().on_step_end(args, state, control, **kwargs)


def train(options: argparse.Namespace, engine: Engine, sync: TrainerCallback) -> dict[str, Any]:
    """Run GRPO.

    Args:
        options: From `parser`.
        engine: Where completions come from.
        sync: Gives the engine new weights.

    Returns:
        What `--json` writes.
    """
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rollouts = Rollouts(engine, options.seed)
    notes = Notes(engine, tokenizer(PROMPTS, add_special_tokens=False)["input_ids"])
    trainer = GRPOTrainer(
        model=options.model,
        processing_class=tokenizer,
        reward_funcs=share_of_letters,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 64}),
        rollout_func=rollouts,
        callbacks=[sync, notes],
        args=GRPOConfig(
            output_dir=options.output,
            max_steps=options.steps,
            seed=options.seed,
            learning_rate=options.lr,
            lr_scheduler_type="constant",
            per_device_train_batch_size=options.batch,
            num_generations=options.generations,
            max_completion_length=options.tokens,
            temperature=TEMPERATURE,
            beta=0.0,
            use_cpu=options.cpu,
            bf16=not options.cpu,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            model_init_kwargs={"dtype": "float32"},
        ),
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    return {
        "seed": options.seed,
        "rewards": rewards,
        "steps": notes.steps,
        "completions": rollouts.completions,
    }


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--model", required=True, help="a folder, or a name on the hub")
    made.add_argument("--vllm", required=True, nargs="+", metavar="URL", help="vLLM servers")
    made.add_argument("--steps", type=int, default=40)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--lr", type=float, default=1e-3)
    made.add_argument("--batch", type=int, default=32, help="completions for each step and rank")
    made.add_argument("--generations", type=int, default=8, help="completions for each prompt")
    made.add_argument("--tokens", type=int, default=16, help="longest completion")
    made.add_argument("--cpu", action=argparse.BooleanOptionalAction, default=True)
    made.add_argument("--output", default="/tmp/grpo-vllm", help="the trainer's own folder")
    made.add_argument("--stop-publishing-after", type=int, metavar="STEP", help="for comparison")
    made.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    return made


def main() -> None:
    """Parse arguments, train, report."""
    options = parser().parse_args()
    if options.stop_publishing_after is not None:
        sync = StopsPublishing(options.stop_publishing_after, vllm=options.vllm)
    else:
        sync = WeightSyncCallback(vllm=options.vllm)  # weightsync, line 2 of 2
    result = train(options, Engine(options.vllm), sync)
    if int(os.environ.get("RANK", "0")) != 0:
        return  # under torchrun every rank has the same rewards
    last = result["rewards"][-5:]
    print(
        f"reward of the engine's completions, mean of the last steps: {sum(last) / len(last):.3f}"
    )
    if options.json is not None:
        options.json.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
