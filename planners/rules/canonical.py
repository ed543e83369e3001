"""Canonical tensors: names, shapes and dtypes of the Hugging Face checkpoint, one per expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType

from weightsync.ir.dtypes import Dtype
from weightsync.planners.rules.config import ConfigLike, ModelConfig, model_config
from weightsync.planners.rules.quantized import quantized_tensor

__all__ = [
    "CORRECTION_BIAS",
    "EMBEDDING",
    "LM_HEAD",
    "canonical_dtypes",
    "canonical_tensors",
    "layer_tensors",
    "outer_tensors",
]

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
CORRECTION_BIAS = ".mlp.gate.e_score_correction_bias"

Shape = tuple[int, ...]


def canonical_tensors(config: ConfigLike, *, quantized: bool = False) -> Mapping[str, Shape]:
    """Lists every tensor of a model's checkpoint.

    Tied weights appear once: with `tie_word_embeddings` there is no `lm_head.weight`. Layers of
    multi-token prediction (`num_nextn_predict_layers`, numbered after the last decoder layer) are
    left out: engines skip them unless they speculate, and transformers does not build them.

    Experts are one tensor each and projection, as checkpoints hold them. gpt-oss has no checkpoint
    of that kind: its `mlp.experts.gate_up_proj` [E, H, 2I] has gate in the even and up in the odd
    columns, and `mlp.experts.down_proj` is [E, I, H].

    Args:
        config: The model.
        quantized: The tensors of the checkpoint as `quantization_config` describes it, not of the
            BF16 one. Block FP8: `X.weight` and its scales `X.weight_scale_inv`
            [ceil(rows / 128), ceil(columns / 128)]; MXFP4: `X_blocks` [E, N, K / 32, 16] and
            `X_scales` [E, N, K / 32] of an `X` [E, K, N].

    Returns:
        Shape by name, in the order of the layers.

    Raises:
        ConfigError: `config` describes no supported model, or, if `quantized`, no quantization that
            is known.
    """
    return _canonical(model_config(config), quantized)[0]


def canonical_dtypes(config: ConfigLike, *, quantized: bool = False) -> Mapping[str, Dtype]:
    """Names the tensors whose dtype is not the one of the model.

    Args:
        config: The model.
        quantized: As in `canonical_tensors`.

    Returns:
        Dtype by name: F32 for `e_score_correction_bias`, and of quantized checkpoints what is
        quantized, with its scales. All others have the dtype of the model, as a rule BF16.

    Raises:
        ConfigError: As in `canonical_tensors`.
    """
    return _canonical(model_config(config), quantized)[1]


@lru_cache(maxsize=8)
def _canonical(
    config: ModelConfig, quantized: bool
) -> tuple[Mapping[str, Shape], Mapping[str, Dtype]]:
    shapes: dict[str, Shape] = {}
    dtypes: dict[str, Dtype] = {}
    for name, shape in _tensors(config):
        found = quantized_tensor(config, name, shape) if quantized else None
        if found is not None:
            shapes |= {part: part_shape for part, (part_shape, _) in found.items()}
            dtypes |= {part: dtype for part, (_, dtype) in found.items()}
            continue
        shapes[name] = shape
        if name.endswith(CORRECTION_BIAS):
            dtypes[name] = Dtype.F32  # steps of the balancing are lost in BF16
    return MappingProxyType(shapes), MappingProxyType(dtypes)


def _tensors(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    embedding, *head = outer_tensors(config)
    yield embedding
    for layer in range(config.num_layers):
        yield from layer_tensors(config, layer)
    yield from head


def outer_tensors(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """Yields name and shape of the tensors that are in no layer: the embedding, then the rest."""
    yield EMBEDDING, (config.vocab_size, config.hidden_size)
    yield "model.norm.weight", (config.hidden_size,)
    if not config.tie_word_embeddings:
        yield LM_HEAD, (config.vocab_size, config.hidden_size)


def layer_tensors(config: ModelConfig, layer: int) -> Iterator[tuple[str, Shape]]:
    """Yields name and shape of the tensors of one layer of the BF16 checkpoint."""
    hidden = config.hidden_size
    prefix = f"model.layers.{layer}."
    if config.latent is None:
        yield from _attention(prefix + "self_attn.", config)
    else:
        yield from _latent_attention(prefix + "self_attn.", config)
    if config.model_type == "gpt_oss":
        yield from _fused_experts(prefix + "mlp.", config)
    elif config.is_sparse(layer):
        yield from _experts(prefix, config)
    else:
        yield from _mlp(prefix + "mlp.", config, config.intermediate_size, bias=config.mlp_bias)
    yield prefix + "input_layernorm.weight", (hidden,)
    yield prefix + "post_attention_layernorm.weight", (hidden,)


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
    yield from _linear(prefix + "o_proj", hidden, q, bias=config.output_bias)
    if config.qk_norm:
        yield prefix + "q_norm.weight", (config.head_dim,)
        yield prefix + "k_norm.weight", (config.head_dim,)
    if config.model_type == "gpt_oss":
        yield prefix + "sinks", (config.num_heads,)


def _latent_attention(prefix: str, config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    latent, hidden, heads = config.latent, config.hidden_size, config.num_heads
    assert latent is not None
    bias = config.attention_bias
    q = heads * config.head_dim
    if latent.q_rank is None:
        yield prefix + "q_proj.weight", (q, hidden)
    else:
        yield from _linear(prefix + "q_a_proj", latent.q_rank, hidden, bias=bias)
        yield prefix + "q_a_layernorm.weight", (latent.q_rank,)
        yield prefix + "q_b_proj.weight", (q, latent.q_rank)
    compressed = latent.kv_rank + latent.rope_dim
    yield from _linear(prefix + "kv_a_proj_with_mqa", compressed, hidden, bias=bias)
    yield prefix + "kv_a_layernorm.weight", (latent.kv_rank,)
    expanded = heads * (latent.nope_dim + latent.v_dim)
    yield prefix + "kv_b_proj.weight", (expanded, latent.kv_rank)
    yield from _linear(prefix + "o_proj", hidden, heads * latent.v_dim, bias=config.output_bias)


def _mlp(
    prefix: str, config: ModelConfig, width: int, *, bias: bool
) -> Iterator[tuple[str, Shape]]:
    yield from _linear(prefix + "gate_proj", width, config.hidden_size, bias=bias)
    yield from _linear(prefix + "up_proj", width, config.hidden_size, bias=bias)
    yield from _linear(prefix + "down_proj", config.hidden_size, width, bias=bias)


def _experts(layer: str, config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    prefix, width = layer + "mlp.", config.moe_intermediate_size
    yield prefix + "gate.weight", (config.num_experts, config.hidden_size)
    if config.correction_bias:
        yield layer.removesuffix(".") + CORRECTION_BIAS, (config.num_experts,)
    for expert in range(config.num_experts):
        yield from _mlp(f"{prefix}experts.{expert}.", config, width, bias=False)
    if config.num_shared_experts:
        shared = width * config.num_shared_experts
        yield from _mlp(prefix + "shared_experts.", config, shared, bias=False)


def _fused_experts(prefix: str, config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """The MLP of gpt-oss; its matrices are K-major, the transposes of what a Linear holds."""
    experts, hidden = config.num_experts, config.hidden_size
    width = config.moe_intermediate_size
    yield from _linear(prefix + "router", experts, hidden, bias=True)
    yield prefix + "experts.gate_up_proj", (experts, hidden, 2 * width)
    yield prefix + "experts.gate_up_proj_bias", (experts, 2 * width)
    yield prefix + "experts.down_proj", (experts, width, hidden)
    yield prefix + "experts.down_proj_bias", (experts, hidden)
