"""One rank's part of a plan, turned into kernel tables of relative addresses.

Everything that does not depend on where memory lies or on the version is computed here once
per binding; a version then costs one addition of base addresses per table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weightsync.encodings.digest import tensor_seed
from weightsync.errors import PlanError
from weightsync.ir.dtypes import ITEMSIZE, Dtype, fill_code
from weightsync.ir.locate import locate_rows
from weightsync.ir.manifest import Manifest
from weightsync.ir.plan import NestTable, Plan
from weightsync.ir.tables import ranges

__all__ = [
    "BucketProgram",
    "Constants",
    "InboundBucket",
    "chunk_bits",
    "constants",
    "hop_program",
    "inbound_buckets",
    "source_program",
]

Int64 = npt.NDArray[np.int64]


def chunk_bits(plan: Plan) -> int:
    """Bits of an immediate that number the chunk in its bucket; the rest is the slot."""
    counts = plan.buckets.chunk_hi - plan.buckets.chunk_lo
    most = int(counts.max(initial=1))
    return max(1, (most - 1).bit_length())


@dataclass(frozen=True)
class BucketProgram:
    """What a sender, a source or a sink that passes on, does for one bucket: R rows of C chunks.

    Args:
        bucket: Number in the plan.
        sink: Index of the sink rank.
        slot: Index of the bucket among those that the sink receives (before parity).
        nbytes: Payload.
        staging_bytes: Staging that the packed chunks take.
        after: Slots of the sender that must be complete before (of a sink; a source has none).
        chunks: (C, 5) int64: sender's buffer or -1 for staging, offset in bytes in it, arena
            offset, bytes, chunk number.
        copy: (R, 16) int64 `pack` table; source addresses relative to `buffer`, destination
            addresses relative to the arena.
        buffer: (R,) int64, sender's buffer, by its index in the plan.
        keys: (R, 9) int64 digest keys: seed, lo, step, by the sender's own layout.
        packed: (R,) bool, whether the row goes through staging on fabrics that need it.
        staged_at: (R,) int64, what turns an arena offset into one in the staging part.
    """

    bucket: int
    sink: int
    slot: int
    nbytes: int
    staging_bytes: int
    after: tuple[int, ...]
    chunks: Int64
    copy: Int64
    buffer: Int64
    keys: Int64
    packed: npt.NDArray[np.bool_]
    staged_at: Int64


@dataclass(frozen=True)
class InboundBucket:
    """What a sink checks for one bucket.

    Args:
        bucket: Number in the plan.
        sender: A source rank, or the number of sources plus a sink that passes it on.
        slot: Index among the sink's buckets (before parity).
        num_chunks: Arrivals that complete it.
        digest: (R, 19) int64 `digest` table; addresses relative to the arena.
        nbytes: Payload.
        tensors: Indices of the tensors in it, for messages.
    """

    bucket: int
    sender: int
    slot: int
    num_chunks: int
    digest: Int64
    nbytes: int
    tensors: Int64


@dataclass(frozen=True)
class Constants:
    """Padding of one sink rank: `fill` table (R, 10) relative to the arena, and its codes."""

    table: Int64
    codes: npt.NDArray[np.uint64]


def source_program(plan: Plan, source: int) -> list[BucketProgram]:
    """The buckets of one source rank, in the order in which it sends them.

    Raises:
        PlanError: A row reads memory that no tensor of this rank's manifest lies in.

    Cost: O(rows of the source); numpy only.
    """
    return _program(plan, plan.program(source), plan.source)


def hop_program(plan: Plan, sink: int) -> list[BucketProgram]:
    """The buckets that one sink rank passes on, in the order in which they are expected.

    Raises:
        PlanError: A row reads memory that no tensor of this rank's manifest lies in.

    Cost: O(rows that it passes on); numpy only.
    """
    return _program(plan, plan.hops(sink), plan.sink)


def _program(plan: Plan, bucket_ids: Int64, sender: Manifest) -> list[BucketProgram]:
    chunks, buckets = plan.chunks, plan.buckets
    if len(bucket_ids) == 0:
        return []
    slots = _slots(plan)
    after = _after(plan, bucket_ids, slots)
    chunk_lo = buckets.chunk_lo[bucket_ids]
    chunk = ranges(chunk_lo, buckets.chunk_hi[bucket_ids] - chunk_lo)
    is_packed = chunks.is_packed[chunk]
    origin = plan.rows.src_buffer[chunks.row_lo[chunk]].astype(np.int64)
    item = ITEMSIZE[sender.buffers.dtype[origin]]
    origin_at = plan.rows.src_offset[chunks.row_lo[chunk]] * item
    # Packed chunks of a bucket follow each other in its staging part, without gaps: the plan has
    # promised that they fit.
    sizes = np.where(is_packed, chunks.nbytes[chunk], 0)
    ends = np.cumsum(sizes)
    first_chunk = np.cumsum(buckets.chunk_hi[bucket_ids] - buckets.chunk_lo[bucket_ids])
    first_chunk = np.concatenate([[0], first_chunk])
    before = np.concatenate([[0], ends])[first_chunk]
    bucket_of = np.repeat(np.arange(len(bucket_ids)), np.diff(first_chunk))
    staged_at = ends - sizes - before[bucket_of]
    chunk_table = _table(
        np.where(is_packed, -1, origin),
        np.where(is_packed, staged_at, origin_at),
        chunks.dst_offset[chunk],
        chunks.nbytes[chunk],
        chunks.number[chunk],
    )
    num_rows = chunks.row_hi[chunk] - chunks.row_lo[chunk]
    row = ranges(chunks.row_lo[chunk], num_rows)
    chunk_of = np.repeat(np.arange(len(chunk)), num_rows)
    first_row = np.concatenate([[0], np.cumsum(num_rows)])[first_chunk]
    nest = plan.nest_of(row)
    src, copy = plan.rows.src_buffer[row].astype(np.int64), _copy_table(plan, row, nest, sender)
    # Which of several tensors that share memory (aliases) the plan reads; a sink has none.
    tensor = plan.tensor_in_source[plan.rows.tensor[row]] if sender is plan.source else None
    keys = _keys(
        sender,
        src,
        plan.rows.src_offset[row],
        nest.n,
        nest.src_stride,
        tensor=tensor,
    )
    row_shift = (staged_at - chunks.dst_offset[chunk])[chunk_of]
    row_packed = is_packed[chunk_of]
    programs = []
    for index, bucket in enumerate(bucket_ids.tolist()):
        of_chunks = slice(first_chunk[index], first_chunk[index + 1])
        of_rows = slice(first_row[index], first_row[index + 1])
        programs.append(
            BucketProgram(
                bucket=bucket,
                sink=int(buckets.dst_rank[bucket]),
                slot=int(slots[bucket]),
                nbytes=int(buckets.nbytes[bucket]),
                staging_bytes=int(before[index + 1] - before[index]),
                after=after.get(bucket, ()),
                chunks=chunk_table[of_chunks],
                copy=copy[of_rows],
                buffer=src[of_rows],
                keys=keys[of_rows],
                packed=row_packed[of_rows],
                staged_at=row_shift[of_rows],
            )
        )
    return programs


def inbound_buckets(plan: Plan, sink: int) -> list[InboundBucket]:
    """The buckets that one sink rank receives, by slot.

    Raises:
        PlanError: A row writes memory that no tensor of this rank's manifest lies in.

    Cost: O(rows of the sink); numpy only.
    """
    rows, chunks, buckets = plan.rows, plan.chunks, plan.buckets
    bucket_ids = plan.inbound(sink)
    row_lo = chunks.row_lo[buckets.chunk_lo[bucket_ids]]
    row_hi = chunks.row_hi[buckets.chunk_hi[bucket_ids] - 1]
    row = ranges(row_lo, row_hi - row_lo)
    buffer = rows.dst_buffer[row].astype(np.int64)
    item = ITEMSIZE[plan.sink.buffers.dtype[buffer]]
    # The sink's own layout says which elements these bytes are.
    nest = plan.nest_of(row)
    keys = _keys(plan.sink, buffer, rows.dst_offset[row], nest.n, nest.dst_stride)
    digest = _table(
        plan.sink.arena_offset_bytes[buffer] + rows.dst_offset[row] * item,
        item,
        keys,
        nest.n,
        nest.dst_stride * item[:, None],
    )
    ends = np.cumsum(row_hi - row_lo)
    found = []
    sender = plan.sender
    for slot, bucket in enumerate(bucket_ids.tolist()):
        of_rows = slice(ends[slot] - (row_hi[slot] - row_lo[slot]), ends[slot])
        found.append(
            InboundBucket(
                bucket=bucket,
                sender=int(sender[bucket]),
                slot=slot,
                num_chunks=int(buckets.chunk_hi[bucket] - buckets.chunk_lo[bucket]),
                digest=digest[of_rows],
                nbytes=int(buckets.nbytes[bucket]),
                tensors=np.unique(rows.tensor[row[of_rows]]).astype(np.int64),
            )
        )
    return found


def constants(plan: Plan, sink: int) -> Constants:
    """The constant pieces of one sink rank."""
    pieces, buffers = plan.sink.pieces, plan.sink.buffers
    mine = np.flatnonzero((pieces.tensor < 0) & (buffers.rank[pieces.buffer] == sink))
    buffer = pieces.buffer[mine]
    dtype = buffers.dtype[buffer]
    item = ITEMSIZE[dtype]
    table = _table(
        plan.sink.arena_offset_bytes[buffer] + pieces.offset[mine] * item,
        dtype,
        pieces.n[mine],
        pieces.stride[mine] * item[:, None],
    )
    fills = zip(dtype.tolist(), pieces.fill[mine].tolist(), strict=True)
    return Constants(table, np.array([fill_code(Dtype(d), v) for d, v in fills], np.uint64))


def _copy_table(plan: Plan, row: Int64, nest: NestTable, sender: Manifest) -> Int64:
    rows = plan.rows
    src, dst = rows.src_buffer[row], rows.dst_buffer[row]
    src_dtype, dst_dtype = sender.buffers.dtype[src], plan.sink.buffers.dtype[dst]
    src_item, dst_item = ITEMSIZE[src_dtype], ITEMSIZE[dst_dtype]
    return _table(
        rows.src_offset[row] * src_item,
        plan.sink.arena_offset_bytes[dst] + rows.dst_offset[row] * dst_item,
        src_dtype,
        dst_dtype,
        nest.n,
        nest.src_stride * src_item[:, None],
        nest.dst_stride * dst_item[:, None],
    )


def _keys(
    manifest: Manifest,
    buffer: Int64,
    offset: Int64,
    n: Int64,
    stride: Int64,
    tensor: Int64 | None = None,
) -> Int64:
    """Digest keys (seed, lo, step) of rows of one side, by that side's own manifest.

    Never by the plan: a plan that moves elements to the wrong place must give another digest.
    """
    piece, lo, step = locate_rows(manifest, buffer, offset, n, stride, tensor)
    bad = np.flatnonzero((piece < 0) | (manifest.pieces.tensor[piece] < 0))
    if len(bad):
        name = manifest.buffers.names[int(buffer[bad[0]])]
        rank = manifest.ranks[int(manifest.buffers.rank[int(buffer[bad[0]])])]
        raise PlanError(
            f"{rank}: a row of the plan touches {name} at element {int(offset[bad[0]])}, where its "
            "layout has no tensor",
            tensor=name,
            rank=rank,
        )
    seeds = np.array([tensor_seed(name) for name in manifest.tensors.names], np.int64)
    return _table(seeds[manifest.pieces.tensor[piece]], lo, step)


def _table(*columns: npt.NDArray[np.generic]) -> Int64:
    """Put columns of one or several numbers per row side by side."""
    parts = [np.asarray(c, np.int64) for c in columns]
    return np.ascontiguousarray(
        np.concatenate([p[:, None] if p.ndim == 1 else p for p in parts], axis=1)
    )


def _slots(plan: Plan) -> Int64:
    """Slot of every bucket at its sink, by bucket number."""
    slots = np.zeros(len(plan.buckets), np.int64)
    for sink in range(len(plan.sink.ranks)):
        inbound = plan.inbound(sink)
        slots[inbound] = np.arange(len(inbound))
    return slots


def _after(plan: Plan, bucket_ids: Int64, slots: Int64) -> dict[int, tuple[int, ...]]:
    """For each of some buckets the slots, at their sender, that it waits for."""
    found: dict[int, tuple[int, ...]] = {}
    for before, after in plan.edges[np.isin(plan.edges[:, 1], bucket_ids)].tolist():
        found[after] = (*found.get(after, ()), int(slots[before]))
    return found
