"""The cells of SGLang's layout matrix: families at true widths, times degrees, times sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from support.layout_cells import LayoutCell

__all__ = ["CELLS", "Cell", "Server"]

# Arguments of the rule and their words, in the order of the page; `{}` is the value.
_WORDS = {
    "tp": "TP {}",
    "pp": "PP {}",
    "dp": "DP {}",
    "ep": "EP {}",
    "moe_dense_tp": "dense MLPs whole",
    "enable_dp_lm_head": "head in the group",
    "num_redundant_experts": "{} redundant experts",
    "moe_a2a_backend": "{}",
    "moe_runner_backend": "{}",
}


@dataclass(frozen=True)
class Server:
    """How a server is started: arguments of `rules.sglang`."""

    flags: Mapping[str, Any]

    @property
    def world_size(self) -> int:
        """Ranks of the server; rank = (dp * PP + pp) * TP + tp."""
        flags = self.flags
        replicas = 1 if flags.get("enable_dp_attention") else flags.get("dp", 1)
        return int(replicas * flags.get("pp", 1) * flags.get("tp", 1))

    @property
    def shown(self) -> str:
        """The degrees in words."""
        flags = {"tp": 1, **self.flags}
        words = dict(_WORDS)
        if flags.get("enable_dp_attention"):
            words["dp"] = "DP attention {}"
        return ", ".join(
            word.format(flags[name]) for name, word in words.items() if flags.get(name)
        )


Cell = LayoutCell[Server]

_FLAGS = (*_WORDS, "enable_dp_attention", "fuse_shared_experts", "expert_map")
KV, VOCABULARY = "kv heads replicated", "padded vocabulary"
FUSED, MOVED = "shared expert in a slot", "experts moved by the balancer"


def _cell(name: str, family: str, model: str, sources: Any, *specials: str, **how: Any) -> Cell:
    # Most cells have fewer rows of vocabulary than published: those are most of the bytes.
    if not how.pop("has_all_rows", False) and not how.get("is_planned", False):
        how["changes"] = {"vocab_size": 16384, **how.get("changes", {})}
    server = Server({flag: how.pop(flag) for flag in _FLAGS if flag in how})
    return Cell(name, family, model, server, sources, specials=specials, **how)


def _dense() -> tuple[Cell, ...]:
    llama, qwen = ("Llama", "llama-3.1-8b"), ("Qwen3", "qwen3-0.6b")
    grouped: dict[str, Any] = {"enable_dp_attention": True}
    return (
        # Llama: 32 heads, 8 kv heads; its attention knows no data parallelism.
        _cell("llama tp2", *llama, (3, 8), tp=2),
        _cell("llama tp16", *llama, (4,), KV, tp=16, is_long=False),
        _cell(
            "llama pp2 tp4", *llama, (3,), "uneven stages",
            tp=4, pp=2, changes={"num_hidden_layers": 3},
        ),
        _cell("llama dp2", *llama, ((2, 2),), "replicas", tp=2, dp=2),
        _cell(
            "llama biases", *llama, (3,), "biases of attention", VOCABULARY,
            tp=4, changes={"vocab_size": 32001, "attention_bias": True},
        ),
        # Qwen3: 16 heads, 8 kv heads, a tied head.
        _cell("qwen3 tp2", *qwen, (3, 4, 5, 8, (2, 2)), "tied head", has_all_rows=True, tp=2),
        _cell("qwen3 tp4", *qwen, (5,), dtype="F32", tp=4),
        _cell("qwen3 dp4 tp16", *qwen, (8,), tp=16, dp=4, **grouped),
        _cell(
            "qwen3 dp2 tp32", *qwen, (4,), KV,
            tp=32, dp=2, enable_dp_lm_head=True, **grouped,
            changes={"tie_word_embeddings": False},
        ),
        _cell(
            "qwen3 pp3", *qwen, (3,), "tied head", "uneven stages",
            tp=2, pp=3, has_all_rows=True, changes={"num_hidden_layers": 5},
        ),
        _cell(
            "qwen3 vocabulary", *qwen, (3, (2, 2)), "vocabulary padded for 6 ranks",
            tp=6, is_long=False, is_transferred=True,
            changes={"vocab_size": 1000, "num_attention_heads": 12, "num_key_value_heads": 6},
        ),
        _cell(
            "qwen3 biases", *qwen, (3,), "biases of attention",
            tp=2, changes={"attention_bias": True, "vocab_size": 4000},
        ),
    )  # fmt: skip


def _sparse() -> tuple[Cell, ...]:
    moe = ("Qwen3-MoE", "qwen3-30b-a3b")
    grouped: dict[str, Any] = {"enable_dp_attention": True}
    few: dict[str, Any] = {"changes": {"num_experts": 16}}
    # Every expert once, then four again; the second layer has them in another order.
    first = [*range(16), *range(4)]
    moved = [[*first], [*reversed(first)]]
    return (
        # Qwen3-MoE: 32 heads, 4 kv heads, 128 experts.
        _cell("qwen3-moe tp4", *moe, (3, 8), has_all_rows=True, tp=4, **few),
        _cell("qwen3-moe tp8", *moe, (5,), KV, VOCABULARY, tp=8,
              changes={"num_experts": 16, "vocab_size": 4001}),
        _cell("qwen3-moe ep4", *moe, (3, (2, 2)), tp=4, ep=4, **few),
        _cell("qwen3-moe ep2 dp4 tp8", *moe, (4,), tp=8, ep=2, dp=4, **grouped, **few,
              is_long=False),
        _cell("qwen3-moe pp2 ep2", *moe, (5,), tp=2, pp=2, ep=2, **few,
              is_long=False),
        _cell("qwen3-moe deepep", *moe, (8,), tp=4, ep=4, dp=4, moe_a2a_backend="deepep",
              **grouped, **few),
        _cell("qwen3-moe redundant", *moe, (3,), "redundant experts", tp=4, ep=4,
              num_redundant_experts=8, **few),
        _cell("qwen3-moe moved", *moe, (3,), "redundant experts", MOVED, tp=4, ep=4,
              num_redundant_experts=4, expert_map=moved, is_long=False,
              changes={"num_experts": 16, "vocab_size": 4000}),
        _cell("qwen3-moe up first", *moe, (5,), "up above gate", tp=4,
              moe_runner_backend="flashinfer_cutlass", is_long=False,
              changes={"num_experts": 8, "vocab_size": 4000}),
        _cell("qwen3-moe transposed", *moe, (5,), "experts transposed", tp=4,
              moe_runner_backend="triton_kernel", is_long=False, is_transferred=True,
              changes={"num_experts": 8, "vocab_size": 4000}),
        _cell("qwen3-moe fp8 tp2", *moe, (3, 8), tp=2, quantized=True,
              changes={"num_experts": 8, "vocab_size": 4000}),
        _cell("qwen3-moe fp8 ep2 dp4", *moe, (5,), tp=4, ep=2, dp=4, quantized=True, **grouped,
              **few),
        _cell("qwen3-moe all experts", "Qwen3-MoE", "qwen3-235b-a22b", (128,), KV, tp=8, ep=8,
              is_planned=True),
        # gpt-oss: 64 heads, 8 kv heads, 128 experts.
        _cell("gpt-oss tp2", "gpt-oss", "gpt-oss-120b", (3,), tp=2, has_all_rows=True,
              changes={"num_local_experts": 8}),
        _cell("gpt-oss tp16", "gpt-oss", "gpt-oss-120b", (8,), KV, VOCABULARY, tp=16,
              is_long=False, changes={"num_local_experts": 8, "vocab_size": 4001}),
        _cell("gpt-oss dp4", "gpt-oss", "gpt-oss-120b", (5, (2, 2)), tp=4, dp=4, **grouped,
              changes={"num_local_experts": 8}),
        _cell("gpt-oss pp2", "gpt-oss", "gpt-oss-120b", (3,), tp=2, pp=2,
              changes={"num_local_experts": 8}),
        _cell("gpt-oss transposed", "gpt-oss", "gpt-oss-120b", (4,), "experts transposed", tp=4,
              moe_runner_backend="triton_kernel", changes={"num_local_experts": 8}),
        _cell("gpt-oss all experts", "gpt-oss", "gpt-oss-120b", (32,), tp=8, is_planned=True),
    )  # fmt: skip


def _shared() -> tuple[Cell, ...]:
    deepseek, kimi = ("DeepSeek-V3", "deepseek-v3"), ("Kimi-K2", "kimi-k2")
    glm = ("GLM-4.5", "glm-4.5")
    grouped: dict[str, Any] = {"enable_dp_attention": True}
    few: dict[str, Any] = {"changes": {"n_routed_experts": 16}}
    return (
        # DeepSeek-V3: 128 heads, 256 experts, one shared.
        _cell("deepseek tp8", *deepseek, (3,), tp=8, **few),
        _cell("deepseek tp16", *deepseek, (8,), has_all_rows=True, tp=16, **few),
        _cell("deepseek fused", *deepseek, ((2, 2),), FUSED, tp=8, fuse_shared_experts=True, **few),
        _cell("deepseek fused ep4", *deepseek, (3,), FUSED, VOCABULARY, tp=8, ep=4,
              fuse_shared_experts=True, is_long=False,
              changes={"n_routed_experts": 8, "vocab_size": 4001}),
        _cell("deepseek ep8 dp8", *deepseek, (5,), "whole shared experts", tp=8, ep=8, dp=8,
              moe_dense_tp=1, enable_dp_lm_head=True, moe_a2a_backend="deepep", quantized=True,
              **grouped, changes={"n_routed_experts": 16, "vocab_size": 4000}),
        _cell("deepseek redundant", *deepseek, (3,), "redundant experts", FUSED, tp=4, ep=4,
              num_redundant_experts=4, fuse_shared_experts=True,
              changes={"n_routed_experts": 8, "vocab_size": 4000}),
        _cell("deepseek direct", *deepseek, (3,), "direct queries", tp=8,
              changes={"q_lora_rank": None, "n_routed_experts": 8, "vocab_size": 4000}),
        _cell("deepseek pp2", *deepseek, (4,), tp=4, pp=2, **few),
        _cell("deepseek all experts", *deepseek, (64,), FUSED, tp=8, is_planned=True),
        _cell("deepseek all experts fp8", *deepseek, (64,), FUSED, tp=16, is_planned=True,
              quantized=True),
        # Kimi-K2: 64 heads, 384 experts, one shared that SGLang never fuses.
        _cell("kimi tp8", *kimi, (5,), tp=8, has_all_rows=True, **few),
        _cell("kimi fp8 tp16", *kimi, (8,), tp=16, quantized=True, **few),
        _cell("kimi ep2 pp2", *kimi, ((2, 2),), tp=4, pp=2, ep=2, **few),
        _cell("kimi ep8 dp4 fp8", *kimi, (3,), tp=8, ep=8, dp=4, quantized=True, **grouped,
              is_long=False,
              changes={"n_routed_experts": 8, "vocab_size": 8000}),
        _cell("kimi all experts", *kimi, (64,), "whole shared experts", tp=32, ep=32, dp=4,
              moe_dense_tp=1, moe_a2a_backend="deepep", is_planned=True, quantized=True, **grouped),
        # GLM-4.5: 96 heads, 8 kv heads, 160 experts, one shared that SGLang fuses without EP.
        _cell("glm tp4", *glm, (3,), "router cast to F32", FUSED, VOCABULARY, tp=4, is_long=False,
              is_transferred=True, changes={"n_routed_experts": 6, "vocab_size": 4001}),
        _cell("glm tp16", *glm, (8,), KV, tp=16, fuse_shared_experts=False, **few),
        _cell("glm ep2 dp2", *glm, (3, (2, 2)), tp=4, ep=2, dp=2, moe_dense_tp=1, **grouped, **few),
        _cell("glm deepep", *glm, (5,), "whole shared experts", tp=4, ep=4,
              moe_a2a_backend="deepep", **few),
        _cell("glm pp2", *glm, (5,), FUSED, tp=2, pp=2,
              changes={"n_routed_experts": 16, "num_hidden_layers": 4}),
        _cell("glm fp8 tp4", *glm, (3,), FUSED, tp=4, quantized=True, **few),
        _cell("glm all experts", *glm, (32,), FUSED, tp=8, is_planned=True),
    )  # fmt: skip


CELLS = (*_dense(), *_sparse(), *_shared())
