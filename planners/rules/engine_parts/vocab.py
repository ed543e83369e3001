"""Embeddings and heads: rows of vocabulary cut over ranks, with padding at the end."""

from __future__ import annotations

from weightsync.planners.rules.engine_parts.linears import Checkpoint
from weightsync.planners.rules.parts import Parameter, rows

__all__ = ["vocab_rows"]


def vocab_rows(
    checkpoint: Checkpoint, tensor: str, name: str, multiple: int, tp: int, tp_rank: int
) -> Parameter:
    """An even share of the rows, padded with zeros; the last ranks hold the padding.

    Args:
        checkpoint: The canonical tensors.
        tensor: Canonical name.
        name: Name of the parameter.
        multiple: The rows are padded to a multiple of this; `tp` divides that.
        tp: Ranks that share them.
        tp_rank: This one.
    """
    size, hidden = checkpoint.shapes[tensor]
    share = -(-size // multiple) * multiple // tp
    start = min(tp_rank * share, size)
    held = min(start + share, size) - start
    return Parameter(
        name,
        (share, hidden),
        (rows(tensor, (size, hidden), start, held),) if held else (),
        (((held, 0), (share - held, hidden)),) if held < share else (),
    )
