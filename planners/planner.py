"""plan_transfer: from the manifests of both sides to a validated plan.

Stages: encode -> classify -> find boxes -> intersect -> share -> choose -> stamp -> spread ->
lower -> order. `share` and `spread` are about sinks that pass on what they received. All up to
`spread` is the outline (`outline.py`); `lower` works on blocks of whole source ranks, so that
temporaries stay small whatever the size of the plan, and one rank can be planned alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from weightsync.errors import PlanBudgetError, PlanError
from weightsync.ir.encoded import made_rows
from weightsync.ir.manifest import Manifest
from weightsync.ir.pieces import CONSTANT
from weightsync.ir.plan import (
    BucketTable,
    ChunkTable,
    NestTable,
    Plan,
    PlanOptions,
    RowKind,
    RowTable,
    Shares,
)
from weightsync.ir.tables import IntArray, distinct, expand, starts_of, take_rows
from weightsync.planners import choose
from weightsync.planners.copies import CopyTable, unique_nests
from weightsync.planners.fans import Fans
from weightsync.planners.lower import Lowered, Memory, lower
from weightsync.planners.order import Cut, cut_buckets
from weightsync.planners.outline import Inputs, Outline
from weightsync.planners.replan import PlanMemory, Prepared

__all__ = ["RankProgram", "plan_rank", "plan_transfer", "solve_shares"]

_BLOCK: Final = 1 << 16  # regions lowered at a time, rounded up to whole source ranks


def plan_transfer(
    source: Manifest,
    sink: Manifest,
    options: PlanOptions | None = None,
    *,
    shares: Shares | None = None,
    memory: PlanMemory | None = None,
) -> Plan:
    """Plan the writes that give every sink its weights, shard to shard.

    Every sink byte is written exactly once, by the least loaded of its holders. The result depends
    on nothing but the arguments: ranks that plan from equal manifests get equal digests.

    Args:
        source: Merged manifest of all source ranks.
        sink: Merged manifest of all sink ranks.
        options: Budgets; None takes the defaults.
        shares: Shares that `solve_shares` chose for these manifests (elsewhere); None solves them.
        memory: What is left of the plan before, and what keeps this one's: planning again after a
            replica came or went costs less then. The plan is the same with and without.

    Returns:
        The plan, validated. Compare `plan.max_load_bytes` with `plan.shares.bound_bytes`.

    Raises:
        UnknownTensorError: Tensors that only one side has; `.missing` and `.extra`.
        LayoutError: A tensor has two shapes, or source pieces overlap in a way nothing can cut.
        DtypeMismatchError: No cast leads from a source's dtype to a sink's.
        CoverageError: A sink needs elements that no source holds.
        PlanBudgetError: The plan does not fit the options.
        PlanError: The shares are for other manifests.

    Cost: about 3 us a region on one core; no I/O. Pure function, safe from any thread.
    """
    options = PlanOptions() if options is None else options
    outline = Outline.of(source, sink, options, shares, memory)
    prepared = _prepare(outline) if memory is None else memory.prepared(outline, _prepare)
    inputs, lowered, fans = outline.inputs, prepared.lowered, prepared.fans
    cut = cut_buckets(
        lowered, inputs.sink, inputs.count, options, prepared.fan, fans, prepared.is_relayed
    )
    rows, nests, chunks = _tables(prepared, cut, outline, _constants(sink))
    plan = Plan(
        source=source,
        sink=sink,
        rows=rows,
        nests=nests,
        chunks=chunks,
        buckets=cut.table,
        shares=outline.shares,
        options=options,
        maxima=prepared.maxima,
        edges=cut.edges,
    )
    del lowered, prepared  # the largest of all, besides the plan
    vars(plan)["encoded"] = inputs.encoded  # the cached property; what replicas store is alike
    if memory is None:
        plan.validate()
    else:
        memory.prove(plan)
        memory.settle()
    return plan


@dataclasses.dataclass(frozen=True)
class RankProgram:
    """What one source sends: the part of a plan that is its own, numbered from 0.

    Attributes:
        rows, nests, chunks, buckets: As in `Plan`; nests are those of the rank, chunks and buckets
            count from its first one.
    """

    rows: RowTable
    nests: NestTable
    chunks: ChunkTable
    buckets: BucketTable


def plan_rank(outline: Outline, rank: int) -> RankProgram:
    """Make the program of one source, without the rows of any other.

    Args:
        outline: Of the whole transfer.
        rank: The source.

    Returns:
        What `plan_transfer` of the same arguments has of this rank.

    Raises:
        PlanError: Replicas pass on to each other: which one gets a bucket first depends on the
            buckets of all sources.
        PlanBudgetError: The plan does not fit the options.

    Cost: about 3 us a region of this rank, and a pass over the outline the first time.
    """
    if outline.is_relayed.any():
        raise PlanError("a plan with relays is made whole: plan without, or use plan_transfer")
    first, last = np.searchsorted(outline.stamped.src_rank, [rank, rank + 1]).tolist()
    prepared = _prepare(outline, slice(first, last))
    inputs = outline.inputs
    cut = cut_buckets(
        prepared.lowered,
        inputs.sink,
        inputs.count,
        outline.options,
        prepared.fan,
        prepared.fans,
        pair_bytes=outline.pair_bytes,
    )
    none = RowTable.empty(), NestTable.empty()
    return RankProgram(*_tables(prepared, cut, outline, none), cut.table)


def solve_shares(source: Manifest, sink: Manifest, options: PlanOptions | None = None) -> Shares:
    """Choose how the holders of the same elements share the work, without making the plan.

    Args:
        source: Merged manifest of all source ranks.
        sink: Merged manifest of all sink ranks.
        options: Only `ignore_extra` and the options about hops matter.

    Returns:
        A small table that `plan_transfer` takes; the coordinator solves it once for all ranks.

    Raises:
        UnknownTensorError, LayoutError, DtypeMismatchError, CoverageError: As `plan_transfer`.
    """
    inputs = Inputs.of(source, sink, options or PlanOptions())
    return inputs.shares if inputs.shares is not None else choose.solve(inputs.sets)


def _blocks(src_rank: IntArray) -> Iterator[slice]:
    """Yield ranges of about `_BLOCK` rows that never part the rows of one source rank."""
    first = 0
    while first < len(src_rank):
        last = min(first + _BLOCK, len(src_rank)) - 1
        last = int(np.searchsorted(src_rank, src_rank[last], side="right"))
        yield slice(first, last)
        first = last


def _prepare(outline: Outline, copies: slice | None = None) -> Prepared:
    """Lower block by block, for one replica; copies that are passed on alike by themselves.

    Args:
        outline: The copies.
        copies: Those of whole source ranks; None: all.
    """
    stamped, inputs, options = outline.stamped, outline.inputs, outline.options
    copies = slice(0, len(stamped.src_rank)) if copies is None else copies
    apart = 2 * outline.pattern[copies] + outline.is_relayed[copies]
    memory = Memory(inputs.encoded, inputs.sink)
    num_rows, parts, of_part = 0, [], []
    for block in _blocks(stamped.src_rank[copies]):
        for number in np.unique(apart[block]).tolist():
            rows = copies.start + block.start + np.flatnonzero(apart[block] == number)
            held = inputs.encoded.source
            found = stamped.copies(rows, inputs.classes, inputs.boxes, held, inputs.sink)
            parts.append(lower(found, memory, options))
            of_part.append(np.full(len(parts[-1].src_rank), number))
            num_rows += len(parts[-1].rows) * (1 if number % 2 else inputs.count)
            _check_rows(num_rows, options)
    lowered = Lowered.concat(parts)
    kind = np.concatenate([np.zeros(0, np.int64), *of_part])
    return Prepared(
        lowered=lowered,
        fan=outline.fans.find(lowered.dst_buffer, kind // 2),
        is_relayed=kind % 2 > 0,
        fans=outline.fans,
        maxima=outline.maxima,
        num_copies=outline.num_copies,
    )


def _check_rows(num_rows: int, options: PlanOptions) -> None:
    if num_rows > options.max_rows:
        raise PlanBudgetError(
            f"the plan has over {num_rows} rows, more than max_rows ({options.max_rows}); "
            "raise it, or shard both sides more alike",
            rows=num_rows,
            budget=options.max_rows,
        )


def _tables(
    prepared: Prepared,
    cut: Cut,
    outline: Outline,
    constants: tuple[RowTable, NestTable],
) -> tuple[RowTable, NestTable, ChunkTable]:
    """Bring rows and chunks into the order of the buckets and number them; constants come last."""
    last, last_nests = constants
    lowered, fan, fans = prepared.lowered, prepared.fan, prepared.fans
    inputs, sink, order = outline.inputs, outline.inputs.sink, cut.order
    counts = np.diff(lowered.row_start)[order]
    _check_rows(int(counts.sum()) + len(last), outline.options)
    owner, local = expand(counts)
    index = lowered.row_start[order][owner] + local
    nests = lowered.nests
    parts = [nests]  # until they are joined, `nest` counts through all parts
    columns = {}
    for name in CopyTable.COLUMNS:
        before = getattr(lowered.rows, name)
        columns[name] = np.empty(len(index) + len(last), before.dtype)
        np.take(before, index, out=columns[name][: len(index)], mode="clip")
        columns[name][len(index) :] = getattr(last, name)
    sent = slice(len(index))
    made = made_rows(inputs.encoded, sink, columns["tensor"][sent], columns["dst_buffer"][sent])
    kind = np.where(made, np.uint8(RowKind.ENCODE), np.uint8(RowKind.COPY))
    buckets, bucket = cut.table, cut.bucket
    buffer = lowered.dst_buffer[order]  # of the first replica: all have one arena
    offset = lowered.dst_offset[order]
    direct = int(np.searchsorted(bucket, int(np.count_nonzero(cut.sender < 0))))  # chunks
    if direct < len(order):
        hops = slice(direct, None)
        first_row = int(counts[:direct].sum())
        entry = buffer[hops].copy()
        to, shift = _targets(fan[order[hops]], cut.target[bucket[hops]], fans)
        buffer[hops] = np.where(to >= 0, to, entry)
        offset[hops] += shift
        rows, of = slice(first_row, len(index)), owner[first_row:] - direct
        columns["src_offset"][rows] = columns["dst_offset"][rows]
        parts.append(dataclasses.replace(nests, src_stride=nests.dst_stride))
        columns["nest"][rows] += len(nests)
        from_buffer = entry + cut.sender[bucket[hops]] * len(sink.buffers)
        columns["src_buffer"][rows] = from_buffer[of]
        columns["dst_buffer"][rows] = buffer[hops][of]
        columns["dst_offset"][rows] += shift[of]
        kind[rows] = RowKind.HOP
    row_start = starts_of(counts)
    chunks = ChunkTable(
        bucket=bucket.astype(np.int32),
        number=(np.arange(len(order)) - buckets.chunk_lo[bucket]).astype(np.int32),
        dst_offset=sink.arena_offset_bytes[buffer] + offset * sink.buffers.itemsize[buffer],
        nbytes=lowered.nbytes[order],
        is_packed=lowered.is_packed[order] & (np.arange(len(order)) < direct),
        row_lo=row_start[:-1],
        row_hi=row_start[1:],
    )
    if inputs.count > 1:
        moved = (cut.replica[bucket] * len(sink.buffers)).astype(np.int32)
        columns["dst_buffer"][sent] += moved[owner]
    columns["nest"][len(index) :] += sum(map(len, parts))
    joined, columns["nest"] = _joined([*parts, last_nests], columns["nest"])
    columns["kind"] = np.concatenate([kind, last.kind])
    columns["chunk"] = np.concatenate([owner.astype(np.int32), last.chunk])
    return RowTable(**columns), joined, chunks


def _joined(
    parts: Sequence[NestTable], nest: NDArray[np.int32]
) -> tuple[NestTable, NDArray[np.int32]]:
    """Join tables of nests, each nest once and none that no row has; number the rows' anew."""
    nests, number = unique_nests(NestTable.concat(parts))
    used, place = distinct(take_rows(number, nest), len(nests))
    return nests.take(used), place.astype(np.int32)


