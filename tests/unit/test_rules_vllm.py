from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from support.layout_oracle import (
    TINY_LLAMA,
    TINY_MODELS,
    TINY_QWEN3,
    TINY_QWEN3_MOE,
    PieceRow,
    build_model,
    checkpoint,
    piece_rows,
    read_buffers,
)
from weightsync.errors import ConfigError, IntegrityError
from weightsync.integrations import readback
from weightsync.ir.dtypes import Dtype
from weightsync.planners import rules

# (model, tp, ep): plain, split, replicated kv heads (2 under tp 4 and 8), experts cut or placed
# (6 experts on 4 ranks: 2, 2, 1, 1), vocabulary padding inside a rank (100, 70, 130 rows) and
# whole ranks of padding (70 rows on 4).
CASES = [
    ("qwen3", 1, False),
    ("qwen3", 2, False),
    ("qwen3", 4, False),
    ("qwen3", 8, False),
    ("qwen3_moe", 1, False),
    ("qwen3_moe", 2, False),
    ("qwen3_moe", 2, True),
    ("qwen3_moe", 4, False),
    ("qwen3_moe", 4, True),
    ("llama", 1, False),
    ("llama", 2, False),
    ("llama", 4, False),
]


@pytest.fixture(scope="module")
def checkpoints() -> dict[str, dict[str, Tensor]]:
    return {name: checkpoint(build_model(config), config) for name, config in TINY_MODELS.items()}


@pytest.mark.parametrize(("name", "tp", "ep"), CASES)
def test_every_rank_equals_the_oracle(
    checkpoints: dict[str, dict[str, Tensor]], name: str, tp: int, ep: bool
) -> None:
    named, config = checkpoints[name], TINY_MODELS[name]
    layout = rules.vllm(config, tp=tp, ep=ep)
    for rank in range(tp):
        expected = readback.shard(named, config, tp=tp, ep=ep, rank=rank)
        buffers = read_buffers(layout.manifest(rank), named)
        assert buffers.keys() == expected.keys()
        for buffer, tensor in expected.items():
            assert torch.equal(buffers[buffer], tensor.flatten()), f"rank {rank}: {buffer}"
        shapes = {parameter.name: parameter.shape for parameter in layout.parameters(rank)}
        assert shapes == {buffer: tuple(tensor.shape) for buffer, tensor in expected.items()}


@pytest.mark.parametrize(("name", "tp", "ep"), CASES)
def test_unshard_undoes_shard(
    checkpoints: dict[str, dict[str, Tensor]], name: str, tp: int, ep: bool
) -> None:
    named, config = checkpoints[name], TINY_MODELS[name]
    ranks = [readback.shard(named, config, tp=tp, ep=ep, rank=rank) for rank in range(tp)]
    found = readback.unshard(ranks, config, tp=tp, ep=ep)
    assert found.keys() == named.keys()
    for tensor in named:
        assert torch.equal(found[tensor], named[tensor]), tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("model.layers.0.self_attn.qkv_proj.weight", -1), "k_proj|v_proj"),
        (("model.norm.weight", 0), "model.norm.weight"),
        (("model.embed_tokens.weight", -1), "padding"),
    ],
)
def test_unshard_notices_replicas_and_padding_that_differ(
    checkpoints: dict[str, dict[str, Tensor]], change: tuple[str, int], message: str
) -> None:
    ranks = [readback.shard(checkpoints["qwen3"], TINY_QWEN3, tp=4, rank=rank) for rank in range(4)]
    name, row = change
    ranks[3][name][row] += 1
    with pytest.raises(IntegrityError, match=message):
        readback.unshard(ranks, TINY_QWEN3, tp=4)


def test_unshard_wants_every_rank() -> None:
    with pytest.raises(ConfigError, match="2 ranks, not 1"):
        readback.unshard([{}], TINY_QWEN3, tp=2)


