"""The rule for SGLang on small models: plans against plain slicing, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from support.layout_oracle import TINY_MODELS
from support.oracle import execute
from support.sglang_oracle import held_by
from weightsync.errors import ConfigError
from weightsync.ir import Arena, Dtype, Manifest, Plan
from weightsync.planners import rules
from weightsync.planners.planner import plan_transfer

LLAMA = {**TINY_MODELS["llama"], "mlp_bias": False}
QWEN3 = TINY_MODELS["qwen3"]
MOE = {**TINY_MODELS["qwen3_moe"], "mlp_only_layers": []}
DEEPSEEK = {**TINY_MODELS["deepseek_v3"], "n_shared_experts": 1}
KIMI = {**TINY_MODELS["kimi_k2"], "attention_bias": False}
GLM = TINY_MODELS["glm4_moe"]
GPT_OSS = TINY_MODELS["gpt_oss"]
GROUPED = {"enable_dp_attention": True}
# Six experts in eight slots, another way in the second layer.
MOVED = [[0, 1, 2, 3, 4, 5, 0, 1], [5, 5, 5, 0, 1, 2, 3, 4]]

CASES: dict[str, tuple[Mapping[str, Any], dict[str, Any], int]] = {
    "llama biases": (LLAMA, {"tp": 2}, 3),
    "llama kv replicas": (LLAMA, {"tp": 4, "dp": 2}, 2),
    "qwen3 kv replicas": (QWEN3, {"tp": 4}, 3),
    "qwen3 groups": (
        {**QWEN3, "tie_word_embeddings": False},
        {"tp": 8, "dp": 4, "enable_dp_lm_head": True, **GROUPED},
        3,
    ),
    "qwen3 tied stages": ({**QWEN3, "num_hidden_layers": 3}, {"tp": 2, "pp": 2}, 5),
    "qwen3 vocabulary": (
        {**QWEN3, "num_attention_heads": 3, "num_key_value_heads": 3}, {"tp": 3}, 2,
    ),
    "experts cut": (MOE, {"tp": 4}, 3),
    "experts in groups": (MOE, {"tp": 4, "ep": 2, "dp": 2, **GROUPED}, 3),
    "redundant experts": (MOE, {"tp": 4, "ep": 2, "num_redundant_experts": 2}, 2),
    "moved experts": (
        MOE, {"tp": 2, "ep": 2, "num_redundant_experts": 2, "expert_map": MOVED}, 3,
    ),
    "up first": (MOE, {"tp": 2, "moe_runner_backend": "flashinfer_cutlass"}, 2),
    "transposed": (MOE, {"tp": 2, "moe_runner_backend": "triton_kernel"}, 3),
    "latent": (DEEPSEEK, {"tp": 4}, 3),
    "latent, everything whole": (
        DEEPSEEK,
        {"tp": 2, "ep": 2, "dp": 2, "moe_dense_tp": 1, "moe_a2a_backend": "deepep", **GROUPED},
        3,
    ),
    "shared expert fused": (DEEPSEEK, {"tp": 4, "ep": 2, "fuse_shared_experts": True}, 2),
    "two shared experts": (TINY_MODELS["deepseek_v3"], {"tp": 2, "pp": 2}, 3),
    "direct queries": (KIMI, {"tp": 2}, 3),
    "glm": (GLM, {"tp": 2, "fuse_shared_experts": False}, 3),
    "glm fused": (GLM, {"tp": 4, "fuse_shared_experts": True}, 2),
    "gpt-oss": (GPT_OSS, {"tp": 4}, 3),
    "gpt-oss transposed": (GPT_OSS, {"tp": 2, "moe_runner_backend": "triton_kernel"}, 3),
}  # fmt: skip


def buffers_of(plan: Plan, arenas: list[Any], rank: int) -> dict[str, Any]:
    """The parameters of one rank after a plan was executed, as flat arrays of bits."""
    arena, sink = Arena(plan.sink, rank), plan.sink
    found = {}
    for buffer, offset in zip(arena.buffers.tolist(), arena.offset_bytes.tolist(), strict=True):
        size = Dtype(sink.buffers.dtype[buffer]).itemsize
        nbytes = int(sink.buffers.numel[buffer]) * size
        kind = {2: np.uint16, 4: np.uint32}[size]
        found[sink.buffers.names[buffer]] = arenas[rank][offset : offset + nbytes].view(kind)
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_plan_gives_every_rank_its_slices(case: str) -> None:
    config, flags, world = CASES[case]
    trainer = rules.fsdp2(config, fsdp=world, dtype="BF16")
    server = rules.sglang(config, **flags)
    plan = plan_transfer(
        Manifest.merge("source", [trainer.manifest(rank) for rank in range(world)]),
        Manifest.merge("sink", [server.manifest(rank) for rank in range(server.world_size)]),
    )
    arenas, counts = execute(plan)
    for rank in range(server.world_size):
        expected = held_by(config, flags, rank)
        found = buffers_of(plan, arenas, rank)
        assert found.keys() == expected.keys()
        for name, codes in expected.items():
            assert np.array_equal(found[name], codes.reshape(-1)), f"rank {rank}: {name}"
        shapes = {parameter.name: parameter.shape for parameter in server.parameters(rank)}
        assert shapes == {name: codes.shape for name, codes in expected.items()}
        assert counts[rank].max() == 1


def test_the_oracle_tells_ranks_and_kernels_apart() -> None:
    config, flags, _ = CASES["experts in groups"]
    mine = held_by(config, flags, 1)
    up_first = held_by(config, {**flags, "moe_runner_backend": "flashinfer_cutlass"}, 1)
    for other, names in (
        (held_by(config, flags, 0), ("self_attn.qkv_proj", "mlp.experts.w2")),
        (held_by(config, flags, 3), ("mlp.experts.w13", "mlp.experts.w2")),
        (up_first, ("mlp.experts.w13",)),
    ):
        for name in names:
            [key] = [key for key in mine if key.startswith("model.layers.0.") and name in key]
            assert mine[key].shape == other[key].shape
            assert not np.array_equal(mine[key], other[key])
    # Rank 3 is the second rank of the second group of attention, as rank 1 is of the first.
    assert np.array_equal(
        mine["model.embed_tokens.weight"], held_by(config, flags, 3)["model.embed_tokens.weight"]
    )


def test_replicas_of_a_server_hold_the_same() -> None:
    layout = rules.sglang(MOE, tp=2, pp=2, dp=2)
    assert layout.world_size == 8
    for rank in range(4):
        assert list(layout.parameters(rank)) == list(layout.parameters(rank + 4))


def test_large_models_have_the_documented_shapes() -> None:
    config = {
        "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168,
        "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 2,
        "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 256, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 8,
    }  # fmt: skip
    sparse = "model.layers.1."
    shapes = {p.name: p.shape for p in rules.sglang(config, tp=8).parameters(5)}
    assert shapes[sparse + "self_attn.fused_qkv_a_proj_with_mqa.weight"] == (2112, 7168)
    assert shapes[sparse + "mlp.experts.w13_weight"] == (257, 512, 7168)
    assert sparse + "mlp.shared_experts.gate_up_proj.weight" not in shapes
    layout = rules.sglang(config, tp=32, ep=32, dp=4, enable_dp_attention=True, moe_dense_tp=1)
    shapes = {p.name: p.shape for p in layout.parameters(5)}
    assert shapes["model.embed_tokens.weight"] == (16160, 7168)
    assert shapes["lm_head.weight"] == (4040, 7168)
    assert shapes["model.layers.0.mlp.gate_up_proj.weight"] == (36864, 7168)
    assert shapes[sparse + "self_attn.q_b_proj.weight"] == (3072, 1536)
    assert shapes[sparse + "mlp.experts.w13_weight"] == (8, 4096, 7168)
    assert shapes[sparse + "mlp.shared_experts.gate_up_proj.weight"] == (128, 7168)


FP8 = {"quantization_config": {"quant_method": "fp8"}}


@pytest.mark.parametrize(
    ("config", "flags", "message", "key"),
    [
        (QWEN3, {"tp": 0}, "tp must be a positive integer", "tp"),
        (QWEN3, {"dp": 0}, "dp must be a positive integer", "dp"),
        (QWEN3, {"ep": True}, "ep must be a positive integer", "ep"),
        (QWEN3, {"pp": 3}, "pp=3 is more than the 2 layers", "pp"),
        (QWEN3, {"tp": 3}, "tp=3 is no multiple of the 2 kv heads", "tp"),
        (QWEN3, {"tp": 16}, "tp=16 does not divide num_attention_heads, 8", "tp"),
        (QWEN3, {"tp": 4, "dp": 3, **GROUPED}, "dp=3 groups of attention", "dp"),
        ({**QWEN3, "intermediate_size": 25}, {"tp": 2}, "intermediate_size, 25", "tp"),
        (QWEN3, {"dp": 2, "enable_dp_lm_head": True}, "needs enable_dp_att", "enable_dp_lm_head"),
        (QWEN3, {"tp": 2, "ep": 2}, "ep, but this qwen3 has no experts", "ep"),
        (QWEN3, {"moe_a2a_backend": "deepep"}, "has no experts", "moe_a2a_backend"),
        (QWEN3, {"moe_dense_tp": 1}, "cuts dense MLPs over all tp ranks", "moe_dense_tp"),
        (QWEN3, {"quantized": True}, "has no quantization_config", "quantization_config"),
        ({**QWEN3, **FP8}, {}, "without a weight_block_size", "quantization_config"),
        (QWEN3, {"dtype": "F8_E4M3"}, "none of BF16, F16, F32", None),
        (LLAMA, {"tp": 2, "dp": 2, **GROUPED}, "cuts its heads over all tp", "enable_dp_attention"),
        (TINY_MODELS["llama"], {}, "mlp_bias on llama", "mlp_bias"),
        (TINY_MODELS["kimi_k2"], {}, "attention_bias on kimi_k2", "attention_bias"),
        (TINY_MODELS["qwen3_moe"], {}, "has experts in every layer", "mlp_only_layers"),
        (MOE, {"tp": 4, "ep": 3}, "ep=3 does not divide the tp=4 ranks", "ep"),
        (MOE, {"tp": 4, "ep": 4}, "ep=4 does not divide the number of experts, 6", "ep"),
        ({**MOE, "num_experts": 3}, {"tp": 4}, "more than the 3 experts", "tp"),
        ({**MOE, "moe_intermediate_size": 13}, {"tp": 2}, "moe_intermediate_size, 13", "tp"),
        (MOE, {"num_redundant_experts": 2}, "needs ep > 1", "num_redundant_experts"),
        (MOE, {"num_redundant_experts": -1}, "integer from 0 on", "num_redundant_experts"),
        (MOE, {"tp": 2, "ep": 2, "expert_map": [range(6)]}, "1 rows for 2 decoder", "expert_map"),
        (MOE, {"tp": 2, "ep": 2, "expert_map": [[0] * 6] * 2}, "row 0 does not", "expert_map"),
        (MOE, {"moe_a2a_backend": "carrier_pigeon"}, "is none of none, deepep", "moe_a2a_backend"),
        (MOE, {"tp": 2, "moe_a2a_backend": "deepep"}, "spans all tp=2 ranks", "ep"),
        (MOE, {"moe_runner_backend": "abacus"}, "is none of triton", "moe_runner_backend"),
        (
            MOE,
            {"tp": 4, "ep": 2, "moe_runner_backend": "flashinfer_cutlass"},
            "wants 1 or tp=4", "ep",
        ),
        (
            MOE,
            {"tp": 2, "ep": 2, "moe_a2a_backend": "flashinfer"},
            "wants deep_gemm or flashinfer_cutlass", "moe_runner_backend",
        ),
        (
            MOE,
            {
                "tp": 2, "ep": 2, "moe_a2a_backend": "flashinfer",
                "moe_runner_backend": "deep_gemm",
            },
            "wants enable_dp_attention with dp=2", "dp",
        ),
        (MOE, {"moe_dense_tp": 2}, "must be 1 or None", "moe_dense_tp"),
        (MOE, {"fuse_shared_experts": True}, "does not fuse them", "fuse_shared_experts"),
        (
            TINY_MODELS["deepseek_v3"], {"fuse_shared_experts": True},
            "with 2 shared experts does not fuse", "fuse_shared_experts",
        ),
        (
            {**GLM, "num_key_value_heads": 4, "n_routed_experts": 6},
            {"tp": 2, "ep": 2, "fuse_shared_experts": True},
            "glm4_moe with 1 shared experts does not fuse", "fuse_shared_experts",
        ),
        (GLM, {"num_redundant_experts": 1}, "no place for copies", "num_redundant_experts"),
        (GPT_OSS, {"tp": 3, "ep": 3}, "gives every rank all", "ep"),
        (
            {**GPT_OSS, "quantization_config": {"quant_method": "mxfp4"}}, {},
            "depends on the GPU", "quantization_config",
        ),
        ({**DEEPSEEK, "tie_word_embeddings": True}, {}, "head unloaded", "tie_word_embeddings"),
    ],
)  # fmt: skip
def test_what_sglang_refuses_is_refused_with_the_reason(
    config: dict[str, Any], flags: dict[str, Any], message: str, key: str | None
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        rules.sglang(config, **flags)
    if key is not None:
        assert caught.value.context["key"] == key


def test_there_is_no_rank_beyond_the_last() -> None:
    with pytest.raises(ConfigError, match="sink rank 2 does not exist: this layout has 2 ranks"):
        rules.sglang(QWEN3, tp=2).manifest(2)