def _targets(fan: IntArray, target: IntArray, fans: Fans) -> tuple[IntArray, IntArray]:
    """Return where hop chunks go: buffer (-1: the same), and elements further on."""
    buffer, shift = np.full(len(fan), -1), np.zeros(len(fan), np.int64)
    fanned = np.flatnonzero(target >= 0)
    if len(fanned):
        entry = fans.start[fan[fanned]] + target[fanned]
        buffer[fanned], shift[fanned] = fans.target[entry], fans.shift[entry]
    return buffer, shift


def _constants(sink: Manifest) -> tuple[RowTable, NestTable]:
    """Return a row for every constant piece of the sink, and a nest for every row."""
    piece = np.flatnonzero(sink.pieces.tensor == CONSTANT)
    none = np.full(len(piece), -1, np.int32)
    n = sink.pieces.n[piece]
    rows = RowTable(
        kind=np.full(len(piece), RowKind.CONST, np.uint8),
        chunk=none,
        tensor=none,
        src_buffer=none,
        dst_buffer=sink.pieces.buffer[piece],
        src_offset=piece,
        dst_offset=sink.pieces.offset[piece],
        nest=np.arange(len(piece), dtype=np.int32),
    )
    stride = sink.pieces.stride[piece]
    return rows, NestTable(n=n, src_stride=np.zeros_like(n), dst_stride=stride)
