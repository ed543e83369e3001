"""Canonical tensors: names and shapes of the BF16 Hugging Face checkpoint, one per expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType

from weightsync.planners.rules.config import ConfigLike, ModelConfig, model_config

__all__ = ["EMBEDDING", "LM_HEAD", "canonical_tensors"]

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"

Shape = tuple[int, ...]


def canonical_tensors(config: ConfigLike) -> Mapping[str, Shape]:
    """Lists every tensor of a model's checkpoint.

    Tied weights appear once: with `tie_word_embeddings` there is no `lm_head.weight`.

    Args:
        config: The model.

    Returns:
        Shape by name, in the order of the layers.

    Raises:
        ConfigError: `config` describes no supported model.
    """
    return _canonical_tensors(model_config(config))


@lru_cache(maxsize=8)
def _canonical_tensors(config: ModelConfig) -> Mapping[str, Shape]:
    return MappingProxyType(dict(_tensors(config)))


def _tensors(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    yield EMBEDDING, (config.vocab_size, config.hidden_size)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        yield from _attention(prefix + "self_attn.", config)
        if config.is_sparse(layer):
            yield prefix + "mlp.gate.weight", (config.num_experts, config.hidden_size)
            for expert in range(config.num_experts):
                expert_prefix = f"{prefix}mlp.experts.{expert}."
                yield from _mlp(expert_prefix, config, config.moe_intermediate_size, bias=False)
        else:
            yield from _mlp(prefix + "mlp.", config, config.intermediate_size, bias=config.mlp_bias)
        yield prefix + "input_layernorm.weight", (config.hidden_size,)
        yield prefix + "post_attention_layernorm.weight", (config.hidden_size,)
    yield "model.norm.weight", (config.hidden_size,)
    if not config.tie_word_embeddings:
        yield LM_HEAD, (config.vocab_size, config.hidden_size)


def _linear(name: str, rows: int, columns: int, *, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield name + ".weight", (rows, columns)
    if bias:
        yield name + ".bias", (rows,)


def _attention(prefix: str, config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, bias = config.hidden_size, config.attention_bias
    yield from _linear(prefix + "q_proj", q, hidden, bias=bias)
    yield from _linear(prefix + "k_proj", kv, hidden, bias=bias)
    yield from _linear(prefix + "v_proj", kv, hidden, bias=bias)
    yield from _linear(prefix + "o_proj", hidden, q, bias=bias)
    if config.qk_norm:
        yield prefix + "q_norm.weight", (config.head_dim,)
        yield prefix + "k_norm.weight", (config.head_dim,)


def _mlp(
    prefix: str, config: ModelConfig, width: int, *, bias: bool
) -> Iterator[tuple[str, Shape]]:
    yield from _linear(prefix + "gate_proj", width, config.hidden_size, bias=bias)
    yield from _linear(prefix + "up_proj", width, config.hidden_size, bias=bias)
    yield from _linear(prefix + "down_proj", config.hidden_size, width, bias=bias)