def test_large_models_have_the_documented_shapes() -> None:
    config = {
        **TINY_QWEN3_MOE,
        "hidden_size": 4096,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "moe_intermediate_size": 1536,
        "vocab_size": 151936,
        "num_hidden_layers": 1,
        "mlp_only_layers": [],
    }
    shapes = {p.name: p.shape for p in rules.vllm(config, tp=8).parameters(5)}
    prefix = "model.layers.0."
    assert shapes["model.embed_tokens.weight"] == (18992, 4096)
    assert shapes[prefix + "self_attn.qkv_proj.weight"] == (1024 + 128 + 128, 4096)
    assert shapes[prefix + "mlp.experts.routed_experts.w13_weight"] == (128, 384, 4096)
    assert shapes[prefix + "mlp.experts.routed_experts.w2_weight"] == (128, 4096, 192)
    placed = {p.name: p.shape for p in rules.vllm(config, tp=8, ep=True).parameters(5)}
    assert placed[prefix + "mlp.experts.routed_experts.w13_weight"] == (16, 3072, 4096)
    keys = [
        row
        for row in piece_rows(rules.vllm(config, tp=8).manifest(5))
        if row.tensor == prefix + "self_attn.k_proj.weight"
    ]
    assert [row.lo for row in keys] == [(2 * 128, 0)]  # kv head 5 // 2


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_buffers_have_the_dtype_asked_for(dtype: str) -> None:
    manifest = rules.vllm(TINY_QWEN3, dtype=dtype).manifest(0)
    assert manifest.ranks == ("sink 0",)
    assert {int(code) for code in manifest.buffers.dtype} == {int(Dtype[dtype])}


