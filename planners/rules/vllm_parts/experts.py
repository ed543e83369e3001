"""Sparse MLPs: router, shared experts, and routed experts with vLLM's grid of scales."""

from __future__ import annotations

import math
from collections.abc import Iterator

from weightsync.errors import ConfigError
from weightsync.ir.dtypes import Dtype
from weightsync.planners.rules.config import ModelConfig
from weightsync.planners.rules.engine_parts.experts import mlp, stacked_experts
from weightsync.planners.rules.engine_parts.linears import SCALE, Checkpoint
from weightsync.planners.rules.parts import Parameter
from weightsync.planners.rules.vllm_parts.degrees import Degrees, Place

__all__ = ["refined_block", "sparse_mlp"]

# Smallest block of scales that vLLM's kernels take.
_LEAST_BLOCK = 32


def sparse_mlp(
    checkpoint: Checkpoint, layer: int, degrees: Degrees, place: Place
) -> Iterator[Parameter]:
    """Router, shared experts and routed experts of a layer; of all families but gpt-oss.

    Args:
        checkpoint: The canonical tensors.
        layer: Its number.
        degrees: How the replica is cut.
        place: This rank's.

    Yields:
        Its parameters, in vLLM's order.

    Raises:
        ConfigError: vLLM cannot cut the scales of the experts.
    """
    config, prefix = checkpoint.config, f"model.layers.{layer}.mlp."
    # vLLM keeps the router of GLM in F32; its checkpoints and trainers do not.
    router = Dtype.F32 if config.model_type == "glm4_moe" else None
    yield checkpoint.whole(prefix + "gate.weight", dtype=router)
    if config.correction_bias:
        yield checkpoint.whole(prefix + "gate.e_score_correction_bias")
    if config.num_shared_experts:
        # Tokens that are cut over the ranks need the whole MLP; GLM's ignores it.
        is_whole = degrees.shares_whole and config.model_type != "glm4_moe"
        tp, tp_rank = (1, 0) if is_whole else (degrees.tp, place.tp_rank)
        width = config.moe_intermediate_size * config.num_shared_experts
        yield from mlp(checkpoint, prefix + "shared_experts.", width, tp, tp_rank)
    held = place.experts_of(sum(sparse < layer for sparse in config.sparse_layers))
    sources = [f"{prefix}experts.{expert}." for expert in held]
    width = config.moe_intermediate_size
    share = width if degrees.is_ep else width // degrees.moe_ranks
    start = 0 if degrees.is_ep else place.moe_rank * share
    is_scaled = sources[0] + "gate_proj" + SCALE in checkpoint.shapes
    yield from stacked_experts(
        checkpoint,
        prefix + "experts.routed_experts.",
        sources,
        start,
        share,
        # One grid for all scales: that of the checkpoint, or a finer one that the shards fit.
        block=refined_block(config, degrees) if is_scaled else None,
    )


def refined_block(config: ModelConfig, degrees: Degrees) -> tuple[int, int] | None:
    """Gives the finer grid that vLLM puts under the scales of experts that are cut inside blocks.

    Args:
        config: The model, quantized to blocks of FP8.
        degrees: How the replica is cut.

    Returns:
        Rows and columns that share a scale; None: those of the checkpoint.

    Raises:
        ConfigError: There is no such grid.
    """
    assert config.weight_block_size is not None
    block = config.weight_block_size
    width, hidden = config.moe_intermediate_size, config.hidden_size
    share = width if degrees.is_ep else width // degrees.moe_ranks
    is_cut = share != width
    if share % block[0] == 0 and (not is_cut or share % block[1] == 0):
        return None
    finer = math.gcd(*block, share, hidden)
    # Scales are repeated whole: a ragged last block would not fit the shards.
    if finer < _LEAST_BLOCK or width % block[0] or width % block[1] or hidden % block[1]:
        raise ConfigError(
            f"vllm: experts of width {width} give {share} to each of {degrees.moe_ranks} ranks, "
            f"which no grid of scales of at least {_LEAST_BLOCK} fits; vLLM refuses blocks of "
            f"{block[0]} x {block[1]} there: use ep, or fewer ranks",
            key="tp",
        )
    return (finer, finer)
