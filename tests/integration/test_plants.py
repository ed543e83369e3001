"""Planted layout bugs: the digest refuses each, and without it the read-back sees each."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from weightsync import plants
from weightsync.client import Job, Sink, Source
from weightsync.demo.model import model_config
from weightsync.errors import IntegrityError, VersionAbortedError
from weightsync.integrations import readback
from weightsync.planners import rules

TIMEOUT_S = 20.0
# kv heads are held twice by the four ranks of a qwen3 replica. What the read-back names first.
CASES = [
    ("k_v", "qwen3", 2, "layers.0.self_attn.k_proj"),
    ("gate_up", "qwen3", 2, "layers.0.mlp.gate_proj"),
    ("kv_head", "qwen3", 4, "layers.0.self_attn.k_proj"),
    ("row_shift", "qwen3", 2, "layers.0.self_attn.q_proj"),
    ("experts", "qwen3_moe", 2, "layers.1.mlp.experts.0.down_proj"),
]


def read_back(config: dict[str, Any], tp: int) -> str | None:
    """Publish one version to one replica; the first tensor that is not what was published."""
    random = torch.Generator().manual_seed(1)
    shapes = rules.canonical_tensors(rules.model_config(config))
    published = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    layout = rules.vllm(config, tp=tp)
    live = [
        {p.name: torch.zeros(p.shape, dtype=torch.bfloat16) for p in layout.parameters(rank)}
        for rank in range(tp)
    ]
    with ExitStack() as stack:
        job = stack.enter_context(Job.start())
        pool = stack.enter_context(ThreadPoolExecutor(tp))
        common: dict[str, Any] = {"job": job, "timeout_s": TIMEOUT_S}
        source = stack.enter_context(Source(published, rank=0, world_size=1, **common))
        sinks = [
            stack.enter_context(
                Sink(
                    live[rank], layout=layout, replica="a", rank=rank, world_size=tp, **common
                )
            )
            for rank in range(tp)
        ]  # fmt: skip
        source.publish()
        for refit in [pool.submit(sink.refit) for sink in sinks]:
            refit.result(TIMEOUT_S)
    try:
        found = readback.unshard(live, config, tp=tp)
    except IntegrityError as error:  # ranks that must hold the same hold different values
        return str(error.tensor)
    for name in sorted(published):
        if not torch.equal(found[name], published[name].to(torch.bfloat16)):
            return name
    return None


@pytest.mark.parametrize(("model", "tp"), [("qwen3", 4), ("qwen3_moe", 2)])
def test_without_a_bug_all_is_well(model: str, tp: int) -> None:
    assert read_back(model_config(model), tp) is None


@pytest.mark.parametrize(("plant", "model", "tp", "tensor"), CASES)
def test_the_digest_refuses_it(
    monkeypatch: pytest.MonkeyPatch, plant: str, model: str, tp: int, tensor: str
) -> None:
    monkeypatch.setenv(plants.ENV_PLANT, plant)
    plants.install(monkeypatch.setattr)
    with pytest.raises(VersionAbortedError, match="holds other values") as caught:
        read_back(model_config(model), tp)
    assert isinstance(caught.value.__cause__, IntegrityError)


@pytest.mark.parametrize(("plant", "model", "tp", "tensor"), CASES)
def test_without_the_digest_the_read_back_sees_it(
    monkeypatch: pytest.MonkeyPatch, plant: str, model: str, tp: int, tensor: str
) -> None:
    monkeypatch.setenv(plants.ENV_PLANT, plant)
    monkeypatch.setenv(plants.ENV_SKIP_DIGEST, "1")
    plants.install(monkeypatch.setattr)
    found = read_back(model_config(model), tp)
    assert found is not None
    assert tensor in found
