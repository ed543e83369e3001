"""What SGLang refuses at some degrees, or silently drops: refused before anything is planned."""

from __future__ import annotations

from weightsync.errors import ConfigError
from weightsync.planners.rules.canonical import canonical_tensors
from weightsync.planners.rules.config import ModelConfig
from weightsync.planners.rules.engine_parts.checks import (
    check_divides,
    check_expert_map,
    check_kv_heads,
    check_redundant,
)
from weightsync.planners.rules.sglang_parts.degrees import A2A_BACKENDS, Degrees
from weightsync.planners.rules.sglang_parts.experts import RUNNERS

__all__ = ["check_degrees", "check_model", "fuses_shared_experts"]

# Experts that SGLang's DeepSeek-V3 must have for the shared one to become one of them.
_FUSED_AMONG = 256


def check_degrees(model: ModelConfig, degrees: Degrees) -> None:
    """Checks degrees against each other and against the layers and experts of a model.

    Args:
        model: The model.
        degrees: The degrees.

    Raises:
        ConfigError: SGLang has no such server.
    """
    tp, ep = degrees.tp, degrees.ep
    if degrees.pp > model.num_layers:
        raise ConfigError(
            f"sglang: pp={degrees.pp} is more than the {model.num_layers} layers", key="pp"
        )
    if tp % degrees.attention_dp:
        raise ConfigError(
            f"sglang: dp={degrees.attention_dp} groups of attention do not divide the tp={tp} "
            "ranks that they share",
            key="dp",
        )
    if degrees.attention_dp > 1 and model.model_type == "llama":
        raise ConfigError(
            "sglang: enable_dp_attention: SGLang's llama cuts its heads over all tp ranks, so a "
            "group of them has only some of the heads for its tokens",
            key="enable_dp_attention",
        )
    if degrees.is_head_in_group and degrees.attention_dp == 1:
        raise ConfigError(
            "sglang: enable_dp_lm_head needs enable_dp_attention",
            key="enable_dp_lm_head",
        )
    if degrees.a2a not in A2A_BACKENDS:
        raise ConfigError(
            f"sglang: moe_a2a_backend {degrees.a2a!r} is none of {', '.join(A2A_BACKENDS)}",
            key="moe_a2a_backend",
        )
    if (ep > 1 or degrees.a2a != "none") and not model.sparse_layers:
        key = "ep" if ep > 1 else "moe_a2a_backend"
        raise ConfigError(f"sglang: {key}, but this {model.model_type} has no experts", key=key)
    if degrees.a2a != "none" and ep != tp:
        raise ConfigError(
            f"sglang: ep={ep}: moe_a2a_backend {degrees.a2a} spans all tp={tp} ranks with experts, "
            f"so ep is {tp}",
            key="ep",
        )
    if tp % ep:
        raise ConfigError(
            f"sglang: ep={ep} does not divide the tp={tp} ranks that experts are placed on",
            key="ep",
        )
    _check_placement(model, degrees)


def _check_placement(model: ModelConfig, degrees: Degrees) -> None:
    redundant, num_slots = degrees.num_redundant, model.num_experts + degrees.num_redundant
    check_redundant("sglang", redundant)
    is_balanced = redundant > 0 or bool(degrees.expert_map)
    if is_balanced and (degrees.ep == 1 or model.model_type not in _BALANCED):
        key = "num_redundant_experts" if redundant else "expert_map"
        why = (
            "needs ep > 1: SGLang balances experts between groups of ranks"
            if model.model_type in _BALANCED
            else f"SGLang's {model.model_type} has no place for copies of experts"
        )
        raise ConfigError(f"sglang: {key}: {why}", key=key)
    if model.sparse_layers:
        check_divides("sglang", "ep", degrees.ep, {"the number of experts": num_slots})
    if degrees.expert_map:
        rows = model.num_layers
        check_expert_map("sglang", model, degrees.expert_map, num_slots, rows, "decoder layers")


# Families whose loader asks where an expert is, and whose layers have slots for copies.
_BALANCED = ("qwen3_moe", "deepseek_v3", "kimi_k2")


def fuses_shared_experts(model: ModelConfig, degrees: Degrees, wanted: bool | None) -> bool:
    """Tells whether the shared expert lies in a slot behind the routed ones.

    Args:
        model: The model.
        degrees: The degrees.
        wanted: Whether it shall; None: what SGLang does by itself on NVIDIA GPUs.

    Raises:
        ConfigError: SGLang would not do so.
    """
    is_latent = model.latent is not None
    is_alone = degrees.ep == 1 and degrees.a2a == "none" and model.num_shared_experts == 1
    if wanted is None:
        return is_alone and (
            model.model_type == "glm4_moe" or (is_latent and model.num_experts == _FUSED_AMONG)
        )
    # DeepSeek's classes can be told to, GLM's cannot.
    is_able = is_latent and model.num_shared_experts == 1 and degrees.a2a != "flashinfer"
    can = is_alone if model.model_type == "glm4_moe" else is_able
    if wanted and not can:
        raise ConfigError(
            f"sglang: fuse_shared_experts: SGLang's {model.model_type} with "
            f"{model.num_shared_experts} shared experts does not fuse them at these degrees",
            key="fuse_shared_experts",
        )
    return wanted


