"""The parent of the demo with a real vLLM server: trainers publish, it generates, all is judged."""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from weightsync.client import Job
from weightsync.demo.model import PROMPT, model_config, readable
from weightsync.demo.vllm.server import Api
from weightsync.demo.worker import Message, Team, Worker
from weightsync.demo.workspace import Interrupts, workspace
from weightsync.errors import ConfigError
from weightsync.integrations.vllm import attach
from weightsync.telemetry.progress import LiveProgress, VersionRow, figures_of, stage_table
from weightsync.units import format_bytes, format_seconds

__all__ = ["VllmDemoOptions", "run_vllm_demo"]

_START_S: Final = 300.0
_STEP_S: Final = 120.0
_NUM_TOKENS: Final = 32
_SHOWN: Final = ("sink_fill", "sink_verify", "sink_pause")


@dataclass(frozen=True, kw_only=True)
class VllmDemoOptions:
    """What to show.

    Args:
        sources: Trainer processes, FSDP2 over gloo.
        tp: Tensor-parallel ranks of the server.
        steps: Optimizer steps, each published.
        model: `qwen3` or `qwen3_moe`.
        timeout_s: Deadline of every version.

    Raises:
        ConfigError: A number or name that cannot be, or there is no vLLM here.
    """

    sources: int = 2
    tp: int = 1
    steps: int = 3
    model: str = "qwen3"
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        model_config(self.model)
        for name, value in (("sources", self.sources), ("sinks", self.tp), ("steps", self.steps)):
            if value < 1:
                raise ConfigError(f"{name}={value}: at least 1")
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                "there is no vLLM in this environment; run it in one that has: "
                "scripts/stack vllm -- weightsync demo --engine vllm"
            )


@dataclass
class _Outcome:
    rows: list[VersionRow] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


class _Stream(threading.Thread):
    """A user of the server who never stops asking; sees how long tokens stay away."""

    def __init__(self, api: Api) -> None:
        super().__init__(name="demo-stream", daemon=True)
        self._api = api
        self._ending = threading.Event()
        self.arrived: list[float] = []

    def run(self) -> None:
        while not self._ending.is_set():
            self._api.generate(list(PROMPT), 1)
            self.arrived.append(time.monotonic())

    def end(self) -> None:
        self._ending.set()
        self.join(10.0)

    def between(self, start: float, end: float) -> int:
        """Tokens that came in an interval."""
        return sum(start <= when <= end for when in self.arrived)


