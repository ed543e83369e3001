"""Manifests: what the ranks of one side hold or need, as tables without addresses."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, Final, Literal

import numpy as np
from numpy.typing import NDArray

from weightsync.errors import ConfigError, LayoutError
from weightsync.ir import manifest_checks, serde
from weightsync.ir.dtypes import ITEMSIZE
from weightsync.ir.pieces import CONSTANT, PieceTable, sorted_pieces
from weightsync.ir.recipes import EncodingTable, check_encodings
from weightsync.ir.tables import MAX_DIMS, IntArray, Table

__all__ = ["ARENA_ALIGN_BYTES", "Arena", "BufferTable", "Manifest", "Side", "TensorTable"]

Side = Literal["source", "sink"]

_SCHEMA: Final = "weightsync.manifest/1"
_SCHEMA_ENCODED: Final = "weightsync.manifest/2"  # with a table of encodings; never an empty one

ARENA_ALIGN_BYTES = 256  # alignment that GPU copies and wide CPU stores like


@dataclasses.dataclass(frozen=True, eq=False)
class TensorTable(Table):
    """Canonical tensors, sorted by name.

    Attributes:
        names: Names of the Hugging Face checkpoint.
        shape: `(T, 4)`, front-padded with 1.
        ndim: Dims of each tensor, 1..4 (a scalar is a tensor of shape (1,)).
    """

    names: tuple[str, ...]
    shape: IntArray
    ndim: NDArray[np.uint8]

    COLUMNS: ClassVar[dict[str, tuple[Any, int]]] = {
        "shape": (np.int64, MAX_DIMS),
        "ndim": (np.uint8, 0),
    }

    @functools.cached_property
    def index(self) -> dict[str, int]:
        """Number of each tensor by name."""
        return {name: number for number, name in enumerate(self.names)}

    def box_text(self, tensor: int, lo: IntArray, n: IntArray, step: IntArray) -> str:
        """Return a box of one tensor as text for messages, in numpy's slice notation."""
        first = MAX_DIMS - int(self.ndim[tensor])
        dims = zip(lo[first:].tolist(), n[first:].tolist(), step[first:].tolist(), strict=True)
        return "[" + ", ".join(
            f"{a}:{a + (k - 1) * s + 1}" + (f":{s}" if s > 1 else "") for a, k, s in dims
        ) + "]"  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class BufferTable(Table):
    """Memory of all ranks, sorted by (rank, name).

    Attributes:
        names: Buffer names, unique inside a rank.
        rank: Index into the manifest's ranks.
        dtype: `Dtype` of the elements.
        numel: Elements.
    """

    names: tuple[str, ...]
    rank: NDArray[np.int32]
    dtype: NDArray[np.uint8]
    numel: IntArray

    COLUMNS: ClassVar[dict[str, tuple[Any, int]]] = {
        "rank": (np.int32, 0),
        "dtype": (np.uint8, 0),
        "numel": (np.int64, 0),
    }

    @property
    def itemsize(self) -> IntArray:
        """Bytes of one element of each buffer."""
        return ITEMSIZE[self.dtype]


