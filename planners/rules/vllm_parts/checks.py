"""What vLLM refuses at some degrees, or silently drops: refused before anything is planned."""

from __future__ import annotations

from dataclasses import replace

from weightsync.errors import ConfigError
from weightsync.planners.rules.canonical import canonical_tensors
from weightsync.planners.rules.config import ModelConfig
from weightsync.planners.rules.engine_parts.checks import (
    check_divides,
    check_expert_map,
    check_kv_heads,
    check_redundant,
)
from weightsync.planners.rules.layout import checked_degree
from weightsync.planners.rules.quantized import is_unconverted
from weightsync.planners.rules.vllm_parts.degrees import ALL2ALL_BACKENDS, Degrees

__all__ = ["check_model", "checked_degrees"]

# Classes of vLLM that look for an example of their experts on every pipeline stage.
_NEEDS_EXPERTS = ("qwen3_moe", "glm4_moe")


def checked_degrees(model: ModelConfig, degrees: Degrees, ep: bool | int) -> Degrees:
    """Checks degrees against each other and against the experts of a model.

    Args:
        model: The model.
        degrees: The degrees; whether experts are placed whole is not yet in them.
        ep: Whether they are, or the degree.

    Returns:
        The degrees, complete.

    Raises:
        ConfigError: vLLM has no such replica.
    """
    shared = degrees.moe_ranks
    degree = (shared if ep else 1) if isinstance(ep, bool) else checked_degree("ep", ep)
    if degree not in (1, shared):
        raise ConfigError(
            f"vllm: ep={degree} with tp={degrees.tp} and dp={degrees.dp}: vLLM spreads experts "
            f"over all ranks of a stage, so ep is {shared} or 1",
            key="ep",
        )
    if degree > 1 and not model.sparse_layers:
        raise ConfigError(
            f"vllm: ep={degree}, but this {model.model_type} has no experts", key="ep"
        )
    if degrees.pp > model.num_layers:
        raise ConfigError(
            f"vllm: pp={degrees.pp} is more than the {model.num_layers} layers", key="pp"
        )
    if degrees.placement not in ("linear", "round_robin"):
        raise ConfigError(
            f"vllm: expert_placement must be linear or round_robin, not {degrees.placement!r}",
            key="expert_placement",
        )
    if degrees.all2all not in ALL2ALL_BACKENDS:
        raise ConfigError(
            f"vllm: all2all_backend {degrees.all2all!r} is none of "
            f"{', '.join(sorted(ALL2ALL_BACKENDS))}",
            key="all2all_backend",
        )
    redundant = degrees.num_redundant
    check_redundant("vllm", redundant)
    if redundant and degree == 1:
        raise ConfigError(
            "vllm: num_redundant_experts needs ep and more than one rank: vLLM balances whole "
            "experts only",
            key="num_redundant_experts",
        )
    if degree > 1 and degree > model.num_experts + redundant:
        raise ConfigError(
            f"vllm: {degree} ranks are more than the {model.num_experts + redundant} experts",
            key="ep",
        )
    _check_expert_map(model, degrees, degree)
    return replace(degrees, is_ep=degree > 1)


def _check_expert_map(model: ModelConfig, degrees: Degrees, degree: int) -> None:
    num_slots, rows = model.num_experts + degrees.num_redundant, degrees.expert_map
    problem = None
    if rows and degree == 1:
        problem = "needs ep and more than one rank: vLLM moves whole experts only"
    elif rows and model.model_type == "gpt_oss":
        problem = "vLLM's gpt_oss knows no balancer"
    elif rows and num_slots % degree:
        problem = f"{degree} ranks do not divide its {num_slots} slots, as vLLM's balancer needs"
    if problem is not None:
        raise ConfigError(f"vllm: expert_map: {problem}", key="expert_map")
    if rows:
        num_sparse = len(model.sparse_layers)
        check_expert_map("vllm", model, rows, num_slots, num_sparse, "layers with experts")


