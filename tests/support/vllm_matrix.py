"""Plans executed against vLLM's own loading, one parameter at a time so that widths can be true.

The oracle is `load_weights` of vLLM's real class at the simulated rank. Contents of canonical
tensors come from a pool of random bits, so any rows of any tensor can be made when they are needed;
nobody holds a whole model.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from support.layout_oracle import PieceRow, piece_rows
from support.vllm_cells import Cell
from support.vllm_refused import Refused
from weightsync.client import Job, Sink, Source
from weightsync.ir import Dtype, Manifest, Plan, RowKind
from weightsync.live.sites import TORCH_DTYPES
from weightsync.planners import rules
from weightsync.planners.rules import RuleLayout
from weightsync.planners.rules.parts import Parameter, whole

if TYPE_CHECKING:
    from weightsync.integrations.vllm.twin import Recording

__all__ = [
    "Canonical",
    "Sources",
    "canonical_of",
    "compare_with_engine",
    "load_engine",
    "recorded",
    "same_map",
    "sink_layout",
    "source_layout",
    "transferred",
]

# A prime: no stride of any layout is a multiple of it, so no misplaced element looks right.
_POOL = 33_554_393
_CACHE_BYTES = 3 << 30
_TIMEOUT_S = 120.0
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
# Bits that no canonical tensor holds, by dtype: NaNs, and one value of a byte.
_SENTINEL = {
    torch.bfloat16: 0x7FC1,
    torch.float32: 0x7FC00001,
    torch.float8_e4m3fn: 0x7F,
    torch.uint8: 0xEE,
}


@cache
def _pool(dtype: torch.dtype) -> Tensor:
    """Random bits of finite numbers."""
    random = np.random.default_rng(dtype.itemsize)
    if dtype is torch.bfloat16:
        bits = random.integers(0, 1 << 16, _POOL, np.uint16)
        bits[(bits & 0x7F80) == 0x7F80] ^= 0x4000
        return torch.from_numpy(bits.view(np.int16)).view(dtype)
    if dtype is torch.float32:
        wide = random.integers(0, 1 << 32, _POOL, np.uint32)
        wide[(wide & 0x7F800000) == 0x7F800000] ^= 0x40000000
        return torch.from_numpy(wide.view(np.int32)).view(dtype)
    small = random.integers(0, 1 << 8, _POOL, np.uint8)
    if dtype is torch.uint8:
        small[small == 0xEE] = 0xEF
    else:
        small[(small & 0x7F) == 0x7F] ^= 0x40
    return torch.from_numpy(small).view(dtype)


class Canonical:
    """Canonical tensors of a model: shapes, dtypes, and contents on demand."""

    def __init__(self, config: Mapping[str, Any], *, quantized: bool, dtype: str) -> None:
        kinds = rules.canonical_dtypes(config, quantized=quantized)
        self.kinds = kinds
        self.shapes = rules.canonical_tensors(config, quantized=quantized)
        self.dtypes = {name: TORCH_DTYPES[kinds.get(name, Dtype[dtype])] for name in self.shapes}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(int(np.prod(s)) * self.dtypes[n].itemsize for n, s in self.shapes.items())

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Some rows of a tensor, in memory of their own."""
        shape, dtype = self.shapes[name], self.dtypes[name]
        width = int(np.prod(shape[1:]))
        made = torch.empty((count, *shape[1:]), dtype=dtype)
        pool, flat = _pool(dtype).view(_BITS[dtype.itemsize]), made.view(-1)
        flat = flat.view(_BITS[dtype.itemsize])
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        at, done = (seed + first * width) % _POOL, 0
        while done < flat.numel():
            part = min(flat.numel() - done, _POOL - at)
            flat[done : done + part] = pool[at : at + part]
            done, at = done + part, 0
        return made

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors in the order of the checkpoint, each made when it is asked for."""
        for name, shape in self.shapes.items():
            yield name, self.rows(name, 0, shape[0])


def canonical_of(cell: Cell | Refused) -> Canonical:
    """The canonical tensors of a cell."""
    return Canonical(cell.config, quantized=cell.quantized, dtype=cell.dtype)


@dataclass(frozen=True, slots=True)
class _QuantizedFsdp2(RuleLayout):
    """Tensors of a quantized checkpoint, cut along dim 0 as `fully_shard` cuts parameters."""

    fsdp: int

    def parameters(self, rank: int, without: Container[int] = ()) -> Iterator[Parameter]:
        dtypes = rules.canonical_dtypes(self.config, quantized=True)
        for name, shape in self.tensors().items():
            kind = dtypes.get(name)
            chunk = -(-shape[0] // self.fsdp)
            start = min(rank % self.fsdp * chunk, shape[0])
            count = min(start + chunk, shape[0]) - start
            rest = shape[1:]
            yield whole(name, name, shape, kind).shard((start, *(0 for _ in rest)), (count, *rest))

    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        return rules.canonical_tensors(self.config, quantized=True)


def source_layout(cell: Cell, world: int | tuple[int, int]) -> RuleLayout:
    """FSDP2 over `world` ranks, or HSDP over (replicate, shard)."""
    replicate, shard = world if isinstance(world, tuple) else (1, world)
    if not cell.quantized:
        return rules.fsdp2(cell.config, fsdp=shard, replicate=replicate, dtype=cell.dtype)
    model = rules.model_config(cell.config)
    return _QuantizedFsdp2("source", model, Dtype.BF16, replicate * shard, shard)


def sink_layout(cell: Cell) -> rules.VllmLayout:
    """What the hand-written rule says about a cell."""
    degrees = cell.degrees
    return rules.vllm(
        cell.config,
        tp=degrees.tp,
        dp=degrees.dp,
        pp=degrees.pp,
        ep=degrees.ep,
        expert_placement=degrees.placement,
        num_redundant_experts=degrees.num_redundant,
    )


class Sources:
    """The buffers of all source ranks, made from canonical tensors when they are needed."""

    def __init__(
        self, manifest: Manifest, canonical: Canonical, cache_bytes: int = _CACHE_BYTES
    ) -> None:
        self._cache_bytes = cache_bytes
        self._manifest = manifest
        self._canonical = canonical
        self._held: OrderedDict[int, Tensor] = OrderedDict()
        self._nbytes = 0

    @cached_property
    def _pieces(self) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in range(len(self._manifest.buffers))]
        for piece, buffer in enumerate(self._manifest.pieces.buffer.tolist()):
            found[buffer].append(piece)
        return found

    def buffer(self, index: int) -> Tensor:
        """A flat buffer."""
        held = self._held.get(index)
        if held is not None:
            self._held.move_to_end(index)
            return held
        manifest = self._manifest
        dtype = TORCH_DTYPES[Dtype(manifest.buffers.dtype[index])]
        made = torch.empty(int(manifest.buffers.numel[index]), dtype=dtype)
        for piece in self._pieces[index]:
            self._fill(made, piece)
        self._held[index] = made
        self._nbytes += made.nbytes
        while self._nbytes > self._cache_bytes and len(self._held) > 1:
            _, old = self._held.popitem(last=False)
            self._nbytes -= old.nbytes
        return made

    def _fill(self, memory: Tensor, piece: int) -> None:
        pieces, tensors = self._manifest.pieces, self._manifest.tensors
        tensor = int(pieces.tensor[piece])
        ndim = int(tensors.ndim[tensor])
        lo, n, step, stride = (
            column[piece, 4 - ndim :].tolist()
            for column in (pieces.lo, pieces.n, pieces.step, pieces.stride)
        )
        ends = [a + s * (k - 1) + 1 for a, k, s in zip(lo, n, step, strict=True)]
        rows = self._canonical.rows(tensors.names[tensor], lo[0], ends[0] - lo[0])
        later = [slice(a, b, s) for a, b, s in zip(lo[1:], ends[1:], step[1:], strict=True)]
        box = (slice(None, None, step[0]), *later)
        memory.as_strided(n, stride, int(pieces.offset[piece])).copy_(rows[box])


def _executed(plan: Plan, sources: Sources, buffer: int, rows: list[int]) -> Tensor:
    """One sink buffer, row by row of a plan, as an executor and a sink would write it."""
    table, sink = plan.rows, plan.sink
    dtype = TORCH_DTYPES[Dtype(sink.buffers.dtype[buffer])]
    made = torch.empty(int(sink.buffers.numel[buffer]), dtype=dtype)
    for row in rows:
        n = table.n[row].tolist()
        to = made.as_strided(n, table.dst_stride[row].tolist(), int(table.dst_offset[row]))
        if table.kind[row] == RowKind.CONST:
            to.fill_(float(sink.pieces.fill[int(table.src_offset[row])]))
            continue
        memory = sources.buffer(int(table.src_buffer[row]))
        offset = int(table.src_offset[row])
        to.copy_(memory.as_strided(n, table.src_stride[row].tolist(), offset))
    return made


@dataclass
class Loaded:
    """What vLLM made of a rank: parameters after loading, and before where that matters."""

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
    """Loads canonical tensors by vLLM's own loader, over memory that no weight looks like."""
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
            faults += [f"{name}: a weight where vLLM writes none"] * bool(
                (is_left & ~_constants(sink, buffer)).any()
            )
        num_wrong = int((made != expected).sum())
        if num_wrong:
            faults.append(f"{name}: {num_wrong} of {made.numel()} elements differ")
        nbytes += found.nbytes
    for name, parameter in engine.parameters.items():
        if name not in seen and bool((_bits(parameter) != _SENTINEL[parameter.dtype]).any()):
            faults.append(f"{name}: vLLM loads it, the plan does not")
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
    return tensor.view(_BITS[tensor.dtype.itemsize])


