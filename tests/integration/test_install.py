"""Sinks that make versions live by themselves: what engines with formats of their own build on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from torch import Tensor

from weightsync import ConfigError, Job, Sink, Source, TornError
from weightsync.integrations.readback import shard
from weightsync.planners import rules

CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "tie_word_embeddings": False,
}


class Engine:
    """Two ranks; keeps copies of what it was given, and can be told to fail."""

    def __init__(self, job: Job) -> None:
        self.live: list[dict[str, Tensor]] = [{}, {}]
        self.fails_on: int | None = None
        # What a rank that does not fail waits for while it installs.
        self.waits_for: Callable[[int], bool] = lambda rank: True
        layout = rules.vllm(CONFIG, tp=2)
        self.sinks = [
            Sink(
                None,
                install=lambda staged, rank=rank: self.install(rank, staged),
                layout=layout,
                replica="a",
                rank=rank,
                world_size=2,
                job=job,
            )
            for rank in range(2)
        ]

    def install(self, rank: int, staged: Mapping[str, Tensor]) -> None:
        if rank == self.fails_on:
            raise RuntimeError("the kernels do not take it")
        deadline = time.monotonic() + 10.0
        while not self.waits_for(rank) and time.monotonic() < deadline:
            time.sleep(0.001)
        self.live[rank] = {name: tensor.clone() for name, tensor in staged.items()}

    def refit(self, timeout_s: float = 20.0) -> list[BaseException | int]:
        """Both ranks at once; what each of them said."""
        found: list[BaseException | int] = [0, 0]

        def one(rank: int) -> None:
            try:
                found[rank] = self.sinks[rank].refit(timeout_s=timeout_s)
            except Exception as error:  # noqa: BLE001 - the test looks at it
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


@pytest.fixture
def job() -> Iterator[Job]:
    with Job.start() as made:
        yield made


@pytest.fixture
def engine(job: Job) -> Iterator[Engine]:
    made = Engine(job)
    yield made
    for sink in made.sinks:
        sink.close()


def weights() -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in rules.canonical_tensors(CONFIG).items()}


def test_staged_tensors_are_handed_over(job: Job, engine: Engine) -> None:
    named = weights()
    with Source(named, job=job, rank=0, world_size=1) as source:
        update = source.start_publish()
        update.wait("committed")
        assert [sink.wait_committed(5.0) for sink in engine.sinks] == [1, 1]
        assert engine.refit() == [1, 1]
        report = update.wait("adopted")
    for rank in range(2):
        wanted = shard({n: t.bfloat16() for n, t in named.items()}, CONFIG, tp=2, rank=rank)
        assert engine.live[rank].keys() == wanted.keys()
        for name, tensor in wanted.items():
            got = engine.live[rank][name]
            assert (got.dtype, got.ndim) == (torch.bfloat16, 1)
            assert torch.equal(got.view(torch.int16), tensor.flatten().view(torch.int16))
    # The report says where the sinks' time went, of the slowest of them.
    stages = report.stages_s
    assert 0 < stages["sink_verify"] <= stages["sink_fill"]
    assert stages["sink_pause"] > 0


def test_nothing_to_adopt(engine: Engine) -> None:
    assert engine.sinks[0].wait_committed(0.05) is None


def test_a_rank_that_copies_longer_than_the_deadline_tears_nothing(
    job: Job, engine: Engine
) -> None:
    """The other has its new weights by then and cannot go back."""
    with Source(weights(), job=job, rank=0, world_size=1) as source:
        source.publish()
        assert [sink.wait_committed(5.0) for sink in engine.sinks] == [1, 1]
        begin, limit_s = time.monotonic(), 1.0
        engine.waits_for = lambda rank: rank == 0 or time.monotonic() > begin + 2 * limit_s
        assert engine.refit(limit_s) == [1, 1]


def test_a_rank_that_fails_tears_its_replica(job: Job, engine: Engine) -> None:
    with Source(weights(), job=job, rank=0, world_size=1) as source:
        source.publish()
        engine.fails_on = 1
        # It is told that the other rank failed while it is still busy.
        engine.waits_for = lambda rank: engine.sinks[0].is_torn
        said = engine.refit()
        assert isinstance(said[0], TornError)
        assert isinstance(said[1], RuntimeError)
        assert [sink.is_torn for sink in engine.sinks] == [True, True]
        assert [sink.version for sink in engine.sinks] == [None, None]
        # The next version repairs it.
        engine.fails_on = None
        engine.waits_for = lambda rank: True
        source.publish()
        assert engine.refit() == [2, 2]
        assert [sink.is_torn for sink in engine.sinks] == [False, False]


def test_arguments_that_do_not_go_together(job: Job) -> None:
    shared = {"layout": rules.vllm(CONFIG), "replica": "a", "rank": 0, "world_size": 1, "job": job}
    with pytest.raises(ConfigError, match="either weights or install"):
        Sink(None, **shared)
    with pytest.raises(ConfigError, match="either weights or install"):
        Sink({}, install=lambda staged: None, **shared)
    with pytest.raises(ConfigError, match="stages nothing"):
        Sink(None, install=lambda staged: None, mode="in_place", **shared)