def check_model(
    model: ModelConfig,
    degrees: Degrees,
    vocab_padding: int,
    mxfp4_padding: tuple[int, int],
    *,
    quantized: bool,
) -> None:
    """Checks a model against the degrees.

    Args:
        model: The model.
        degrees: The degrees.
        vocab_padding: Rows of the embeddings are padded to a multiple of this.
        mxfp4_padding: Paddings of experts in MXFP4.
        quantized: Whether the engine holds the quantized checkpoint.

    Raises:
        ConfigError: vLLM would refuse this, or drop some of the weights.
    """
    _check_weights(model)
    if quantized:
        _check_quantized(model, mxfp4_padding)
    if model.model_type == "gpt_oss":
        _check_gpt_oss(model, degrees)
    if model.model_type in _NEEDS_EXPERTS:
        for stage in range(degrees.pp):
            layers = degrees.place(model, stage * degrees.tp).layers
            if model.sparse_layers.isdisjoint(layers):
                raise ConfigError(
                    f"vllm: pp={degrees.pp}: stage {stage} has no sparse layer, and vLLM's "
                    f"{model.model_type} wants one on each",
                    key="pp",
                )
    tp = degrees.tp
    divided = {"num_attention_heads": model.num_heads}
    if model.latent is None:
        check_kv_heads("vllm", "tp", tp, model.num_kv_heads)
    if len(model.sparse_layers) < model.num_layers:
        divided["intermediate_size"] = model.intermediate_size
    if model.sparse_layers:
        if model.model_type == "qwen3_moe" and tp > model.num_experts:
            raise ConfigError(
                f"vllm: tp={tp} is more than the {model.num_experts} experts", key="tp"
            )
        if model.num_shared_experts:
            divided["the width of the shared experts"] = (
                model.moe_intermediate_size * model.num_shared_experts
            )
        if not degrees.is_ep and model.moe_intermediate_size % degrees.moe_ranks:
            raise ConfigError(
                f"vllm: tp={tp} does not divide moe_intermediate_size, "
                f"{model.moe_intermediate_size}"
                + (f", over {degrees.dp} data-parallel ranks" if degrees.dp > 1 else ""),
                key="tp",
            )
    divided[f"the vocabulary padded to a multiple of {vocab_padding}"] = (
        -(-model.vocab_size // vocab_padding) * vocab_padding
    )
    check_divides("vllm", "tp", tp, divided)


def _check_weights(model: ModelConfig) -> None:
    """Weights that a checkpoint may have and vLLM's classes do not."""
    has_no_bias = model.qk_norm and model.model_type.startswith("qwen3")
    if model.attention_bias and has_no_bias:
        raise ConfigError(
            f"vllm: attention_bias on {model.model_type}: vLLM's o_proj has no bias there and "
            "would drop it",
            key="attention_bias",
        )
    if model.attention_bias and model.latent is not None:
        raise ConfigError(
            f"vllm: attention_bias on {model.model_type}: vLLM's latent attention has no biases "
            "and would drop them",
            key="attention_bias",
        )
    if model.tie_word_embeddings and model.model_type not in ("llama", "qwen3", "qwen3_moe"):
        raise ConfigError(
            f"vllm: tie_word_embeddings on {model.model_type}: vLLM would leave its head unloaded",
            key="tie_word_embeddings",
        )


def _check_quantized(model: ModelConfig, mxfp4_padding: tuple[int, int]) -> None:
    canonical_tensors(model, quantized=True)  # refuses what it does not know
    if model.quantization == "mxfp4" and any(size < 32 or size % 32 for size in mxfp4_padding):
        raise ConfigError(
            f"vllm: mxfp4_padding must be two multiples of 32, not {mxfp4_padding}",
            key="mxfp4_padding",
        )
    if model.model_type != "qwen3_moe" or model.quantization != "fp8":
        return
    for layer in sorted(model.sparse_layers):
        router = f"model.layers.{layer}.mlp.gate"
        if not is_unconverted(model, router):
            raise ConfigError(
                f"vllm: quantization_config does not name {router} among modules_to_not_convert; "
                "vLLM would quantize it, no checkpoint does",
                key="quantization_config",
            )


def _check_gpt_oss(model: ModelConfig, degrees: Degrees) -> None:
    if degrees.tp > model.num_kv_heads:
        raise ConfigError(
            f"vllm: tp={degrees.tp} is more than the {model.num_kv_heads} kv heads, which vLLM's "
            "gpt_oss does not replicate",
            key="tp",
        )
    if degrees.num_redundant:
        raise ConfigError(
            "vllm: num_redundant_experts: vLLM's loader of gpt_oss does not know them",
            key="num_redundant_experts",
        )
    if degrees.is_ep and model.num_experts % degrees.moe_ranks:
        raise ConfigError(
            f"vllm: {degrees.moe_ranks} ranks do not divide the {model.num_experts} experts, and "
            "vLLM's loader of gpt_oss takes even shares",
            key="ep",
        )
