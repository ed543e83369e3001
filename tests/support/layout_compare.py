"""Plans executed against an engine's own loading, one parameter at a time: widths can be true.

The oracle is `load_weights` of the engine's real class at the simulated rank.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from support.layout_cells import LayoutCell
from support.layout_matrix import BITS, Canonical, Sources, source_layout, sources_of
from support.layout_oracle import PieceRow, piece_rows
from weightsync.ir import Dtype, Manifest, Plan, RowKind
from weightsync.live.sites import TORCH_DTYPES
from weightsync.planners.planner import plan_transfer
from weightsync.planners.rules import RuleLayout

if TYPE_CHECKING:
    from weightsync.integrations.recording import Recording

__all__ = [
    "Compared",
    "Loaded",
    "SimulatedRank",
    "compare_ranks",
    "compare_with_engine",
    "load_engine",
    "same_map",
]

_CACHE_BYTES = 3 << 30  # of what source ranks hold
# Bits that no canonical tensor holds, by dtype: NaNs, and one value of a byte.
_SENTINEL = {
    torch.bfloat16: 0x7FC1,
    torch.float32: 0x7FC00001,
    torch.float8_e4m3fn: 0x7F,
    torch.uint8: 0xEE,
}


class SimulatedRank(NamedTuple):
    """What can be done while a process is one rank of an engine.

    Args:
        record: The layout, recorded from the engine's own loader.
        build: The engine's model, before anything is loaded.
    """

    record: Callable[[], Recording]
    build: Callable[[], nn.Module]


class Compared(NamedTuple):
    """What was found of one cell.

    Args:
        nbytes: Bytes that were compared; none of them differ.
        rule: How the rule equals the recordings: `digest` or `elements`.
        digest: Of what the rule says of all ranks.
    """

    nbytes: int
    rule: str
    digest: str


def compare_ranks(
    cell: LayoutCell[Any],
    layout: RuleLayout,
    canonical: Canonical,
    *,
    recorded: Sequence[int],
    executed: Sequence[int],
    simulate: Callable[[int], AbstractContextManager[SimulatedRank]],
) -> Compared:
    """Holds a rule against an engine's loader, and plans from all trainers against its bits.

    Args:
        cell: Who has the weights: each world is planned for all ranks of the engine.
        layout: The rule's layout of the engine.
        canonical: The weights.
        recorded: Ranks whose layout is recorded.
        executed: Ranks that the plans are executed for; some of them.
        simulate: Makes this process one rank of the engine.
    """
    sinks = [layout.manifest(rank) for rank in range(layout.world_size)]
    merged = Manifest.merge("sink", sinks)
    plans = []
    for world in cell.sources:
        trainer = source_layout(cell, world)
        held = [trainer.manifest(rank) for rank in range(trainer.world_size)]
        plans.append(plan_transfer(Manifest.merge("source", held), merged))
    cache_bytes = _CACHE_BYTES // len(plans)
    held_by = [
        sources_of(cell, world, plan.source, canonical, cache_bytes)
        for world, plan in zip(cell.sources, plans, strict=True)
    ]
    same: set[str] = set()
    nbytes = 0
    for rank in recorded:
        with simulate(rank) as simulated:
            same.add(same_map(sinks[rank], simulated.record().manifest(rank)))
            if rank not in executed:
                continue
            engine = load_engine(simulated.build(), canonical, sinks[rank])
            for plan, memory in zip(plans, held_by, strict=True):
                compared, faults = compare_with_engine(plan, rank, memory, engine)
                assert faults == []
                nbytes += compared
            del engine
            gc.collect()
    assert same <= {"digest", "elements"}
    return Compared(nbytes, "elements" if "elements" in same else "digest", merged.digest)


def _executed(plan: Plan, sources: Sources, buffer: int, rows: list[int]) -> Tensor:
    """One sink buffer, row by row of a plan, as an executor and a sink would write it."""
    table, sink = plan.rows, plan.sink
    dtype = TORCH_DTYPES[Dtype(sink.buffers.dtype[buffer])]
    made = torch.empty(int(sink.buffers.numel[buffer]), dtype=dtype)
    for row in rows:
        nest = int(table.nest[row])
        n = plan.nests.n[nest].tolist()
        to = made.as_strided(n, plan.nests.dst_stride[nest].tolist(), int(table.dst_offset[row]))
        if table.kind[row] == RowKind.CONST:
            to.fill_(float(sink.pieces.fill[int(table.src_offset[row])]))
            continue
        memory = sources.buffer(int(table.src_buffer[row]))
        offset = int(table.src_offset[row])
        to.copy_(memory.as_strided(n, plan.nests.src_stride[nest].tolist(), offset))
    return made


@dataclass
class Loaded:
    """What an engine made of a rank: parameters after loading, and before where that matters."""

    parameters: dict[str, Tensor]
    before: dict[str, Tensor]

    def expected(self, name: str) -> Tensor:
        """The bits of a parameter; what the loader leaves alone keeps its constructor's value."""
        found = self.parameters[name]
        bits = _bits(found).reshape(-1)
        if name not in self.before:
            return bits
        is_left = bits == _SENTINEL[found.dtype]
        return torch.where(is_left, _bits(self.before[name]).reshape(-1), bits)

    def differences(self, memory: Mapping[str, Tensor]) -> list[str]:
        """Parameters that are not what was received."""
        return [
            name
            for name, received in memory.items()
            if not torch.equal(_bits(received).reshape(-1), self.expected(name))
        ]


