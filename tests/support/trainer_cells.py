"""The layout matrix of trainers: which of them, cut how, sends to which engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from support.layout_oracle import (
    TINY_DEEPSEEK_V3,
    TINY_GLM4_MOE,
    TINY_GPT_OSS,
    TINY_KIMI_K2,
    TINY_LLAMA,
    TINY_QWEN3,
    TINY_QWEN3_MOE,
)
from support.megatron_oracle import MegatronCut
from weightsync.planners import rules

__all__ = ["LIVE_CELLS", "MEGATRON_CELLS", "ZERO3_CELLS", "MegatronCell", "Zero3Cell"]

Config = dict[str, Any]

QWEN3_MOE = {**TINY_QWEN3_MOE, "num_hidden_layers": 4, "mlp_only_layers": [1]}
# Compressions that two ranks divide.
DEEPSEEK_EVEN = {**TINY_DEEPSEEK_V3, "kv_lora_rank": 10, "num_hidden_layers": 3}
# Megatron has no biases in latent attention.
KIMI_PLAIN = {**TINY_KIMI_K2, "attention_bias": False}
GLM_EVEN = {**TINY_GLM4_MOE, "n_routed_experts": 6, "num_hidden_layers": 3}
GPT_OSS = {**TINY_GPT_OSS, "num_local_experts": 4, "num_hidden_layers": 2}


@dataclass(frozen=True)
class MegatronCell:
    """A model, its degrees for the rule, the same for the oracle, and the engines it sends to."""

    name: str
    config: Config
    degrees: Mapping[str, Any]
    cut: MegatronCut
    engines: Sequence[Mapping[str, Any]] = field(default=({"tp": 1},))

    def layout(self, dtype: str = "F32") -> rules.MegatronLayout:
        return rules.megatron(self.config, dtype=dtype, **self.degrees)


@dataclass(frozen=True)
class Zero3Cell:
    """A model over some ranks, and the engines it sends to."""

    name: str
    config: Config
    dp: int
    engines: Sequence[Mapping[str, Any]] = field(default=({"tp": 1},))


MEGATRON_CELLS = [
    MegatronCell(
        "llama tp2, all biases",
        TINY_LLAMA,
        {"tp": 2},
        MegatronCut([[[0]]], tp=2),
        ({"tp": 1}, {"tp": 4}),
    ),
    MegatronCell(
        "llama tp4 dp2, vocabulary as it is",
        TINY_LLAMA,
        {"tp": 4, "dp": 2, "vocab_divisible_by": 1, "transformer_engine": False},
        MegatronCut([[[0]]], tp=4, copies=2, te=False, vocab_multiple=1),
        ({"tp": 2},),
    ),
    MegatronCell(
        "qwen3 tp4 pp2, inside kv heads, tied over stages",
        TINY_QWEN3,
        {"tp": 4, "pp": 2},
        MegatronCut([[[0]], [[1]]], tp=4),
        ({"tp": 2}, {"tp": 4}, {"pp": 2}),
    ),
    MegatronCell(
        "qwen3 tp2 pp2 vpp2",
        {**TINY_QWEN3, "num_hidden_layers": 8},
        {"tp": 2, "pp": 2, "vpp": 2},
        MegatronCut([[[0, 1], [4, 5]], [[2, 3], [6, 7]]], tp=2),
        ({"tp": 2},),
    ),
    MegatronCell(
        "qwen3 moe tp2 ep2",
        QWEN3_MOE,
        {"tp": 2, "ep": 2, "etp": 1},
        MegatronCut([[[0, 1, 2, 3]]], tp=2, ep=2),
        ({"tp": 2, "ep": True}, {"tp": 4}),
    ),
    MegatronCell(
        "qwen3 moe tp2 dp2 etp2, sequential experts",
        QWEN3_MOE,
        {"tp": 2, "dp": 2, "transformer_engine": False},
        MegatronCut([[[0, 1, 2, 3]]], tp=2, etp=2, copies=2, te=False, experts="sequential"),
        ({"tp": 4},),
    ),
    MegatronCell(
        "qwen3 moe dp2 cp2 pp2 ep2 etp2, one tensor of experts",
        QWEN3_MOE,
        {"dp": 2, "cp": 2, "pp": 2, "ep": 2, "etp": 2, "experts": "single"},
        MegatronCut([[[0, 1]], [[2, 3]]], ep=2, etp=2, copies=4, experts="single"),
        ({"tp": 2, "dp": 2, "ep": True},),
    ),
    MegatronCell(
        "deepseek tp2 dp3 ep3",
        TINY_DEEPSEEK_V3,
        {"tp": 2, "dp": 3, "ep": 3},
        MegatronCut([[[0, 1]]], tp=2, ep=3, etp=2, copies=3),
        ({"tp": 2}, {"tp": 2, "dp": 2, "ep": True}),
    ),
    MegatronCell(
        "deepseek tp2 pp2, compressions cut, uneven stages",
        DEEPSEEK_EVEN,
        {"tp": 2, "pp": 2, "first_layers": 1, "transformer_engine": False, "experts": "sequential"},
        MegatronCut([[[0]], [[1, 2]]], tp=2, etp=2, te=False, experts="sequential"),
        ({"tp": 4},),
    ),
    MegatronCell(
        "kimi tp2 ep2, direct queries",
        KIMI_PLAIN,
        {"tp": 2, "dp": 2, "ep": 2, "etp": 1},
        MegatronCut([[[0]]], tp=2, ep=2, copies=2),
        ({"tp": 2, "ep": True},),
    ),
    MegatronCell(
        "glm tp2 pp2 ep2, drawn stages",
        GLM_EVEN,
        {"tp": 2, "pp": 2, "ep": 2, "etp": 1, "pipeline_layout": "Ett|tL"},
        MegatronCut([[[0, 1]], [[2]]], tp=2, ep=2),
        ({"tp": 2}, {"tp": 4, "ep": True}),
    ),
    MegatronCell(
        "gpt-oss tp2 pp2 ep2",
        GPT_OSS,
        {"tp": 2, "pp": 2, "ep": 2, "etp": 1},
        MegatronCut([[[0]], [[1]]], tp=2, ep=2),
        ({"tp": 2}, {"tp": 2, "ep": True}),
    ),
    MegatronCell(
        "gpt-oss dp2, one tensor of experts",
        GPT_OSS,
        {"dp": 2, "ep": 2, "experts": "single"},
        MegatronCut([[[0, 1]]], ep=2, copies=2, experts="single"),
        ({"tp": 2},),
    ),
    MegatronCell(
        "gpt-oss pp2, sequential experts",
        GPT_OSS,
        {"pp": 2, "transformer_engine": False},
        MegatronCut([[[0]], [[1]]], te=False, experts="sequential"),
    ),
]

# Without Transformer Engine, whose modules need GPUs, Megatron-Core's own can be built here.
LOCAL = {"transformer_engine": False}
LOCAL_CUT = {"te": False, "experts": "sequential"}
MEGATRON_CELLS += [
    MegatronCell(
        "llama tp2, own modules",
        TINY_LLAMA,
        {"tp": 2, **LOCAL},
        MegatronCut([[[0]]], tp=2, te=False),
        ({"tp": 4},),
    ),
    MegatronCell(
        "qwen3 tp4, own modules, inside kv heads",
        TINY_QWEN3,
        {"tp": 4, **LOCAL},
        MegatronCut([[[0, 1]]], tp=4, te=False),
        ({"tp": 2}, {"tp": 4}),
    ),
    MegatronCell(
        "qwen3 tp2 pp2, own modules, tied over stages",
        TINY_QWEN3,
        {"tp": 2, "pp": 2, **LOCAL},
        MegatronCut([[[0]], [[1]]], tp=2, te=False),
        ({"tp": 4}, {"pp": 2}),
    ),
    MegatronCell(
        "qwen3 tp2 pp2 vpp2, own modules",
        {**TINY_QWEN3, "num_hidden_layers": 8},
        {"tp": 2, "pp": 2, "vpp": 2, **LOCAL},
        MegatronCut([[[0, 1], [4, 5]], [[2, 3], [6, 7]]], tp=2, te=False),
    ),
    MegatronCell(
        "qwen3 pp4, own modules, embedding and loss counted",
        {**TINY_QWEN3, "num_hidden_layers": 6},
        {"pp": 4, "account_for_embedding": True, "account_for_loss": True, **LOCAL},
        MegatronCut([[[0]], [[1, 2]], [[3, 4]], [[5]]], te=False),
    ),
    MegatronCell(
        "qwen3 moe tp2 ep2, own modules",
        QWEN3_MOE,
        {"tp": 2, "ep": 2, "etp": 1, **LOCAL},
        MegatronCut([[[0, 1, 2, 3]]], tp=2, ep=2, **LOCAL_CUT),
        ({"tp": 2, "ep": True},),
    ),
    MegatronCell(
        "qwen3 moe dp4 ep2 etp2, own modules",
        QWEN3_MOE,
        {"dp": 4, "ep": 2, "etp": 2, **LOCAL},
        MegatronCut([[[0, 1, 2, 3]]], ep=2, etp=2, copies=4, **LOCAL_CUT),
        ({"tp": 4},),
    ),
    MegatronCell(
        "kimi tp2 ep2, own modules, direct queries",
        {**KIMI_PLAIN, "kv_lora_rank": 10},
        {"tp": 2, "ep": 2, "etp": 1, **LOCAL},
        MegatronCut([[[0]]], tp=2, ep=2, **LOCAL_CUT),
        ({"tp": 2, "ep": True},),
    ),
    MegatronCell(
        "glm tp2 pp2 ep2, own modules, drawn stages",
        GLM_EVEN,
        {"tp": 2, "pp": 2, "ep": 2, "etp": 1, "pipeline_layout": "Ett|tL", **LOCAL},
        MegatronCut([[[0, 1]], [[2]]], tp=2, ep=2, **LOCAL_CUT),
        ({"tp": 2, "ep": True},),
    ),
    MegatronCell(
        "gpt-oss tp2 ep2, own modules",
        GPT_OSS,
        {"tp": 2, "ep": 2, "etp": 1, **LOCAL},
        MegatronCut([[[0, 1]]], tp=2, ep=2, **LOCAL_CUT),
        ({"tp": 2, "ep": True},),
    ),
]
LIVE_CELLS = [c for c in MEGATRON_CELLS if not c.cut.te and c.cut.world_size <= 4]

ZERO3_CELLS = [
    Zero3Cell("llama 3", TINY_LLAMA, 3, ({"tp": 1}, {"tp": 4})),
    Zero3Cell("qwen3 5", TINY_QWEN3, 5, ({"tp": 4}, {"pp": 2})),
    Zero3Cell("qwen3 40, more ranks than a norm has elements", TINY_QWEN3, 40, ({"tp": 2},)),
    Zero3Cell("qwen3 moe 7", TINY_QWEN3_MOE, 7, ({"tp": 2, "ep": True}, {"tp": 4})),
    Zero3Cell("qwen3 moe 16", TINY_QWEN3_MOE, 16, ({"tp": 2},)),
    Zero3Cell("deepseek 6", TINY_DEEPSEEK_V3, 6, ({"tp": 2}, {"tp": 2, "dp": 2, "ep": True})),
    Zero3Cell("kimi 3, direct queries", KIMI_PLAIN, 3, ({"tp": 2, "ep": True},)),
    Zero3Cell("glm 5", TINY_GLM4_MOE, 5, ({"tp": 2},)),
    Zero3Cell("gpt-oss 3", TINY_GPT_OSS, 3, ({"tp": 2},)),
    Zero3Cell("gpt-oss 11", GPT_OSS, 11, ({"tp": 2, "ep": True},)),
]
