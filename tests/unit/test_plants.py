from __future__ import annotations

import functools

import numpy as np
import pytest

from support.oracle import execute, memory_of
from weightsync import plants
from weightsync.demo.model import model_config
from weightsync.errors import ConfigError, PlanError
from weightsync.ir import Arena, Manifest, Plan
from weightsync.ir.validate import validate_content, validate_structure
from weightsync.planners import rules
from weightsync.planners.planner import plan_transfer

# kv heads are held twice by the four ranks of a qwen3 replica.
CASES = [
    ("k_v", "qwen3", 2),
    ("gate_up", "qwen3", 2),
    ("gate_up", "qwen3_moe", 2),
    ("kv_head", "qwen3", 4),
    ("row_shift", "qwen3", 1),
    ("row_shift", "qwen3_moe", 2),
    ("experts", "qwen3_moe", 2),
]


@functools.cache
def right_plan(model: str, tp: int) -> Plan:
    config = model_config(model)
    trainer, engine = rules.fsdp2(config, fsdp=2), rules.vllm(config, tp=tp)
    source = Manifest.merge("source", [trainer.manifest(rank) for rank in range(2)])
    sink = Manifest.merge("sink", [engine.manifest(rank) for rank in range(tp)])
    return plan_transfer(source, sink)


def wrong_buffers(plan: Plan) -> set[str]:
    """Buffers that hold other values than the sinks' own layout says."""
    arenas, counts = execute(plan)
    assert all((count <= 1).all() for count in counts)
    expected = memory_of(plan.sink)
    found = set()
    for rank in range(len(plan.sink.ranks)):
        arena = Arena(plan.sink, rank)
        for buffer, offset in zip(arena.buffers.tolist(), arena.offset_bytes.tolist(), strict=True):
            content = expected[buffer].view(np.uint8)
            if not np.array_equal(arenas[rank][offset : offset + len(content)], content):
                found.add(f"{rank}:{plan.sink.buffers.names[buffer]}")
    return found


@pytest.mark.parametrize(("plant", "model", "tp"), CASES)
def test_a_planted_plan_has_the_right_form_and_wrong_content(
    plant: str, model: str, tp: int
) -> None:
    right = right_plan(model, tp)
    bad = plants.apply(right, plant)
    assert bad.sink == right.sink
    assert bad.digest != right.digest
    assert bad.digest == plants.apply(right, plant).digest, "every party must plant the same"
    validate_structure(bad)
    with pytest.raises(PlanError):
        validate_content(bad)


@pytest.mark.parametrize(
    ("plant", "model", "tp", "names"),
    [
        ("k_v", "qwen3", 2, {f"{r}:model.layers.0.self_attn.qkv_proj.weight" for r in (0, 1)}),
        ("gate_up", "qwen3", 2, {f"{r}:model.layers.0.mlp.gate_up_proj.weight" for r in (0, 1)}),
        ("kv_head", "qwen3", 4, {"1:model.layers.0.self_attn.qkv_proj.weight"}),
        ("row_shift", "qwen3", 2, {"0:model.layers.0.self_attn.qkv_proj.weight"}),
        (
            "experts",
            "qwen3_moe",
            2,
            {
                f"{r}:model.layers.1.mlp.experts.routed_experts.{part}_weight"
                for r in (0, 1)
                for part in ("w13", "w2")
            },
        ),
    ],
)
def test_only_the_planted_tensors_are_wrong(
    plant: str, model: str, tp: int, names: set[str]
) -> None:
    right = right_plan(model, tp)
    assert wrong_buffers(right) == set()
    assert wrong_buffers(plants.apply(right, plant)) == names


def test_a_bug_needs_a_model_that_can_have_it() -> None:
    with pytest.raises(ConfigError, match=r"experts\.0"):
        plants.apply(right_plan("qwen3", 2), "experts")
    with pytest.raises(ConfigError, match="kv heads"):
        plants.apply(right_plan("qwen3", 1), "kv_head")
    with pytest.raises(ConfigError, match="k_v, gate_up"):
        plants.apply(right_plan("qwen3", 1), "typo")


def test_the_environment_asks_for_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(plants.ENV_PLANT, raising=False)
    assert plants.requested() is None
    monkeypatch.setenv(plants.ENV_PLANT, "k_v")
    assert plants.requested() == "k_v"
    monkeypatch.setenv(plants.ENV_PLANT, "typo")
    with pytest.raises(ConfigError, match="typo"):
        plants.requested()
