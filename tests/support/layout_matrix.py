"""What the cells of layout matrices start from: canonical tensors, and trainers that hold them.

Contents come from a pool of random bits, so any rows of any tensor can be made when they are
needed; nobody holds a whole model.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from support.layout_cells import LayoutCell, LayoutRefused, World
from support.trainer_worlds import MegatronWorld, Zero3World
from weightsync.client import Job, Sink, Source
from weightsync.ir import Dtype, Manifest
from weightsync.live.sites import TORCH_DTYPES
from weightsync.planners import rules
from weightsync.planners.rules import RuleLayout
from weightsync.planners.rules.parts import Parameter, whole

__all__ = [
    "BITS",
    "Canonical",
    "Sources",
    "canonical_of",
    "source_layout",
    "sources_of",
    "transferred",
]

# A prime: no stride of any layout is a multiple of it, so no misplaced element looks right.
_POOL = 33_554_393
_CACHE_BYTES = 3 << 30
_TIMEOUT_S = 120.0
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


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
        pool, flat = _pool(dtype).view(BITS[dtype.itemsize]), made.view(-1)
        flat = flat.view(BITS[dtype.itemsize])
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


@dataclass(frozen=True, slots=True)
class _QuantizedFsdp2(RuleLayout):
    """Tensors of a quantized checkpoint, cut along dim 0 as `fully_shard` cuts parameters."""

    fsdp: int

    def parameters(self, rank: int) -> Iterator[Parameter]:
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


def canonical_of(cell: LayoutCell[Any] | LayoutRefused[Any]) -> Canonical:
    """The canonical tensors of a cell."""
    return Canonical(cell.config, quantized=cell.quantized, dtype=cell.dtype)


def source_layout(cell: LayoutCell[Any], world: World) -> RuleLayout:
    """FSDP2 over `world` ranks, HSDP over (replicate, shard), or another trainer."""
    if isinstance(world, MegatronWorld | Zero3World):
        return world.layout(cell.config, cell.dtype)
    replicate, shard = world if isinstance(world, tuple) else (1, world)
    if not cell.quantized:
        return rules.fsdp2(cell.config, fsdp=shard, replicate=replicate, dtype=cell.dtype)
    model = rules.model_config(cell.config)
    return _QuantizedFsdp2("source", model, Dtype.BF16, replicate * shard, shard)


class Sources:
    """The buffers of all source ranks, made from canonical tensors when they are needed.

    FSDP2's are what the pieces say; those of other trainers are what `TrainerSources` cuts.
    """

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
        made = self._made(index)
        self._held[index] = made
        self._nbytes += made.nbytes
        while self._nbytes > self._cache_bytes and len(self._held) > 1:
            _, old = self._held.popitem(last=False)
            self._nbytes -= old.nbytes
        return made

    def _made(self, index: int) -> Tensor:
        manifest = self._manifest
        dtype = TORCH_DTYPES[Dtype(manifest.buffers.dtype[index])]
        made = torch.empty(int(manifest.buffers.numel[index]), dtype=dtype)
        for piece in self._pieces[index]:
            self._fill(made, piece)
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


class TrainerSources(Sources):
    """The buffers of a trainer's ranks, cut out of the whole checkpoint without any piece."""

    def __init__(
        self,
        manifest: Manifest,
        canonical: Canonical,
        cache_bytes: int,
        world: MegatronWorld | Zero3World,
        config: Mapping[str, Any],
    ) -> None:
        super().__init__(manifest, canonical, cache_bytes)
        named = dict(canonical.weights())
        self._of_rank = cache(lambda rank: world.held(named, config, rank))

    def _made(self, index: int) -> Tensor:
        buffers = self._manifest.buffers
        # Memory of its own: strides of pieces count from its first element.
        made = self._of_rank(int(buffers.rank[index]))[buffers.names[index]].flatten().clone()
        assert made.dtype == TORCH_DTYPES[Dtype(buffers.dtype[index])]
        assert made.numel() == int(buffers.numel[index])
        return made


def sources_of(
    cell: LayoutCell[Any],
    world: World,
    manifest: Manifest,
    canonical: Canonical,
    cache_bytes: int = _CACHE_BYTES,
) -> Sources:
    """What the source ranks of a cell hold."""
    if isinstance(world, MegatronWorld | Zero3World):
        return TrainerSources(manifest, canonical, cache_bytes, world, cell.config)
    return Sources(manifest, canonical, cache_bytes)


def transferred(
    cell: LayoutCell[Any], engine: RuleLayout, canonical: Canonical, url: str
) -> list[dict[str, Tensor]]:
    """Publishes one version from all ranks of a cell's first world to one replica, really.

    Returns:
        The memory of every sink rank.
    """
    trainer = source_layout(cell, cell.sources[0])
    live = [_memory(engine.manifest(rank)) for rank in range(engine.world_size)]
    with ExitStack() as stack:
        job = stack.enter_context(Job.start(url))
        pool = stack.enter_context(ThreadPoolExecutor(trainer.world_size + engine.world_size))
        sources = []
        for rank in range(trainer.world_size):
            manifest = trainer.manifest(rank)
            held = sources_of(cell, cell.sources[0], manifest, canonical)
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
