"""Plans: which bytes of which source go where, as tables without addresses.

A plan is rows (strided N-D copies) gathered into chunks (one contiguous destination range, one
write) gathered into buckets (one sender, one sink; staged, tracked and verified together). Senders
are sources and, behind all of their buckets, sinks that pass on what they received (hops).
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
from typing import Any, ClassVar, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from weightsync.errors import ConfigError, PlanError
from weightsync.ir import serde
from weightsync.ir.encoded import Encoded
from weightsync.ir.manifest import Manifest
from weightsync.ir.tables import MAX_DIMS, IntArray, Table, sum_by

__all__ = [
    "QUEUE_DEPTH",
    "STAGED_BUCKETS",
    "BucketTable",
    "ChunkTable",
    "HopRule",
    "MaxTable",
    "NestTable",
    "Plan",
    "PlanOptions",
    "RowKind",
    "RowTable",
    "Shares",
]

MIB: Final = 1 << 20

# Of every source, executed and predicted alike. A source writes to many sinks, each of which may be
# busy with others for a while: eight buckets on their way keep its NICs busy (docs/plan.md).
STAGED_BUCKETS: Final = 8
"""Staging of a source that was given no budget, in its largest buckets."""
QUEUE_DEPTH: Final = 8
"""Buckets that may wait before each stage of a source's pipeline."""
HopRule = Literal["auto", "on", "off"]
# Rules by which a plan is chosen, no budgets: what they led to is in the rows.
_RULES: Final = ("ranks_per_node", "node_dedup", "relays", "node_link_ratio")


