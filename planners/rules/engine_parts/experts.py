"""MLPs, dense and sparse: fused gate and up, stacked experts, and their scales."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weightsync.planners.rules.engine_parts.linears import SCALE, Checkpoint, Rows
from weightsync.planners.rules.parts import Parameter, Part, columns, rows

__all__ = ["mlp", "stacked_experts"]


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
        Its parameters, in the engine's order.
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


def stacked_experts(
    checkpoint: Checkpoint,
    name: str,
    sources: Sequence[str],
    start: int,
    share: int,
    *,
    block: tuple[int, int] | None = None,
    is_up_first: bool = False,
) -> Iterator[Parameter]:
    """Experts on top of each other: `w13_weight` [E, 2I, H] and `w2_weight` [E, H, I].

    Args:
        checkpoint: The canonical tensors.
        name: Name of the module, with a dot.
        sources: Name of the checkpoint's MLP in each slot, with a dot.
        start: First of the rows of gate and up, and columns of down, that this rank holds.
        share: How many.
        block: Rows and columns that share a scale here, where that grid is finer than the
            checkpoint's: scales are then repeated.
        is_up_first: Whether up is above gate in `w13_weight`.

    Yields:
        The parameters.

    Raises:
        ConfigError: Some experts have scales and some have not.
    """
    config = checkpoint.config
    hidden, width = config.hidden_size, config.moe_intermediate_size
    halves = ("up_proj", "gate_proj") if is_up_first else ("gate_proj", "up_proj")
    num_slots, tall, wide = len(sources), (width, hidden), (hidden, width)
    w13: list[Part] = []
    w2: list[Part] = []
    for slot, source in enumerate(sources):
        for half, which in enumerate(halves):
            at = (slot, half * share, 0)
            w13.append(rows(f"{source}{which}.weight", tall, start, share, at))
        w2.append(columns(source + "down_proj.weight", wide, start, share, (slot, 0, 0)))
    dtype = checkpoint.dtypes.get(sources[0] + "gate_proj.weight")
    yield Parameter(name + "w13_weight", (num_slots, 2 * share, hidden), tuple(w13), dtype=dtype)
    yield Parameter(name + "w2_weight", (num_slots, hidden, share), tuple(w2), dtype=dtype)
    held = [f"{source}{which}_proj" for source in sources for which in ("gate", "up", "down")]
    if not checkpoint.is_block_scaled(name + "w13_weight", held):
        return
    block = block or checkpoint.block
    high, deep = -(-share // block[0]), -(-share // block[1])
    grid = (-(-hidden // block[0]), -(-hidden // block[1]))
    finer = (checkpoint.block[0] // block[0], checkpoint.block[1] // block[1])
    w13, w2 = [], []
    for slot, source in enumerate(sources):
        for half, which in enumerate(halves):
            box = ((start // block[0], high), (0, grid[1]))
            w13 += _upsampled(source + which + SCALE, box, finer, (slot, half * high, 0))
        box = ((0, grid[0]), (start // block[1], deep))
        w2 += _upsampled(source + "down_proj" + SCALE, box, finer, (slot, 0, 0))
    scales = checkpoint.dtypes.get(sources[0] + "gate_proj" + SCALE)
    shape13, shape2 = (num_slots, 2 * high, grid[1]), (num_slots, grid[0], deep)
    yield Parameter(name + "w13_weight_scale_inv", shape13, tuple(w13), dtype=scales)
    yield Parameter(name + "w2_weight_scale_inv", shape2, tuple(w2), dtype=scales)


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
