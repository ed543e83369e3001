"""The cells of the layout matrix: families at true widths, times degrees, times sources."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.vllm_ranks import Degrees

__all__ = ["CELLS", "Cell", "config_of"]

_MODELS = Path(__file__).resolve().parents[2] / "configs" / "model"
_BLOCK_FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
}


@dataclass(frozen=True)
class Cell:
    """One combination.

    Args:
        name: Unique.
        family: As the matrix counts them.
        model: File of configs/model.
        degrees: How the replica is cut.
        sources: Worlds of FSDP2; a pair is HSDP, (replicate, shard).
        changes: Keys of the configuration that are not the published ones.
        quantized: Whether tensors come quantized.
        dtype: Dtype of the trainer's parameters.
        specials: What is special here.
        is_long: Run in the long tier only.
        is_planned: Full counts on the meta device: rules, recording and plan only.
        is_transferred: Small enough to go through the real executor, too.
    """

    name: str
    family: str
    model: str
    degrees: Degrees
    sources: tuple[int | tuple[int, int], ...]
    changes: Mapping[str, Any] = field(default_factory=dict)
    quantized: bool = False
    dtype: str = "BF16"
    specials: tuple[str, ...] = ()
    is_long: bool = True
    is_planned: bool = False
    is_transferred: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """The configuration that both sides are given."""
        return config_of(self.model, self.changes, quantized=self.quantized)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks that are executed: the first, one in the middle, the last."""
        last = self.degrees.world_size - 1
        return tuple(sorted({0, (last + 1) // 2, last}))


def config_of(model: str, changes: Mapping[str, Any], *, quantized: bool) -> dict[str, Any]:
    """A published configuration with two layers, and changes."""
    content = json.loads((_MODELS / f"{model}.json").read_text())
    config: dict[str, Any] = {**content.get("config", content)}
    config.pop("num_nextn_predict_layers", None)  # engines skip what they do not speculate with
    config["num_hidden_layers"] = 2
    if "first_k_dense_replace" in config:
        config["first_k_dense_replace"] = 1
    if not quantized:
        config.pop("quantization_config", None)
    elif "quantization_config" not in config:
        config["quantization_config"] = dict(_BLOCK_FP8)
    config |= changes
    if (
        quantized
        and "modules_to_not_convert" not in changes
        and model.startswith("qwen3-")
        and "num_experts" in config
    ):
        layers = range(config["num_hidden_layers"])
        routers = [f"model.layers.{layer}.mlp.gate" for layer in layers]
        config["quantization_config"]["modules_to_not_convert"] = ["lm_head", *routers]
    return config


def _cells() -> tuple[Cell, ...]:
    few = {"n_routed_experts": 16}
    six = {"n_routed_experts": 6}
    oss = {"num_local_experts": 8}
    kv, vocab, uneven, robin = (
        "kv heads replicated",
        "padded vocabulary",
        "uneven experts",
        "round-robin experts",
    )

    def cell(name: str, family: str, model: str, sources: Any, *specials: str, **how: Any) -> Cell:
        # Most cells have fewer rows of vocabulary than published: those are most of the bytes.
        if not how.pop("has_all_rows", False) and not how.get("is_planned", False):
            how["changes"] = {"vocab_size": 16384, **how.get("changes", {})}
        keys = ("tp", "dp", "pp", "ep", "placement", "num_redundant")
        degrees = Degrees(**{key: how.pop(key) for key in keys if key in how})
        return Cell(name, family, model, degrees, sources, specials=specials, **how)

    return (
        # Llama: 32 heads, 8 kv heads; biases are a switch of its config.
        cell("llama tp2", "Llama", "llama-3.1-8b", (3, 8), tp=2),
        cell("llama tp8", "Llama", "llama-3.1-8b", (5, (2, 2)), has_all_rows=True, tp=8),
        cell("llama tp16", "Llama", "llama-3.1-8b", (4,), kv, tp=16, is_long=False),
        cell("llama pp2", "Llama", "llama-3.1-8b", (3,), tp=2, pp=2),
        cell("llama dp2", "Llama", "llama-3.1-8b", ((2, 2),), tp=4, dp=2),
        cell(
            "llama biases",
            "Llama",
            "llama-3.1-8b",
            (3,),
            "all biases",
            vocab,
            tp=4,
            changes={"vocab_size": 32001, "attention_bias": True, "mlp_bias": True},
        ),
        cell("llama fp8 tp4", "Llama", "llama-3.1-8b", (3,), tp=4, quantized=True),
        # Qwen3: 16 heads, 8 kv heads, a tied head.
        cell(
            "qwen3 tp2",
            "Qwen3",
            "qwen3-0.6b",
            (3, 4, 5, 8, (2, 2)),
            "tied head",
            has_all_rows=True,
            tp=2,
        ),
        cell("qwen3 tp4", "Qwen3", "qwen3-0.6b", (5,), dtype="F32", tp=4),
        cell("qwen3 tp16", "Qwen3", "qwen3-0.6b", (8,), kv, tp=16),
        cell(
            "qwen3 pp3",
            "Qwen3",
            "qwen3-0.6b",
            (3,),
            "tied head",
            has_all_rows=True,
            tp=2,
            pp=3,
            changes={"num_hidden_layers": 5},
        ),
        cell(
            "qwen3 vocabulary",
            "Qwen3",
            "qwen3-0.6b",
            (3, (2, 2)),
            vocab,
            is_transferred=True,
            tp=4,
            is_long=False,
            changes={"vocab_size": 1000},
        ),
        cell(
            "qwen3 untied dp2",
            "Qwen3",
            "qwen3-0.6b",
            (4,),
            vocab,
            tp=2,
            dp=2,
            changes={"vocab_size": 1000, "tie_word_embeddings": False},
        ),
        # Qwen3-MoE: 32 heads, 4 kv heads, 128 experts.
        cell(
            "qwen3-moe tp4",
            "Qwen3-MoE",
            "qwen3-30b-a3b",
            (3, 8),
            has_all_rows=True,
            tp=4,
            changes={"num_experts": 16, "mlp_only_layers": [0]},
        ),
        cell(
            "qwen3-moe tp8",
            "Qwen3-MoE",
            "qwen3-30b-a3b",
            (5,),
            kv,
            tp=8,
            is_long=False,
            changes={"num_experts": 16, "mlp_only_layers": [0], "vocab_size": 4000},
        ),
        cell(
            "qwen3-moe tp4 ep",
            "Qwen3-MoE",
            "qwen3-30b-a3b",
            (3, (2, 2)),
            uneven,
            tp=4,
            ep=True,
            changes={"num_experts": 18},
        ),
        cell(
            "qwen3-moe dp2 tp2",
            "Qwen3-MoE",
            "qwen3-30b-a3b",
            (4,),
            tp=2,
            dp=2,
            changes={"num_experts": 16},
        ),
        cell(
            "qwen3-moe dp2 tp2 ep",
            "Qwen3-MoE",
            "qwen3-30b-a3b",
            (8,),
            tp=2,
            dp=2,
            ep=True,
            changes={"num_experts": 16},
        ),
        cell(
            "qwen3-moe pp2 ep",
            "Qwen3-MoE",
            "qwen3-30b-a3b",
            (5,),
            tp=2,
            pp=2,
            ep=True,
            changes={"num_experts": 16},
        ),
        cell(
            "qwen3-moe fp8 tp4",
            "Qwen3-MoE",
            "qwen3-30b-a3b",
            (3, 8),
            "refined grid of scales",
            is_transferred=True,
            tp=4,
            quantized=True,
            is_long=False,
            changes={"num_experts": 8, "vocab_size": 4000},
        ),
        cell(
            "qwen3-moe fp8 ep",
            "Qwen3-MoE",
            "qwen3-30b-a3b",
            (5,),
            uneven,
            tp=4,
            ep=True,
            quantized=True,
            changes={"num_experts": 18},
        ),
        cell(
            "qwen3-moe all experts",
            "Qwen3-MoE",
            "qwen3-235b-a22b",
            (128,),
            kv,
            tp=8,
            is_planned=True,
        ),
        # DeepSeek-V3: 128 heads, 256 experts in 8 groups, one shared.
        cell("deepseek tp8", "DeepSeek-V3", "deepseek-v3", (3,), tp=8, changes=few),
        cell(
            "deepseek tp16",
            "DeepSeek-V3",
            "deepseek-v3",
            (8,),
            has_all_rows=True,
            tp=16,
            changes=few,
        ),
        cell(
            "deepseek tp8 ep",
            "DeepSeek-V3",
            "deepseek-v3",
            ((2, 2),),
            uneven,
            tp=8,
            ep=True,
            changes={"n_routed_experts": 20},
        ),
        cell(
            "deepseek round-robin",
            "DeepSeek-V3",
            "deepseek-v3",
            (4,),
            robin,
            tp=8,
            ep=True,
            placement="round_robin",
            changes=few,
        ),
        cell(
            "deepseek round-robin uneven",
            "DeepSeek-V3",
            "deepseek-v3",
            (3,),
            robin,
            uneven,
            vocab,
            tp=4,
            ep=True,
            placement="round_robin",
            is_long=False,
            changes={"n_routed_experts": 6, "n_group": 2, "vocab_size": 4001},
        ),
        cell(
            "deepseek dp2 tp4 ep",
            "DeepSeek-V3",
            "deepseek-v3",
            (5,),
            "whole shared experts",
            tp=4,
            dp=2,
            ep=True,
            changes=few,
        ),
        cell(
            "deepseek dp2 tp4",
            "DeepSeek-V3",
            "deepseek-v3",
            (3,),
            tp=4,
            dp=2,
            changes=few,
        ),
        cell("deepseek pp2", "DeepSeek-V3", "deepseek-v3", (4,), tp=4, pp=2, changes=few),
        cell(
            "deepseek fp8 tp8",
            "DeepSeek-V3",
            "deepseek-v3",
            (3, 8),
            tp=8,
            quantized=True,
            changes=few,
        ),
        cell(
            "deepseek direct queries",
            "DeepSeek-V3",
            "deepseek-v3",
            (3,),
            "direct queries",
            vocab,
            tp=8,
            changes={**six, "q_lora_rank": None, "vocab_size": 4001},
        ),
        cell(
            "deepseek redundant",
            "DeepSeek-V3",
            "deepseek-v3",
            (3,),
            "redundant experts",
            tp=4,
            dp=2,
            ep=True,
            num_redundant=8,
            changes=few,
        ),
        cell("deepseek all experts", "DeepSeek-V3", "deepseek-v3", (64,), tp=8, is_planned=True),
        # Kimi-K2: 64 heads, 384 experts.
        cell("kimi tp8", "Kimi-K2", "kimi-k2", (5,), has_all_rows=True, tp=8, changes=few),
        cell(
            "kimi fp8 dp4 tp2 ep",
            "Kimi-K2",
            "kimi-k2",
            (3,),
            "whole shared experts",
            tp=2,
            dp=4,
            ep=True,
            quantized=True,
            is_long=False,
            changes={**six, "n_routed_experts": 8, "vocab_size": 8000},
        ),
        cell("kimi fp8 tp16", "Kimi-K2", "kimi-k2", (8,), tp=16, quantized=True, changes=few),
        cell("kimi tp4 pp2 ep", "Kimi-K2", "kimi-k2", ((2, 2),), tp=4, pp=2, ep=True, changes=few),
        cell(
            "kimi all experts fp8 dp4 tp8 ep",
            "Kimi-K2",
            "kimi-k2",
            (64,),
            tp=8,
            dp=4,
            ep=True,
            quantized=True,
            is_planned=True,
        ),
        # GLM-4.5: 96 heads, 8 kv heads, biases, a router in F32.
        cell(
            "glm tp4",
            "GLM-4.5",
            "glm-4.5",
            (3,),
            "router cast to F32",
            vocab,
            is_transferred=True,
            tp=4,
            is_long=False,
            changes={**six, "vocab_size": 4001},
        ),
        cell(
            "glm tp8",
            "GLM-4.5",
            "glm-4.5",
            (8,),
            "router cast to F32",
            has_all_rows=True,
            tp=8,
            changes=few,
        ),
        cell("glm tp16", "GLM-4.5", "glm-4.5", (4,), kv, tp=16, changes=few),
        cell(
            "glm tp4 ep",
            "GLM-4.5",
            "glm-4.5",
            ((2, 2),),
            uneven,
            tp=4,
            ep=True,
            changes={"n_routed_experts": 18},
        ),
        cell(
            "glm round-robin",
            "GLM-4.5",
            "glm-4.5",
            (5,),
            robin,
            tp=4,
            ep=True,
            placement="round_robin",
            changes={"n_routed_experts": 18, "n_group": 2},
        ),
        cell("glm dp2 tp4 ep", "GLM-4.5", "glm-4.5", (3,), tp=4, dp=2, ep=True, changes=few),
        cell(
            "glm tp2 pp2",
            "GLM-4.5",
            "glm-4.5",
            (5,),
            tp=2,
            pp=2,
            changes={**few, "num_hidden_layers": 4},
        ),
        cell("glm fp8 tp4", "GLM-4.5", "glm-4.5", (3,), tp=4, quantized=True, changes=few),
        cell("glm all experts", "GLM-4.5", "glm-4.5", (32,), tp=8, is_planned=True),
        # gpt-oss: 64 heads, 8 kv heads, 128 experts of width 2880.
        cell("gpt-oss tp2", "gpt-oss", "gpt-oss-120b", (3,), has_all_rows=True, tp=2, changes=oss),
        cell(
            "gpt-oss tp8",
            "gpt-oss",
            "gpt-oss-120b",
            (8,),
            vocab,
            tp=8,
            is_long=False,
            changes={**oss, "vocab_size": 4001},
        ),
        cell("gpt-oss tp4 ep", "gpt-oss", "gpt-oss-120b", (5, (2, 2)), tp=4, ep=True, changes=oss),
        cell("gpt-oss dp2 tp4", "gpt-oss", "gpt-oss-120b", (4,), tp=4, dp=2, changes=oss),
        cell("gpt-oss pp2", "gpt-oss", "gpt-oss-120b", (3,), tp=2, pp=2, changes=oss),
        cell(
            "gpt-oss mxfp4 tp4",
            "gpt-oss",
            "gpt-oss-120b",
            (3,),
            "uneven padded blocks",
            is_transferred=True,
            tp=4,
            quantized=True,
            is_long=False,
            changes={**oss, "vocab_size": 4000},
        ),
        cell(
            "gpt-oss mxfp4 tp8",
            "gpt-oss",
            "gpt-oss-120b",
            (5,),
            "uneven padded blocks",
            has_all_rows=True,
            tp=8,
            quantized=True,
            changes=oss,
        ),
        cell(
            "gpt-oss mxfp4 ep",
            "gpt-oss",
            "gpt-oss-120b",
            ((2, 2),),
            tp=4,
            ep=True,
            quantized=True,
            changes=oss,
        ),
        cell(
            "gpt-oss mxfp4 dp2 tp8",
            "gpt-oss",
            "gpt-oss-120b",
            (3,),
            "ranks without any block",
            tp=8,
            dp=2,
            quantized=True,
            changes=oss,
        ),
        cell(
            "gpt-oss all experts",
            "gpt-oss",
            "gpt-oss-120b",
            (32,),
            tp=8,
            is_planned=True,
        ),
    )


CELLS = _cells()
