from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from support.layout_oracle import TINY_MODELS, build_model, checkpoint
from weightsync.ir.dtypes import Dtype
from weightsync.planners.rules import (
    canonical_dtypes,
    canonical_tensors,
    transformers_buffers,
    transformers_parameters,
)

MODELS = Path(__file__).parents[2] / "configs" / "model"
REAL = sorted(path.stem for path in MODELS.glob("*.json"))


def assert_equals_transformers(config: dict[str, Any]) -> None:
    model = build_model(config, "meta")
    expected = {name: tuple(tensor.shape) for name, tensor in checkpoint(model, config).items()}
    assert dict(canonical_tensors(config)) == expected
    live = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {name: p.shape for name, p in transformers_parameters(config).items()} == live
    stored = {name for name in model.state_dict() if name not in live and name in expected}
    assert set(transformers_buffers(config)) == stored
    # What transformers keeps in F32 whatever the model's dtype is what the checkpoint has in F32.
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    own = {name: Dtype.F32 for name in expected if any(word in name for word in kept)}
    assert dict(canonical_dtypes(config)) == own


@pytest.mark.parametrize("name", TINY_MODELS)
def test_names_and_shapes_equal_the_real_class(name: str) -> None:
    assert_equals_transformers(TINY_MODELS[name])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("glm4_moe", {"use_qk_norm": False, "attention_bias": False}),
        ("gpt_oss", {"attention_bias": False, "tie_word_embeddings": True}),
        ("deepseek_v3", {"attention_bias": True, "first_k_dense_replace": 2}),
        ("qwen3", {"attention_bias": True}),
    ],
)
def test_switches_equal_the_real_class(name: str, change: dict[str, Any]) -> None:
    assert_equals_transformers({**TINY_MODELS[name], **change})


@pytest.mark.parametrize("name", REAL)
def test_published_models_equal_the_real_class(name: str) -> None:
    content = json.loads((MODELS / f"{name}.json").read_text())
    shapes = canonical_tensors(content)
    assert sum(math.prod(shape) for shape in shapes.values()) == content["parameters"]
    # Sparse layers of a model are alike, and dense ones: two are enough for the slow real class.
    few = {"num_hidden_layers": 2}
    if "first_k_dense_replace" in content["config"]:
        few["first_k_dense_replace"] = 1
    assert_equals_transformers({**content["config"], **few})


def test_the_published_models_are_there() -> None:
    assert set(REAL) >= {
        "deepseek-v3",
        "glm-4.5",
        "glm-4.6",
        "gpt-oss-120b",
        "kimi-k2",
        "llama-3.1-405b",
        "llama-3.1-8b",
        "qwen3-0.6b",
        "qwen3-235b-a22b",
        "qwen3-30b-a3b",
    }


@pytest.mark.parametrize("name", TINY_MODELS)
def test_fused_parameters_hold_every_tensor_once(name: str) -> None:
    held: dict[str, int] = {}
    config = TINY_MODELS[name]
    both = (*transformers_parameters(config).values(), *transformers_buffers(config).values())
    for parameter in both:
        assert sum(math.prod(part.n) for part in parameter.parts) == math.prod(parameter.shape)
        for part in parameter.parts:
            held[part.tensor] = held.get(part.tensor, 0) + math.prod(part.n)
    shapes = canonical_tensors(config)
    assert held == {tensor: math.prod(shape) for tensor, shape in shapes.items()}
