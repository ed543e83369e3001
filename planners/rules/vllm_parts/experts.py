"""MLPs, dense and sparse: fused gate and up, stacked experts, their scales and their padding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from weightsync.errors import ConfigError
from weightsync.ir.dtypes import Dtype
from weightsync.planners.rules.config import ModelConfig
from weightsync.planners.rules.parts import Parameter, Part, columns, rows
from weightsync.planners.rules.vllm_parts.degrees import Degrees, Place
from weightsync.planners.rules.vllm_parts.linears import SCALE, Checkpoint, Rows

__all__ = ["mlp", "refined_block", "sparse_mlp"]

# Smallest block of scales that vLLM's kernels take.
_LEAST_BLOCK = 32


def mlp(
    checkpoint: Checkpoint, prefix: str, width: int, tp: int, tp_rank: int
) -> Iterator[Parameter]:
    """A dense MLP.

    Args:
        checkpoint: The canonical tensors.
        prefix: Name of the module, with a dot.
        width: Its intermediate size.
        tp: Ranks that share it.
        tp_rank: This one.

    Yields:
        Its parameters, in vLLM's order.
    """
    share = width // tp
    bias = checkpoint.config.mlp_bias
    yield from checkpoint.fused(
        prefix + "gate_up_proj",
        [
            Rows(prefix + "gate_proj", tp_rank * share, share),
            Rows(prefix + "up_proj", tp_rank * share, share),
        ],
        bias=bias,
    )
    yield from checkpoint.cut_columns(
        prefix + "down_proj", prefix + "down_proj", tp_rank * share, share, bias=bias
    )


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
    yield from _experts(checkpoint, prefix + "experts.", degrees, place.moe_rank, held)


def _experts(
    checkpoint: Checkpoint, prefix: str, degrees: Degrees, moe_rank: int, experts: Sequence[int]
) -> Iterator[Parameter]:
    """Experts stacked: `w13_weight` [E, 2I, H], gate above up, and `w2_weight` [E, H, I]."""
    config = checkpoint.config
    hidden, width = config.hidden_size, config.moe_intermediate_size
    share = width if degrees.is_ep else width // degrees.moe_ranks
    start = 0 if degrees.is_ep else moe_rank * share
    num_slots = len(experts)
    tall, wide = (width, hidden), (hidden, width)
    w13: list[Part] = []
    w2: list[Part] = []
    for slot, expert in enumerate(experts):
        name = f"{prefix}{expert}."
        w13.append(rows(name + "gate_proj.weight", tall, start, share, (slot, 0, 0)))
        w13.append(rows(name + "up_proj.weight", tall, start, share, (slot, share, 0)))
        w2.append(columns(name + "down_proj.weight", wide, start, share, (slot, 0, 0)))
    routed = prefix + "routed_experts."
    first = f"{prefix}0."
    dtype = checkpoint.dtypes.get(first + "gate_proj.weight")
    yield Parameter(routed + "w13_weight", (num_slots, 2 * share, hidden), tuple(w13), dtype=dtype)
    yield Parameter(routed + "w2_weight", (num_slots, hidden, share), tuple(w2), dtype=dtype)
    held = [f"{prefix}{e}.{w}_proj" for e in experts for w in ("gate", "up", "down")]
    if not checkpoint.is_block_scaled(routed + "w13_weight", held):
        return
    # One grid for all scales: that of the checkpoint, or a finer one that the shards fit.
    block = refined_block(config, degrees) or checkpoint.block
    high, deep = -(-share // block[0]), -(-share // block[1])
    grid = (-(-hidden // block[0]), -(-hidden // block[1]))
    finer = (checkpoint.block[0] // block[0], checkpoint.block[1] // block[1])
    w13, w2 = [], []
    for slot, expert in enumerate(experts):
        name = f"{prefix}{expert}."
        for half, which in enumerate(("gate_proj", "up_proj")):
            tensor, at = name + which + SCALE, (slot, half * high, 0)
            box = ((start // block[0], high), (0, grid[1]))
            w13 += _upsampled(tensor, box, finer, at)
        box = ((0, grid[0]), (start // block[1], deep))
        w2 += _upsampled(name + "down_proj" + SCALE, box, finer, (slot, 0, 0))
    scales = checkpoint.dtypes.get(first + "gate_proj" + SCALE)
    shape13, shape2 = (num_slots, 2 * high, grid[1]), (num_slots, grid[0], deep)
    yield Parameter(routed + "w13_weight_scale_inv", shape13, tuple(w13), dtype=scales)
    yield Parameter(routed + "w2_weight_scale_inv", shape2, tuple(w2), dtype=scales)


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


def _upsampled(
    tensor: str,
    box: tuple[tuple[int, int], tuple[int, int]],
    finer: tuple[int, int],
    at: tuple[int, int, int],
) -> Iterator[Part]:
    """A box of scales on a finer grid: each of the checkpoint's stands for several.

    Args:
        tensor: Canonical name of the scales.
        box: First index and count on the finer grid, of rows and of columns.
        finer: Finer blocks per block of the checkpoint, along rows and columns.
        at: Where the box goes in the parameter.

    Yields:
        A part for each place inside a block, with gaps of `finer` between its elements.
    """
    (row, num_rows), (column, num_columns) = box
    for i in range(finer[0]):
        for j in range(finer[1]):
            # Finer rows row + i, row + i + finer, ... below row + num_rows.
            high, wide = -(-(num_rows - i) // finer[0]), -(-(num_columns - j) // finer[1])
            if high <= 0 or wide <= 0:
                continue
            yield Part(
                tensor,
                ((row + i) // finer[0], (column + j) // finer[1]),
                (high, wide),
                (1, 1),
                (at[0], at[1] + i, at[2] + j),
                (1, 2),
                finer,
            )
