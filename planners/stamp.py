"""Stamp the regions of each class out to its tensors and give every copy its buffers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightsync.errors import PlanBudgetError
from weightsync.ir.manifest import Manifest
from weightsync.ir.plan import NestTable
from weightsync.ir.tables import IntArray, expand, ranges, take_rows, unique_rows
from weightsync.planners.choose import Election
from weightsync.planners.classes import TensorClasses
from weightsync.planners.copies import Copies, CopyTable, unique_nests
from weightsync.planners.intersect import Boxes, Regions

__all__ = ["Stamped", "stamp"]


@dataclasses.dataclass(frozen=True)
class Stamped:
    """All copies of a plan as three numbers each, sorted by source rank.

    Attributes:
        tensor: Index into `TensorClasses.tensor`, `(R,)`.
        region: Row of `lo`, `n`, `step`, `origin`, `(R,)`.
        member: Sender: index into `Boxes.member_*`, `(R,)`.
        src_rank: Its rank, ascending, `(R,)`.
        dst_piece: Sink piece (of the representative) that each goes to, `(R,)`.
        lo, n, step: Boxes of the regions, then of the parts of split ones, `(Q', 4)`.
        origin: The region that each is, or is a part of, `(Q',)`.
    """

    tensor: IntArray
    region: IntArray
    member: IntArray
    src_rank: IntArray
    dst_piece: IntArray
    lo: IntArray
    n: IntArray
    step: IntArray
    origin: IntArray

    def copies(
        self,
        rows: slice | IntArray,
        classes: TensorClasses,
        boxes: Boxes,
        source: Manifest,
        sink: Manifest,
    ) -> Copies:
        """Materialise some copies: buffers, offsets and strides on both sides.

        The tensors of a class are placed alike, so that copies of one region between the same two
        pieces of the representative differ in buffers and offsets only.
        """
        tensor, region, member = self.tensor[rows], self.region[rows], self.member[rows]
        model = classes.first[classes.of[tensor]]
        first, kind = unique_rows([region, member, self.dst_piece[rows]])
        lo, n, step = (take_rows(c, region[first]) for c in (self.lo, self.n, self.step))
        columns: dict[str, NDArray[Any]] = {}
        strides: dict[str, NDArray[Any]] = {}
        for side, manifest, like, start in (
            ("src", source, boxes.member_piece[member], classes.src_start),
            ("dst", sink, self.dst_piece[rows], classes.dst_start),
        ):
            pieces = manifest.pieces
            piece = like + (start[tensor] - start[model])  # same position in the tensor's own list
            held = pieces.take(like[first])
            index = (lo - held.lo) // held.step
            shift = (index * held.stride).sum(axis=1)
            columns[f"{side}_buffer"] = pieces.buffer[piece]
            columns[f"{side}_offset"] = pieces.offset[piece] + shift[kind]
            strides[f"{side}_stride"] = held.stride * (step // held.step) * (n > 1)
        nests, number = unique_nests(NestTable(n=n, **strides))
        columns["nest"] = number.astype(np.int32)[kind]
        return Copies(CopyTable(tensor=classes.tensor[tensor].astype(np.int32), **columns), nests)


def stamp(
    classes: TensorClasses, boxes: Boxes, regions: Regions, election: Election, max_rows: int
) -> Stamped:
    """Lay out the regions of all tensors with their elected senders, sorted by source rank.

    Raises:
        PlanBudgetError: More regions than `max_rows`.
    """
    counts = np.diff(regions.class_start)[classes.of]
    if (total := int(counts.sum())) > max_rows:
        raise PlanBudgetError(
            f"the sides overlap in {total} regions, more than max_rows ({max_rows}); raise it, or "
            "shard both sides more alike",
            rows=total,
            budget=max_rows,
        )
    tensor, region = expand(counts)
    region += regions.class_start[classes.of[tensor]]
    item = election.item_start[tensor] - boxes.class_start[classes.of[tensor]] + regions.box[region]
    member = election.member[item]
    lo, n, step = regions.lo, regions.n, regions.step
    origin = np.arange(len(regions.piece))
    split = np.flatnonzero(member < 0)
    if len(split):
        first = np.searchsorted(election.part_item, item[split])
        count = np.searchsorted(election.part_item, item[split], side="right") - first
        part, whole = ranges(first, count), np.repeat(split, count)
        part_lo, part_n, keep = _clip(boxes, regions, region[whole], election, part)
        part, whole = part[keep], whole[keep]
        kept = np.flatnonzero(member >= 0)
        added = len(origin) + np.arange(len(whole))
        lo, n = np.concatenate([lo, part_lo[keep]]), np.concatenate([n, part_n[keep]])
        step = np.concatenate([step, np.where(part_n[keep] > 1, step[region[whole]], 1)])
        origin = np.concatenate([origin, region[whole]])
        tensor = np.concatenate([tensor[kept], tensor[whole]])
        region = np.concatenate([region[kept], added])
        member = np.concatenate([member[kept], election.part_member[part]])
    rank = boxes.member_rank[member]
    small = rank.astype(np.uint16) if int(rank.max(initial=0)) < 1 << 16 else rank
    order = np.argsort(small, kind="stable")  # a radix sort for 16 bits
    region = region[order]
    piece = regions.piece[origin[region]]
    return Stamped(tensor[order], region, member[order], rank[order], piece, lo, n, step, origin)


def _clip(
    boxes: Boxes, regions: Regions, region: IntArray, election: Election, part: IntArray
) -> tuple[IntArray, IntArray, IntArray]:
    """Clip regions to parts of their boxes: `(lo, n)` of what remains and which rows are left."""
    dim = election.part_dim[part]
    rows = np.arange(len(region))
    box = regions.box[region]
    lo, n = regions.lo[region], regions.n[region]
    step = regions.step[region, dim]
    # Index ranges of the box along its dim, as canonical coordinates, then as region indices.
    begin = boxes.lo[box, dim] + boxes.step[box, dim] * election.part_lo[part]
    end = boxes.lo[box, dim] + boxes.step[box, dim] * election.part_hi[part]
    first = np.clip(-((lo[rows, dim] - begin) // step), 0, n[rows, dim])
    last = np.clip(-((lo[rows, dim] - end) // step), 0, n[rows, dim])
    lo[rows, dim] += first * step
    n[rows, dim] = last - first
    return lo, n, np.flatnonzero(last > first)
