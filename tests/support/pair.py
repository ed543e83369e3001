"""The smallest fleet of real members in one process: a source and a replica of two sinks."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import torch

from support.toy import SHAPES, ToySinkLayout, ToySourceLayout, expected_sink, toy_shard, toy_sink
from weightsync.client import Job, Sink, Source

__all__ = ["TIMEOUT_S", "Pair", "join_source", "until_lost"]

TIMEOUT_S = 20.0


class Pair:
    """One source and a replica of two sinks, in this process."""

    def __init__(self, stack: ExitStack, job: Job | str) -> None:
        self.pool = stack.enter_context(ThreadPoolExecutor(4))
        self.values = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        self.shard = toy_shard(self.values, 0, 1)
        self.source = stack.enter_context(join_source(job, self.shard))
        self.live = [toy_sink(2) for _ in range(2)]
        self.sinks = [
            stack.enter_context(
                Sink(
                    self.live[rank], layout=ToySinkLayout(2), replica="a", rank=rank, world_size=2,
                    job=job, timeout_s=TIMEOUT_S,
                )
            )
            for rank in range(2)
        ]  # fmt: skip

    def step(self, seed: int) -> int:
        """Train, publish, refit, compare; the version that all now hold."""
        generator = torch.Generator().manual_seed(seed)
        for name, value in self.values.items():
            value.copy_(torch.randn(value.shape, generator=generator))
            self.shard[name].copy_(value)
        version = self.source.publish(timeout_s=TIMEOUT_S).version
        assert list(self.pool.map(Sink.refit, self.sinks)) == [version] * 2
        for rank, live in enumerate(self.live):
            for name, value in expected_sink(self.values, rank, 2).items():
                assert torch.equal(live[name].view(torch.int16), value.view(torch.int16)), name
        return version


def join_source(job: Job | str, shard: dict[str, torch.Tensor] | None = None) -> Source:
    weights = toy_shard({n: torch.zeros(s) for n, s in SHAPES.items()}, 0, 1)
    return Source(
        weights if shard is None else shard, layout=ToySourceLayout(1), rank=0, world_size=1,
        job=job, timeout_s=TIMEOUT_S,
    )  # fmt: skip


def until_lost(*sides: Source | Sink) -> None:
    """Wait until all know that the coordinator is gone: a publish that it got is lost with it."""
    deadline = time.monotonic() + TIMEOUT_S
    while any(side._member.session is not None for side in sides):
        assert time.monotonic() < deadline
        time.sleep(0.005)
