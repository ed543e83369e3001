"""Errors about layouts that do not fit together: which part of which tensor, on which ranks."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from weightsync.errors import CoverageError, LayoutError
from weightsync.ir.manifest import Manifest
from weightsync.ir.tables import MAX_DIMS, IntArray, volume_of

__all__ = ["gap_error", "overlap_error"]

_LARGEST_MASK: Final = 1 << 24  # cells looked at to find a gap


def overlap_error(
    tensor: int,
    piece: IntArray,
    lo: IntArray,
    n: IntArray,
    step: IntArray,
    source: Manifest,
    sink: Manifest,
) -> LayoutError:
    """Describe two source pieces that overlap in a way that no cut separates.

    Args:
        tensor: Sink tensor.
        piece: The two source pieces, `(2,)`.
        lo: What is left of them after cutting: first elements, `(2, 4)`.
        n: Counts, `(2, 4)`.
        step: Steps, `(2, 4)`.
        source: Merged manifest.
        sink: Merged manifest.
    """
    name = sink.tensors.names[tensor]
    ranks, texts = [], []
    for row in range(2):
        rank = source.ranks[int(source.buffers.rank[source.pieces.buffer[piece[row]]])]
        box = sink.tensors.box_text(tensor, lo[row], n[row], step[row])
        ranks.append(rank)
        texts.append(f"{box} on {rank}")
    return LayoutError(
        f"tensor {name}: the source pieces {' and '.join(texts)} overlap with different steps; "
        "declare both with the same step, or split the larger one into interleaved pieces",
        tensor=name,
        ranks=ranks,
        side="source",
    )


def gap_error(
    sink: Manifest, piece: int, lo: IntArray, n: IntArray, step: IntArray
) -> CoverageError:
    """Describe a part of a sink piece that no source holds, given the boxes that sources hold."""
    pieces = sink.pieces
    tensor, buffer = int(pieces.tensor[piece]), int(pieces.buffer[piece])
    name, rank = sink.tensors.names[tensor], sink.ranks[int(sink.buffers.rank[buffer])]
    need = pieces.lo[piece], pieces.n[piece], pieces.step[piece]
    box = sink.tensors.box_text(tensor, *need)
    part = sink.tensors.box_text(tensor, *_first_gap(*need, lo, n, step))
    missing = int(need[1].prod() - volume_of(n).sum())
    return CoverageError(
        f"tensor {name}: {rank} needs {box}, but no source holds {part} of it ({missing} elements "
        "in all); check the sources' layout and that every source rank has joined",
        tensor=name,
        rank=rank,
        side="sink",
        box=box,
        uncovered=part,
    )


def _first_gap(
    lo: IntArray,
    n: IntArray,
    step: IntArray,
    held_lo: IntArray,
    held_n: IntArray,
    held_step: IntArray,
) -> tuple[IntArray, IntArray, IntArray]:
    """Return a box inside `lo, n, step` that meets none of the held boxes, as large as is easy.

    Held boxes lie inside the box. Indices are compressed to the borders of the held boxes, so the
    mask is small whatever the sizes.
    """
    first = (held_lo - lo) // step
    stride = np.where(held_n > 1, held_step // step, 1)
    grids = []
    for dim in range(MAX_DIMS):
        if (stride[:, dim] > 1).any():  # interleaved: every index is a border
            grids.append(np.arange(n[dim] + 1))
        else:
            borders = np.concatenate([first[:, dim], first[:, dim] + held_n[:, dim]])
            grids.append(np.unique(np.append(borders, [0, n[dim]])))
    shape = [len(grid) - 1 for grid in grids]
    if math.prod(shape) > _LARGEST_MASK:
        return lo, n, step  # interleaved in several dims: the whole box must do
    covered = np.zeros(shape, np.bool_)
    for row in range(len(first)):
        last = first[row] + (held_n[row] - 1) * stride[row]
        index = [
            slice(np.searchsorted(g, a), np.searchsorted(g, b, side="right"), k)
            for g, a, b, k in zip(grids, first[row], last, stride[row], strict=True)
        ]
        covered[tuple(index)] = True
    start = np.array(np.unravel_index(int(covered.argmin()), covered.shape))
    end = start + 1
    for dim in range(MAX_DIMS - 1, -1, -1):
        window = [slice(a, b) for a, b in zip(start, end, strict=True)]
        while end[dim] < covered.shape[dim]:
            window[dim] = slice(end[dim], end[dim] + 1)
            if covered[tuple(window)].any():
                break
            end[dim] += 1
    begin = np.array([grid[a] for grid, a in zip(grids, start, strict=True)], np.int64)
    finish = np.array([grid[b] for grid, b in zip(grids, end, strict=True)], np.int64)
    return lo + begin * step, finish - begin, step