def load_engine(model: nn.Module, canonical: Canonical, manifest: Manifest) -> Loaded:
    """Loads canonical tensors by an engine's own loader, over memory that no weight looks like."""
    padded = {
        manifest.buffers.names[int(buffer)]
        for buffer in manifest.pieces.buffer[manifest.pieces.tensor < 0]
    }
    before = {}
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    for name, parameter in parameters.items():
        if name in padded:
            before[name] = parameter.clone()
        _bits(parameter).fill_(_SENTINEL[parameter.dtype])
    load: Any = model.load_weights
    load(canonical.weights())
    return Loaded(parameters, before)


def compare_with_engine(
    plan: Plan, rank: int, sources: Sources, engine: Loaded
) -> tuple[int, list[str]]:
    """Executes a plan for one sink rank and compares every parameter bit for bit.

    Returns:
        Bytes compared, and what differs.
    """
    sink = plan.sink
    order = np.argsort(plan.rows.dst_buffer, kind="stable")
    ends = np.searchsorted(plan.rows.dst_buffer[order], np.arange(len(sink.buffers) + 1))
    faults: list[str] = []
    seen: set[str] = set()
    nbytes = 0
    for buffer in sink.buffers_of(rank).tolist():
        name = sink.buffers.names[buffer]
        seen.add(name)
        rows = order[ends[buffer] : ends[buffer + 1]].tolist()
        made = _executed(plan, sources, buffer, rows)
        found = engine.parameters[name]
        if found.dtype != made.dtype or found.numel() != made.numel():
            faults.append(f"{name}: {found.dtype} {tuple(found.shape)}, not {made.dtype}")
            continue
        made, expected = _bits(made), engine.expected(name)
        if name in engine.before:
            is_left = _bits(found).reshape(-1) == _SENTINEL[found.dtype]
            faults += [f"{name}: a weight where the engine writes none"] * bool(
                (is_left & ~_constants(sink, buffer)).any()
            )
        num_wrong = int((made != expected).sum())
        if num_wrong:
            faults.append(f"{name}: {num_wrong} of {made.numel()} elements differ")
        nbytes += found.nbytes
    for name, parameter in engine.parameters.items():
        if name not in seen and bool((_bits(parameter) != _SENTINEL[parameter.dtype]).any()):
            faults.append(f"{name}: the engine loads it, the plan does not")
    return nbytes, faults


def _constants(manifest: Manifest, buffer: int) -> Tensor:
    """Which elements of a buffer are constants."""
    mask = torch.zeros(int(manifest.buffers.numel[buffer]), dtype=torch.bool)
    pieces = manifest.pieces
    for piece in np.flatnonzero((pieces.buffer == buffer) & (pieces.tensor < 0)).tolist():
        n, stride = pieces.n[piece].tolist(), pieces.stride[piece].tolist()
        mask.as_strided(n, stride, int(pieces.offset[piece])).fill_(True)
    return mask


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(BITS[tensor.dtype.itemsize])


def same_map(one: Manifest, other: Manifest) -> str:
    """Whether two manifests of a rank describe the same map: `digest`, `elements`, or what differs.

    Where pieces are cut otherwise, both are asked element by element what each of them is.
    """
    if one.digest == other.digest:
        return "digest"
    kinds = [
        dict(
            zip(
                manifest.buffers.names,
                zip(manifest.buffers.dtype.tolist(), manifest.buffers.numel.tolist(), strict=True),
                strict=True,
            )
        )
        for manifest in (one, other)
    ]
    differ = sorted(
        n for n in kinds[0].keys() | kinds[1].keys() if kinds[0].get(n) != kinds[1].get(n)
    )
    if differ:
        return f"buffers {', '.join(differ[:4])}"
    shapes = _shapes(one)
    if shapes != _shapes(other):
        return "shapes of tensors"
    sides: list[dict[str, set[PieceRow]]] = [{}, {}]
    for side, manifest in zip(sides, (one, other), strict=True):
        for row in piece_rows(manifest):
            side.setdefault(row.buffer, set()).add(row)
    number = {name: index for index, name in enumerate(sorted(shapes))}
    for buffer, (_, numel) in kinds[0].items():
        rows = sides[0][buffer], sides[1][buffer]
        if rows[0] == rows[1]:
            continue
        maps = [_elements(side, numel, shapes, number) for side in rows]
        if not np.array_equal(maps[0], maps[1]):
            return f"elements of {buffer}"
    return "elements"


def _shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    tensors = manifest.tensors
    return {
        name: tuple(tensors.shape[t, 4 - int(tensors.ndim[t]) :].tolist())
        for t, name in enumerate(tensors.names)
    }


def _elements(
    rows: set[PieceRow],
    numel: int,
    shapes: Mapping[str, tuple[int, ...]],
    number: Mapping[str, int],
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """What every element of a buffer is: tensor and element of it, or a constant, in one number."""
    found = np.full(numel, -1, np.int64)
    memory = torch.from_numpy(found)
    for row in rows:
        at = memory.as_strided(row.n, row.stride, row.offset)
        if row.tensor is None:
            at.fill_(-2 - int(row.fill))
            continue
        shape = shapes[row.tensor]
        index = torch.zeros((), dtype=torch.int64)
        for dim, size in enumerate(shape):
            along = row.lo[dim] + row.step[dim] * torch.arange(row.n[dim])
            index = index.unsqueeze(-1) * size + along
        at.copy_(index + (number[row.tensor] << 40))
    return found