@pytest.mark.parametrize(
    ("config", "degrees", "message"),
    [
        (TINY_QWEN3, {"tp": 0}, "tp must be a positive integer"),
        (TINY_QWEN3, {"tp": True}, "tp must be a positive integer"),
        (TINY_QWEN3, {"pp": 3}, "pp=3 is more than the 2 layers"),
        (TINY_QWEN3, {"dp": 0}, "dp must be a positive integer"),
        (TINY_QWEN3, {"tp": 3}, "tp=3 is no multiple of the 2 kv heads"),
        (TINY_QWEN3, {"tp": 16}, "tp=16 does not divide num_attention_heads, 8"),
        (
            {**TINY_QWEN3, "num_key_value_heads": 8, "num_attention_heads": 24},
            {"tp": 3},
            "tp=3 does not divide num_key_value_heads, 8",
        ),
        (
            {**TINY_QWEN3, "num_key_value_heads": 3, "num_attention_heads": 6},
            {"tp": 3},
            "tp=3 does not divide the vocabulary padded to a multiple of 64, 128",
        ),
        ({**TINY_QWEN3, "intermediate_size": 25}, {"tp": 2}, "intermediate_size, 25"),
        ({**TINY_QWEN3_MOE, "moe_intermediate_size": 13}, {"tp": 2}, "moe_intermediate_size, 13"),
        ({**TINY_QWEN3_MOE, "num_experts": 3}, {"tp": 4}, "more than the 3 experts"),
        (TINY_QWEN3_MOE, {"tp": 4, "ep": 2}, "so ep is 4 or 1"),
        (TINY_QWEN3_MOE, {"tp": 4, "ep": 0}, "ep must be a positive integer"),
        (TINY_QWEN3, {"tp": 2, "ep": True}, "has no experts"),
        (TINY_QWEN3, {"dtype": "F8_E4M3"}, "none of BF16, F16, F32"),
        ({**TINY_QWEN3, "attention_bias": True}, {}, "o_proj has no bias"),
        (TINY_MODELS["gpt_oss"], {"tp": 4}, "more than the 2 kv heads, which vLLM's gpt_oss"),
        (TINY_MODELS["gpt_oss"], {"dp": 2, "ep": True}, "2 ranks do not divide the 3 experts"),
        (
            {**TINY_QWEN3, "quantization_config": {"quant_method": "fp8"}},
            {},
            "quantizes to fp8 without a weight_block_size",
        ),
        (TINY_QWEN3, {"quantized": True}, "the config has no quantization_config"),
        (TINY_QWEN3_MOE, {"expert_placement": "random"}, "must be linear or round_robin"),
        (TINY_QWEN3_MOE, {"all2all_backend": "carrier_pigeon"}, "is none of allgather"),
        (TINY_QWEN3_MOE, {"num_redundant_experts": 2}, "needs ep and more than one rank"),
        (TINY_QWEN3_MOE, {"num_redundant_experts": -1}, "must be an integer from 0 on"),
        (TINY_QWEN3_MOE, {"expert_map": [range(8)]}, "expert_map: needs ep"),
        (TINY_QWEN3_MOE, {"expert_map": [range(8)] * 9, "tp": 2, "ep": True}, "9 rows for"),
        (
            TINY_QWEN3_MOE,
            {"expert_map": [[0] * 6], "tp": 2, "ep": True},
            "row 0 does not place all 6 experts in 6 slots",
        ),
        (TINY_QWEN3_MOE, {"dp": 8, "ep": True}, "8 ranks are more than the 6 experts"),
        (TINY_QWEN3_MOE, {"tp": 2, "dp": 5}, "over 5 data-parallel ranks"),
        (TINY_QWEN3_MOE, {"pp": 2}, "stage 1 has no sparse layer"),
        (TINY_MODELS["kimi_k2"], {}, "latent attention has no biases and would drop them"),
        (
            {**TINY_MODELS["deepseek_v3"], "tie_word_embeddings": True},
            {},
            "would leave its head unloaded",
        ),
        (
            {**TINY_MODELS["gpt_oss"], "quantization_config": {"quant_method": "mxfp4"}},
            {"mxfp4_padding": (128, 100)},
            "must be two multiples of 32",
        ),
    ],
)
def test_what_vllm_refuses_is_refused_with_the_reason(
    config: dict[str, Any], degrees: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        rules.vllm(config, **degrees)


def test_a_degree_may_be_stated_as_a_number() -> None:
    assert rules.vllm(TINY_QWEN3_MOE, tp=2, ep=2) == rules.vllm(TINY_QWEN3_MOE, tp=2, ep=True)
    assert rules.vllm(TINY_QWEN3_MOE, tp=2, ep=1) == rules.vllm(TINY_QWEN3_MOE, tp=2)


def test_there_is_no_rank_beyond_the_last() -> None:
    with pytest.raises(ConfigError, match="sink rank 2 does not exist: this layout has 2 ranks"):
        rules.vllm(TINY_QWEN3, tp=2).manifest(2)


# The comparison above must notice the mistakes that such rules really contain.

ATTENTION = "model.layers.0.self_attn."
EXPERTS = "model.layers.0.mlp.experts."


def swapped(rows: list[PieceRow], one: str, other: str) -> list[PieceRow]:
    names = {one: other, other: one}
    return [replace(row, tensor=names.get(row.tensor or "", row.tensor)) for row in rows]


def moved(rows: list[PieceRow], tensor: str, by: int) -> list[PieceRow]:
    return [
        replace(row, lo=(row.lo[0] + by, *row.lo[1:])) if row.tensor == tensor else row
        for row in rows
    ]


def rotated(rows: list[PieceRow], tensor: str) -> list[PieceRow]:
    """Every row of a matrix one place too low, the last one on top."""
    (row,) = (row for row in rows if row.tensor == tensor)
    count = row.n[0]
    below = replace(row, n=(count - 1, *row.n[1:]), offset=row.offset + row.stride[0])
    top = replace(row, lo=(row.lo[0] + count - 1, *row.lo[1:]), n=(1, *row.n[1:]))
    return [other for other in rows if other is not row] + [below, top]


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("qwen3", lambda r: swapped(r, ATTENTION + "k_proj.weight", ATTENTION + "v_proj.weight")),
        (
            "qwen3",
            lambda r: swapped(
                r, "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
            ),
        ),
        ("qwen3", lambda r: rotated(r, "model.layers.0.mlp.up_proj.weight")),
        ("qwen3", lambda r: moved(r, ATTENTION + "k_proj.weight", -4)),
        (
            "qwen3_moe",
            lambda r: swapped(r, EXPERTS + "0.gate_proj.weight", EXPERTS + "0.up_proj.weight"),
        ),
        (
            "qwen3_moe",
            lambda r: swapped(r, EXPERTS + "1.down_proj.weight", EXPERTS + "2.down_proj.weight"),
        ),
    ],
    ids=["k_v", "gate_up", "row_shift", "wrong_kv_head", "expert_gate_up", "experts"],
)
def test_planted_mistakes_are_noticed(
    checkpoints: dict[str, dict[str, Tensor]],
    name: str,
    mistake: Callable[[list[PieceRow]], list[PieceRow]],
) -> None:
    named, config = checkpoints[name], TINY_MODELS[name]
    tp, rank = (4, 2) if name == "qwen3" else (1, 0)
    manifest = rules.vllm(config, tp=tp).manifest(rank)
    expected = readback.shard(named, config, tp=tp, rank=rank)
    rows = piece_rows(manifest)

    def differing(found: dict[str, Tensor]) -> list[str]:
        return [n for n, tensor in expected.items() if not torch.equal(found[n], tensor.flatten())]

    assert differing(read_buffers(manifest, named, rows)) == []
    assert differing(read_buffers(manifest, named, mistake(rows))) != []


def test_biases_are_stacked_and_replicated() -> None:
    names = {parameter.name for parameter in rules.vllm(TINY_LLAMA, tp=2).parameters(1)}
    prefix = "model.layers.0."
    assert {
        prefix + "self_attn.qkv_proj.bias",
        prefix + "self_attn.o_proj.bias",
        prefix + "mlp.gate_up_proj.bias",
        prefix + "mlp.down_proj.bias",
    } <= names