@dataclasses.dataclass(frozen=True, eq=False)
class Manifest:
    """All tensors of one side with their layouts; frozen, validated, canonically sorted.

    Build one with `ManifestBuilder` and join the ranks of a side with `Manifest.merge`. Equal
    content gives equal bytes and an equal digest, whatever the order it was declared in.

    Attributes:
        side: "source" (holds weights) or "sink" (needs them).
        ranks: Label of each rank for messages, e.g. "source 3".
        tensors, buffers, pieces: The tables.
        encodings: Which tensors of a sink are codes and scales of which values.
        repeats: One replica and how many of it this manifest is, if that is known: planning then
            costs what one does. No part of the content.

    Raises:
        LayoutError: A piece leaves its tensor or buffer, or a table is not in canonical order.
        CoverageError: A sink buffer is not covered exactly once by its pieces.
    """

    side: Side
    ranks: tuple[str, ...]
    tensors: TensorTable
    buffers: BufferTable
    pieces: PieceTable
    encodings: EncodingTable = dataclasses.field(default_factory=EncodingTable.empty)
    repeats: tuple[Manifest, int] | None = dataclasses.field(default=None, init=False)

    def __post_init__(self) -> None:
        manifest_checks.check_labels(self)
        check_encodings(self.encodings, self.tensors)
        manifest_checks.check_pieces(self)
        if self.side == "sink":
            manifest_checks.check_cover(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @classmethod
    def trusted(cls, **fields: Any) -> Manifest:
        """Make a manifest of tables that are valid by construction, without validating them."""
        made = object.__new__(cls)
        for name, value in fields.items():
            object.__setattr__(made, name, value)
        return made

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of the canonical bytes, in hex."""
        digest = hashlib.sha256()
        for part in serde.chunks(*self._content()):
            digest.update(part)
        return digest.hexdigest()

    @functools.cached_property
    def arena_offset_bytes(self) -> IntArray:
        """Offset of each buffer inside the arena of its rank, `(B,)` bytes, 256-byte aligned."""
        nbytes = self.buffers.numel * self.buffers.itemsize
        padded = -(-nbytes // ARENA_ALIGN_BYTES) * ARENA_ALIGN_BYTES
        before = np.cumsum(padded) - padded
        first = np.searchsorted(self.buffers.rank, self.buffers.rank)  # first buffer of the rank
        offset: IntArray = before - before[first]
        return offset

    def arena_nbytes(self, rank: int) -> int:
        """Return the length of a rank's arena in bytes, without padding at the end."""
        last = int(np.searchsorted(self.buffers.rank, rank, side="right")) - 1
        if last < 0 or self.buffers.rank[last] != rank:
            return 0
        nbytes = int(self.buffers.numel[last]) * int(ITEMSIZE[self.buffers.dtype[last]])
        return int(self.arena_offset_bytes[last]) + nbytes

    def buffers_of(self, rank: int) -> IntArray:
        """Return the indices of a rank's buffers, in order."""
        first, last = np.searchsorted(self.buffers.rank, [rank, rank + 1])
        return np.arange(first, last)

    def to_bytes(self) -> bytes:
        """Return the canonical serialisation (see `weightsync.ir.serde`)."""
        return serde.pack(*self._content())

    def _content(self) -> tuple[str, dict[str, Any], tuple[Table, ...]]:
        """Return schema, header and tables."""
        header = {
            "side": self.side,
            "ranks": self.ranks,
            "tensors": self.tensors.names,
            "buffers": self.buffers.names,
        }
        tables = (self.tensors, self.buffers, self.pieces)
        if len(self.encodings):
            return _SCHEMA_ENCODED, header, (*tables, self.encodings)
        return _SCHEMA, header, tables

    @classmethod
    def from_bytes(
        cls, data: bytes | memoryview, *, ranks: tuple[str, ...] | None = None
    ) -> Manifest:
        """Read `to_bytes`; everything is validated, so bytes of a stranger are safe to read.

        Args:
            data: The bytes.
            ranks: Labels in place of those in the bytes; a layout does not know which replica it
                is for, a job does.

        Raises:
            ConfigError: Not a manifest, or one larger than the limits.
            LayoutError: A manifest that contradicts itself.
        """
        tables: tuple[type[Table], ...] = (TensorTable, BufferTable, PieceTable)
        if is_encoded := serde.is_of(_SCHEMA_ENCODED, data):
            tables = (*tables, EncodingTable)
        header, columns = serde.unpack(_SCHEMA_ENCODED if is_encoded else _SCHEMA, data, tables)
        if set(header) != {"side", "ranks", "tensors", "buffers"}:
            raise ConfigError(f"manifest header has the wrong keys: {sorted(header)}")
        if is_encoded and not len(columns[3]["codes"]):
            raise ConfigError("manifest of the encoded kind without encodings: not canonical")
        names = {key: serde.names(header, key) for key in ("ranks", "tensors", "buffers")}
        if header["side"] not in ("source", "sink"):
            raise ConfigError(f"manifest of unknown side {header['side']!r}")
        return cls(
            side=header["side"],
            ranks=names["ranks"] if ranks is None else ranks,
            tensors=TensorTable(names["tensors"], **columns[0]),
            buffers=BufferTable(names["buffers"], **columns[1]),
            pieces=PieceTable(**columns[2]),
            encodings=EncodingTable(**columns[3]) if is_encoded else EncodingTable.empty(),
        )

    @classmethod
    def merge(cls, side: Side, manifests: Sequence[Manifest]) -> Manifest:
        """Join manifests of one side; their ranks are numbered in the order given.

        Valid because they are, each by itself, so that only what is between them is checked.

        Raises:
            LayoutError: Manifests of the other side, labels that occur twice, or a tensor with
                two shapes; names the tensor and both ranks.
        """
        labels = tuple(label for m in manifests for label in m.ranks)
        if len(set(labels)) < len(labels):
            twice = next(label for label, count in Counter(labels).items() if count > 1)
            raise LayoutError(
                f"rank labels must be unique, {twice} occurs twice", rank=twice, side=side
            )
        for manifest in manifests:
            if manifest.side != side:
                label = ", ".join(manifest.ranks)
                raise LayoutError(f"{label} is a {manifest.side}, not a {side}", rank=label)
        # Ranks of one mesh name the same tensors, or those of few different parts.
        ids_of = {m.tensors.names: np.zeros(0, np.int64) for m in manifests}
        names = sorted(set().union(*ids_of))
        shape = np.zeros((len(names), MAX_DIMS), np.int64)
        ndim = np.zeros(len(names), np.uint8)
        owner = np.full(len(names), -1)
        number = {name: i for i, name in enumerate(names)}
        for held in ids_of:
            ids_of[held] = np.array([number[name] for name in held], np.int64)
        pieces, encodings = [], []
        num_ranks = num_buffers = 0
        for position, manifest in enumerate(manifests):
            table = manifest.tensors
            ids = ids_of[table.names]
            known = owner[ids] >= 0
            differs = (shape[ids] != table.shape).any(axis=1) | (ndim[ids] != table.ndim)
            for clash in np.flatnonzero(known & differs)[:1]:
                other = manifests[int(owner[ids[clash]])]
                _raise_shapes(table.names[clash], other, manifest)
            new = ids[~known]
            owner[new] = position
            shape[new], ndim[new] = table.shape[~known], table.ndim[~known]
            columns = {name: getattr(manifest.pieces, name) for name in PieceTable.COLUMNS}
            tensor = manifest.pieces.tensor
            if len(ids):
                columns["tensor"] = np.where(tensor == CONSTANT, CONSTANT, ids[tensor])
            columns["buffer"] = manifest.pieces.buffer + num_buffers
            pieces.append(PieceTable(**columns))
            if len(manifest.encodings):
                encodings.append(_renumbered(manifest.encodings, ids))
            num_ranks += len(manifest.ranks)
            num_buffers += len(manifest.buffers)
        rank_starts = np.cumsum([0] + [len(m.ranks) for m in manifests])
        buffers = [
            dataclasses.replace(m.buffers, names=(), rank=m.buffers.rank + start)
            for m, start in zip(manifests, rank_starts, strict=False)
        ]
        columns = {
            c: np.concatenate([np.zeros(0, t), *(getattr(b, c) for b in buffers)])
            for c, (t, _) in BufferTable.COLUMNS.items()
        }
        merged = cls.trusted(
            side=side,
            ranks=labels,
            repeats=None,
            tensors=TensorTable(tuple(names), shape, ndim),
            buffers=BufferTable(tuple(n for m in manifests for n in m.buffers.names), **columns),
            pieces=sorted_pieces(*pieces),
            encodings=_joined(encodings, names),
        )
        check_encodings(merged.encodings, merged.tensors)
        return merged


class Arena:
    """One rank's buffers as one address space, without addresses.

    Both sides of a transfer compute the same arena from the same manifest, so a write names a place
    in a sink's memory as an arena offset and no address ever crosses the wire.

    Args:
        manifest: A side, merged or not.
        rank: Index into `manifest.ranks`.

    Attributes:
        buffers: Indices of the rank's buffers in the manifest, in order, `(B_rank,)`.
        offset_bytes: 256-byte aligned arena offset of each, `(B_rank,)`.
        nbytes: Length of the arena in bytes.
    """

    def __init__(self, manifest: Manifest, rank: int) -> None:
        self.buffers: Final[IntArray] = manifest.buffers_of(rank)
        self.offset_bytes: Final[IntArray] = manifest.arena_offset_bytes[self.buffers]
        self.nbytes: Final[int] = manifest.arena_nbytes(rank)


def _renumbered(table: EncodingTable, ids: IntArray) -> EncodingTable:
    """Return encodings with the tensors' numbers in another table."""
    return EncodingTable(
        recipe=table.recipe,
        **{
            name: ids[getattr(table, name)].astype(np.int32)
            for name in ("values", "codes", "scales")
        },
    )


def _joined(tables: Sequence[EncodingTable], names: Sequence[str]) -> EncodingTable:
    """Join the encodings of several ranks; all must store a tensor alike."""
    every = EncodingTable.concat(tables)
    _, first, number = np.unique(every.codes, return_index=True, return_inverse=True)
    joined = every.take(first)
    for column in ("recipe", "values", "scales"):
        differs = getattr(joined, column)[number] != getattr(every, column)
        for row in np.flatnonzero(differs)[:1]:
            name = names[int(every.codes[row])]
            raise LayoutError(
                f"tensor {name}: two sinks encode it by different recipes or from different "
                "tensors; one fleet stores codes of a tensor in one way",
                tensor=name,
            )
    return joined


def _raise_shapes(name: str, first: Manifest, second: Manifest) -> None:
    """Report a tensor that two manifests declare with different shapes."""
    shapes = []
    for manifest in (first, second):
        index = manifest.tensors.index[name]
        dims = int(manifest.tensors.ndim[index])
        shapes.append(tuple(manifest.tensors.shape[index, MAX_DIMS - dims :].tolist()))
    labels = [", ".join(m.ranks) for m in (first, second)]
    raise LayoutError(
        f"tensor {name} has shape {shapes[0]} on {labels[0]} but {shapes[1]} on {labels[1]}; "
        "all ranks must state the canonical (unsharded) shape",
        tensor=name,
        ranks=labels,
    )
