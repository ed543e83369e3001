"""The parent of the demo: hosts the job, drives trainers and sinks, tells what happened."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from rich.console import Console
from rich.text import Text

from weightsync.certs import make_certs
from weightsync.client import Job
from weightsync.demo.model import PROMPT, model_config, readable
from weightsync.demo.worker import Message, Team, Worker
from weightsync.demo.workspace import Interrupts, workspace
from weightsync.errors import ConfigError
from weightsync.planners import rules
from weightsync.settings import TOKEN_NAME
from weightsync.telemetry.progress import LiveProgress, VersionRow, figures_of, stage_table
from weightsync.telemetry.trace import Trace
from weightsync.units import format_bytes, format_seconds, gb_per_s

__all__ = ["DemoOptions", "run_demo"]

_START_S: Final = 180.0  # processes that import torch on a busy machine
_MAX_PROCESSES: Final = 64
_SHOWN_TOKENS: Final = 32

Mode = Literal["staged", "in_place"]


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What to show.

    Args:
        sources: Trainer processes.
        sinks: Rollout processes; two replicas of half as many ranks each, or one of one.
        steps: Optimizer steps, each published.
        model: `qwen3` or `qwen3_moe`.
        mode: `staged` or `in_place`.
        kill_step: Step at which the last trainer is killed in the middle of writing, or None.
        tls: Whether processes talk over grpcs:// on loopback instead of a Unix socket.
        trace: Where to write the trace; None: traces/demo-<time>.json.
        timeout_s: Deadline of every version.

    Raises:
        ConfigError: A number or name that cannot be.
    """

    sources: int = 2
    sinks: int = 4
    steps: int = 3
    model: str = "qwen3"
    mode: Mode = "staged"
    kill_step: int | None = None
    tls: bool = False
    trace: Path | None = None
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if not 1 <= self.sources <= _MAX_PROCESSES:
            raise ConfigError(f"sources={self.sources}: 1 to {_MAX_PROCESSES}")
        if not 1 <= self.sinks <= _MAX_PROCESSES or (self.sinks > 1 and self.sinks % 2):
            raise ConfigError(f"sinks={self.sinks}: 1, or an even number for two equal replicas")
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps}: at least 1")
        if self.mode not in ("staged", "in_place"):
            raise ConfigError(f"mode={self.mode!r}: 'staged' or 'in_place'")
        if self.kill_step is not None and not 1 <= self.kill_step <= self.steps:
            raise ConfigError(f"kill at step {self.kill_step}: the steps are 1 to {self.steps}")
        for replica in self.replicas:
            rules.vllm(model_config(self.model), tp=self.tp, ep=self.is_ep(replica))

    @property
    def tp(self) -> int:
        """Tensor-parallel ranks of a replica."""
        return max(1, self.sinks // 2)

    @property
    def replicas(self) -> tuple[str, ...]:
        """Names of the replicas."""
        return ("a",) if self.sinks == 1 else ("a", "b")

    def is_ep(self, replica: str) -> bool:
        """Whether a replica places experts whole: the second one does, to show both ways."""
        return replica == "b" and self.tp > 1 and "num_experts" in model_config(self.model)

    @staticmethod
    def parse_kill(text: str | None) -> int | None:
        """The step of `trainer:STEP`.

        Raises:
            ConfigError: Something else.
        """
        if text is None:
            return None
        role, _, step = text.partition(":")
        if role != "trainer" or not step.isdecimal():
            raise ConfigError(f"kill={text!r}: write trainer:STEP, such as trainer:2")
        return int(step)


@dataclass
class _Outcome:
    """What is known so far; becomes the result."""

    rows: list[VersionRow] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    aborted: dict[str, Any] | None = None
    as_planned: bool = True


class _Demo:
    """One run, from started processes to the last version."""

    def __init__(
        self, options: DemoOptions, team: Team, job: Job, progress: LiveProgress, trace: Trace
    ) -> None:
        self.options, self.team, self.job = options, team, job
        self.progress, self.trace = progress, trace
        self.outcome = _Outcome()
        self.trainers: list[Worker] = []
        self.sinks: dict[str, list[Worker]] = {}
        self.verifier: Worker

    # ---- phases ----

    def start(self) -> None:
        """Start all processes and wait until they have joined the job."""
        options, folder, began = self.options, str(self.team.folder), time.monotonic()
        shared = {
            "model": options.model,
            "folder": folder,
            "job": self.job.url,
            "token_file": str(_token_file(self.team.folder)) if options.tls else None,
            "timeout_s": options.timeout_s,
        }
        self.progress.now("starting processes")
        for rank in range(options.sources):
            self.trainers.append(
                self.team.start(
                    f"trainer {rank}",
                    "trainer",
                    rank=rank,
                    world_size=options.sources,
                    num_tokens=_SHOWN_TOKENS,
                    **shared,
                )
            )
        for replica in options.replicas:
            self.sinks[replica] = [
                self.team.start(
                    f"sink {replica}/{rank}",
                    "sink",
                    replica=replica,
                    rank=rank,
                    tp=options.tp,
                    ep=options.is_ep(replica),
                    mode=options.mode,
                    **shared,
                )
                for rank in range(options.tp)
            ]
        self.verifier = self.team.start("verify", "verify", **shared)
        events = {"ready": 0, "parameters": 0}

        def count(worker: Worker, event: Message) -> None:
            events["ready"] += event["event"] == "ready"
            events["parameters"] = max(events["parameters"], event.get("parameters", 0))
            self.progress.now(f"starting: {events['ready']} of {len(self.team.workers)} are ready")

        self.team.wait(self.team.workers, ("ready",), timeout_s=_START_S, on_event=count)
        took = time.monotonic() - began
        self.trace.add("demo", "phases", "start", began, began + took)
        self.progress.say(
            f"{options.model}, {events['parameters']:,} parameters: {options.sources} trainer(s) "
            f"under FSDP2 in fp32, {len(options.replicas)} replica(s) of {options.tp} rank(s) in "
            f"bf16, {options.mode}; started in {format_seconds(took)}"
        )

    def run(self) -> None:
        """Train and publish step by step; stops after a version that was not committed."""
        for step in range(1, self.options.steps + 1):
            loss = self._train(step)
            row = self._publish(step)
            self.outcome.rows.append(row)
            refits = self._refit(step)
            if not row.is_committed:
                self._after_abort(step, refits)
                return
            row.add_stages(event["stages_s"] for event in refits.values())
            tokens = self._verify(step, self.options.replicas, row)
            self.progress.say(self._line(row, loss, tokens))
            self.progress.advance()
            if not row.verified:
                return

    def _train(self, step: int) -> float:
        self.progress.now(f"step {step}: training")
        for trainer in self.trainers:
            trainer.send("train", step=step)
        events = self._phase("train", self.trainers, ("trained",), step)
        return float(events[self.trainers[0]]["loss"])

    def _publish(self, step: int) -> VersionRow:
        self.progress.now(f"step {step}: publishing version {step}")
        dies = step == self.options.kill_step
        if self.options.mode == "in_place":
            self._ask_refit(step)  # generation is paused before a byte is written
        for trainer in self.trainers:
            # At its second bucket, if there is one: a sink has its first by then.
            bucket = min(2, self.options.sinks)
            die = dies and trainer is self.trainers[-1]
            trainer.send("publish", step=step, die=die, bucket=bucket)
        events = self._phase(
            "publish",
            self.trainers,
            ("published", "aborted"),
            step,
            may_die=self.trainers[-1] if dies else None,
        )
        row = VersionRow(step)
        done = [event for event in events.values() if event["event"] == "published"]
        row.is_committed = len(done) == len(self.trainers)
        if row.is_committed:
            row.add_published(done)
        row.add_stages(event["stages_s"] for event in done)
        for event in events.values():
            if event["event"] == "aborted":
                self.outcome.aborted = {
                    "version": step,
                    "error": event["error"],
                    "reason": event["reason"] or event["message"],
                }
        return row

    def _ask_refit(self, step: int) -> None:
        for sink in self._sinks(self.options.replicas):
            sink.send("refit", version=step)

    def _refit(self, step: int) -> dict[Worker, Message]:
        """Have the sinks adopt the version, or say what they hold after it was aborted."""
        sinks = self._sinks(self.options.replicas)
        self.progress.now(f"step {step}: {len(self.options.replicas)} replica(s) adopt")
        if self.options.mode == "staged":
            self._ask_refit(step)
        if not self.outcome.rows[-1].is_committed:
            for sink in sinks:
                sink.send("stop")
        return self._phase("refit", sinks, ("refitted",), step)

    def _verify(self, step: int, replicas: Iterable[str], row: VersionRow) -> list[int]:
        self.progress.now(f"step {step}: reading back, comparing, generating")
        dumps = [
            {
                "name": replica,
                "ep": self.options.is_ep(replica),
                "ranks": [
                    str(self.team.folder / f"sink-{replica}-{rank}.safetensors")
                    for rank in range(self.options.tp)
                ],
            }
            for replica in replicas
        ]
        self.verifier.send("verify", step=step, replicas=dumps)
        event = self._phase("verify", [self.verifier], ("verified",), step)[self.verifier]
        found = {replica: problem for replica, problem in event["problems"].items() if problem}
        row.verified = not found
        for replica, problem in found.items():
            self.outcome.problems.append(f"version {step}, replica {replica}: {problem}")
        return [int(token) for token in event["tokens"]]

    def _after_abort(self, step: int, refits: dict[Worker, Message]) -> None:
        """A version was aborted: check that the old one serves, and say so."""
        outcome, old = self.outcome, step - 1
        committed, reason = self._recorded(step)
        if outcome.aborted is None:  # nobody is left who could have been told
            outcome.aborted = {"version": step, "error": "VersionAbortedError", "reason": reason}
        outcome.as_planned = step == self.options.kill_step and committed is False
        say = self.progress.say
        if step == self.options.kill_step:
            name = self.trainers[-1].name
            say(Text(f"step {step}: {name} was killed while it wrote version {step}", "yellow"))
        text = f"version {step} was aborted: {outcome.aborted['reason']}"
        if outcome.as_planned:
            say(Text(text, "yellow"))
        else:
            outcome.problems.append(text)
        serving = []
        for replica, workers in self.sinks.items():
            events = [refits[worker] for worker in workers]
            versions = {event["version"] for event in events}
            torn = [event["torn"] for event in events if event["torn"]]
            if versions == {old}:
                serving.append(replica)
                say(f"replica {replica} still serves version {old}")
            elif versions == {None} and old == 0 and not torn:
                say(f"replica {replica} serves nothing, as before")
            elif versions == {None} and self.options.mode == "in_place":
                why = torn[0] if torn else "part of the version had arrived"
                say(f"replica {replica} is torn and serves nothing until the next version: {why}")
            else:
                outcome.as_planned = False
                outcome.problems.append(f"replica {replica} serves {sorted(map(str, versions))}")
        if serving:
            row = VersionRow(old)
            tokens = self._verify(old, serving, row)
            if row.verified:
                say(
                    f"read back: version {old} bit for bit in replica(s) {', '.join(serving)}; it "
                    f"generates {_quoted(tokens)}"
                )

    # ---- help ----

    def _phase(
        self,
        name: str,
        workers: list[Worker],
        kinds: tuple[str, ...],
        step: int,
        may_die: Worker | None = None,
    ) -> dict[Worker, Message]:
        began = time.monotonic()
        timeout_s = self.options.timeout_s + 30  # their own deadlines come first and say more
        events = self.team.wait(workers, kinds, timeout_s=timeout_s, may_die=may_die)
        self.trace.add("demo", "phases", f"{name} {step}", began, time.monotonic())
        for worker, event in events.items():
            for track, span, start, end in event.get("spans", []):
                self.trace.add(worker.name, track, span, start, end, version=step)
        return events

    def _sinks(self, replicas: Iterable[str]) -> list[Worker]:
        return [sink for replica in replicas for sink in self.sinks[replica]]

    def _recorded(self, version: int) -> tuple[bool | None, str]:
        """What the job's journal says of a version; None: it was never decided."""
        with sqlite3.connect(f"file:{self.team.folder}/journal?mode=ro", uri=True) as journal:
            query = "SELECT is_commit, reason FROM decision WHERE version = ?"
            row = journal.execute(query, (version,)).fetchone()
        return (None, "") if row is None else (bool(row[0]), str(row[1]))

    def _line(self, row: VersionRow, loss: float, tokens: list[int]) -> Text:
        rate = gb_per_s(row.num_bytes, row.seconds)
        line = Text(
            f"step {row.version}  loss {loss:.3f}  {format_bytes(row.num_bytes)} in "
            f"{format_seconds(row.seconds)} ({rate:.2f} GB/s), {row.num_replicas} replica(s)  "
        )
        line.append("verified" if row.verified else "DIFFERS", "green" if row.verified else "red")
        return line.append(f"  {_quoted(tokens)}", "cyan")


def run_demo(options: DemoOptions, console: Console) -> dict[str, Any]:
    """Run the demo and print what happens. Blocks for the whole run.

    Args:
        options: What to show.
        console: Where to print.

    Returns:
        The keys of `weightsync.demo/1`, without "schema".

    Raises:
        WeightSyncError: A process failed in a way that the demo did not provoke.
        KeyboardInterrupt: SIGINT or SIGTERM; every process and file is gone.
    """
    trace = Trace()
    with Interrupts() as interrupts, workspace() as folder:
        job = _start_job(options, folder)
        with (
            job,
            Team(folder) as team,
            LiveProgress(console, options.steps) as progress,
            interrupts.allowed(),
        ):
            demo = _Demo(options, team, job, progress, trace)
            demo.start()
            demo.run()
            progress.now("ending processes")
            team.dismiss()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = options.trace if options.trace is not None else Path("traces") / f"demo-{stamp}.json"
    trace.write(path)
    result = _result(options, demo.outcome)
    console.print(stage_table(demo.outcome.rows))
    for problem in demo.outcome.problems:
        console.print(Text(problem, "bold red"), soft_wrap=True)
    console.print(f"trace: {path}  (open in ui.perfetto.dev)", markup=False, soft_wrap=True)
    return {**result, "trace": str(path)}


def _start_job(options: DemoOptions, folder: Path) -> Job:
    url, token_file = f"unix:{folder}/job", None
    if options.tls:
        token_file = _token_file(folder)
        make_certs(token_file.parent, ["localhost"])
        url = "grpcs://127.0.0.1:0"
    return Job.start(
        url,
        min_replicas=len(options.replicas),
        journal=folder / "journal",
        token_file=token_file,
    )


def _token_file(folder: Path) -> Path:
    return folder / "certs" / TOKEN_NAME


def _result(options: DemoOptions, outcome: _Outcome) -> dict[str, Any]:
    done = [row for row in outcome.rows if row.is_committed]
    verified = not outcome.problems and all(row.verified for row in done)
    complete = len(done) == options.steps or outcome.aborted is not None
    result = {
        "ok": verified and complete and outcome.as_planned,
        "verified": verified,
        "sources": options.sources,
        "sinks": options.sinks,
        "steps": options.steps,
        "model": options.model,
        "mode": options.mode,
        **figures_of(done),
        "problems": outcome.problems,
    }
    if outcome.aborted is not None:
        result["aborted"] = outcome.aborted
    return result


def _quoted(tokens: list[int]) -> str:
    return f'"{PROMPT.decode()}{readable(tokens)}"'
