"""plan_transfer: from the manifests of both sides to a validated plan.

Stages: encode -> classify -> find boxes -> intersect -> choose -> stamp -> lower -> order.
Everything up to `stamp` works on one representative per class of tensors; `lower` works on blocks
of whole source ranks, so that temporaries stay small whatever the size of the plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final

import numpy as np

from weightsync.errors import LayoutError, PlanBudgetError, UnknownTensorError
from weightsync.ir.encoded import Encoded, made_rows
from weightsync.ir.manifest import Manifest
from weightsync.ir.pieces import CONSTANT
from weightsync.ir.plan import (
    BucketTable,
    ChunkTable,
    MaxTable,
    Plan,
    PlanOptions,
    RowKind,
    RowTable,
    Shares,
)
from weightsync.ir.tables import IntArray, expand, starts_of
from weightsync.planners import choose, encode
from weightsync.planners.classes import TensorClasses, classify
from weightsync.planners.copies import CopyTable
from weightsync.planners.encode import CodeCells
from weightsync.planners.intersect import Boxes, Regions, find_boxes, intersect
from weightsync.planners.lower import Lowered, lower
from weightsync.planners.order import cut_buckets
from weightsync.planners.stamp import Stamped, stamp

__all__ = ["plan_transfer", "solve_shares"]

_BLOCK: Final = 1 << 16  # regions lowered at a time, rounded up to whole source ranks
_MAX_LISTED: Final = 8  # names in a message; the error's attributes list all


def plan_transfer(
    source: Manifest,
    sink: Manifest,
    options: PlanOptions | None = None,
    *,
    shares: Shares | None = None,
) -> Plan:
    """Plan the writes that give every sink its weights, shard to shard.

    Every sink byte is written exactly once, by the least loaded of its holders. The result depends
    on nothing but the arguments: ranks that plan from equal manifests get equal digests.

    Args:
        source: Merged manifest of all source ranks.
        sink: Merged manifest of all sink ranks.
        options: Budgets; None takes the defaults.
        shares: Shares that `solve_shares` chose for these manifests (elsewhere); None solves them.

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
    inputs = _Inputs.of(source, sink, options)
    if shares is None:
        shares = choose.solve(inputs.sets)
    else:
        choose.check_shares(shares, inputs.sets)
    like = inputs.classes.tensor[inputs.classes.first]
    election = choose.elect(
        inputs.classes, inputs.boxes, inputs.regions, inputs.sets, shares, inputs.encoded.cell[like]
    )
    maxima = MaxTable.empty()
    if len(inputs.encoded.table):
        parts = inputs.classes, inputs.boxes
        election = encode.follow_codes(election, *parts, inputs.cells, sink.tensors.shape[like])
        maxima = encode.shared_maxima(inputs.encoded, inputs.sink, *parts, election, inputs.cells)
    stamped = stamp(
        inputs.classes, inputs.boxes, inputs.regions, election, options.max_rows // inputs.count
    )
    rows, chunks, buckets = _lower_all(stamped, inputs, sink, options)
    plan = Plan(
        source=source,
        sink=sink,
        rows=rows,
        chunks=chunks,
        buckets=buckets,
        shares=shares,
        options=options,
        maxima=maxima,
    )
    vars(plan)["encoded"] = inputs.encoded  # the cached property; what replicas store is alike
    plan.validate()
    return plan


def solve_shares(source: Manifest, sink: Manifest, options: PlanOptions | None = None) -> Shares:
    """Choose how the holders of the same elements share the work, without making the plan.

    Args:
        source: Merged manifest of all source ranks.
        sink: Merged manifest of all sink ranks.
        options: Only `ignore_extra` matters.

    Returns:
        A small table that `plan_transfer` takes; the coordinator solves it once for all ranks.

    Raises:
        UnknownTensorError, LayoutError, DtypeMismatchError, CoverageError: As `plan_transfer`.
    """
    return choose.solve(_Inputs.of(source, sink, options or PlanOptions()).sets)


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What both entry points need: what is encoded, classes, boxes, regions and holder sets.

    All of one replica (`sink`) where the manifest says that it repeats it `count` times.
    """

    encoded: Encoded
    classes: TensorClasses
    boxes: Boxes
    regions: Regions
    sets: choose.HolderSets
    cells: CodeCells
    sink: Manifest
    count: int

    @classmethod
    def of(cls, source: Manifest, sink: Manifest, options: PlanOptions) -> _Inputs:
        if source.side != "source" or sink.side != "sink":
            raise LayoutError(f"plan from a source to a sink, not {source.side} to {sink.side}")
        sink, count = sink.repeats or (sink, 1)
        encoded = Encoded.of(source, sink)
        held = encoded.source
        match = _match_tensors(held, sink, options)
        classes = classify(held, sink, match, encoded.table)
        cells = CodeCells.of(classes, encoded, len(sink.tensors))
        boxes = find_boxes(classes, held, sink)
        regions = intersect(classes, boxes, held, sink, encoded)
        regions = dataclasses.replace(regions, nbytes=regions.nbytes * count)
        is_scales = cells.is_scales[classes.first]
        sets = choose.find_holder_sets(classes, boxes, regions, is_scales)
        return cls(encoded, classes, boxes, regions, sets, cells, sink, count)


def _match_tensors(source: Manifest, sink: Manifest, options: PlanOptions) -> IntArray:
    """Match tensors by name and shape: the source's number of each sink tensor, `(T_sink,)`."""
    index = source.tensors.index
    numbers = np.array([index.get(name, -1) for name in sink.tensors.names], np.int64)
    wanted = np.zeros(len(numbers), np.bool_)
    wanted[sink.pieces.tensor[sink.pieces.tensor != CONSTANT]] = True
    missing = [sink.tensors.names[t] for t in np.flatnonzero(wanted & (numbers < 0))]
    extra = sorted(set(source.tensors.names) - set(sink.tensors.names) - set(options.ignore_extra))
    if missing or extra:
        raise UnknownTensorError(
            "the two sides do not name the same tensors; "
            f"missing on the source: {_listed(missing)}; "
            f"extra on the source, wanted by no sink: {_listed(extra)}; "
            "check the layouts' model, or list known extras in PlanOptions.ignore_extra",
            missing=missing,
            extra=extra,
        )
    known = np.flatnonzero(numbers >= 0)
    src_shape, dst_shape = source.tensors.shape[numbers[known]], sink.tensors.shape[known]
    differs = (src_shape != dst_shape).any(axis=1)
    differs |= source.tensors.ndim[numbers[known]] != sink.tensors.ndim[known]
    for row in np.flatnonzero(differs)[:1]:
        name = sink.tensors.names[known[row]]
        shapes = [
            tuple(side.tensors.shape[t, -int(side.tensors.ndim[t]) :].tolist())
            for side, t in ((source, numbers[known[row]]), (sink, known[row]))
        ]
        raise LayoutError(
            f"tensor {name} is {shapes[0]} on the source but {shapes[1]} on the sink; both sides "
            "must state the shape in the Hugging Face checkpoint",
            tensor=name,
            source_shape=shapes[0],
            sink_shape=shapes[1],
        )
    return numbers


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return (", ".join(names[:_MAX_LISTED]) or "none") + more


