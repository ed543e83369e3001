"""What vLLM cannot do, or would do wrong: the rule must refuse it, too."""

from __future__ import annotations

from support.layout_cells import LayoutRefused
from support.vllm_ranks import Degrees

__all__ = ["REFUSED", "Refused"]


Refused = LayoutRefused[Degrees]


def _refused() -> tuple[Refused, ...]:
    moe = {"num_experts": 16, "vocab_size": 4096}
    few = {"n_routed_experts": 16, "vocab_size": 4096}
    oss = {"num_local_experts": 8, "vocab_size": 4096}
    return (
        Refused(
            "heads", "llama-3.1-8b", Degrees(tp=3),
            "32 heads over 3 ranks",
            "tp=3 does not divide", "must be divisible by tensor parallel size",
        ),
        Refused(
            "kv heads", "qwen3-30b-a3b", Degrees(tp=6),
            "4 kv heads are replicated over multiples of 4 ranks only",
            "tp=6 is no multiple of the 4 kv heads", "AssertionError",
            moe | {"num_attention_heads": 36, "vocab_size": 4032},
        ),
        Refused(
            "vocabulary", "qwen3-0.6b", Degrees(tp=3),
            "1000 rows of vocabulary, padded to 1024, over 3 ranks",
            "tp=3 does not divide the vocabulary padded", "AssertionError",
            {"vocab_size": 1000, "num_attention_heads": 12, "num_key_value_heads": 6},
        ),
        Refused(
            "ranks and experts", "qwen3-30b-a3b", Degrees(tp=32),
            "more tensor-parallel ranks than experts",
            "more than the 16 experts", "greater than the number of experts", moe,
        ),
        Refused(
            "width of experts", "qwen3-30b-a3b", Degrees(tp=4, dp=5),
            "experts of width 768 over 20 ranks",
            "does not divide moe_intermediate_size", "AssertionError", moe,
        ),
        Refused(
            "fp8 dense width", "kimi-k2", Degrees(tp=32),
            "block FP8: 18432 / 32 = 576 rows are no multiple of a block",
            "no multiple of the 128 that share a scale",
            "not divisible by weight quantization block",
            few, quantized=True,
        ),
        Refused(
            "fp8 kv heads", "qwen3-0.6b", Degrees(tp=8),
            "block FP8: kv heads of 64 rows cut a block",
            "no multiple of the 128 that share a scale", "out of range",
            {"head_dim": 64, "vocab_size": 4096}, quantized=True,
        ),
        Refused(
            "fp8 experts", "qwen3-30b-a3b", Degrees(tp=16),
            "block FP8: experts of width 768 / 16 = 48; scales have no grid below 32",
            "no grid of scales of at least 32 fits", "not divisible by weight quantization block",
            moe, quantized=True,
        ),
        Refused(
            "fp8 router", "qwen3-30b-a3b", Degrees(tp=2),
            "block FP8 without the router in `modules_to_not_convert`: vLLM would cast it to FP8",
            "vLLM would quantize it", "", moe | {"modules_to_not_convert": None}, quantized=True,
        ),
        Refused(
            "gpt-oss kv heads", "gpt-oss-120b", Degrees(tp=16),
            "vLLM's gpt-oss does not replicate its 8 kv heads",
            "more than the 8 kv heads", "ZeroDivisionError", oss,
        ),
        Refused(
            "gpt-oss uneven experts", "gpt-oss-120b", Degrees(tp=4, ep=True),
            "vLLM's loader of gpt-oss gives every rank an even share of the experts",
            "4 ranks do not divide the 10 experts", "must match the existing size",
            oss | {"num_local_experts": 10}, rank=0,
        ),
        Refused(
            "stages without experts", "glm-4.5", Degrees(pp=2),
            "a pipeline stage that has no sparse layer",
            "stage 0 has no sparse layer", "No Glm4MoE layer found", few, rank=0,
        ),
        Refused(
            "bias of qwen3", "qwen3-0.6b", Degrees(),
            "vLLM's o_proj has no bias there and drops the checkpoint's",
            "o_proj has no bias", "", {"attention_bias": True, "vocab_size": 4096},
        ),
        Refused(
            "bias of deepseek", "deepseek-v3", Degrees(tp=8),
            "vLLM's latent attention has no biases and drops the checkpoint's",
            "latent attention has no biases", "", few | {"attention_bias": True},
        ),
        Refused(
            "redundant experts without ep", "deepseek-v3", Degrees(tp=8, num_redundant=8),
            "redundant experts need expert parallelism",
            "needs ep", "", few,
        ),
    )  # fmt: skip


REFUSED = _refused()
