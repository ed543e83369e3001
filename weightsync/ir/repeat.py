"""Manifests that repeat themselves: layers that differ by number, replicas that differ by label.

What is repeated was validated once; what comes out is valid by construction, or validated where it
is cheap. A model of sixty layers costs what two of them do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import numpy as np

from weightsync.errors import InternalError, LayoutError
from weightsync.ir.manifest import BufferTable, Manifest, TensorTable
from weightsync.ir.pieces import CONSTANT, PieceTable, sorted_pieces
from weightsync.ir.recipes import EncodingTable
from weightsync.ir.tables import IntArray, expand, starts_of

__all__ = ["repeat_layers", "repeat_ranks"]

_LAYER: Final = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def repeat_layers(manifest: Manifest, groups: Sequence[Sequence[int]]) -> Manifest:
    """Return a manifest with layers added that are like one that it has.

    Args:
        manifest: Of one rank. The number of a layer stands behind `layers.` in the names of its
            tensors and buffers.
        groups: Layers that differ in their number only; the first of each is in the manifest.

    Returns:
        The manifest with all layers of the groups, validated.

    Cost: a sort of the names and the pieces.
    """
    like = {group[0]: group for group in groups if len(group) > 1}
    if not like:
        return manifest
    tensors = _Names(manifest.tensors.names, like)
    buffers = _Names(manifest.buffers.names, like)
    pieces = manifest.pieces
    owner, copy = expand(buffers.count[pieces.buffer])
    template = pieces.take(owner)
    is_constant = template.tensor == CONSTANT
    if (tensors.count[template.tensor] != buffers.count[template.buffer])[~is_constant].any():
        raise InternalError("a layer's buffer holds a tensor that is not of the layer")
    columns = {name: getattr(template, name) for name in PieceTable.COLUMNS}
    number = tensors.number[np.where(is_constant, 0, tensors.start[template.tensor] + copy)]
    columns["tensor"] = np.where(is_constant, CONSTANT, number).astype(np.int32)
    columns["buffer"] = buffers.number[buffers.start[template.buffer] + copy].astype(np.int32)
    encodings = manifest.encodings
    owner, copy = expand(tensors.count[encodings.codes])
    encoded = {
        name: tensors.number[tensors.start[getattr(encodings, name)[owner]] + copy]
        for name in ("values", "codes", "scales")
    }
    order = np.argsort(encoded["codes"])
    return Manifest(
        side=manifest.side,
        ranks=manifest.ranks,
        tensors=TensorTable(
            tensors.names,
            manifest.tensors.shape[tensors.template],
            manifest.tensors.ndim[tensors.template],
        ),
        buffers=BufferTable(
            buffers.names,
            manifest.buffers.rank[buffers.template],
            manifest.buffers.dtype[buffers.template],
            manifest.buffers.numel[buffers.template],
        ),
        pieces=sorted_pieces(PieceTable(**columns)),
        encodings=EncodingTable(
            recipe=encodings.recipe[owner[order]],
            **{name: column[order].astype(np.int32) for name, column in encoded.items()},
        ),
    )


def repeat_ranks(manifest: Manifest, labels: Sequence[Sequence[str]]) -> Manifest:
    """Return the merged manifest of several equal replicas.

    Args:
        manifest: Of all ranks of one.
        labels: Labels of the ranks of each replica, all different.

    Returns:
        What `Manifest.merge` makes of the ranks' manifests, with `repeats` set. Valid because
        `manifest` is, so it is not validated again.

    Raises:
        LayoutError: Labels that are missing or occur twice.
    """
    flat = [label for of_replica in labels for label in of_replica]
    if any(len(of) != len(manifest.ranks) for of in labels) or len(set(flat)) != len(flat):
        raise LayoutError(f"replicas of {len(manifest.ranks)} ranks need as many labels each")
    count, buffers, pieces = len(labels), manifest.buffers, manifest.pieces
    columns = {
        name: np.tile(column, (count, *[1] * (column.ndim - 1)))
        for name in PieceTable.COLUMNS
        for column in [getattr(pieces, name)]
    }
    shift = np.repeat(np.arange(count, dtype=np.int32) * len(buffers), len(pieces))
    columns["buffer"] += shift
    # By tensor, then buffer: replicas follow one another inside each tensor.
    order = np.argsort(columns["tensor"], kind="stable")
    rank = np.arange(count, dtype=np.int32)[:, None] * len(manifest.ranks) + buffers.rank
    return Manifest.trusted(
        side=manifest.side,
        ranks=tuple(flat),
        tensors=manifest.tensors,
        buffers=BufferTable(
            buffers.names * count,
            rank.reshape(-1),
            np.tile(buffers.dtype, count),
            np.tile(buffers.numel, count),
        ),
        pieces=PieceTable(**columns).take(order),
        encodings=manifest.encodings,
        repeats=(manifest, count),
    )


class _Names:
    """Names with those of the added layers, and where each came from.

    Attributes:
        names: All, sorted.
        template: For each its number before.
        count: Copies of each name from before, in the order of the layers.
        start: Where the copies of each begin in `number`.
        number: Number of each copy among `names`.
    """

    def __init__(self, names: Sequence[str], like: dict[int, Sequence[int]]) -> None:
        made: list[str] = []
        count: list[int] = []
        for name in names:
            match = _LAYER.search(name)
            layers = like.get(int(match[1])) if match else None
            if match is None or layers is None:
                made.append(name)
                count.append(1)
                continue
            before, after = name[: match.start(1)], name[match.end(1) :]
            made += [f"{before}{layer}{after}" for layer in layers]
            count.append(len(layers))
        order = np.array(sorted(range(len(made)), key=made.__getitem__), np.int64)
        self.names = tuple([made[i] for i in order.tolist()])
        self.count = np.array(count, np.int64)
        self.start: IntArray = starts_of(self.count)
        self.number = np.empty(len(made), np.int64)
        self.number[order] = np.arange(len(made))
        self.template = np.repeat(np.arange(len(names)), self.count)[order]
