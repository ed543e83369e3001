"""Rows of vLLM's layout matrix whose sources are Megatron-Core and DeepSpeed ZeRO-3."""

from __future__ import annotations

from typing import Any, Protocol

from support.megatron_oracle import MegatronCut
from support.trainer_worlds import MegatronWorld, Zero3World

__all__ = ["trainer_cells"]


class MakesCells(Protocol):
    """`cell` of support.vllm_cells."""

    def __call__(
        self, name: str, family: str, model: str, sources: Any, *specials: str, **how: Any
    ) -> Any: ...


def trainer_cells(cell: MakesCells) -> tuple[Any, ...]:
    """The rows; every one has two layers."""
    both, apart = [[[0, 1]]], [[[0]], [[1]]]
    six, eight = {"n_routed_experts": 6}, {"n_routed_experts": 8}
    kv, vocab = "kv heads replicated", "padded vocabulary"
    return (
        cell(
            "llama tp4 from trainers",
            "Llama",
            "llama-3.1-8b",
            (MegatronWorld({"tp": 2, "pp": 2}, MegatronCut(apart, tp=2)), Zero3World(6)),
            tp=4,
        ),
        cell(
            "llama tp16 from trainers",
            "Llama",
            "llama-3.1-8b",
            (MegatronWorld({"tp": 8, "dp": 2}, MegatronCut(both, tp=8, copies=2)), Zero3World(7)),
            kv,
            tp=16,
        ),
        cell(
            "qwen3 tp4 from trainers",
            "Qwen3",
            "qwen3-0.6b",
            # More ranks than kv heads, and most of the padded vocabulary on ranks without any.
            (MegatronWorld({"tp": 16}, MegatronCut(both, tp=16)), Zero3World(5)),
            vocab,
            tp=4,
            is_long=False,
            changes={"vocab_size": 1000},
        ),
        cell(
            "qwen3 pp2 from trainers",
            "Qwen3",
            "qwen3-0.6b",
            (
                MegatronWorld(
                    {"tp": 2, "pp": 2, "vpp": 2},
                    MegatronCut([[[0], [2]], [[1], [3]]], tp=2),
                ),
                Zero3World(3),
            ),
            "tied head",
            tp=2,
            pp=2,
            changes={"num_hidden_layers": 4, "vocab_size": 4000},
        ),
        cell(
            "qwen3-moe tp8 from trainers",
            "Qwen3-MoE",
            "qwen3-30b-a3b",
            (
                MegatronWorld(
                    {"tp": 2, "dp": 2, "ep": 4, "etp": 1},
                    MegatronCut(both, tp=2, ep=4, copies=2),
                ),
                Zero3World(5),
            ),
            kv,
            tp=8,
            is_long=False,
            changes={"num_experts": 8, "mlp_only_layers": [0], "vocab_size": 4000},
        ),
        cell(
            "qwen3-moe tp4 ep from trainers",
            "Qwen3-MoE",
            "qwen3-30b-a3b",
            (
                MegatronWorld(
                    {"tp": 4, "dp": 2, "ep": 2, "etp": 4, "experts": "single"},
                    MegatronCut(both, tp=4, ep=2, etp=4, copies=2, experts="single"),
                ),
                Zero3World(8),
            ),
            "uneven experts",
            tp=4,
            ep=True,
            changes={"num_experts": 18},
        ),
        cell(
            "deepseek dp2 tp4 ep from trainers",
            "DeepSeek-V3",
            "deepseek-v3",
            (
                MegatronWorld(
                    {"tp": 4, "pp": 2, "ep": 2, "etp": 2}, MegatronCut(apart, tp=4, ep=2, etp=2)
                ),
                Zero3World(6),
            ),
            "whole shared experts",
            tp=4,
            dp=2,
            ep=True,
            changes=eight,
        ),
        cell(
            "kimi tp8 from trainers",
            "Kimi-K2",
            "kimi-k2",
            (
                MegatronWorld(
                    {
                        "tp": 2,
                        "dp": 2,
                        "ep": 4,
                        "etp": 1,
                        "transformer_engine": False,
                    },
                    MegatronCut(both, tp=2, ep=4, copies=2, te=False, experts="sequential"),
                ),
                Zero3World(3),
            ),
            tp=8,
            changes=eight,
        ),
        cell(
            "glm tp4 from trainers",
            "GLM-4.5",
            "glm-4.5",
            (
                MegatronWorld({"tp": 8, "ep": 2, "etp": 4}, MegatronCut(both, tp=8, ep=2, etp=4)),
                Zero3World(4),
            ),
            "router cast to F32",
            vocab,
            tp=4,
            changes={**six, "vocab_size": 4001},
        ),
        cell(
            "gpt-oss tp4 from trainers",
            "gpt-oss",
            "gpt-oss-120b",
            (
                MegatronWorld({"tp": 4, "ep": 4, "etp": 1}, MegatronCut(both, tp=4, ep=4)),
                Zero3World(5),
            ),
            tp=4,
            is_long=False,
            changes={"num_local_experts": 4, "vocab_size": 4000},
        ),
        cell(
            "gpt-oss tp2 ep from trainers",
            "gpt-oss",
            "gpt-oss-120b",
            (
                MegatronWorld(
                    {"tp": 2, "pp": 2, "ep": 2, "etp": 1, "experts": "single"},
                    MegatronCut(apart, tp=2, ep=2, experts="single"),
                ),
                Zero3World(3),
            ),
            tp=2,
            ep=True,
            changes={"num_local_experts": 8},
        ),
    )
