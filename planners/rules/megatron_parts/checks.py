"""What Megatron-Core refuses at some degrees, or has no place for."""

from __future__ import annotations

from weightsync.errors import ConfigError
from weightsync.planners.rules.config import ModelConfig
from weightsync.planners.rules.megatron_parts.degrees import Degrees
from weightsync.planners.rules.megatron_parts.whole import EXPERT_FORMS

__all__ = ["check_model"]


def check_model(model: ModelConfig, degrees: Degrees, experts: str, *, te: bool) -> None:
    """Checks a model against the degrees.

    Args:
        model: The model.
        degrees: The degrees.
        experts: How experts are held.
        te: Whether modules are Transformer Engine's.

    Raises:
        ConfigError: Megatron-Core would refuse this, or has no such weights.
    """
    if experts not in EXPERT_FORMS:
        raise ConfigError(
            f"megatron: experts must be one of {', '.join(EXPERT_FORMS)}, not {experts!r}",
            key="experts",
        )
    if experts != "sequential" and not te:
        raise ConfigError(
            f"megatron: experts={experts!r} are modules of Transformer Engine; use sequential ones "
            "with transformer_engine=False",
            key="experts",
        )
    if degrees.vpp > 1 and degrees.pp == 1:
        raise ConfigError(f"megatron: vpp={degrees.vpp} needs more than one stage", key="vpp")
    _check_biases(model)
    _check_experts(model, degrees)
    _check_tensor_parallel(model, degrees.tp, te=te)


def _check_biases(model: ModelConfig) -> None:
    """Megatron has biases on all linears, on those to queries, keys and values, or on none."""
    if model.model_type == "gpt_oss":
        kinds = {True, model.attention_bias, model.output_bias}
    elif model.latent is not None:
        kinds = {False, model.attention_bias}
    else:
        kinds = {model.output_bias, model.mlp_bias}
        if model.mlp_bias:
            kinds |= {model.attention_bias}
    if len(kinds) > 1:
        key = "mlp_bias" if model.mlp_bias else "attention_bias"
        raise ConfigError(
            f"megatron: {key} on {model.model_type}: Megatron has biases on all linears, or on "
            "those to queries, keys and values alone (add_bias_linear, add_qkv_bias), on none of "
            "latent attention's",
            key=key,
        )


def _check_experts(model: ModelConfig, degrees: Degrees) -> None:
    ep, etp = degrees.ep, degrees.etp
    if not model.num_experts:
        if ep > 1:
            raise ConfigError(
                f"megatron: ep={ep}, but this {model.model_type} has no experts", key="ep"
            )
        return
    if degrees.stage_size % (ep * etp):
        raise ConfigError(
            f"megatron: ep={ep} with etp={etp} does not divide the {degrees.stage_size} ranks of a "
            f"stage (tp={degrees.tp}, cp={degrees.cp}, dp={degrees.dp}); etp is tp unless given",
            key="ep",
        )
    if model.num_experts % ep:
        raise ConfigError(
            f"megatron: ep={ep} does not divide the {model.num_experts} experts", key="ep"
        )
    if model.moe_intermediate_size % etp:
        raise ConfigError(
            f"megatron: etp={etp} does not divide moe_intermediate_size, "
            f"{model.moe_intermediate_size}",
            key="etp",
        )
    if etp > 1 and model.model_type == "gpt_oss":
        raise ConfigError(
            f"megatron: etp={etp}: experts with biases, as gpt_oss has them, need etp=1", key="etp"
        )


def _check_tensor_parallel(model: ModelConfig, tp: int, *, te: bool) -> None:
    latent, groups = model.latent, model.num_kv_heads
    divided = {"num_attention_heads": model.num_heads}
    if latent is None:
        if groups % tp and tp % groups:
            raise ConfigError(
                f"megatron: tp={tp} is neither multiple nor divisor of the {groups} kv heads",
                key="tp",
            )
        divided["the rows of queries, keys and values"] = (
            model.num_heads + 2 * groups
        ) * model.head_dim
    elif not te:
        divided["kv_lora_rank + qk_rope_head_dim"] = latent.kv_rank + latent.rope_dim
        divided["q_lora_rank"] = latent.q_rank or 0
    if len(model.sparse_layers) < model.num_layers:
        divided["intermediate_size"] = model.intermediate_size
    if model.num_shared_experts:
        divided["the width of the shared experts"] = (
            model.moe_intermediate_size * model.num_shared_experts
        )
    for what, size in divided.items():
        if size % tp:
            raise ConfigError(f"megatron: tp={tp} does not divide {what}, {size}", key="tp")
