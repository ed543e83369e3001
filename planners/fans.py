"""Who receives what a node shares, and where its neighbours store it.

The regions that the same sinks share lie on a line, in the order of their sources; the line is cut
into as many even parts as there are sinks, and each receives one. A region in which a cut falls is
split along its outermost dim. A *fan* then says where the others store what one of them receives:
in which buffer, and how many elements further on.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from weightsync.ir.manifest import Manifest
from weightsync.ir.tables import (
    IntArray,
    expand,
    starts_of,
    sum_by,
    unique_rows,
    unique_runs,
    volume_of,
)
from weightsync.planners.classes import TensorClasses
from weightsync.planners.sharing import Sharing
from weightsync.planners.stamp import Stamped

__all__ = ["Fans", "find_fans", "spread"]


@dataclasses.dataclass(frozen=True)
class Fans:
    """Distinct ways in which a sink passes on what it receives into one of its buffers.

    Attributes:
        buffer: Buffer that receives, `(F,)`.
        pattern: Number of the fan among those of its buffer, `(F,)`.
        ranks: Number of the set of ranks that it passes on to, `(F,)`.
        start: Targets of fan f are `start[f] : start[f + 1]`, sorted by rank, `(F + 1,)`.
        target, target_rank: Buffer and rank of each target, `(E,)`.
        shift: Elements from an offset in `buffer` to that in `target`, `(E,)`.
    """

    buffer: IntArray
    pattern: IntArray
    ranks: IntArray
    start: IntArray
    target: IntArray
    target_rank: IntArray
    shift: IntArray

    @classmethod
    def empty(cls) -> Fans:
        """Return no fans."""
        none = np.zeros(0, np.int64)
        return cls(none, none, none, starts_of(none), none, none, none)

    def find(self, buffer: IntArray, pattern: IntArray) -> IntArray:
        """Return the fan of each (buffer, pattern); -1 where the pattern is."""
        if not len(self.buffer):
            return np.full(len(buffer), -1)
        width = int(self.pattern.max()) + 1
        key = self.buffer * width + self.pattern
        order = np.argsort(key)
        found = order[
            np.searchsorted(key[order], buffer * width + np.maximum(pattern, 0)) % len(key)
        ]
        return np.where(pattern >= 0, found, -1)


def spread(
    stamped: Stamped, sharing: Sharing, sink: Manifest, cell: IntArray
) -> tuple[Stamped, IntArray]:
    """Choose which sink receives each copy of what several share.

    Args:
        stamped: Copies of all tensors, to the first of the sinks that share each.
        sharing: Who shares each region.
        sink: Merged manifest of one replica.
        cell: Elements that stay together, of each wanted tensor, `(T, 4)`; parts begin with a cell.

    Returns:
        The copies to the sinks that receive, those in which a cut falls in parts; and the place in
        `sharing` of each.
    """
    start, counts = sharing.start, np.diff(sharing.start)
    region = stamped.origin[stamped.region]
    place = start[region]
    shared = np.flatnonzero(counts[region] > 1)
    if not len(shared):
        return stamped, place
    _, of_set = unique_runs(counts, [sharing.rank])
    lines = of_set[region[shared]]
    order = np.argsort(lines, kind="stable")
    shared, lines = shared[order], lines[order]
    size = volume_of(stamped.n[stamped.region[shared]])
    size *= sink.buffers.itemsize[sink.pieces.buffer[stamped.dst_piece[shared]]]
    end = np.cumsum(size)
    begin = end - size
    head = np.searchsorted(lines, lines)
    begin, end = begin - begin[head], end - begin[head]
    total = sum_by(lines, size, int(lines.max()) + 1)[lines]
    parts = counts[region[shared]]
    first = begin * parts // total
    last = np.maximum((end - 1) * parts // total, first)
    place[shared] += first
    cut = np.flatnonzero(last > first)
    if len(cut):
        number = (last - first)[cut]
        owner, local = expand(number)
        at = -(-(first[cut][owner] + local + 1) * total[cut][owner] // parts[cut][owner])
        at -= begin[cut][owner]
        stamped, place = _split(stamped, place, shared[cut], number, at, size[cut], cell)
    return dataclasses.replace(stamped, dst_piece=sharing.piece[place]), place


def _split(
    stamped: Stamped,
    place: IntArray,
    row: IntArray,
    num_cuts: IntArray,
    at: IntArray,
    size: IntArray,
    cell: IntArray,
) -> tuple[Stamped, IntArray]:
    """Split copies along their outermost dim, at the index or cell nearest to a byte.

    Args:
        stamped: All copies.
        place: Their receivers; the parts of a copy go to this place, the next, and so on.
        row: Which to split, `(K,)`.
        num_cuts: `(K,)`.
        at: Bytes of the copy before each cut, ascending, `(num_cuts.sum(),)`.
        size: Bytes of each copy, `(K,)`.
        cell: As in `spread`.
    """
    region = stamped.region[row]
    n = stamped.n[region]
    dim = (n > 1).argmax(axis=1)
    rows = np.arange(len(row))
    length, origin = n[rows, dim], stamped.lo[region, dim]
    unit = np.where(stamped.step[region, dim] == 1, cell[stamped.tensor[row], dim], 1)
    cut, _ = expand(num_cuts)
    slice_bytes = (size // length)[cut]
    index = (at + slice_bytes // 2) // slice_bytes
    nearest = (origin[cut] + index + unit[cut] // 2) // unit[cut] * unit[cut] - origin[cut]
    index = np.clip(np.where(unit[cut] > 1, nearest, index), 0, length[cut])
    owner, part = expand(num_cuts + 1)
    border = starts_of(num_cuts)[owner] + part
    padded = np.append(index, 0)
    low = np.where(part > 0, padded[border - 1], 0)
    high = np.where(part < num_cuts[owner], padded[border], length[owner])
    keep = np.flatnonzero(high > low)
    owner, part, low, high = owner[keep], part[keep], low[keep], high[keep]
    lo, n, step = (c[region[owner]] for c in (stamped.lo, stamped.n, stamped.step))
    along = np.arange(len(owner)), dim[owner]
    lo[along] += low * step[along]
    n[along] = high - low
    rest = np.ones(len(stamped.tensor), np.bool_)
    rest[row] = False
    kept = np.flatnonzero(rest)
    of_row = np.concatenate([kept, row[owner]])
    order = np.lexsort((np.concatenate([np.zeros_like(kept), part]), of_row))
    added = len(stamped.lo) + np.arange(len(owner))
    of_row = of_row[order]
    return (
        Stamped(
            tensor=stamped.tensor[of_row],
            region=np.concatenate([stamped.region[kept], added])[order],
            member=stamped.member[of_row],
            src_rank=stamped.src_rank[of_row],
            dst_piece=stamped.dst_piece[of_row],
            origin=np.concatenate([stamped.origin, stamped.origin[region[owner]]]),
            lo=np.concatenate([stamped.lo, lo]),
            n=np.concatenate([stamped.n, n]),
            step=np.concatenate([stamped.step, np.where(n > 1, step, 1)]),
        ),
        np.concatenate([place[kept], (place[row[owner]] + part)])[order],
    )


def find_fans(
    stamped: Stamped, place: IntArray, sharing: Sharing, classes: TensorClasses, sink: Manifest
) -> tuple[Fans, IntArray]:
    """Find where else each copy is wanted.

    Args:
        stamped: Copies, to those that receive them.
        place: The place in `sharing` of each.
        sharing: Who shares each region.
        classes: The wanted tensors.
        sink: Merged manifest of one replica.

    Returns:
        The fans and the one of each copy; -1 of those that nobody else wants.
    """
    fan = np.full(len(stamped.tensor), -1)
    counts = np.diff(sharing.start)
    shared = np.flatnonzero(counts[stamped.origin[stamped.region]] > 1)
    if not len(shared):
        return Fans.empty(), fan
    first, inverse = unique_rows([stamped.tensor[shared], place[shared]])
    one = shared[first]
    region, tensor = stamped.origin[stamped.region[one]], stamped.tensor[one]
    owner, local = expand(counts[region])
    member = sharing.start[region[owner]] + local
    model = classes.first[classes.of[tensor]]
    pieces = sink.pieces
    piece = sharing.piece[member] + (classes.dst_start[tensor] - classes.dst_start[model])[owner]
    index = (stamped.lo[region[owner]] - pieces.lo[piece]) // pieces.step[piece]
    offset = pieces.offset[piece] + (index * pieces.stride[piece]).sum(axis=1)
    buffer = pieces.buffer[piece].astype(np.int64)
    receives = member == place[one][owner]
    targets = np.flatnonzero(~receives)
    owner = owner[targets]
    shift = offset[targets] - offset[receives][owner]
    num = counts[region] - 1
    found, of = unique_runs(num, [buffer[receives][owner], buffer[targets], shift])
    fan[shared] = of[inverse]
    start = starts_of(num)
    again, local = expand(num[found])
    row = start[found[again]] + local
    target = buffer[targets][row]
    target_rank = sink.buffers.rank[target].astype(np.int64)
    _, ranks = unique_runs(num[found], [target_rank])
    receiver = buffer[receives][found]
    order = np.argsort(receiver, kind="stable")
    pattern = np.empty(len(found), np.int64)
    pattern[order] = np.arange(len(found)) - np.searchsorted(receiver[order], receiver[order])
    start = starts_of(num[found])
    return Fans(receiver, pattern, ranks, start, target, target_rank, shift[row]), fan
