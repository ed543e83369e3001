"""Attention: fused queries, keys and values; latent attention with replicated compressions."""

from __future__ import annotations

from collections.abc import Iterator

from weightsync.planners.rules.engine_parts.linears import Checkpoint, Rows
from weightsync.planners.rules.parts import Parameter, rows, stacked

__all__ = ["attention", "latent_attention"]


def attention(
    checkpoint: Checkpoint, layer: str, tp: int, tp_rank: int, module: str = "self_attn."
) -> Iterator[Parameter]:
    """Attention with a projection each for queries, keys and values.

    Args:
        checkpoint: The canonical tensors.
        layer: `model.layers.N.`
        tp: Tensor-parallel ranks. With more of them than kv heads, neighbours hold the same one.
        tp_rank: This one.
        module: What the engine calls it.

    Yields:
        Its parameters, in the engine's order.
    """
    config = checkpoint.config
    source, name = layer + "self_attn.", layer + module
    num_heads = config.num_heads // tp
    num_q = num_heads * config.head_dim
    num_kv = max(1, config.num_kv_heads // tp) * config.head_dim
    kv_rank = tp_rank // max(1, tp // config.num_kv_heads)
    if config.model_type == "gpt_oss":
        sinks = rows(source + "sinks", (config.num_heads,), tp_rank * num_heads, num_heads)
        yield stacked(name + "sinks", [sinks])
    yield from checkpoint.fused(
        name + "qkv_proj",
        [
            Rows(source + "q_proj", tp_rank * num_q, num_q),
            Rows(source + "k_proj", kv_rank * num_kv, num_kv),
            Rows(source + "v_proj", kv_rank * num_kv, num_kv),
        ],
        bias=config.attention_bias,
    )
    yield from checkpoint.cut_columns(
        name + "o_proj", source + "o_proj", tp_rank * num_q, num_q, bias=config.output_bias
    )
    if config.qk_norm:
        yield checkpoint.whole(source + "q_norm.weight")
        yield checkpoint.whole(source + "k_norm.weight")


def latent_attention(
    checkpoint: Checkpoint, layer: str, tp: int, tp_rank: int, compression: str
) -> Iterator[Parameter]:
    """Latent attention: compressions whole on every rank, expansions cut by heads.

    Args:
        checkpoint: The canonical tensors.
        layer: `model.layers.N.`
        tp: Tensor-parallel ranks.
        tp_rank: This one.
        compression: What the engine calls both compressions in one.

    Yields:
        Its parameters, in the engine's order.
    """
    config = checkpoint.config
    latent = config.latent
    assert latent is not None
    prefix = layer + "self_attn."
    num_heads = config.num_heads // tp
    num_q = num_heads * config.head_dim
    expanded = num_heads * (latent.nope_dim + latent.v_dim)
    compressed = Rows(prefix + "kv_a_proj_with_mqa", 0, latent.kv_rank + latent.rope_dim)
    if latent.q_rank is None:
        yield from checkpoint.fused(compressed.source, [compressed])
        yield from checkpoint.fused(
            prefix + "q_proj", [Rows(prefix + "q_proj", tp_rank * num_q, num_q)]
        )
    else:
        yield from checkpoint.fused(
            prefix + compression,
            [Rows(prefix + "q_a_proj", 0, latent.q_rank), compressed],
        )
        yield checkpoint.whole(prefix + "q_a_layernorm.weight")
        yield from checkpoint.fused(
            prefix + "q_b_proj", [Rows(prefix + "q_b_proj", tp_rank * num_q, num_q)]
        )
    yield checkpoint.whole(prefix + "kv_a_layernorm.weight")
    yield from checkpoint.fused(
        prefix + "kv_b_proj", [Rows(prefix + "kv_b_proj", tp_rank * expanded, expanded)]
    )
    values = num_heads * latent.v_dim
    yield from checkpoint.cut_columns(
        prefix + "o_proj", prefix + "o_proj", tp_rank * values, values
    )