class RowKind(enum.IntEnum):
    """What a row does. Kinds that the executor cannot run yet are refused there by name.

    MAX rows are no writes to sinks: a plan has them in a table of their own, `MaxTable`.
    """

    COPY = 0
    CONST = 1
    ENCODE = 2
    MAX = 3
    HOP = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Budgets of a plan, which are part of its digest, and rules for who passes on.

    Attributes:
        bucket_bytes: Most bytes of one bucket.
        chunk_bytes: Most bytes of one chunk (write).
        direct_run_bytes: A run at least this long, contiguous on both sides and without a cast, is
            written straight from source memory; shorter ones are packed into staging first.
        max_chunks_per_bucket: Most chunks of one bucket; bounds the sink's bitmap.
        slot_bytes: Staging slot of a source: most packed bytes of one bucket.
        max_rows: Refuse plans with more rows than this before making them.
        ignore_extra: Source tensors that no sink wants and that is known.
        ranks_per_node: Sink ranks of one replica that share a node; they fill nodes in order. 1: no
            two do.
        node_dedup: Whether what the sinks of a node store alike crosses the network once: one of
            them receives it and passes it on. "auto": where the formulas say that it helps.
        relays: Whether sinks pass on to the same rank of other replicas, if all are equal. "auto":
            where sources would be slower than the busiest sink.
        node_link_ratio: How many times as fast as from its NIC a sink receives from its node; what
            "auto" goes by.

    Raises:
        ConfigError: A budget that fits no plan.
    """

    bucket_bytes: int = 32 * MIB
    chunk_bytes: int = 4 * MIB
    direct_run_bytes: int = 64 << 10
    max_chunks_per_bucket: int = 4096
    slot_bytes: int = 64 * MIB
    max_rows: int = 50_000_000
    ignore_extra: tuple[str, ...] = ()
    ranks_per_node: int = 1
    node_dedup: HopRule = "auto"
    relays: HopRule = "off"
    node_link_ratio: float = 8.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "ignore_extra", tuple(sorted(set(self.ignore_extra))))
        for name in ("bucket_bytes", "chunk_bytes", "slot_bytes"):
            if not 8 <= getattr(self, name) < 1 << 46:
                raise ConfigError(f"{name} must hold one element: 8 bytes to 64 TiB")
        for name in ("direct_run_bytes", "max_chunks_per_bucket", "max_rows", "ranks_per_node"):
            if not 1 <= getattr(self, name) < 1 << 46:
                raise ConfigError(f"{name} must be positive")
        for name in ("node_dedup", "relays"):
            if getattr(self, name) not in get_args(HopRule):
                raise ConfigError(f"{name} must be auto, on or off, not {getattr(self, name)!r}")
        if not 0 < self.node_link_ratio < 1e6:
            raise ConfigError("node_link_ratio must be positive: a rate over that of a NIC")

    @property
    def write_bytes(self) -> int:
        """Most bytes of one direct chunk: a chunk never exceeds its bucket."""
        return min(self.chunk_bytes, self.bucket_bytes)

    @property
    def packed_bytes(self) -> int:
        """Most bytes of one packed chunk: it must also fit a staging slot."""
        return min(self.write_bytes, self.slot_bytes)


@dataclasses.dataclass(frozen=True, eq=False)
class Shares(Table):
    """How the holders of the same elements share the work of sending them: a small table.

    Solved once (by `weightsync.planners.solve_shares`), sent to every rank, so that all stamp out
    the same plan. One row per (holder set, rank of it), sorted by both.

    Attributes:
        holder_set: Number of the set; sets are numbered in order of first use.
        rank: Source rank.
        quota_bytes: Bytes on the wire that this rank sends of what the set holds.
        bound_bytes: No choice of holders sends fewer bytes from its most loaded rank.
    """

    holder_set: NDArray[np.int32]
    rank: NDArray[np.int32]
    quota_bytes: IntArray
    bound_bytes: int

    COLUMNS: ClassVar[dict[str, tuple[Any, int]]] = {
        "holder_set": (np.int32, 0),
        "rank": (np.int32, 0),
        "quota_bytes": (np.int64, 0),
    }

    def to_bytes(self) -> bytes:
        """Return the canonical serialisation."""
        return serde.pack("weightsync.shares/1", {"bound_bytes": self.bound_bytes}, (self,))

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Shares:
        """Read `to_bytes`. Whether the shares fit two manifests, `plan_transfer` checks.

        Raises:
            ConfigError: Not shares.
        """
        header, (columns,) = serde.unpack("weightsync.shares/1", data, (cls,))
        bound = header.get("bound_bytes")
        if type(bound) is not int or not 0 <= bound < 1 << 62:
            raise ConfigError(f"shares: bad bound_bytes {bound!r}")
        return cls(**columns, bound_bytes=bound)


@dataclasses.dataclass(frozen=True, eq=False)
class RowTable(Table):
    """Strided copies, sorted by chunk and destination; HOP rows, then CONST rows, come last.

    In a HOP row the source side is the memory of the sink that passes it on. In an ENCODE row the
    source offset is where the values of the first code or scale begin.

    Attributes:
        kind: `RowKind`.
        chunk: Chunk of the row; -1 for CONST rows, which the sink does by itself.
        tensor: Index into the SINK manifest's tensors; -1 for CONST rows.
        src_buffer: Source buffer; in HOP rows the sink buffer that is read; -1 for CONST rows.
        dst_buffer: Sink buffer.
        src_offset: First source element; for CONST rows the sink's piece, which has the fill.
        dst_offset: First sink element.
        nest: Row of `Plan.nests`: counts and strides.
    """

    kind: NDArray[np.uint8]
    chunk: NDArray[np.int32]
    tensor: NDArray[np.int32]
    src_buffer: NDArray[np.int32]
    dst_buffer: NDArray[np.int32]
    src_offset: IntArray
    dst_offset: IntArray
    nest: NDArray[np.int32]

    COLUMNS: ClassVar[dict[str, tuple[Any, int]]] = {
        "kind": (np.uint8, 0),
        "chunk": (np.int32, 0),
        "tensor": (np.int32, 0),
        "src_buffer": (np.int32, 0),
        "dst_buffer": (np.int32, 0),
        "src_offset": (np.int64, 0),
        "dst_offset": (np.int64, 0),
        "nest": (np.int32, 0),
    }


@dataclasses.dataclass(frozen=True, eq=False)
class NestTable(Table):
    """Loop nests: how many elements a row moves along each dim, and how far apart they lie.

    Millions of rows have some hundred of them, which is why they are a table of their own. Each is
    there once, and some row has it; they come in the order of the rows that have them before rows
    get their buckets.

    Of ENCODE rows counts and sink strides are in elements of the codes or scales that the sink
    stores; source strides lead from where the values of one begin to those of the next.

    Attributes:
        n: Counts per canonical dim, `(N, 4)`.
        src_stride, dst_stride: Elements, `(N, 4)`; 0 where n is 1. CONST rows have no source.
    """

    n: IntArray
    src_stride: IntArray
    dst_stride: IntArray

    COLUMNS: ClassVar[dict[str, tuple[Any, int]]] = {
        "n": (np.int64, MAX_DIMS),
        "src_stride": (np.int64, MAX_DIMS),
        "dst_stride": (np.int64, MAX_DIMS),
    }


@dataclasses.dataclass(frozen=True, eq=False)
class ChunkTable(Table):
    """Contiguous destination ranges, each inside one sink buffer and written by one write.

    Attributes:
        bucket: Bucket of the chunk.
        number: Position inside the bucket, from 0; goes into the write's immediate.
        dst_offset: Arena bytes of the sink rank.
        nbytes: Length.
        is_packed: Rows are gathered into staging, laid out like the destination, then written.
            Otherwise the chunk is one row, contiguous on both sides, written from source memory; of
            HOP rows there may be several, which lie side by side alike on both sides.
        row_lo, row_hi: Rows of the chunk.
    """

    bucket: NDArray[np.int32]
    number: NDArray[np.int32]
    dst_offset: IntArray
    nbytes: IntArray
    is_packed: NDArray[np.bool_]
    row_lo: IntArray
    row_hi: IntArray

    COLUMNS: ClassVar[dict[str, tuple[Any, int]]] = {
        "bucket": (np.int32, 0),
        "number": (np.int32, 0),
        "dst_offset": (np.int64, 0),
        "nbytes": (np.int64, 0),
        "is_packed": (np.bool_, 0),
        "row_lo": (np.int64, 0),
        "row_hi": (np.int64, 0),
    }


@dataclasses.dataclass(frozen=True, eq=False)
class BucketTable(Table):
    """Groups of chunks of one sender for one sink, sorted by sender in the order of sending.

    Attributes:
        src_rank, dst_rank: Indices into the ranks of the two manifests; of hops, which come last,
            both into the sink's.
        chunk_lo, chunk_hi: Chunks of the bucket.
        nbytes: Bytes on the wire.
        staging_bytes: Bytes of the packed chunks.
    """

    src_rank: NDArray[np.int32]
    dst_rank: NDArray[np.int32]
    chunk_lo: IntArray
    chunk_hi: IntArray
    nbytes: IntArray
    staging_bytes: IntArray

    COLUMNS: ClassVar[dict[str, tuple[Any, int]]] = {
        "src_rank": (np.int32, 0),
        "dst_rank": (np.int32, 0),
        "chunk_lo": (np.int64, 0),
        "chunk_hi": (np.int64, 0),
        "nbytes": (np.int64, 0),
        "staging_bytes": (np.int64, 0),
    }


@dataclasses.dataclass(frozen=True, eq=False)
class MaxTable(Table):
    """Cells that several sources share: whose maxima go to whom before the first bucket.

    The source that writes a cell's scale (`dst_rank`) takes the maximum of all parts and answers
    every row with as many values: two messages a sharer, not one between every two. A cell that two
    boxes of one source touch may be in two of its rows.

    Attributes:
        tensor: Scales: index into the SINK manifest's tensors.
        src_rank: Source that encodes a part of the cells.
        dst_rank: Source that writes their scales.
        lo, n, step: Box of cells, `(M, 4)`; step is 1 where n is 1.
    """

    tensor: NDArray[np.int32]
    src_rank: NDArray[np.int32]
    dst_rank: NDArray[np.int32]
    lo: IntArray
    n: IntArray
    step: IntArray

    COLUMNS: ClassVar[dict[str, tuple[Any, int]]] = {
        "tensor": (np.int32, 0),
        "src_rank": (np.int32, 0),
        "dst_rank": (np.int32, 0),
        "lo": (np.int64, MAX_DIMS),
        "n": (np.int64, MAX_DIMS),
        "step": (np.int64, MAX_DIMS),
    }


@dataclasses.dataclass(frozen=True, eq=False)
class EdgeTable(Table):
    """Dependencies between buckets: `pair[:, 1]` waits for `pair[:, 0]`."""

    pair: NDArray[np.int32]

    COLUMNS: ClassVar[dict[str, tuple[Any, int]]] = {"pair": (np.int32, 2)}


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A transfer plan: frozen, address-free, with a digest that all ranks compare.

    Made by `weightsync.planners.plan_transfer`, which validates it. A plan that comes from
    elsewhere must be validated before use: `validate()`.

    Attributes:
        source, sink: The merged manifests that the row indices refer to.
        rows, nests, chunks, buckets: The tables.
        maxima: Cells that sources share.
        edges: `(E, 2)` int32 pairs of buckets (before, after): which complete buckets of a sink
            each of its hops reads.
        shares: How holders of the same elements were chosen.
        options: Budgets that the plan keeps.
    """

    source: Manifest
    sink: Manifest
    rows: RowTable
    nests: NestTable
    chunks: ChunkTable
    buckets: BucketTable
    shares: Shares
    options: PlanOptions
    maxima: MaxTable = dataclasses.field(default_factory=MaxTable.empty)
    edges: NDArray[np.int32] = dataclasses.field(default_factory=lambda: np.zeros((0, 2), np.int32))

    def __post_init__(self) -> None:
        object.__setattr__(self, "edges", EdgeTable(self.edges).pair)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @functools.cached_property
    def digest(self) -> str:
        """sha256 over options, tables and the digests of both manifests, in hex."""
        digest = hashlib.sha256()
        for part in serde.chunks("weightsync.plan/3", self._header(), self._tables()):
            digest.update(part)
        return digest.hexdigest()

    @property
    def max_load_bytes(self) -> int:
        """Bytes that the most loaded source rank sends; compare with `shares.bound_bytes`."""
        return int(self.bytes_per_source().max(initial=0))

    def bytes_per_source(self) -> IntArray:
        """Return the bytes that each source rank sends, `(source ranks,)`."""
        own = slice(self.num_direct)
        return sum_by(self.buckets.src_rank[own], self.buckets.nbytes[own], len(self.source.ranks))

    def bytes_per_forwarder(self) -> IntArray:
        """Return the bytes that each sink rank passes on, `(sink ranks,)`."""
        hops = slice(self.num_direct, None)
        return sum_by(self.buckets.src_rank[hops], self.buckets.nbytes[hops], len(self.sink.ranks))

    def bytes_per_sink(self) -> IntArray:
        """Return the bytes that each sink rank receives, `(sink ranks,)`."""
        return sum_by(self.buckets.dst_rank, self.buckets.nbytes, len(self.sink.ranks))

    def program(self, src_rank: int) -> IntArray:
        """Return the buckets that a source rank sends, in order."""
        sent = self.buckets.src_rank[: self.num_direct]
        first, last = np.searchsorted(sent, [src_rank, src_rank + 1])
        return np.arange(first, last)

    def hops(self, sink_rank: int) -> IntArray:
        """Return the buckets that a sink rank passes on, in the order that is expected."""
        passed_on = self.buckets.src_rank[self.num_direct :]
        first, last = np.searchsorted(passed_on, [sink_rank, sink_rank + 1])
        return self.num_direct + np.arange(first, last)

    @property
    def sender(self) -> IntArray:
        """Who sends each bucket: a source rank, or the number of sources plus a sink rank, `(B,)`.

        Made anew by every call.
        """
        sender = self.buckets.src_rank.astype(np.int64)
        sender[self.num_direct :] += len(self.source.ranks)
        return sender

    def sender_label(self, sender: int) -> str:
        """Return the label of the rank that `sender` numbers."""
        return [*self.source.ranks, *self.sink.ranks][sender]

    def nest_of(self, rows: IntArray | slice) -> NestTable:
        """Return counts and strides of each of some rows; made anew by every call."""
        return self.nests.take(self.rows.nest[rows])

    def inbound(self, dst_rank: int) -> IntArray:
        """Return the buckets that a sink rank receives, ascending; the position is its slot."""
        return np.flatnonzero(self.buckets.dst_rank == dst_rank)

    def constants(self, dst_rank: int) -> IntArray:
        """Return the CONST rows that a sink rank fills by itself."""
        first = self.num_sent
        rank = self.sink.buffers.rank[self.rows.dst_buffer[first:]]
        return first + np.flatnonzero(rank == dst_rank)

    @property
    def num_sent(self) -> int:
        """Rows that are sent; those behind are CONST, which sinks do by themselves."""
        return int(self.chunks.row_hi[-1]) if len(self.chunks) else 0

    @functools.cached_property
    def num_direct_rows(self) -> int:
        """Rows that sources send; HOP rows follow."""
        return int(np.count_nonzero(self.rows.kind[: self.num_sent] != RowKind.HOP))

    @functools.cached_property
    def num_direct(self) -> int:
        """Buckets that sources send; those behind are hops, which sinks send."""
        chunks = np.searchsorted(self.chunks.row_lo, self.num_direct_rows)
        return int(np.searchsorted(self.buckets.chunk_lo, chunks))

    @functools.cached_property
    def encoded(self) -> Encoded:
        """The sources with what they make of their values; `encoded.source` has all pieces."""
        return Encoded.of(self.source, self.sink)

    @functools.cached_property
    def tensor_in_source(self) -> IntArray:
        """Number in `encoded.source` of each sink tensor; -1 if the sources lack it."""
        index = self.encoded.source.tensors.index
        return np.array([index.get(name, -1) for name in self.sink.tensors.names], np.int64)

    def validate(self) -> None:
        """Prove that the plan moves every element where it belongs, each sink byte exactly once.

        Raises:
            CoverageError: A sink byte is written never or twice.
            PlanError: The tables contradict each other, the manifests or the budgets.

        Cost: about 1 us a row; see `weightsync.ir.validate`.
        """
        from weightsync.ir import validate_replicas  # imports this module

        validate_replicas.prove(self)

    def to_bytes(self) -> bytes:
        """Return the plan with both manifests as bytes, for goldens and tests.

        Plans never cross the wire: ranks make their own and compare digests.
        """
        tables = serde.pack("weightsync.plan/3", self._header(), self._tables())
        parts = (tables, self.source.to_bytes(), self.sink.to_bytes())
        return b"".join(len(p).to_bytes(8, "little") + p for p in parts)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Plan:
        """Read `to_bytes` and validate the plan.

        Raises:
            ConfigError, LayoutError, PlanError: Not a plan, or one that contradicts itself.
        """
        view = memoryview(data)
        parts: list[memoryview] = []
        while len(view) >= 8 and len(parts) < 3:
            size = int.from_bytes(view[:8], "little")
            parts.append(view[8 : 8 + size])
            view = view[8 + size :]
        if len(parts) != 3 or len(view):
            raise ConfigError("not a plan: it needs three parts")
        kinds = (RowTable, NestTable, ChunkTable, BucketTable, MaxTable, EdgeTable, Shares)
        header, columns = serde.unpack("weightsync.plan/3", parts[0], kinds)
        try:
            options = dict(header["options"])
            options["ignore_extra"] = tuple(options["ignore_extra"])
            plan = cls(
                source=Manifest.from_bytes(parts[1]),
                sink=Manifest.from_bytes(parts[2]),
                rows=RowTable(**columns[0]),
                nests=NestTable(**columns[1]),
                chunks=ChunkTable(**columns[2]),
                buckets=BucketTable(**columns[3]),
                maxima=MaxTable(**columns[4]),
                edges=columns[5]["pair"],
                shares=Shares(**columns[6], bound_bytes=int(header["bound_bytes"])),
                options=PlanOptions(**options),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not a plan: bad header ({error})") from error
        if [plan.source.digest, plan.sink.digest] != header.get("manifests"):
            raise PlanError("the plan was made from other manifests than those stored with it")
        plan.validate()
        return plan

    def _header(self) -> dict[str, Any]:
        return {
            "manifests": [self.source.digest, self.sink.digest],
            "options": _budgets(self.options),
            "bound_bytes": self.shares.bound_bytes,
        }

    def _tables(self) -> tuple[Table, ...]:
        edges = EdgeTable(self.edges)
        return (self.rows, self.nests, self.chunks, self.buckets, self.maxima, edges, self.shares)


def _budgets(options: PlanOptions) -> dict[str, Any]:
    """Options as a plan stores them."""
    values = dataclasses.asdict(options)
    return {name: value for name, value in values.items() if name not in _RULES}
