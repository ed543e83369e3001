"""Replicas that hold one layout and get one content: prove one, and that the others are like it."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from weightsync.errors import PlanError
from weightsync.ir import validate
from weightsync.ir.manifest import Manifest
from weightsync.ir.plan import BucketTable, ChunkTable, Plan, RowKind, RowTable, Shares
from weightsync.ir.repeat import relabelled
from weightsync.ir.tables import IntArray, Table, owners, ranges, starts_of

__all__ = ["first_replica", "prove"]

_SHIFTED = ("chunk", "src_buffer", "dst_buffer")
_ROWS = tuple(name for name in RowTable.COLUMNS if name not in _SHIFTED)


def prove(plan: Plan, known: str | None = None) -> str:
    """Prove a plan: of equal replicas one, and that the others are like it.

    Args:
        plan: Any plan.
        known: What this returned of a plan that it proved, or an empty string: what of the two is
            equal is not proven again. None: prove all, and return an empty string.

    Returns:
        Stands for the plan of one replica: a digest of all that its proof depends on, which are its
        tables, both manifests and the budgets. Neither labels of sinks nor quotas are part of it,
        nor who gets a bucket first.

    Raises:
        CoverageError, PlanError: As `Plan.validate`.

    Cost: about 1 us a row of one replica and 0.1 us a row of the others; where the proof is known
    only the latter, and a hash of the rows of one.
    """
    base, count = plan.sink.repeats or (plan.sink, 1)
    proven, found = plan, ""
    is_one_of_many = count > 1 or known is not None
    if is_one_of_many and not _has_relays(plan, len(base.ranks)):
        validate.check_nests(plan)
        validate.check_tiling(plan)
        validate.check_constants(plan)
        proven = first_replica(plan, base, count)
        if known is not None:
            found = _stand_in(proven).digest
            if found == known:
                return known
    validate.validate_structure(proven)
    validate.validate_content(proven)
    return found


def _has_relays(plan: Plan, size: int) -> bool:
    """Whether replicas of so many ranks pass on to each other, so that they are not alike."""
    hops = slice(plan.num_direct, None)
    src, dst = plan.buckets.src_rank[hops], plan.buckets.dst_rank[hops]
    return bool((src // max(size, 1) != dst // max(size, 1)).any())


def _stand_in(plan: Plan) -> Plan:
    """Return a plan without what its proof does not depend on."""
    none = np.zeros(0, np.int32)
    labels = [str(rank) for rank in range(len(plan.sink.ranks))]
    shares = Shares(none, none, none.astype(np.int64), bound_bytes=0)
    return dataclasses.replace(plan, sink=relabelled(plan.sink, labels), shares=shares)


def first_replica(plan: Plan, base: Manifest, count: int) -> Plan:
    """Return the part of a plan that writes the first replica; check that the others equal it.

    Args:
        plan: A plan that passed `check_nests` and `check_tiling`.
        base: One replica of `plan.sink`.
        count: Replicas.

    Returns:
        A plan for `base`. If it is valid and this returns, so is the whole.

    Raises:
        PlanError: Two replicas get different rows.

    Cost: about 0.1 us a row.
    """
    buckets, chunks, rows = plan.buckets, plan.chunks, plan.rows
    replica, local = np.divmod(buckets.dst_rank, len(base.ranks))
    is_hop = np.arange(len(buckets)) >= plan.num_direct
    sender = buckets.src_rank - np.where(is_hop, replica * len(base.ranks), 0)
    # In one order for all; that of sending may differ between hops of two replicas.
    place = chunks.dst_offset[buckets.chunk_lo]
    order = np.lexsort((place, local, sender, is_hop, replica))
    of_replica = _equal_parts(order, np.bincount(replica, minlength=count))
    first = of_replica[0]
    chunk_ids = [_members(buckets.chunk_lo, buckets.chunk_hi, ids) for ids in of_replica]
    row_ids = [_members(chunks.row_lo, chunks.row_hi, ids) for ids in chunk_ids]
    base_chunks = chunks.take(chunk_ids[0])
    base_rows = rows.take(row_ids[0])
    base_edges = _edges_of(plan, first)
    passed_on = base_rows.kind == RowKind.HOP
    for number in range(1, count):
        others = of_replica[number], chunk_ids[number], row_ids[number]
        shift = number * len(base.buffers)
        alike = _alike(buckets, others[0], buckets.take(first), ("nbytes",))
        alike &= np.array_equal(_edges_of(plan, others[0]), base_edges)
        for column in (local, sender, is_hop):
            alike &= bool((column[others[0]] == column[first]).all())
        names = ("number", "dst_offset", "nbytes", "is_packed")
        alike = alike and _alike(chunks, others[1], base_chunks, names)
        alike = alike and _alike(rows, others[2], base_rows, _ROWS)
        for name, moved in (("src_buffer", passed_on * shift), ("dst_buffer", shift)):
            wanted = getattr(base_rows, name) + moved
            alike = alike and np.array_equal(getattr(rows, name)[others[2]], wanted)
        if not alike:
            raise PlanError(
                f"the plan writes replica {number} otherwise than replica 0, though both hold the "
                "same layout; the plan was changed or is a bug of the planner"
            )
    # In the order of the whole, which is sorted by sender, hops last.
    chunks_of = buckets.chunk_hi[first] - buckets.chunk_lo[first]
    rows_of = base_chunks.row_hi - base_chunks.row_lo
    chunk_start, row_start = starts_of(chunks_of), starts_of(rows_of)
    constants = np.flatnonzero(plan.sink.buffers.rank[rows.dst_buffer] < len(base.ranks))
    constants = constants[constants >= plan.num_sent]
    fixed = rows.take(constants)
    sent = dataclasses.replace(base_rows, chunk=owners(rows_of))
    proven = dataclasses.replace(
        plan,
        sink=base,
        buckets=BucketTable(
            src_rank=buckets.src_rank[first],
            dst_rank=buckets.dst_rank[first],
            chunk_lo=chunk_start[:-1],
            chunk_hi=chunk_start[1:],
            nbytes=buckets.nbytes[first],
            staging_bytes=buckets.staging_bytes[first],
        ),
        chunks=ChunkTable(
            bucket=owners(chunks_of),
            number=base_chunks.number,
            dst_offset=base_chunks.dst_offset,
            nbytes=base_chunks.nbytes,
            is_packed=base_chunks.is_packed,
            row_lo=row_start[:-1],
            row_hi=row_start[1:],
        ),
        rows=RowTable.concat([sent, _with_pieces_of(fixed, plan.sink, base)]),
        edges=base_edges,
    )
    vars(proven)["encoded"] = plan.encoded  # the cached property: of the same tensors
    return proven


def _edges_of(plan: Plan, ids: IntArray) -> NDArray[np.int32]:
    """Edges between some buckets, which are named by their place in `ids`; sorted."""
    place = np.full(len(plan.buckets), -1, np.int32)
    place[ids] = np.arange(len(ids))
    edges = place[plan.edges]
    edges = edges[(edges >= 0).any(axis=1)]
    return edges[np.lexsort((edges[:, 0], edges[:, 1]))]


def _equal_parts(order: IntArray, counts: IntArray) -> list[IntArray]:
    if (counts != counts[0]).any():
        raise PlanError(f"the plan has {counts.tolist()} buckets for replicas of one layout")
    return np.split(order, len(counts))


def _members(lo: IntArray, hi: IntArray, ids: IntArray) -> IntArray:
    """Numbers in the ranges of some rows, one range after the other."""
    return ranges(lo[ids], hi[ids] - lo[ids])


def _alike(table: Table, ids: IntArray, wanted: Table, names: tuple[str, ...]) -> bool:
    return len(ids) == len(wanted) and all(
        np.array_equal(getattr(table, name)[ids], getattr(wanted, name)) for name in names
    )


def _with_pieces_of(constants: RowTable, sink: Manifest, base: Manifest) -> RowTable:
    """Number the constant pieces of the first replica as its own manifest does."""
    # Constants are the first pieces on both sides, in one order inside a replica.
    mine = np.flatnonzero(sink.buffers.rank[sink.pieces.buffer] < len(base.ranks))
    return dataclasses.replace(constants, src_offset=np.searchsorted(mine, constants.src_offset))
