"""Trainers and engines of one test, as processes: the workers of `weightsync.demo.vllm`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from weightsync import Job
from weightsync.demo.model import model_config
from weightsync.demo.vllm.server import Api
from weightsync.demo.worker import Message, Team, Worker
from weightsync.integrations.vllm import attach

__all__ = ["Fleet", "is_long"]

_START_S = 300.0
_STEP_S = 120.0


def is_long() -> bool:
    """Whether the long tier runs."""
    return os.environ.get("WEIGHTSYNC_TEST_TIER") == "long"


class Fleet:
    """A job with trainers and engines. Context manager; ends every process.

    Args:
        folder: Takes logs, the model and the job's socket.
        model: A model of the demo.
        dtype: Of the engines and of the judge.
        timeout_s: Deadline of every version.
    """

    def __init__(
        self,
        folder: Path,
        *,
        model: str,
        dtype: str,
        timeout_s: float = 60.0,
        fabric: str = "local",
        min_replicas: int = 1,
        lr: float = 2e-2,
    ) -> None:
        self.dtype, self.timeout_s, self.fabric, self.lr = dtype, timeout_s, fabric, lr
        self.folder = folder
        self.model_dir = make_model(folder / "model", model, dtype)
        self.team = Team(folder, package="weightsync.demo.vllm")
        self.trainers: list[Worker] = []
        self.servers: list[Worker] = []
        self.engines: list[Worker] = []
        self.apis: dict[Worker, Api] = {}
        self.ready: dict[Worker, Message] = {}
        self.job = Job.start(
            f"unix:{folder}/job",
            min_replicas=min_replicas,
            lease_s=40.0,  # what is frozen in a test is not to be taken for lost
            journal=folder / "journal",
        )

    def start_trainers(self, count: int) -> None:
        for rank in range(count):
            options = {
                "rank": rank,
                "world_size": count,
                "folder": str(self.folder),
                "model": str(self.model_dir),
                "dtype": self.dtype,
                "lr": self.lr,
                "job": self.job.url,
                "timeout_s": self.timeout_s,
                "is_random": True,  # text would have it say the same at every step
                "fabric": self.fabric,
            }
            self.trainers.append(self.team.start(f"trainer {rank}", "trainer", **options))

    def start_server(self, name: str, *, tp: int, **options: Any) -> Worker:
        server = self._start(name, "server", tp, **options)
        self.servers.append(server)
        return server

    def start_engine(self, name: str, *, tp: int) -> Worker:
        engine = self._start(name, "engine", tp)
        self.engines.append(engine)
        return engine

    def _start(self, name: str, role: str, tp: int, **options: Any) -> Worker:
        return self.team.start(
            name, role, model=str(self.model_dir), tp=tp, dtype=self.dtype, **options
        )

    def wait_ready(self) -> None:
        events = self.ready = self.team.wait(self.team.workers, "ready", timeout_s=_START_S)
        for server in self.servers:
            self.apis[server] = Api(events[server]["url"])

    def attach(self, **options: Any) -> None:
        """Engines join, then trainers."""
        if self.servers:
            urls = [self.apis[server].url for server in self.servers]
            attach(urls, job=self.job, fabric=self.fabric, **options)
        for engine in self.engines:
            engine.send("attach", job=self.job.url, fabric=self.fabric)
        self._checked(self.engines, "attached")
        for trainer in self.trainers:
            trainer.send("join")
        self._checked(self.trainers, "joined")

    def train(self) -> float:
        for trainer in self.trainers:
            trainer.send("train")
        return float(self._checked(self.trainers, "trained")[self.trainers[0]]["loss"])

    def start_publish(self, **options: Any) -> None:
        for trainer in self.trainers:
            trainer.send("publish", **options)
        for engine in self.engines:
            engine.send("refit", timeout_s=self.timeout_s)

    def publish(self, **options: Any) -> Message:
        """Publish and have everything adopted; the report of trainer 0."""
        self.start_publish(**options)
        events = self._checked(self.trainers, "published")
        for event in self._checked(self.engines, "refitted").values():
            assert event["shown"] == str(event["version"])
        return events[self.trainers[0]]

    def shown_version(self) -> str:
        """What vLLM's own endpoints say, of all servers alike."""
        if not self.servers:
            return str(self.job.status()["committed_version"])
        deadline = time.monotonic() + 10.0
        while True:  # it is shown a moment after it is adopted
            shown = {api.weight_version() for api in self.apis.values()}
            wanted = str(self.job.status()["committed_version"])
            if shown == {wanted} or time.monotonic() > deadline:
                return ",".join(sorted(shown))
            time.sleep(0.01)

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        for engine in self.engines:
            engine.send("generate", prompts=prompts, num_tokens=num_tokens)
        made = [event["tokens"] for event in self._checked(self.engines, "generated").values()]
        for api in self.apis.values():
            made.append([api.generate(prompt, num_tokens) for prompt in prompts])
        assert all(tokens == made[0] for tokens in made), "engines disagree"
        return [list(tokens) for tokens in made[0]]

    def judge(
        self, prompts: list[list[int]], tokens: list[list[int]]
    ) -> tuple[list[list[int]], list[list[float]], list[list[float]]]:
        """What transformers says on the weights of the last step; see `judge_tokens`."""
        self.trainers[0].send("judge", prompts=prompts, tokens=tokens)
        event = self._checked([self.trainers[0]], "judged")[self.trainers[0]]
        return event["best"], event["lead"], event["sure"]

    def _checked(self, workers: list[Worker], kind: str) -> dict[Worker, Message]:
        events = self.team.wait(workers, (kind, "aborted", "refused"), timeout_s=_STEP_S)
        for worker, event in events.items():
            assert event["event"] == kind, f"{worker.name}: {event}\n{worker.log_tail()}"
        return events

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None:
            self.team.dismiss(30.0)
        self.team.__exit__(None, None, None)
        self.job.close()


def make_model(folder: Path, model: str, dtype: str) -> Path:
    """A checkpoint with random weights, other ones than the trainers begin with."""
    import torch

    from weightsync.demo.model import build_model

    torch.manual_seed(1)
    made: Any = build_model(model_config(model), getattr(torch, dtype))
    made.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == model
    return folder
