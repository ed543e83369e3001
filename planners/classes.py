"""Classes of tensors: same shape, same placement on both sides, planned once and stamped out.

The layers of a model and the experts of a layer differ by name and by buffer, rarely by anything
that matters to intersection. A class has one representative; every piece of another member is the
piece at the same position in the member's own list, at another offset of another buffer.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from weightsync.ir.manifest import Manifest
from weightsync.ir.recipes import EncodingTable
from weightsync.ir.tables import IntArray, expand, ranges, unique_rows, unique_runs

__all__ = ["TensorClasses", "classify"]


@dataclasses.dataclass(frozen=True)
class TensorClasses:
    """The tensors that sinks want, and which of them are alike.

    Attributes:
        tensor: Sink tensor number of each wanted tensor, `(T,)`, ascending.
        of: Class of each wanted tensor, `(T,)`.
        first: Representative of each class: index into `tensor`, `(C,)`.
        src_start, src_count: Source pieces of each wanted tensor (they are contiguous), `(T,)`.
        dst_start, dst_count: Sink pieces of each wanted tensor, `(T,)`.
    """

    tensor: IntArray
    of: IntArray
    first: IntArray
    src_start: IntArray
    src_count: IntArray
    dst_start: IntArray
    dst_count: IntArray

    def representatives(self, *, side: str) -> tuple[IntArray, IntArray]:
        """Return `(class, piece)` of all pieces of the representatives on one side."""
        is_source = side == "source"
        start = (self.src_start if is_source else self.dst_start)[self.first]
        count = (self.src_count if is_source else self.dst_count)[self.first]
        owner, local = expand(count)
        return owner, start[owner] + local


def classify(
    source: Manifest, sink: Manifest, tensor_in_source: IntArray, table: EncodingTable
) -> TensorClasses:
    """Find the tensors that some sink wants and group them into classes.

    Args:
        source: Merged manifest of the sources.
        sink: Merged manifest of the sinks.
        tensor_in_source: Source tensor number of each sink tensor, `(T_sink,)`; -1 if unknown.
        table: What sources encode: scales are alike only if their codes are.

    Cost: O(P log T) for P pieces, a few passes over the piece columns.
    """
    numbers = np.arange(len(sink.tensors))
    dst_start = np.searchsorted(sink.pieces.tensor, numbers)
    dst_count = np.searchsorted(sink.pieces.tensor, numbers, side="right") - dst_start
    wanted = np.flatnonzero(dst_count)
    in_source = tensor_in_source[wanted]
    src_start = np.searchsorted(source.pieces.tensor, in_source)
    src_count = np.searchsorted(source.pieces.tensor, in_source, side="right") - src_start
    dst_start, dst_count = dst_start[wanted], dst_count[wanted]
    _, src_kind = unique_runs(src_count, _placement(source, src_start, src_count))
    _, dst_kind = unique_runs(dst_count, _placement(sink, dst_start, dst_count))
    first, of = unique_rows([sink.tensors.shape[wanted], src_kind, dst_kind])
    if len(table):
        of_codes = np.full(len(sink.tensors), -1)
        kind = np.full(len(sink.tensors), -1)
        kind[wanted] = of
        of_codes[table.scales] = kind[table.codes]
        recipe = np.full(len(sink.tensors), -1)
        recipe[table.codes] = table.recipe
        first, of = unique_rows([of, of_codes[wanted], recipe[wanted]])
    return TensorClasses(wanted, of, first, src_start, src_count, dst_start, dst_count)


def _placement(side: Manifest, start: IntArray, count: IntArray) -> list[IntArray]:
    """Return what must be equal for two tensors to be placed alike: all but buffer and offset."""
    pieces, piece = side.pieces, ranges(start, count)
    buffer = pieces.buffer[piece]
    fixed = [
        side.buffers.rank[buffer].astype(np.int64),
        side.buffers.dtype[buffer].astype(np.int64),
    ]
    boxes = [column[piece] for column in (pieces.lo, pieces.n, pieces.step, pieces.stride)]
    # Most columns are padding; one that never varies tells nothing apart.
    columns = [*fixed, *(c for box in boxes for c in box.T)]
    return [c for c in columns if len(c) and c.min() != c.max()] or [fixed[0]]