def recorded(vllm_config: Any, canonical: Canonical) -> Recording:
    """The layout of the current rank, recorded from vLLM's own loader."""
    from weightsync.integrations.vllm.twin import record_worker

    shapes = {name: (shape, canonical.dtypes[name]) for name, shape in canonical.shapes.items()}
    return record_worker(vllm_config, shapes)


def transferred(
    cell: Cell, world: int | tuple[int, int], canonical: Canonical, url: str
) -> list[dict[str, Tensor]]:
    """Publishes one version from all source ranks to one replica, by the real executor.

    Returns:
        The memory of every sink rank.
    """
    trainer, engine = source_layout(cell, world), sink_layout(cell)
    live = [_memory(engine.manifest(rank)) for rank in range(engine.world_size)]
    with ExitStack() as stack:
        job = stack.enter_context(Job.start(url))
        pool = stack.enter_context(ThreadPoolExecutor(trainer.world_size + engine.world_size))
        sources = []
        for rank in range(trainer.world_size):
            manifest = trainer.manifest(rank)
            held = Sources(manifest, canonical)
            memory = {n: held.buffer(i) for i, n in enumerate(manifest.buffers.names)}
            made = Source(
                memory, layout=trainer, rank=rank, world_size=trainer.world_size, job=job,
                timeout_s=_TIMEOUT_S,
            )  # fmt: skip
            sources.append(stack.enter_context(made))
        sinks = [
            stack.enter_context(
                Sink(
                    live[rank], layout=engine, replica="a", rank=rank,
                    world_size=engine.world_size, job=job, timeout_s=_TIMEOUT_S,
                )
            )
            for rank in range(engine.world_size)
        ]  # fmt: skip
        published = [pool.submit(source.publish) for source in sources]
        adopted = [pool.submit(sink.refit, timeout_s=_TIMEOUT_S) for sink in sinks]
        for future in (*published, *adopted):
            future.result(_TIMEOUT_S)
    return live


def _memory(manifest: Manifest) -> dict[str, Tensor]:
    """The buffers of one rank, empty."""
    return {
        name: torch.zeros(int(numel), dtype=TORCH_DTYPES[Dtype(dtype)])
        for name, numel, dtype in zip(
            manifest.buffers.names, manifest.buffers.numel, manifest.buffers.dtype, strict=True
        )
    }


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
