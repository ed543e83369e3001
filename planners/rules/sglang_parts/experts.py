"""Sparse layers: router, shared and routed experts, and the fused experts of gpt-oss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from weightsync.ir.dtypes import Dtype
from weightsync.planners.rules.engine_parts.experts import mlp, stacked_experts
from weightsync.planners.rules.engine_parts.linears import Checkpoint
from weightsync.planners.rules.parts import Parameter, Part
from weightsync.planners.rules.sglang_parts.degrees import Degrees, Place

__all__ = ["RUNNERS", "gpt_oss_mlp", "sparse_mlp"]

# What `--moe-runner-backend` may be here. Kernels of FlashInfer's CUTLASS want up above gate, those
# of triton_kernels every matrix transposed; all others that take BF16 want the checkpoint's way.
RUNNERS = ("triton", "deep_gemm", "flashinfer_cutlass", "triton_kernel")


def sparse_mlp(
    checkpoint: Checkpoint,
    layer: int,
    degrees: Degrees,
    place: Place,
    runner: str,
    *,
    is_shared_fused: bool,
) -> Iterator[Parameter]:
    """Router, shared experts and routed experts of a layer; of all families but gpt-oss.

    Args:
        checkpoint: The canonical tensors.
        layer: Its number.
        degrees: How the server is cut.
        place: This rank's.
        runner: Name of the kernels that run the experts.
        is_shared_fused: Whether the shared expert is in the last slot of the routed ones.

    Yields:
        Its parameters.

    Raises:
        ConfigError: Some experts have scales and some have not.
    """
    config, prefix = checkpoint.config, f"model.layers.{layer}.mlp."
    # SGLang keeps the router of GLM in F32; its checkpoints and trainers do not.
    router = Dtype.F32 if config.model_type == "glm4_moe" else None
    yield checkpoint.whole(prefix + "gate.weight", dtype=router)
    if config.correction_bias:
        yield checkpoint.whole(prefix + "gate.e_score_correction_bias")
    width, expert = config.moe_intermediate_size, place.expert
    sources = [f"{prefix}experts.{e}." for e in degrees.experts(config, place.ep_rank, layer)]
    if is_shared_fused:
        sources.append(prefix + "shared_experts.")
    elif config.num_shared_experts:
        shared = width * config.num_shared_experts
        yield from mlp(checkpoint, prefix + "shared_experts.", shared, *place.shared)
    share = width // expert.size
    is_up_first = runner == "flashinfer_cutlass"
    stacked = stacked_experts(
        checkpoint,
        prefix + "experts.",
        sources,
        expert.rank * share,
        share,
        is_up_first=is_up_first,
    )
    yield from _transposed(stacked) if runner == "triton_kernel" else stacked


def gpt_oss_mlp(
    checkpoint: Checkpoint, layer: int, place: Place, runner: str
) -> Iterator[Parameter]:
    """Router and experts of gpt-oss: gate and up interleaved as in the checkpoint, biases in F32.

    Args:
        checkpoint: The canonical tensors.
        layer: Number of the layer.
        place: This rank's place.
        runner: Name of the kernels that run the experts.

    Yields:
        Its parameters.
    """
    config, prefix = checkpoint.config, f"model.layers.{layer}.mlp."
    yield checkpoint.whole(prefix + "router.weight")
    yield checkpoint.whole(prefix + "router.bias")
    num_experts, hidden = config.num_experts, config.hidden_size
    share = config.moe_intermediate_size // place.expert.size
    start = place.expert.rank * share
    source, swapped = prefix + "experts.", (0, 2, 1)

    def box(name: str, tensor: str, at: int, count: int, dim: int) -> Parameter:
        """Columns or rows of every expert; matrices are [E, in, out] in the checkpoint."""
        n = list(checkpoint.shapes[source + tensor])
        lo = [0] * len(n)
        lo[dim], n[dim] = at, count
        is_bias = len(n) == 2
        axes = (0, 1) if is_bias else swapped
        shape = tuple(n[axis] for axis in axes)
        zeros, ones = (0,) * len(n), (1,) * len(n)
        part = Part(source + tensor, tuple(lo), tuple(n), ones, zeros, axes, ones)
        dtype = Dtype.F32 if is_bias else None
        return Parameter(source + name, shape, (part,), dtype=dtype)

    weights = (
        box("w13_weight", "gate_up_proj", 2 * start, 2 * share, 2),
        box("w2_weight", "down_proj", start, share, 1),
    )
    yield from _transposed(weights) if runner == "triton_kernel" else weights
    yield box("w13_weight_bias", "gate_up_proj_bias", 2 * start, 2 * share, 1)
    down = box("w2_weight_bias", "down_proj_bias", 0, hidden, 1)
    if place.expert.rank:
        # The first of the ranks that share an expert adds its bias; the loader zeroes the others'.
        down = replace(down, parts=(), zeros=(((0, 0), (num_experts, hidden)),))
    yield down


def _transposed(parameters: Iterable[Parameter]) -> Iterator[Parameter]:
    """Stacked matrices, each transposed."""
    for parameter in parameters:
        swap = {0: 0, 1: 2, 2: 1}
        yield replace(
            parameter,
            shape=(parameter.shape[0], parameter.shape[2], parameter.shape[1]),
            parts=tuple(
                replace(
                    part,
                    at=(part.at[0], part.at[2], part.at[1]),
                    axes=tuple(swap[axis] for axis in part.axes),
                )
                for part in parameter.parts
            ),
        )
