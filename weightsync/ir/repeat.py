"""Manifests that repeat themselves: layers that differ by number, replicas that differ by label.

What is repeated was validated once; what comes out is valid by construction, or validated where it
is cheap. A model of sixty layers costs what two of them do.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np

from weightsync.errors import LayoutError
from weightsync.ir.manifest import BufferTable, Manifest, TensorTable
from weightsync.ir.pieces import CONSTANT, PieceTable, sorted_pieces
from weightsync.ir.recipes import EncodingTable
from weightsync.ir.tables import IntArray, expand, starts_of, take_rows

__all__ = ["find_replicas", "relabelled", "repeat_blocks", "repeat_ranks"]

Prefixes = tuple[str, str]
Beginnings = tuple[str, tuple[str, ...]]  # of the names of a part, and of those of its copies


def repeat_blocks(
    manifest: Manifest, blocks: Sequence[tuple[Prefixes, Sequence[Prefixes]]]
) -> Manifest:
    """Return a manifest in which parts stand several times, under other names.

    Layers of a model are alike: one is described, the others are copies of it.

    Args:
        manifest: Of one rank.
        blocks: How the names of a part's tensors begin, and those of its buffers; and what they
            begin with instead, each time. No beginning is that of another part's names.

    Returns:
        The manifest with all parts. Valid because `manifest` is: a part lies in buffers of its own.

    Raises:
        LayoutError: A buffer of a part holds a tensor that is not of the part, or a name occurs
            twice.

    Cost: a sort of the names and the pieces.
    """
    if not blocks:
        return manifest
    tensors, buffers = (
        _names(names, tuple((old[side], tuple(p[side] for p in new)) for old, new in blocks))
        for side, names in enumerate((manifest.tensors.names, manifest.buffers.names))
    )
    pieces = manifest.pieces
    owner, copy = expand(buffers.count[pieces.buffer])
    template = pieces.take(owner)
    is_constant = template.tensor == CONSTANT
    if (tensors.block[template.tensor] != buffers.block[template.buffer])[~is_constant].any():
        raise LayoutError("a buffer of a repeated part holds a tensor that is not of the part")
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
    return Manifest.trusted(
        side=manifest.side,
        ranks=manifest.ranks,
        repeats=None,
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
    # By tensor, then buffer: replicas follow one another inside each tensor.
    order = np.argsort(np.tile(pieces.tensor, count), kind="stable")
    replica, piece = np.divmod(order, max(len(pieces), 1))
    columns = {name: take_rows(getattr(pieces, name), piece) for name in PieceTable.COLUMNS}
    columns["buffer"] += replica.astype(np.int32) * np.int32(len(buffers))
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
        pieces=PieceTable(**columns),
        encodings=manifest.encodings,
        repeats=(manifest, count),
    )


def relabelled(manifest: Manifest, labels: Sequence[str]) -> Manifest:
    """Return a manifest whose ranks have other labels: the same tables, not validated again.

    Args:
        manifest: A manifest; it is returned itself if it has these labels.
        labels: One for each rank, all different.

    Raises:
        LayoutError: Labels that are missing or occur twice.
    """
    if manifest.ranks == tuple(labels):
        return manifest
    if len(set(labels)) != len(manifest.ranks) or len(labels) != len(manifest.ranks):
        raise LayoutError(f"{len(manifest.ranks)} ranks need as many labels, all different")
    return Manifest.trusted(
        side=manifest.side,
        ranks=tuple(labels),
        tensors=manifest.tensors,
        buffers=manifest.buffers,
        pieces=manifest.pieces,
        encodings=manifest.encodings,
        repeats=None,
    )


def find_replicas(sink: Manifest) -> Manifest:
    """Return a manifest that knows its replicas, if they are equal; else the same.

    A replica is the ranks whose labels are alike up to the last `/`, one after the other.

    Args:
        sink: Merged manifest.

    Cost: a few passes over the piece columns.
    """
    names = [label.rpartition("/")[0] for label in sink.ranks]
    count = len(set(names))
    size = len(names) // max(count, 1)
    blocks = [names[first : first + size] for first in range(0, len(names), max(size, 1))]
    is_even = len(blocks) == count and all(len(set(block)) == 1 for block in blocks)
    if sink.repeats is not None or count < 2 or not is_even:
        return sink
    buffers, pieces = sink.buffers, sink.pieces
    num = int(np.searchsorted(buffers.rank, size))
    base = Manifest.trusted(
        side=sink.side,
        ranks=sink.ranks[:size],
        tensors=sink.tensors,
        buffers=BufferTable(
            buffers.names[:num], buffers.rank[:num], buffers.dtype[:num], buffers.numel[:num]
        ),
        pieces=pieces.take(pieces.buffer < num),
        encodings=sink.encodings,
        repeats=None,
    )
    labels = [sink.ranks[first : first + size] for first in range(0, len(names), size)]
    found = repeat_ranks(base, labels)
    is_equal = found.buffers.names == buffers.names and len(found.pieces) == len(pieces)
    for mine, theirs in ((found.buffers, buffers), (found.pieces, pieces)):
        for name in type(mine).COLUMNS:
            is_equal = is_equal and np.array_equal(getattr(mine, name), getattr(theirs, name))
    return found if is_equal else sink


class _Names:
    """Names with those of the copies, and where each came from.

    Attributes:
        names: All, sorted.
        template: For each its number before.
        block: Block of each name from before; -1 for none.
        count: Copies of each name from before, in the order of the new beginnings.
        start: Where the copies of each begin in `number`.
        number: Number of each copy among `names`.
    """

    def __init__(self, names: tuple[str, ...], blocks: tuple[Beginnings, ...]) -> None:
        made: list[str] = []
        block: list[int] = []
        for name in names:
            number = next((b for b, (old, _) in enumerate(blocks) if name.startswith(old)), -1)
            block.append(number)
            if number < 0:
                made.append(name)
            else:
                old, new = blocks[number]
                made += [begin + name[len(old) :] for begin in new]
        order = np.array(sorted(range(len(made)), key=made.__getitem__), np.int64)
        self.names = tuple([made[i] for i in order.tolist()])
        if len(set(made)) < len(made):
            twice = next(a for a, b in itertools.pairwise(self.names) if a == b)
            raise LayoutError(f"{twice} occurs twice, as parts are repeated")
        self.block = np.array(block, np.int64)
        self.count = np.array([len(new) for _, new in blocks] + [1])[self.block]
        self.start: IntArray = starts_of(self.count)
        self.number = np.empty(len(made), np.int64)
        self.number[order] = np.arange(len(made))
        self.template = np.repeat(np.arange(len(names)), self.count)[order]


@functools.lru_cache(maxsize=64)  # ranks of one mesh name the same, but for their experts
def _names(names: tuple[str, ...], blocks: tuple[Beginnings, ...]) -> _Names:
    return _Names(names, blocks)