def check_model(model: ModelConfig, degrees: Degrees, runner: str, *, quantized: bool) -> None:
    """Checks a model against the degrees.

    Args:
        model: The model.
        degrees: The degrees.
        runner: Name of the kernels that run the experts.
        quantized: Whether the engine holds the quantized checkpoint.

    Raises:
        ConfigError: SGLang would refuse this, or drop some of the weights.
    """
    _check_weights(model, degrees)
    _check_runner(model, degrees, runner, quantized=quantized)
    tp, attention_tp = degrees.tp, degrees.attention_tp
    key = "dp" if degrees.attention_dp > 1 else "tp"
    if model.latent is None:
        check_kv_heads("sglang", key, attention_tp, model.num_kv_heads)
    check_divides("sglang", key, attention_tp, {"num_attention_heads": model.num_heads})
    if len(model.sparse_layers) < model.num_layers and not degrees.is_dense_whole:
        check_divides("sglang", "tp", tp, {"intermediate_size": model.intermediate_size})
    if not model.sparse_layers:
        return
    if tp > model.num_experts and model.model_type != "gpt_oss":
        raise ConfigError(f"sglang: tp={tp} is more than the {model.num_experts} experts", key="tp")
    width = model.moe_intermediate_size
    if width % degrees.expert_tp:
        raise ConfigError(
            f"sglang: tp={tp} over ep={degrees.ep} leaves {degrees.expert_tp} ranks for each "
            f"expert, which do not divide moe_intermediate_size, {width}",
            key="ep" if degrees.ep > 1 else "tp",
        )
    if model.num_shared_experts and degrees.a2a == "none":
        shared = {"the width of the shared experts": width * model.num_shared_experts}
        check_divides("sglang", "tp", tp, shared)
    if quantized:
        assert model.weight_block_size is not None
        height = model.weight_block_size[0]
        if width // degrees.expert_tp % height:
            raise ConfigError(
                f"sglang: experts of width {width} give {width // degrees.expert_tp} to each of "
                f"{degrees.expert_tp} ranks, which is no multiple of the {height} that share a "
                "scale; SGLang refuses that: use a larger ep, or a smaller tp",
                key="tp",
            )


def _check_weights(model: ModelConfig, degrees: Degrees) -> None:
    """Weights that a checkpoint may have and SGLang's classes do not."""
    dropped = {
        "mlp_bias": model.mlp_bias,
        "attention_bias": model.attention_bias and model.latent is not None,
    }
    for key, is_set in dropped.items():
        if is_set:
            raise ConfigError(
                f"sglang: {key} on {model.model_type}: SGLang's class has not all of these biases "
                "and would drop the checkpoint's",
                key=key,
            )
    if model.model_type == "qwen3_moe" and len(model.sparse_layers) < model.num_layers:
        raise ConfigError(
            "sglang: mlp_only_layers, decoder_sparse_step: SGLang's qwen3_moe has experts in every "
            "layer and would drop the dense MLPs of the checkpoint",
            key="mlp_only_layers",
        )
    is_tied = model.tie_word_embeddings
    if is_tied and model.model_type not in ("llama", "qwen3"):
        raise ConfigError(
            f"sglang: tie_word_embeddings on {model.model_type}: SGLang would leave its head "
            "unloaded",
            key="tie_word_embeddings",
        )
    if is_tied and model.model_type == "llama" and degrees.pp > 1:
        raise ConfigError(
            f"sglang: pp={degrees.pp} with tie_word_embeddings: the last stage of SGLang's llama "
            "has neither embedding nor head",
            key="pp",
        )
    if degrees.is_dense_whole and model.model_type in ("llama", "qwen3", "qwen3_moe"):
        raise ConfigError(
            f"sglang: moe_dense_tp: SGLang's {model.model_type} cuts dense MLPs over all tp ranks "
            "regardless",
            key="moe_dense_tp",
        )


def _check_runner(model: ModelConfig, degrees: Degrees, runner: str, *, quantized: bool) -> None:
    if runner not in RUNNERS:
        raise ConfigError(
            f"sglang: moe_runner_backend {runner!r} is none of {', '.join(RUNNERS)}",
            key="moe_runner_backend",
        )
    if quantized:
        canonical_tensors(model, quantized=True)  # refuses what it does not know
        if model.quantization != "fp8":
            raise ConfigError(
                f"sglang: quantization_config: how SGLang holds {model.quantization} depends on "
                "the GPU and is not known here; quantized=False describes BF16",
                key="quantization_config",
            )
        if model.model_type == "llama":
            raise ConfigError(
                "sglang: quantization_config: SGLang's llama drops the scales of block FP8; "
                "quantized=False describes BF16",
                key="quantization_config",
            )
        if runner not in ("triton", "deep_gemm"):
            raise ConfigError(
                f"sglang: moe_runner_backend {runner} takes no block FP8", key="moe_runner_backend"
            )
    if runner == "flashinfer_cutlass" and degrees.ep not in (1, degrees.tp):
        raise ConfigError(
            f"sglang: ep={degrees.ep}: moe_runner_backend {runner} wants 1 or tp={degrees.tp}",
            key="ep",
        )
    if degrees.a2a == "flashinfer" and runner not in ("deep_gemm", "flashinfer_cutlass"):
        raise ConfigError(
            f"sglang: moe_runner_backend {runner}: moe_a2a_backend flashinfer wants deep_gemm or "
            "flashinfer_cutlass",
            key="moe_runner_backend",
        )
    if degrees.a2a == "flashinfer" and degrees.attention_dp != degrees.tp:
        raise ConfigError(
            f"sglang: dp={degrees.attention_dp}: moe_a2a_backend flashinfer wants "
            f"enable_dp_attention with dp={degrees.tp}, one group for each rank",
            key="dp",
        )
    if model.model_type == "gpt_oss" and degrees.ep > 1:
        raise ConfigError(
            f"sglang: ep={degrees.ep}: SGLang's loader of gpt_oss in BF16 gives every rank all "
            "experts",
            key="ep",
        )