class _Demo:
    def __init__(
        self, options: VllmDemoOptions, team: Team, job: Job, progress: LiveProgress
    ) -> None:
        self.options, self.team, self.job, self.progress = options, team, job, progress
        self.outcome = _Outcome()

    def start(self, folder: Path) -> None:
        """Start everything and have it join the job."""
        options = self.options
        began = time.monotonic()
        self.progress.now("starting trainers and vllm serve")
        model = _checkpoint_folder(folder, options.model)
        self.server = self.team.start(
            "vllm", "server", model=str(model), tp=options.tp, dtype="float32",
            arguments=["--load-format", "dummy"],
        )  # fmt: skip
        self.trainers = [
            self.team.start(
                f"trainer {rank}",
                "trainer",
                rank=rank,
                world_size=options.sources,
                folder=str(folder),
                model=str(model),
                dtype="float32",
                lr=1e-2,
                job=self.job.url,
                timeout_s=options.timeout_s,
                fabric="local",
            )
            for rank in range(options.sources)
        ]
        events = self.team.wait(self.team.workers, "ready", timeout_s=_START_S)
        self.api = Api(events[self.server]["url"])
        attach([self.api.url], job=self.job)
        for trainer in self.trainers:
            trainer.send("join")
        self.team.wait(self.trainers, "joined", timeout_s=_STEP_S)
        parameters = events[self.trainers[0]]["parameters"]
        took = format_seconds(time.monotonic() - began)
        self.progress.say(
            f"{options.model}, {parameters:,} parameters: {options.sources} trainer(s) under "
            f"FSDP2, vllm serve with {options.tp} rank(s) at {self.api.url}; started in {took}"
        )

    def run(self) -> None:
        """Train, publish, generate, judge; stops where something is wrong."""
        for step in range(1, self.options.steps + 1):
            loss = self._train(step)
            stream = _Stream(self.api)
            stream.start()
            row, during = self._publish(step, stream)
            stream.end()
            self.outcome.rows.append(row)
            if row.is_committed:
                row.verified = self._judge(step)
                self.progress.say(self._line(row, loss, during))
            self.progress.advance()
            if not row.verified:
                return

    def _train(self, step: int) -> float:
        self.progress.now(f"step {step}: training")
        for trainer in self.trainers:
            trainer.send("train")
        events = self.team.wait(self.trainers, "trained", timeout_s=_STEP_S)
        return float(events[self.trainers[0]]["loss"])

    def _publish(self, step: int, stream: _Stream) -> tuple[VersionRow, int]:
        self.progress.now(f"step {step}: publishing version {step} while vLLM generates")
        began = time.monotonic()
        for trainer in self.trainers:
            trainer.send("publish", tag=f"step {step}")
        events = self.team.wait(self.trainers, ("published", "aborted"), timeout_s=_STEP_S)
        during = stream.between(began, time.monotonic())
        row = VersionRow(step)
        failed = [event for event in events.values() if event["event"] == "aborted"]
        if failed:
            why = f"version {step}: {failed[0]['error']}: {failed[0]['message']}"
            self.outcome.problems.append(why)
            return row, during
        row.is_committed = True
        done: list[Message] = list(events.values())
        row.add_published(done)
        row.add_stages(event["stages_s"] for event in done)
        return row, during

    def _judge(self, step: int) -> bool:
        self.progress.now(f"step {step}: comparing tokens with transformers")
        tokens = self.api.generate(list(PROMPT), _NUM_TOKENS)
        self.trainers[0].send("judge", prompts=[list(PROMPT)], tokens=[tokens])
        judge: list[Worker] = [self.trainers[0]]
        event = self.team.wait(judge, "judged", timeout_s=_STEP_S)[self.trainers[0]]
        self.outcome.tokens = tokens
        if event["best"] == [tokens]:
            return True
        self.outcome.problems.append(
            f"version {step}: vLLM says {tokens}, transformers {event['best'][0]}"
        )
        return False

    def _line(self, row: VersionRow, loss: float, during: int) -> Text:
        fill, verify, pause = (format_seconds(row.stages_s.get(name, 0.0)) for name in _SHOWN)
        line = Text(
            f"step {row.version}  loss {loss:.3f}  {format_bytes(row.num_bytes)}: received in "
            f"{fill}, of that verified in {verify}; {during} request(s) answered; pause {pause}  "
        )
        line.append(
            "same tokens" if row.verified else "OTHER TOKENS", "green" if row.verified else "red"
        )
        return line.append(f'  "{PROMPT.decode()}{readable(self.outcome.tokens)}"', "cyan")


def run_vllm_demo(options: VllmDemoOptions, console: Console) -> dict[str, Any]:
    """Run the demo and print what happens. Blocks for the whole run, a minute or more.

    Args:
        options: What to show.
        console: Where to print.

    Returns:
        The keys of `weightsync.demo/1`, without "schema".

    Raises:
        WeightSyncError: A process failed.
        KeyboardInterrupt: SIGINT or SIGTERM; every process and file is gone.
    """
    with Interrupts() as interrupts, workspace() as folder:
        job = Job.start(f"unix:{folder}/job", journal=folder / "journal")
        team = Team(folder, package="weightsync.demo.vllm")
        with job, team, LiveProgress(console, options.steps) as progress, interrupts.allowed():
            demo = _Demo(options, team, job, progress)
            demo.start(folder)
            demo.run()
            progress.now("ending processes")
            team.dismiss(30.0)
    outcome = demo.outcome
    console.print(stage_table(outcome.rows, "token by token"))
    for problem in outcome.problems:
        console.print(Text(problem, "bold red"), soft_wrap=True)
    done = [row for row in outcome.rows if row.is_committed]
    verified = not outcome.problems and len(done) == options.steps
    return {
        "ok": verified,
        "verified": verified,
        "engine": "vllm",
        "sources": options.sources,
        "sinks": options.tp,
        "steps": options.steps,
        "model": options.model,
        "mode": "staged",
        **figures_of(done),
        "problems": outcome.problems,
    }


def _checkpoint_folder(folder: Path, model: str) -> Path:
    """A config without weights: the server starts with random ones."""
    made = folder / "model"
    made.mkdir()
    config = {**model_config(model), "torch_dtype": "float32"}
    (made / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return made
