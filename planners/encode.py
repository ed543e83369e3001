"""Planning what is encoded: scales go with their codes, and cells that sources share.

Who sends the codes of a box also writes the scales of the cells that begin in it. A cell that lies
in several boxes needs the maximum of all its parts before anybody encodes: those who encode a part
tell it to the one who writes the scale, and are answered (`MaxTable`).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from weightsync.ir.encoded import Encoded
from weightsync.ir.manifest import Manifest
from weightsync.ir.pieces import intersect_progressions
from weightsync.ir.plan import MaxTable
from weightsync.ir.recipes import RECIPES
from weightsync.ir.tables import MAX_DIMS, BoolArray, IntArray, all_dims, expand, unique_rows
from weightsync.planners.choose import Election
from weightsync.planners.classes import TensorClasses
from weightsync.planners.intersect import Boxes, Held, join

__all__ = ["CodeCells", "follow_codes", "shared_maxima"]


@dataclasses.dataclass(frozen=True)
class CodeCells:
    """How codes and scales of the wanted tensors belong together, seen from the classes.

    Attributes:
        codes_of: For each wanted tensor that holds scales, the position in `TensorClasses.tensor`
            of its codes; -1 for others, `(T,)`.
        recipe: Recipe of each wanted tensor that is codes or scales; -1 for others, `(T,)`.
    """

    codes_of: IntArray
    recipe: IntArray

    @classmethod
    def of(cls, classes: TensorClasses, encoded: Encoded, num_tensors: int) -> CodeCells:
        """Look up what is encoded among the wanted tensors."""
        position = np.full(num_tensors, -1)
        position[classes.tensor] = np.arange(len(classes.tensor))
        codes_of, recipe = np.full((2, len(classes.tensor)), -1)
        table = encoded.table
        codes, scales = position[table.codes], position[table.scales]
        recipe[codes[codes >= 0]] = table.recipe[codes >= 0]
        both = (codes >= 0) & (scales >= 0)
        codes_of[scales[both]] = codes[both]
        recipe[scales[both]] = table.recipe[both]
        return cls(codes_of, recipe)

    @property
    def is_scales(self) -> BoolArray:
        """Whether each wanted tensor holds scales, `(T,)`."""
        return np.asarray(self.codes_of >= 0)


def _scale_dims(recipe: int) -> list[tuple[int, int, int]]:
    """For each dim of the scales `(its position, that of the codes' dim it follows, ratio)`."""
    found = RECIPES[recipe]
    front_codes, front_scales = MAX_DIMS - len(found.codes), MAX_DIMS - len(found.scales)
    dims = []
    for position, (dim, per) in enumerate(found.scales, front_scales):
        k = next(k for k, (d, _) in enumerate(found.codes) if d == dim)
        dims.append((position, front_codes + k, per // found.codes[k][1]))
    return dims


def follow_codes(
    election: Election, classes: TensorClasses, boxes: Boxes, cells: CodeCells, shape: IntArray
) -> Election:
    """Let the scales of every cell be written by whoever sends the code that it begins with.

    Args:
        election: Senders of everything; what it says of scales is replaced.
        classes: The wanted tensors.
        boxes: What sources hold.
        cells: Which tensors are scales of which.
        shape: Shape of each class's tensors, `(C, 4)`.
    """
    scales = np.flatnonzero(cells.is_scales)
    if not len(scales):
        return election
    under = _box_of_codes(classes, boxes, cells, shape)
    tensor, local = expand(np.diff(boxes.class_start)[classes.of[scales]])
    tensor = scales[tensor]
    codes = cells.codes_of[tensor]
    item = election.item_start[tensor] + local
    box = boxes.class_start[classes.of[tensor]] + local
    codes_item = election.item_start[codes] + under[box] - boxes.class_start[classes.of[codes]]
    # Whoever holds the codes of a box holds the scales that begin in it: the lists are equal.
    shift = boxes.member_start[box] - boxes.member_start[under[box]]
    sender = election.member[codes_item]
    member = election.member.copy()
    member[item] = np.where(sender < 0, -1, sender + shift)
    split = np.flatnonzero(sender < 0)
    first = np.searchsorted(election.part_item, codes_item[split])
    count = np.searchsorted(election.part_item, codes_item[split], side="right") - first
    owner, step = expand(count)
    part, whole = first[owner] + step, split[owner]
    lo, hi, dim = _parts_of_scales(
        election, part, boxes, box[whole], under[box[whole]], cells.recipe[tensor[whole]]
    )
    keep = np.flatnonzero(hi > lo)
    columns = {
        "part_item": (election.part_item, item[whole]),
        "part_member": (election.part_member, election.part_member[part] + shift[whole]),
        "part_lo": (election.part_lo, lo),
        "part_hi": (election.part_hi, hi),
        "part_dim": (election.part_dim, dim),
    }
    joined = {name: np.concatenate([old, new[keep]]) for name, (old, new) in columns.items()}
    order = np.argsort(joined["part_item"], kind="stable")
    return Election(
        item_start=election.item_start,
        member=member,
        **{name: column[order] for name, column in joined.items()},
    )


def _box_of_codes(
    classes: TensorClasses, boxes: Boxes, cells: CodeCells, shape: IntArray
) -> IntArray:
    """For each box of scales the box of codes that its first cell begins in; -1 for others."""
    of_class = np.flatnonzero(cells.is_scales[classes.first])
    is_scales = np.zeros(len(classes.first), np.bool_)
    is_scales[of_class] = True
    mine = np.flatnonzero(is_scales[boxes.tclass])
    tensor = classes.first[boxes.tclass[mine]]
    point = np.zeros((len(mine), MAX_DIMS), np.int64)
    for recipe in range(len(RECIPES)):
        rows = cells.recipe[tensor] == recipe
        for position, codes_dim, ratio in _scale_dims(recipe):
            point[rows, codes_dim] = boxes.lo[mine[rows], position] * ratio
    ones = np.ones_like(point)
    points = Held(classes.of[cells.codes_of[tensor]], mine, point, ones, ones)
    order = np.argsort(points.tclass, kind="stable")
    held = Held(boxes.tclass, np.arange(len(boxes.tclass)), boxes.lo, boxes.n, boxes.step)
    found, which, *_ = join(held, points.take(order), shape)
    under = np.full(len(boxes.tclass), -1)
    under[mine[order[which]]] = found
    return under


def _parts_of_scales(
    election: Election,
    part: IntArray,
    boxes: Boxes,
    box: IntArray,
    codes_box: IntArray,
    recipe: IntArray,
) -> tuple[IntArray, IntArray, IntArray]:
    """Turn parts of boxes of codes into those of boxes of scales: `(lo, hi, dim)`, maybe empty."""
    codes_dim = election.part_dim[part]
    # Without a dim of its own, as inside a cell of several codes, the first part has the cell.
    dim, ratio = np.full(len(part), MAX_DIMS - 1), np.zeros(len(part), np.int64)
    for number in range(len(RECIPES)):
        for position, of, per in _scale_dims(number):
            mine = (recipe == number) & (codes_dim == of)
            dim[mine], ratio[mine] = position, per
    origin, step = boxes.lo[codes_box, codes_dim], boxes.step[codes_box, codes_dim]
    first, stride, count = (c[box, dim] for c in (boxes.lo, boxes.step, boxes.n))
    borders = []
    for index in (election.part_lo[part], election.part_hi[part]):
        cell = -(-(origin + step * index) // np.maximum(ratio, 1))  # first cell that begins there
        border = np.clip(-((first - cell) // stride), 0, count)
        is_end = index == boxes.n[codes_box, codes_dim]
        border = np.where(is_end, count, border)
        borders.append(np.where(ratio > 0, border, np.where(index > 0, count, 0)))
    return borders[0], borders[1], dim


def shared_maxima(
    encoded: Encoded,
    sink: Manifest,
    classes: TensorClasses,
    boxes: Boxes,
    election: Election,
    cells: CodeCells,
) -> MaxTable:
    """Find the cells that several senders encode parts of, and who writes their scales.

    Returns:
        A row for each sender and each owner of scales that meet; sorted by source.
    """
    is_codes = (cells.recipe >= 0) & ~cells.is_scales
    is_shared = np.diff(boxes.class_start)[classes.of] > 1
    is_shared[np.searchsorted(election.item_start, election.part_item, side="right") - 1] = True
    tensors = np.flatnonzero(is_codes & is_shared)
    scales_of = np.full(len(classes.tensor), -1)
    scales_of[cells.codes_of[cells.is_scales]] = np.flatnonzero(cells.is_scales)
    tensors = tensors[scales_of[tensors] >= 0]
    found = []
    for recipe in range(len(RECIPES)):
        mine = tensors[cells.recipe[tensors] == recipe]
        if len(mine):
            shape = sink.tensors.shape[classes.tensor[scales_of[mine]]]
            parts = _contributions(classes, boxes, election, mine)
            found.append((classes.tensor[scales_of[mine]], *_meetings(parts, recipe, shape)))
    tables = [
        MaxTable(
            tensor=tensor[owner].astype(np.int32),
            src_rank=src.astype(np.int32),
            dst_rank=dst.astype(np.int32),
            lo=lo,
            n=n,
            step=step,
        )
        for tensor, owner, src, dst, lo, n, step in found
    ]
    table = MaxTable.concat(tables)
    first, _ = unique_rows([getattr(table, name) for name in MaxTable.COLUMNS])
    table = table.take(first)
    minor = [column for name in ("n", "lo") for column in getattr(table, name).T[::-1]]
    return table.take(np.lexsort([*minor, table.tensor, table.dst_rank, table.src_rank]))


def _contributions(
    classes: TensorClasses, boxes: Boxes, election: Election, tensors: IntArray
) -> tuple[IntArray, IntArray, Held]:
    """What each sender encodes of some tensors: position in `tensors`, rank and box of codes."""
    owner, local = expand(np.diff(boxes.class_start)[classes.of[tensors]])
    item = election.item_start[tensors[owner]] + local
    box = boxes.class_start[classes.of[tensors[owner]]] + local
    member = election.member[item]
    split = np.flatnonzero(member < 0)
    first = np.searchsorted(election.part_item, item[split])
    count = np.searchsorted(election.part_item, item[split], side="right") - first
    which, step = expand(count)
    part, whole = first[which] + step, split[which]
    kept = np.flatnonzero(member >= 0)
    rows, parts_box = np.arange(len(part)), box[whole]
    lo, n = boxes.lo[parts_box], boxes.n[parts_box]
    dim = election.part_dim[part]
    lo[rows, dim] += boxes.step[parts_box, dim] * election.part_lo[part]
    n[rows, dim] = election.part_hi[part] - election.part_lo[part]
    every = np.concatenate([box[kept], parts_box])
    held = Held(
        np.concatenate([owner[kept], owner[whole]]),
        every,
        np.concatenate([boxes.lo[box[kept]], lo]),
        np.concatenate([boxes.n[box[kept]], n]),
        boxes.step[every],
    )
    sender = np.concatenate([member[kept], election.part_member[part]])
    return held.tclass, boxes.member_rank[sender], held


def _meetings(
    parts: tuple[IntArray, IntArray, Held], recipe: int, shape: IntArray
) -> tuple[IntArray, IntArray, IntArray, IntArray, IntArray, IntArray]:
    """Intersect the cells that begin in each box with those that each box touches."""
    owner, rank, held = parts
    touched_lo, begun_lo = np.zeros((2, len(owner), MAX_DIMS), np.int64)
    touched_n, begun_n, step = np.ones((3, len(owner), MAX_DIMS), np.int64)
    for position, codes_dim, ratio in _scale_dims(recipe):
        lo, n, jump = (c[:, codes_dim] for c in (held.lo, held.n, held.step))
        touched_lo[:, position] = lo // ratio
        touched_n[:, position] = (lo + (n - 1) * jump) // ratio - lo // ratio + 1
        at, count, jump = intersect_progressions(
            lo, n, jump, np.zeros_like(lo), shape[owner, position], np.full_like(lo, ratio)
        )
        begun_lo[:, position], begun_n[:, position] = at // ratio, count
        step[:, position] = np.where(count > 1, jump // ratio, 1)
    owns = np.flatnonzero(all_dims(begun_n > 0))
    order = np.argsort(owner[owns], kind="stable")
    owns = owns[order]
    begun = Held(owner[owns], owns, begun_lo[owns], begun_n[owns], step[owns])
    order = np.argsort(owner, kind="stable")
    touched = Held(
        owner[order], order, touched_lo[order], touched_n[order], np.ones_like(touched_n)
    )
    a, b, lo, n, step = join(begun, touched, shape)
    dst, src = rank[owns[a]], rank[order[b]]
    keep = np.flatnonzero(src != dst)
    return owner[owns[a[keep]]], src[keep], dst[keep], lo[keep], n[keep], step[keep]
