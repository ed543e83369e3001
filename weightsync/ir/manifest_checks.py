"""What makes a manifest valid; every message names tensor, rank and side."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np

from weightsync.errors import CoverageError, LayoutError
from weightsync.ir.cover import covers_once
from weightsync.ir.dtypes import Dtype
from weightsync.ir.pieces import CONSTANT, is_nested, is_sorted
from weightsync.ir.tables import MAX_DIMS

if TYPE_CHECKING:
    from weightsync.ir.manifest import Manifest

__all__ = ["check_cover", "check_labels", "check_pieces"]

MAX_NUMEL: Final = 1 << 47  # 140 T elements: sums of strides and bytes stay far below 2**63
MAX_STEP: Final = 1 << 31  # the lcm of two steps stays below 2**62


def check_labels(manifest: Manifest) -> None:
    """Check names, shapes and buffers."""
    side, tensors, buffers = manifest.side, manifest.tensors, manifest.buffers
    if side not in ("source", "sink"):
        raise LayoutError(f"side must be 'source' or 'sink', not {side!r}")
    if len(set(manifest.ranks)) != len(manifest.ranks) or not all(manifest.ranks):
        raise LayoutError(f"rank labels must be non-empty and unique: {manifest.ranks}", side=side)
    if len(tensors.names) != len(tensors) or len(buffers.names) != len(buffers):
        raise LayoutError("a table and its names differ in length", side=side)
    if any(a >= b for a, b in pairwise(tensors.names)):
        raise LayoutError("tensors are not sorted by name, or one occurs twice", side=side)
    keys = list(zip(buffers.rank.tolist(), buffers.names, strict=True))
    if any(a >= b for a, b in pairwise(keys)):
        raise LayoutError("buffers are not sorted by rank and name, or one occurs twice", side=side)
    ranks_known = ((buffers.rank >= 0) & (buffers.rank < len(manifest.ranks))).all()
    if not ranks_known or (buffers.dtype >= len(Dtype)).any():
        raise LayoutError("a buffer has an unknown rank or dtype", side=side)
    if ((buffers.numel < 0) | (buffers.numel > MAX_NUMEL)).any():
        raise LayoutError(f"a buffer has a negative size or over {MAX_NUMEL} elements", side=side)
    padding = np.arange(MAX_DIMS) < MAX_DIMS - tensors.ndim.astype(np.int64)[:, None]
    volume = np.prod(tensors.shape, axis=1, dtype=np.float64)
    bad = (tensors.shape < 0).any(axis=1) | ((tensors.shape != 1) & padding).any(axis=1)
    bad |= (tensors.ndim < 1) | (tensors.ndim > MAX_DIMS) | (volume > MAX_NUMEL)
    for index in np.flatnonzero(bad)[:1]:
        name = tensors.names[index]
        raise LayoutError(f"tensor {name}: bad shape {tensors.shape[index]}", tensor=name)


def check_pieces(manifest: Manifest) -> None:
    """Check that every piece lies inside its tensor and its buffer, in canonical form and order."""
    pieces, tensors, buffers = manifest.pieces, manifest.tensors, manifest.buffers
    if not len(pieces):
        return
    lowest = CONSTANT if manifest.side == "sink" else 0
    unknown = (pieces.tensor < lowest) | (pieces.tensor >= len(tensors))
    unknown |= (pieces.buffer < 0) | (pieces.buffer >= len(buffers))
    if unknown.any():
        row = int(np.flatnonzero(unknown)[0])
        raise LayoutError(f"piece {row} names an unknown tensor or buffer", side=manifest.side)
    single = pieces.n == 1
    constant = pieces.tensor == CONSTANT
    shape = tensors.shape[pieces.tensor] if len(tensors) else np.ones_like(pieces.n)
    # Products in float: 53 bits are plenty to refuse what would overflow 64.
    box_reach = pieces.lo + (pieces.n - 1) * pieces.step.astype(np.float64)
    reach = pieces.offset + ((pieces.n - 1) * pieces.stride.astype(np.float64)).sum(axis=1)
    checks = (
        ("has no elements", (pieces.n < 1).any(axis=1)),
        (
            "has a step outside 1..2**31",
            ((pieces.step < 1) | (pieces.step >= MAX_STEP)).any(axis=1),
        ),
        (
            "leaves its tensor",
            (pieces.lo < 0).any(axis=1) | (~constant & (box_reach >= shape).any(axis=1)),
        ),
        ("is a constant with a box", constant & (pieces.lo != 0).any(axis=1)),
        ("has a fill but is no constant", ~constant & (pieces.fill != 0)),
        ("leaves its buffer", (pieces.offset < 0) | (reach >= buffers.numel[pieces.buffer])),
        ("has a negative stride", (pieces.stride < 0).any(axis=1)),
        (
            "is not canonical (step 1 and stride 0 where n is 1)",
            (single & ((pieces.step != 1) | (pieces.stride != 0))).any(axis=1),
        ),
        (
            "holds an element twice or has strides that do not nest",
            ~is_nested(pieces.n, pieces.stride),
        ),
    )
    for fault, rows in checks:
        for row in np.flatnonzero(rows)[:1]:
            _raise_piece(manifest, int(row), fault)
    if not np.isfinite(pieces.fill).all():
        raise LayoutError("a constant is not finite", side=manifest.side)
    if not is_sorted(pieces):
        raise LayoutError("pieces are not in canonical order", side=manifest.side)


def _raise_piece(manifest: Manifest, row: int, fault: str) -> None:
    """Report a bad piece by the names that its user knows."""
    pieces, buffers = manifest.pieces, manifest.buffers
    tensor = int(pieces.tensor[row])
    buffer = int(pieces.buffer[row])
    name = "constant" if tensor == CONSTANT else manifest.tensors.names[tensor]
    rank = manifest.ranks[int(buffers.rank[buffer])]
    raise LayoutError(
        f"{rank}: the piece of {name} in buffer {buffers.names[buffer]} {fault}: "
        f"lo {pieces.lo[row].tolist()}, n {pieces.n[row].tolist()}, "
        f"step {pieces.step[row].tolist()}, offset {pieces.offset[row]}, "
        f"stride {pieces.stride[row].tolist()}, buffer of {buffers.numel[buffer]} elements",
        tensor=name,
        rank=rank,
        side=manifest.side,
    )


def check_cover(manifest: Manifest) -> None:
    """Check that the pieces of a sink write every element of its buffers exactly once."""
    pieces, buffers = manifest.pieces, manifest.buffers
    owner = pieces.buffer.astype(np.int64)
    good = covers_once(owner, pieces.offset, pieces.n, pieces.stride, buffers.numel)
    for buffer in np.flatnonzero(~good)[:1]:
        rank = manifest.ranks[int(buffers.rank[buffer])]
        rows = np.flatnonzero(owner == buffer)
        written, numel = int(pieces.volume[rows].sum()), int(buffers.numel[buffer])
        names = sorted({manifest.tensors.names[t] for t in pieces.tensor[rows] if t != CONSTANT})
        raise CoverageError(
            f"{rank}: the pieces of buffer {buffers.names[buffer]} hold {written} elements of "
            f"{numel}"
            + (", but some twice and some never" if written == numel else "")
            + f"; tensors in it: {', '.join(names[:4]) or 'none'}; declare padding with .constant",
            tensor=names[0] if names else None,
            rank=rank,
            side=manifest.side,
        )
