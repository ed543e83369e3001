"""What sources can make of the values they hold: pieces of the codes and scales of sinks."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightsync.errors import LayoutError
from weightsync.ir.manifest import Manifest, TensorTable
from weightsync.ir.manifest_checks import check_labels
from weightsync.ir.pieces import PieceTable, sorted_pieces
from weightsync.ir.recipes import RECIPES, EncodingTable, coarsened
from weightsync.ir.tables import MAX_DIMS, BoolArray, IntArray, front_pad

__all__ = ["Encoded", "made_rows"]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The sources of a plan, seen as holders of whatever the sinks store.

    Attributes:
        source: The sources' manifest with pieces of codes and scales; same ranks and buffers. An
            element of such a piece is where the values of that code, or of that cell, begin.
        table: The sink's encodings that sources must make, a part of its own.
        dtype: `Dtype` of the sink's tensors that are codes or scales of them; -1 of others,
            `(T_sink,)`.
        cells: Elements of codes that share a scale, by recipe, `(1 + recipes, 4)`; the first row is
            for what is not encoded, one element.
        cell_of: Row of `cells` of each of the sink's tensors, `(T_sink,)`.
    """

    source: Manifest
    table: EncodingTable
    dtype: IntArray
    cells: IntArray
    cell_of: IntArray

    def cell(self, tensors: NDArray[Any]) -> IntArray:
        """Return the elements that share a scale, of some of the sink's tensors, `(N, 4)`."""
        cells: IntArray = self.cells[self.cell_of[tensors]]
        return cells

    @classmethod
    def of(cls, source: Manifest, sink: Manifest) -> Encoded:
        """Find what must be encoded: where the sources hold values, but no scales.

        Raises:
            LayoutError: A source holds a part of a cell whose codes cannot be made apart.
        """
        dtype = np.full(len(sink.tensors), -1)
        cells = front_pad([(), *(recipe.codes_cell for recipe in RECIPES)], 1)
        cell_of = np.zeros(len(sink.tensors), np.int64)
        index, names = source.tensors.index, sink.tensors.names
        rows = [
            row
            for row, (values, scales) in enumerate(
                zip(sink.encodings.values.tolist(), sink.encodings.scales.tolist(), strict=True)
            )
            if names[values] in index and names[scales] not in index
        ]
        table = sink.encodings.take(np.array(rows, np.int64))
        if not rows:
            return cls(source, table, dtype, cells, cell_of)
        for number, recipe in enumerate(RECIPES):
            mine = table.recipe == number
            dtype[table.codes[mine]] = recipe.codes_dtype
            dtype[table.scales[mine]] = recipe.scales_dtype
            cell_of[table.codes[mine]] = 1 + number
        return cls(_with_made(source, sink, table), table, dtype, cells, cell_of)


def made_rows(
    encoded: Encoded, sink: Manifest, tensor: NDArray[Any], dst_buffer: NDArray[Any]
) -> BoolArray:
    """Tell which rows encode: a fleet may have sinks that store a tensor's values beside others.

    Args:
        encoded: Of the two sides.
        sink: The sinks' manifest.
        tensor: Sink tensor of each row, `(R,)`.
        dst_buffer: Sink buffer of each row, `(R,)`.
    """
    made: BoolArray = encoded.dtype[tensor] == sink.buffers.dtype[dst_buffer]
    return made


def _with_made(source: Manifest, sink: Manifest, table: EncodingTable) -> Manifest:
    """Add pieces of codes and scales to those of the values."""
    made = np.unique(np.concatenate([table.scales, table.codes[table.codes != table.values]]))
    added = [sink.tensors.names[t] for t in made]
    names = sorted([*source.tensors.names, *added])
    number = {name: i for i, name in enumerate(names)}
    old = np.array([number[name] for name in source.tensors.names], np.int32)
    new = np.array([number[name] for name in added], np.int32)
    shape, ndim = np.zeros((len(names), MAX_DIMS), np.int64), np.zeros(len(names), np.uint8)
    shape[old], ndim[old] = source.tensors.shape, source.tensors.ndim
    shape[new], ndim[new] = sink.tensors.shape[made], sink.tensors.ndim[made]
    kept = PieceTable(
        **{
            **{name: getattr(source.pieces, name) for name in PieceTable.COLUMNS},
            "tensor": old[source.pieces.tensor],
        }
    )
    in_source = np.array([source.tensors.index[sink.tensors.names[t]] for t in table.values])
    row_of = np.full(len(source.tensors), -1)
    row_of[in_source] = np.arange(len(table))
    owner = row_of[source.pieces.tensor]
    parts = [kept]
    for code, recipe in enumerate(RECIPES):
        mine = np.flatnonzero((owner >= 0) & (table.recipe[owner] == code))
        if not len(mine):
            continue
        held, of = source.pieces.take(mine), owner[mine]
        for dims, tensors in ((recipe.codes, table.codes), (recipe.scales, table.scales)):
            wanted = tensors[of]
            if dims is recipe.codes and (wanted == table.values[of]).all():
                continue  # codes lie one to one where the values do
            pieces, whole = coarsened(
                held, dims, sink.tensors.shape[wanted], _numbers(sink.tensors, wanted, number)
            )
            for bad in np.flatnonzero(~whole)[:1]:
                piece = int(mine[bad])
                rank = source.ranks[int(source.buffers.rank[source.pieces.buffer[piece]])]
                name = source.tensors.names[int(source.pieces.tensor[piece])]
                box = source.tensors.box_text(
                    int(source.pieces.tensor[piece]), held.lo[bad], held.n[bad], held.step[bad]
                )
                raise LayoutError(
                    f"{rank} holds {box} of {name}, which cuts cells of {recipe.cell} that "
                    f"{recipe.name} packs together; shard it along another dim, or by whole cells",
                    tensor=name,
                    rank=rank,
                    side="source",
                )
            parts.append(pieces)
    seen = Manifest.trusted(  # valid as the pieces of the values are, but for the names
        side="source",
        ranks=source.ranks,
        tensors=TensorTable(tuple(names), shape, ndim),
        buffers=source.buffers,
        pieces=sorted_pieces(*parts),
        encodings=EncodingTable.empty(),
        repeats=None,
    )
    check_labels(seen)
    return seen


def _numbers(tensors: TensorTable, wanted: IntArray, number: dict[str, int]) -> IntArray:
    """Number in the new table of each of the sink's tensors."""
    distinct, inverse = np.unique(wanted, return_inverse=True)
    return np.array([number[tensors.names[t]] for t in distinct], np.int64)[inverse]