def _blocks(src_rank: IntArray) -> Iterator[slice]:
    """Yield ranges of about `_BLOCK` rows that never part the rows of one source rank."""
    first = 0
    while first < len(src_rank):
        last = min(first + _BLOCK, len(src_rank)) - 1
        last = int(np.searchsorted(src_rank, src_rank[last], side="right"))
        yield slice(first, last)
        first = last


def _lower_all(
    stamped: Stamped, inputs: _Inputs, sink: Manifest, options: PlanOptions
) -> tuple[RowTable, ChunkTable, BucketTable]:
    """Lower block by block, for one replica, then bring the buckets of all into their order."""
    source, num_rows, parts = inputs.encoded.source, 0, []
    for block in _blocks(stamped.src_rank):
        copies = stamped.copies(block, inputs.classes, inputs.boxes, source, inputs.sink)
        parts.append(lower(copies, inputs.encoded, inputs.sink, options))
        num_rows += len(parts[-1].rows) * inputs.count
        if num_rows > options.max_rows:
            raise PlanBudgetError(
                f"the plan has over {num_rows} rows, more than max_rows ({options.max_rows}); "
                "raise it, or shard both sides more alike",
                rows=num_rows,
                budget=options.max_rows,
            )
    lowered = Lowered.concat(parts)
    del parts
    buckets, order, replica = cut_buckets(lowered, inputs.sink, inputs.count, options)
    return *_tables(lowered, buckets, order, replica, inputs, _constant_rows(sink)), buckets


def _tables(
    lowered: Lowered,
    buckets: BucketTable,
    order: IntArray,
    replica: IntArray,
    inputs: _Inputs,
    constants: RowTable,
) -> tuple[RowTable, ChunkTable]:
    """Bring rows and chunks into the order of the buckets and number them; constants come last."""
    counts = np.diff(lowered.row_start)[order]
    owner, local = expand(counts)
    index = lowered.row_start[order][owner] + local
    columns = {}
    for name in CopyTable.COLUMNS:  # straight into its place: these are the largest arrays of all
        before, last = getattr(lowered.rows, name), getattr(constants, name)
        columns[name] = np.empty((len(index) + len(last), *before.shape[1:]), before.dtype)
        np.take(before, index, axis=0, out=columns[name][: len(index)], mode="clip")
        columns[name][len(index) :] = last
    sent = slice(len(index))
    made = made_rows(
        inputs.encoded, inputs.sink, columns["tensor"][sent], columns["dst_buffer"][sent]
    )
    bucket, number = expand(buckets.chunk_hi - buckets.chunk_lo)
    buffer = lowered.dst_buffer[order]  # of the first replica: all have one arena
    row_start = starts_of(counts)
    chunks = ChunkTable(
        bucket=bucket.astype(np.int32),
        number=number.astype(np.int32),
        dst_offset=inputs.sink.arena_offset_bytes[buffer]
        + lowered.dst_offset[order] * inputs.sink.buffers.itemsize[buffer],
        nbytes=lowered.nbytes[order],
        is_packed=lowered.is_packed[order],
        row_lo=row_start[:-1],
        row_hi=row_start[1:],
    )
    if inputs.count > 1:
        shift = (replica * len(inputs.sink.buffers)).astype(np.int32)
        columns["dst_buffer"][sent] += shift[owner]
    kind = np.where(made, np.uint8(RowKind.ENCODE), np.uint8(RowKind.COPY))
    columns["kind"] = np.concatenate([kind, constants.kind])
    columns["chunk"] = np.concatenate([owner.astype(np.int32), constants.chunk])
    return RowTable(**columns), chunks


def _constant_rows(sink: Manifest) -> RowTable:
    """Return a row for every constant piece of the sink."""
    piece = np.flatnonzero(sink.pieces.tensor == CONSTANT)
    none = np.full(len(piece), -1, np.int32)
    n = sink.pieces.n[piece]
    return RowTable(
        kind=np.full(len(piece), RowKind.CONST, np.uint8),
        chunk=none,
        tensor=none,
        src_buffer=none,
        dst_buffer=sink.pieces.buffer[piece],
        src_offset=piece,
        dst_offset=sink.pieces.offset[piece],
        n=n,
        src_stride=np.zeros_like(n),
        dst_stride=sink.pieces.stride[piece],
    )
