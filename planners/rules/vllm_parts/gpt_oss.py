"""The MLP of gpt-oss: experts fused and interleaved, transposed in BF16, padded in MXFP4."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from weightsync.ir.dtypes import Dtype
from weightsync.planners.rules.engine_parts.linears import Checkpoint
from weightsync.planners.rules.parts import Parameter, Part
from weightsync.planners.rules.quantized import MX_BLOCK
from weightsync.planners.rules.vllm_parts.degrees import Degrees, Place

__all__ = ["gpt_oss_mlp"]

Index = tuple[int, ...]


def gpt_oss_mlp(
    checkpoint: Checkpoint, layer: str, degrees: Degrees, place: Place, padding: tuple[int, int]
) -> Iterator[Parameter]:
    """Router and experts of a layer.

    Args:
        checkpoint: The canonical tensors.
        layer: `model.layers.N.`
        degrees: How the replica is cut.
        place: This rank's.
        padding: In MXFP4 a rank's width and the hidden size are padded to multiples of these.

    Yields:
        Its parameters, in vLLM's order.
    """
    yield checkpoint.whole(layer + "mlp.router.weight")
    yield checkpoint.whole(layer + "mlp.router.bias")
    config, source = checkpoint.config, layer + "mlp.experts."
    is_packed = source + "gate_up_proj_blocks" in checkpoint.shapes
    span = _span(config.moe_intermediate_size, degrees, place, padding[0] if is_packed else 1)
    first, count = place.experts[0], len(place.experts)
    start, held, room = 2 * span.start, 2 * span.size, 2 * span.room
    hidden = config.hidden_size
    wide = _round_up(hidden, padding[1]) if is_packed else hidden
    up, down = source + "gate_up_proj", source + "down_proj"
    routed = source + "routed_experts."

    def box(name: str, tensor: str, lo: Index, n: Index, shape: Index, **how: Any) -> Parameter:
        return _corner(routed + name, tensor, (first, *lo), (count, *n), (count, *shape), **how)

    w13_bias = box("w13_bias", up + "_bias", (start,), (held,), (room,))
    w2_bias = box("w2_bias", down + "_bias", (0,), (hidden,), (wide,))
    if not degrees.is_ep and place.moe_rank:
        # The first of the ranks that share an expert adds its bias; the loader zeroes the others'.
        w2_bias = Parameter(w2_bias.name, w2_bias.shape, (), (((0, 0), w2_bias.shape),))
    if not is_packed:
        # [E, H, 2I] and [E, I, H] in the checkpoint: the engine holds the transposes.
        yield box("w13_weight", up, (0, start), (hidden, held), (held, hidden), is_transposed=True)
        yield w13_bias
        box_of_rank = (span.size, hidden), (hidden, span.size)
        yield box("w2_weight", down, (span.start, 0), *box_of_rank, is_transposed=True)
        yield w2_bias
        return
    # Two values a byte, 16 bytes a block; the last two dims are one in vLLM, the memory is equal.
    deep, deep_room, pair = hidden // MX_BLOCK, wide // MX_BLOCK, MX_BLOCK // 2
    first_block, high, high_room = (number // MX_BLOCK for number in span)
    packed = {"dtype": Dtype.U8}
    n: Index = (held, deep, pair)
    shape: Index = (room, deep_room, pair)
    yield box("w13_weight", up + "_blocks", (start, 0, 0), n, shape, **packed)
    yield box("w13_weight_scale", up + "_scales", (start, 0), n[:2], shape[:2], **packed)
    n, shape = (hidden, high, pair), (wide, high_room, pair)
    yield box("w2_weight", down + "_blocks", (0, first_block, 0), n, shape, **packed)
    yield box("w2_weight_scale", down + "_scales", (0, first_block), n[:2], shape[:2], **packed)
    yield w13_bias
    yield w2_bias


class _Span(NamedTuple):
    """What of the width of every expert a rank holds; `room` is that with padding."""

    start: int
    size: int
    room: int


def _span(width: int, degrees: Degrees, place: Place, padding: int) -> _Span:
    if degrees.is_ep:
        return _Span(0, width, _round_up(width, padding))
    even = width // degrees.moe_ranks
    if padding == 1:
        return _Span(place.moe_rank * even, even, even)
    # Whole blocks to each rank, fewer to the last ones. The room is an even share, rounded up.
    share = -(-(width // MX_BLOCK) // degrees.moe_ranks) * MX_BLOCK
    start = min(place.moe_rank * share, width)
    return _Span(start, min(start + share, width) - start, _round_up(even, padding))


def _corner(
    name: str,
    tensor: str,
    lo: Index,
    n: Index,
    shape: Index,
    *,
    is_transposed: bool = False,
    dtype: Dtype | None = None,
) -> Parameter:
    """A box of a tensor at the origin of a parameter; zeros around it."""
    dims = len(n)
    axes, held = tuple(range(dims)), n
    if is_transposed:
        axes, held = (*axes[:-2], dims - 1, dims - 2), (*n[:-2], n[-1], n[-2])
    if 0 in n:
        return Parameter(name, shape, (), (((0,) * dims, shape),), dtype)
    part = Part(tensor, lo, n, (1,) * dims, (0,) * dims, axes, (1,) * dims)
    zeros = []
    for dim in reversed(range(dims)):
        if held[dim] < shape[dim]:
            corner = (*(0,) * dim, held[dim], *(0,) * (dims - dim - 1))
            size = (*shape[:dim], shape[dim] - held[dim], *held[dim + 1 :])
            zeros.append((corner, size))
    return Parameter(name, shape, (part,), tuple(zeros), dtype)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
