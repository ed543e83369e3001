from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from support.layout_oracle import (
    TINY_DEEPSEEK_V3,
    TINY_GLM4_MOE,
    TINY_LLAMA,
    TINY_QWEN3,
    TINY_QWEN3_MOE,
    assert_holds,
    build_model,
    checkpoint,
    number_elements,
    read_buffers,
)
from support.titan import titan_module, titan_tensors
from weightsync.errors import ConfigError
from weightsync.live.layout import module_layout
from weightsync.live.weights import SourceWeights
from weightsync.planners import rules

MODELS: dict[str, dict[str, Any]] = {
    "llama": {**TINY_LLAMA, "attention_bias": False, "mlp_bias": False},
    "qwen3": TINY_QWEN3,
    "qwen3_moe": TINY_QWEN3_MOE,
    "deepseek_v3": TINY_DEEPSEEK_V3,
    "deepseek_v3 lite": {**TINY_DEEPSEEK_V3, "q_lora_rank": None},
}
RELEASES = ["0.3", "0.3 separate", "0.2"]


def numbered(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    model = build_model(config)
    number_elements(model)
    return checkpoint(model, config)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("release", RELEASES)
def test_live_modules_hold_the_checkpoint(name: str, release: str) -> None:
    config = MODELS[name]
    named = numbered(config)
    live = module_layout(titan_module(named, config, release=release), config=config)
    assert set(live.manifest().tensors.names) == set(named)
    tensors = live.tensors()
    read_buffers(live.manifest(), named)
    assert_holds(tensors, live.manifest(), named)
    held = sum(tensor.numel() for tensor in tensors.values())
    assert held == sum(tensor.numel() for tensor in named.values())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fused_qkv", [True, False])
def test_the_rule_lists_the_names_and_shapes_of_the_module(name: str, fused_qkv: bool) -> None:
    config = MODELS[name]
    release = "0.3" if fused_qkv else "0.3 separate"
    expected = titan_tensors(numbered(config), config, release=release)
    buffers = {n for n in expected if n.endswith("expert_bias_E")}
    parameters = rules.torchtitan_parameters(config, fused_qkv=fused_qkv)
    assert {n: p.shape for n, p in parameters.items()} == {
        n: tuple(tensor.shape) for n, tensor in expected.items() if n not in buffers
    }
    with_place = buffers if config["model_type"] == "deepseek_v3" else set()
    assert set(rules.torchtitan_buffers(config)) == with_place
    for parameter in parameters.values():
        assert sum(math.prod(part.n) for part in parameter.parts) == math.prod(parameter.shape)


def test_what_the_checkpoint_has_no_place_for_is_listed() -> None:
    module = titan_module(numbered(TINY_QWEN3_MOE), TINY_QWEN3_MOE)
    module.add_module("mtp_layers", torch.nn.ModuleDict({"0": torch.nn.Linear(2, 2)}))
    live = module_layout(module, config=TINY_QWEN3_MOE)
    assert live.skipped == (
        "mtp_layers.0.weight",
        "mtp_layers.0.bias",
        "layers.0.moe.expert_bias_E",
    )
    assert not set(live.skipped) & set(live.tensors())


def test_a_source_takes_a_live_layout() -> None:
    module = titan_module(numbered(TINY_QWEN3_MOE), TINY_QWEN3_MOE)
    live = module_layout(module, config=TINY_QWEN3_MOE, rank=0)
    source = SourceWeights(module, layout=live, rank=0, dtype=None)
    source.prepare()
    assert source.manifest.to_bytes() == live.manifest().to_bytes()
    assert source.addresses().tolist() == [t.data_ptr() for t in live.tensors().values()]


def test_rows_of_a_llama_head_alternate_between_its_halves() -> None:
    parameter = rules.torchtitan_parameters(MODELS["llama"])[
        "layers.0.attention.qkv_linear.wqkv.weight"
    ]
    # 2 query heads of 4 rows, a key and a value for each of 2 kv heads.
    first, second = (part for part in parameter.parts if part.at[0] in (0, 1))
    assert (first.lo, first.n, first.jump) == ((0, 0), (2, 16), (2, 1))
    assert (second.lo, second.n, second.at) == ((2, 0), (2, 16), (1, 0))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TINY_GLM4_MOE, "glm4_moe is not known; known are llama, qwen3"),
        (TINY_LLAMA, "attention_bias on llama: torchtitan's projections have none"),
        ({**MODELS["llama"], "mlp_bias": True}, "mlp_bias on llama"),
    ],
)
def test_models_that_torchtitan_has_not_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rules.torchtitan_parameters(config)
    assert rules.torchtitan_parameter(config, "tok_embeddings.weight") is None
