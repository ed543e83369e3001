"""Assemble a plan's tables: rows and chunks of all replicas in the order of the buckets.

The last stage, and the only one that handles every row of the plan. It goes block by block, so that
beside the tables themselves it needs memory for one block and for columns of one replica only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from weightsync.errors import PlanBudgetError
from weightsync.ir.encoded import made_rows
from weightsync.ir.manifest import Manifest
from weightsync.ir.pieces import CONSTANT
from weightsync.ir.plan import ChunkTable, NestTable, PlanOptions, RowKind, RowTable
from weightsync.ir.tables import IntArray, expand, starts_of, take_rows
from weightsync.planners.copies import CopyTable, unique_nests
from weightsync.planners.fans import Fans
from weightsync.planners.order import Cut
from weightsync.planners.outline import Outline
from weightsync.planners.replan import Prepared

__all__ = ["assemble", "check_rows", "constants_of"]

_BLOCK: Final = 1 << 16  # rows at a time, rounded up to whole chunks

Constants = tuple[RowTable, NestTable]
Columns = dict[str, NDArray[Any]]


def assemble(
    prepared: Prepared, cut: Cut, outline: Outline, constants: Constants
) -> tuple[RowTable, NestTable, ChunkTable]:
    """Bring rows and chunks into the order of the buckets and number them; constants come last.

    Args:
        prepared: Rows and chunks to one replica.
        cut: The buckets.
        outline: What both were made of.
        constants: As `constants_of` returns them.

    Raises:
        PlanBudgetError: More rows than the options allow.

    Cost: about 0.1 us a row.
    """
    last, last_nests = constants
    lowered = prepared.lowered
    row_start = starts_of(np.diff(lowered.row_start)[cut.order])
    num_rows, num_chunks = int(row_start[-1]), len(cut.order)
    check_rows(num_rows + len(last), outline.options)
    rows = _empty(RowTable, num_rows + len(last))
    chunks = _empty(ChunkTable, num_chunks) | {"row_lo": row_start[:-1], "row_hi": row_start[1:]}
    inputs = outline.inputs
    made = made_rows(inputs.encoded, inputs.sink, lowered.rows.tensor, lowered.rows.dst_buffer)
    before = {name: getattr(lowered.rows, name) for name in CopyTable.COLUMNS}
    before["kind"] = np.where(made, np.uint8(RowKind.ENCODE), np.uint8(RowKind.COPY))
    num_buffers = len(inputs.sink.buffers)
    direct = int(np.searchsorted(cut.bucket, int(np.count_nonzero(cut.sender < 0))))
    for block in _blocks(row_start, direct):
        like = cut.order[block]
        owner, local = expand(np.diff(row_start[block.start : block.stop + 1]))
        index = lowered.row_start[like][owner] + local
        to = slice(row_start[block.start], row_start[block.stop])
        mine = {name: column[to] for name, column in rows.items()}
        for name, column in before.items():
            # The other modes go through a buffer; indices are right by construction.
            np.take(column, index, out=mine[name], mode="clip")
        mine["chunk"][:] = owner + block.start
        bucket = cut.bucket[block]
        buffer, offset = lowered.dst_buffer[like], lowered.dst_offset[like]
        if block.start >= direct:
            # What is read is what was received; it goes where the fan says.
            entry = buffer + cut.sender[bucket] * num_buffers
            target, shift = _targets(prepared.fan[like], cut.target[bucket], prepared.fans)
            buffer, offset = np.where(target >= 0, target, buffer), offset + shift
            mine["kind"][:] = RowKind.HOP
            mine["src_offset"][:] = mine["dst_offset"]
            mine["src_buffer"][:] = entry[owner]
            mine["dst_buffer"][:] = buffer[owner]
            mine["dst_offset"] += shift[owner]
            mine["nest"] += len(lowered.nests)
        moved = (cut.replica[bucket] * num_buffers).astype(np.int32)
        mine["dst_buffer"] += moved[owner]
        base = inputs.sink.arena_offset_bytes[buffer]  # of the first replica: all have one arena
        chunks["bucket"][block] = bucket
        chunks["number"][block] = np.arange(block.start, block.stop) - cut.table.chunk_lo[bucket]
        chunks["dst_offset"][block] = base + offset * inputs.sink.buffers.itemsize[buffer]
        chunks["nbytes"][block] = lowered.nbytes[like]
        chunks["is_packed"][block] = lowered.is_packed[like] & (block.start < direct)
    for name in RowTable.COLUMNS:
        rows[name][num_rows:] = getattr(last, name)
    hops = dataclasses.replace(lowered.nests, src_stride=lowered.nests.dst_stride)
    rows["nest"][num_rows:] += 2 * len(lowered.nests)
    own = int(row_start[direct])
    joined = _joined([lowered.nests, hops, last_nests], rows["nest"][own:])
    return RowTable(**rows), joined, ChunkTable(**chunks)


def check_rows(num_rows: int, options: PlanOptions) -> None:
    """Raise PlanBudgetError if a plan may not have so many rows."""
    if num_rows > options.max_rows:
        raise PlanBudgetError(
            f"the plan has over {num_rows} rows, more than max_rows ({options.max_rows}); "
            "raise it, or shard both sides more alike",
            rows=num_rows,
            budget=options.max_rows,
        )


def constants_of(sink: Manifest) -> Constants:
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


def _empty(table: type[RowTable] | type[ChunkTable], num: int) -> Columns:
    return {name: np.empty(num, dtype) for name, (dtype, _) in table.COLUMNS.items()}


def _blocks(row_start: IntArray, direct: int) -> Iterator[slice]:
    """Yield ranges of chunks: first those of sources, then those that sinks pass on."""
    start, num_chunks = 0, len(row_start) - 1
    while start < num_chunks:
        stop = int(np.searchsorted(row_start, row_start[start] + _BLOCK))
        stop = min(stop, direct if start < direct else num_chunks)
        yield slice(start, stop)
        start = stop


def _joined(parts: list[NestTable], nest: NDArray[np.int32]) -> NestTable:
    """Join tables of nests, each nest once and none that no row has; number the rows' anew.

    Args:
        parts: Those of rows that sources send first: each once, all of them needed.
        nest: Nests of all other rows, counted through all parts; renumbered in place.
    """
    nests, number = unique_nests(NestTable.concat(parts))
    is_used = np.arange(len(nests)) < len(parts[0])
    is_used[number[nest]] = True
    place = np.cumsum(is_used, dtype=np.int32) - np.int32(1)
    nest[:] = take_rows(place[number], nest)
    return nests.take(is_used)


def _targets(fan: IntArray, target: IntArray, fans: Fans) -> tuple[IntArray, IntArray]:
    """Return where hop chunks go: buffer (-1: the same), and elements further on."""
    buffer, shift = np.full(len(fan), -1), np.zeros(len(fan), np.int64)
    fanned = np.flatnonzero(target >= 0)
    if len(fanned):
        entry = fans.start[fan[fanned]] + target[fanned]
        buffer[fanned], shift[fanned] = fans.target[entry], fans.shift[entry]
    return buffer, shift
