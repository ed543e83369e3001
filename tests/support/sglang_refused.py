"""What SGLang cannot do, or would do wrong: the rule must refuse it, too."""

from __future__ import annotations

from typing import Any, Final

from support.layout_cells import LayoutRefused
from support.sglang_cells import Server

__all__ = ["DROPS", "REFUSED", "Refused"]

Refused = LayoutRefused[Server]

DROPS: Final = "drops"
"""What SGLang "says" where it loads, but leaves tensors or parameters out."""


def _server(**flags: Any) -> Server:
    return Server(flags)


def _refused() -> tuple[Refused, ...]:
    small = {"vocab_size": 4096}
    moe = {"num_experts": 16, **small}
    few = {"n_routed_experts": 16, **small}
    oss = {"num_local_experts": 16, **small}
    grouped = {"enable_dp_attention": True}
    return (
        Refused(
            "heads", "qwen3-30b-a3b", _server(tp=3),
            "32 heads over 3 ranks", "tp=3 does not divide num_key_value_heads",
            "AssertionError", moe,
        ),
        Refused(
            "kv heads", "qwen3-30b-a3b", _server(tp=6),
            "4 kv heads are replicated over multiples of 4 ranks only",
            "tp=6 is no multiple of the 4 kv heads", "AssertionError",
            {"num_experts": 18, "num_attention_heads": 36, **small},
        ),
        Refused(
            "groups of attention", "qwen3-0.6b", _server(tp=4, dp=3, **grouped),
            "3 groups of attention among 4 ranks",
            "dp=3 groups of attention do not divide the tp=4",
            "AssertionError", small,
        ),
        Refused(
            "attention of llama", "llama-3.1-8b", _server(tp=4, dp=2, **grouped),
            "SGLang loads it, but cuts the heads over all ranks, while each group has tokens of "
            "its own", "only some of the heads for its tokens", "", small,
        ),
        Refused(
            "head without groups", "qwen3-0.6b", _server(tp=2, dp=2, enable_dp_lm_head=True),
            "the head in a group of attention, without groups",
            "enable_dp_lm_head needs enable_dp_attention", "requires attention DP", small,
        ),
        Refused(
            "groups of experts", "qwen3-30b-a3b", _server(tp=4, ep=3),
            "3 groups of experts among 4 ranks", "ep=3 does not divide the tp=4",
            "parallel topology is inconsistent", {"num_experts": 12, **small},
        ),
        Refused(
            "number of experts", "qwen3-30b-a3b", _server(tp=4, ep=4),
            "18 experts over 4 groups", "ep=4 does not divide the number of experts, 18",
            "AssertionError", {"num_experts": 18, **small},
        ),
        Refused(
            "redundant experts and groups", "deepseek-v3",
            _server(tp=4, ep=4, num_redundant_experts=2),
            "18 slots over 4 groups", "ep=4 does not divide the number of experts, 18",
            "AssertionError", few,
        ),
        Refused(
            "ranks and experts", "qwen3-30b-a3b", _server(tp=32),
            "more tensor-parallel ranks than experts", "more than the 16 experts",
            "greater than the number of experts", moe,
        ),
        Refused(
            "width of experts", "qwen3-30b-a3b", _server(tp=5),
            "experts of width 768 over 5 ranks", "do not divide moe_intermediate_size, 768",
            "AssertionError", {"num_attention_heads": 40, "num_key_value_heads": 5, **moe},
        ),
        Refused(
            "fp8 experts", "qwen3-30b-a3b", _server(tp=4),
            "block FP8: experts of width 768 / 4 = 192 are no multiple of a block",
            "no multiple of the 128 that share a scale",
            "not divisible by weight quantization block_n", moe, quantized=True,
        ),
        Refused(
            "fp8 dense width", "kimi-k2", _server(tp=32, ep=32),
            "block FP8: 18432 / 32 = 576 rows are no multiple of a block",
            "no multiple of the 128 that share a scale",
            "Weight output_partition_size = 576", {"n_routed_experts": 32, **small},
            quantized=True,
        ),
        Refused(
            "fp8 kv heads", "qwen3-0.6b", _server(tp=8),
            "block FP8: kv heads of 64 rows cut a block",
            "no multiple of the 128 that share a scale", "Weight output_partition_size = 64",
            {"head_dim": 64, **small}, quantized=True,
        ),
        Refused(
            "fp8 of llama", "llama-3.1-8b", _server(tp=4),
            "block FP8: SGLang's Llama looks for scales under another name, and drops them",
            "SGLang's llama drops the scales", DROPS, small, quantized=True,
        ),
        Refused(
            "experts of gpt-oss", "gpt-oss-120b", _server(tp=4, ep=4),
            "SGLang's loader of gpt-oss in BF16 gives every rank all experts",
            "gives every rank all experts", "must match the existing size", oss,
        ),
        Refused(
            "mxfp4", "gpt-oss-120b", _server(tp=4),
            "MXFP4: SGLang knows it on GPUs only, and pads it as their kernels want",
            "depends on the GPU", "Unknown quantization method: mxfp4", oss, quantized=True,
        ),
        Refused(
            "redundant experts of glm", "glm-4.5", _server(tp=4, ep=4, num_redundant_experts=4),
            "SGLang's GLM has no slots for redundant experts, and loads 16 experts into 16 slots "
            "that it takes for 20", "has no place for copies of experts", "", few,
        ),
        Refused(
            "redundant experts of gpt-oss", "gpt-oss-120b",
            _server(tp=4, num_redundant_experts=4),
            "SGLang's loader of gpt-oss knows no redundant experts",
            "has no place for copies of experts", "must match the existing size", oss,
        ),
        Refused(
            "dense layers of qwen3-moe", "qwen3-30b-a3b", _server(tp=4),
            "SGLang's Qwen3-MoE has experts in every layer and drops dense MLPs",
            "has experts in every layer", DROPS, {"mlp_only_layers": [0], **moe},
        ),
        Refused(
            "bias of deepseek", "deepseek-v3", _server(tp=8),
            "SGLang's latent attention has no biases and drops the checkpoint's",
            "attention_bias on deepseek_v3", DROPS, {"attention_bias": True, **few},
        ),
        Refused(
            "biases of mlps", "llama-3.1-8b", _server(tp=2),
            "SGLang's MLPs have no biases and drop the checkpoint's", "mlp_bias on llama", DROPS,
            {"mlp_bias": True, **small},
        ),
        Refused(
            "tied head of qwen3-moe", "qwen3-30b-a3b", _server(tp=4),
            "SGLang's Qwen3-MoE ties no head and leaves it unloaded",
            "would leave its head unloaded", DROPS, {"tie_word_embeddings": True, **moe},
        ),
        Refused(
            "tied head of a stage", "llama-3.1-8b", _server(pp=2),
            "the last stage of SGLang's Llama has neither the embedding nor a head",
            "neither embedding nor head", "", {"tie_word_embeddings": True, **small},
        ),
        Refused(
            "stages", "qwen3-0.6b", _server(pp=3),
            "more pipeline stages than layers", "pp=3 is more than the 2 layers", "AssertionError",
            small,
        ),
    )  # fmt: skip


REFUSED = _refused()
