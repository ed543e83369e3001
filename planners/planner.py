"""plan_transfer: from the manifests of both sides to a validated plan.

Stages: encode -> classify -> find boxes -> intersect -> share -> choose -> stamp -> spread ->
lower -> order -> assemble. `share` and `spread` are about sinks that pass on what they received.
All up to `spread` is the outline (`outline.py`); `lower` works on blocks of whole source ranks, so
that temporaries stay small whatever the size of the plan, and one rank can be planned alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final

import numpy as np

from weightsync.errors import PlanError
from weightsync.ir.manifest import Manifest
from weightsync.ir.plan import (
    BucketTable,
    ChunkTable,
    NestTable,
    Plan,
    PlanOptions,
    RowTable,
    Shares,
)
from weightsync.ir.tables import IntArray
from weightsync.planners import choose
from weightsync.planners.assemble import assemble, check_rows, constants_of
from weightsync.planners.lower import Lowered, Memory, lower
from weightsync.planners.order import cut_buckets
from weightsync.planners.outline import Inputs, Outline
from weightsync.planners.replan import PlanMemory, Prepared

__all__ = ["RankProgram", "plan_rank", "plan_transfer", "solve_shares"]

# Regions lowered at a time, rounded up to whole source ranks. A part of every digest: where chunks
# are passed on, nests are numbered in the order of the blocks.
_BLOCK: Final = 1 << 16


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
    rows, nests, chunks = assemble(prepared, cut, outline, constants_of(sink))
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
    return RankProgram(*assemble(prepared, cut, outline, none), cut.table)


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
            check_rows(num_rows, options)
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
