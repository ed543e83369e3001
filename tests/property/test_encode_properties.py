"""Plans that encode: every code from its own values, one scale a cell, maxima of shared cells.

The oracle knows neither pieces of codes nor elections. Sources hold the flat canonical number of
every value; rows are followed element by element, and who needs whose maximum is told from who
writes what.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from support import scaled
from weightsync.errors import EncodingError, LayoutError
from weightsync.ir import Manifest, ManifestBuilder, Plan, PlanOptions, RowKind
from weightsync.ir.repeat import repeat_ranks
from weightsync.planners.planner import plan_transfer, solve_shares
from weightsync.service.planning import make_plan

Array = NDArray[np.int64]


def cuts(rng: random.Random, length: int, parts: int, unit: int = 1) -> list[int]:
    """Borders of some parts, maybe empty ones, at multiples of a unit."""
    inner = sorted(rng.randint(0, length // unit) * unit for _ in range(parts - 1))
    return [0, *inner, length]


class Fp8Fleet:
    """A matrix in shards of rows, columns or every other row, for sinks that want parts of it."""

    cell = (128, 128)

    def __init__(self, rng: random.Random) -> None:
        self.shape = (rng.randint(1, 420), rng.randint(1, 300))
        self.scales = tuple(-(-n // 128) for n in self.shape)
        kind = rng.choice(["rows", "columns", "both", "stepped"])
        self.sources = [self._source(rng, kind) for _ in range(rng.choice([1, 1, 2]))]
        self.dim, self.tp = rng.randint(0, 1), rng.randint(1, 3)
        self.borders = cuts(rng, self.shape[self.dim], self.tp, 128)
        self.gap = rng.choice([0, 5])

    def _source(self, rng: random.Random, kind: str) -> list[list[tuple[list[int], ...]]]:
        rows, columns = self.shape
        world = rng.randint(1, 5)
        if kind == "stepped":  # halves of heads, as rotary embeddings are laid out by some
            return [[([at, 0], [-(-(rows - at) // 2), columns], [2, 1])] for at in range(2)][:rows]
        row = cuts(rng, rows, world if kind != "columns" else 1)
        column = cuts(rng, columns, world if kind == "columns" else rng.randint(1, 2))
        boxes = [
            ([a, c], [b - a, d - c], [1, 1])
            for a, b in itertools.pairwise(row)
            for c, d in itertools.pairwise(column)
            if b > a and d > c
        ]
        if kind == "both":
            return [[box] for box in boxes]
        ranks: list[list[Any]] = [[] for _ in range(world)]
        for box in boxes:
            rng.choice(ranks).append(box)
        return ranks

    def manifests(self) -> tuple[Manifest, Manifest]:
        sources, sinks = [], []
        for held in itertools.chain(*self.sources):
            label = f"source {len(sources)}"
            builder = ManifestBuilder("source", label)
            builder.tensor("w", self.shape)
            for number, (lo, n, step) in enumerate(held):
                builder.buffer(f"w.{number}", "BF16", n[0] * n[1])
                builder.place("w", f"w.{number}", n, lo=lo, n=n, step=step)
            sources.append(builder.build())
        for rank, (begin, end) in enumerate(itertools.pairwise(self.borders)):
            builder = ManifestBuilder("sink", f"sink {rank}")
            builder.tensor("w", self.shape)
            builder.tensor("s", self.scales)
            builder.encode("fp8_block", "w", "w", "s")
            for name, dtype, shape, per in (
                ("w", "F8_E4M3", self.shape, 1),
                ("s", "F32", self.scales, 128),
            ):
                lo, n = [0, 0], list(shape)
                lo[self.dim], n[self.dim] = -(-begin // per), -(-end // per) - -(-begin // per)
                if 0 not in n:
                    view = (n[0] + self.gap, n[1])
                    builder.buffer(name, dtype, view[0] * view[1])
                    builder.place(name, name, view, lo=lo, n=n)
                    if self.gap:
                        builder.constant(name, n[0] * n[1], (self.gap, n[1]), (n[1], 1), 0)
            sinks.append(builder.build())
        return Manifest.merge("source", sources), Manifest.merge("sink", sinks)

    def origin(self, tensor: str, index: Array) -> Array:
        """Values that elements of a stored tensor begin with, `(N, 2)`."""
        return index if tensor == "w" else index * 128

    def cell_of(self, index: Array) -> Array:
        """Cell of each code, in elements of the scales."""
        return index // 128


class Mxfp4Fleet:
    """Experts of gpt-oss, K-major, for sinks that pack codes along the depth."""

    def __init__(self, rng: random.Random) -> None:
        self.shape = (rng.randint(1, 5), 32 * rng.randint(1, 3), 2 * rng.randint(1, 5))
        self.dim = rng.choice([0, 1, 2])
        self.replicas = rng.randint(1, 2)
        self.world = rng.randint(1, 4)
        unit = 32 if self.dim == 1 else 1
        self.borders = cuts(rng, self.shape[self.dim], self.world, unit)
        self.tp = cuts(rng, self.shape[2] // 2, rng.randint(1, 2))

    def manifests(self) -> tuple[Manifest, Manifest]:
        experts, depth, width = self.shape
        sources, sinks = [], []
        for _ in range(self.replicas):
            for begin, end in itertools.pairwise(self.borders):
                builder = ManifestBuilder("source", f"source {len(sources)}")
                builder.tensor("w", self.shape)
                lo, n = [0, 0, 0], list(self.shape)
                lo[self.dim], n[self.dim] = begin, end - begin
                if end > begin:
                    builder.buffer("w", "BF16", n[0] * n[1] * n[2])
                    builder.place("w", "w", n, lo=lo, n=n)
                sources.append(builder.build())
        codes, scales = (experts, width, depth // 32, 16), (experts, width, depth // 32)
        for rank, (begin, end) in enumerate(itertools.pairwise(self.tp)):
            builder = ManifestBuilder("sink", f"sink {rank}")
            for name, shape in (("w", self.shape), ("c", codes), ("s", scales)):
                builder.tensor(name, shape)
            builder.encode("mxfp4", "w", "c", "s")
            for name, shape in (("c", codes), ("s", scales)):
                if end == begin:
                    continue
                rows = 2 * (end - begin)
                builder.buffer(name, "U8", experts * rows * int(np.prod(shape[2:])))
                for half in range(2):  # gate in the even rows, up in the odd ones
                    part = (experts, rows // 2, *shape[2:])
                    at = (0, half * (rows // 2), *(0 for _ in shape[2:]))
                    lo = (0, 2 * begin + half, *(0 for _ in shape[2:]))
                    step = (1, 2, *(1 for _ in shape[2:]))
                    view = (experts, rows, *shape[2:])
                    builder.place(name, name, view, at=at, lo=lo, n=part, step=step)
            sinks.append(builder.build())
        return Manifest.merge("source", sources), Manifest.merge("sink", sinks)

    def origin(self, tensor: str, index: Array) -> Array:
        inner = 2 * index[:, 3] if tensor == "c" else 0
        return np.stack([index[:, 0], 32 * index[:, 2] + inner, index[:, 1]], axis=1)

    def cell_of(self, index: Array) -> Array:
        return index[:, :3]


def addresses(offset: int, n: list[int], stride: list[int]) -> Array:
    """Element addresses of a strided box, flat, in row-major order."""
    total = np.full(1, offset)
    for count, step in zip(n, stride, strict=True):
        total = (total[:, None] + np.arange(count) * step).reshape(-1)
    return total


def meaning(side: Manifest, buffer: int, name: str) -> dict[int, tuple[int, ...]]:
    """Element number of a tensor at each address of a buffer, from the definition of pieces."""
    pieces, found = side.pieces, {}
    tensor = side.tensors.index[name]
    dims = int(side.tensors.ndim[tensor])
    for row in np.flatnonzero((pieces.buffer == buffer) & (pieces.tensor == tensor)):
        n = pieces.n[row].tolist()
        places = addresses(int(pieces.offset[row]), n, pieces.stride[row].tolist()).tolist()
        grid = np.indices(n).reshape(4, -1).T * pieces.step[row] + pieces.lo[row]
        found |= dict(zip(places, map(tuple, grid[:, 4 - dims :].tolist()), strict=True))
    return found


def follow(plan: Plan, fleet: Any) -> tuple[dict[Any, set[int]], dict[Any, int]]:
    """Check each encoded element against its values; who sends codes of a cell, who its scale."""
    senders: dict[Any, set[int]] = {}
    owner: dict[Any, int] = {}
    rows, source, sink = plan.rows, plan.source, plan.sink
    known: dict[Any, Any] = {}
    for row in range(plan.num_sent):
        is_hop = rows.kind[row] == RowKind.HOP
        assert is_hop or rows.kind[row] == RowKind.ENCODE
        src, dst = int(rows.src_buffer[row]), int(rows.dst_buffer[row])
        name = sink.tensors.names[int(rows.tensor[row])]
        n = rows.n[row].tolist()
        origin = ("dst", sink, src, name) if is_hop else ("src", source, src, "w")
        for key, side, buffer, of in (origin, ("dst", sink, dst, name)):
            if (key, buffer, of) not in known:
                known[key, buffer, of] = meaning(side, buffer, of)
        read = addresses(int(rows.src_offset[row]), n, rows.src_stride[row].tolist())
        write = addresses(int(rows.dst_offset[row]), n, rows.dst_stride[row].tolist())
        index = np.array([known["dst", dst, name][a] for a in write.tolist()])
        if is_hop:  # codes and scales as they are
            assert [known["dst", src, name][a] for a in read.tolist()] == list(map(tuple, index))
            continue
        values = np.array([known["src", src, "w"][a] for a in read.tolist()])
        assert np.array_equal(values, fleet.origin(name, index)), name
        rank = int(source.buffers.rank[src])
        if name == "s":
            for cell in map(tuple, index.tolist()):
                assert owner.setdefault(cell, rank) == rank
        else:
            for cell in set(map(tuple, fleet.cell_of(index).tolist())):
                senders.setdefault(cell, set()).add(rank)
    return senders, owner


def asked(plan: Plan) -> dict[Any, list[tuple[int, int]]]:
    """Who tells whom the maximum of each cell."""
    table, found = plan.maxima, {}
    for row in range(len(table)):
        dims = int(plan.sink.tensors.ndim[int(table.tensor[row])])
        grid = np.indices(table.n[row].tolist()).reshape(4, -1).T * table.step[row] + table.lo[row]
        for cell in map(tuple, grid[:, 4 - dims :].tolist()):
            pair = int(table.src_rank[row]), int(table.dst_rank[row])
            found.setdefault(cell, []).append(pair)
    return found


@pytest.mark.parametrize("kind", [Fp8Fleet, Mxfp4Fleet])
@settings(max_examples=scaled(20, 1500))
@given(seed=st.integers(0, 2**32 - 1))
def test_codes_scales_and_maxima(kind: Any, seed: int) -> None:
    rng = random.Random(seed)
    fleet = kind(rng)
    options = PlanOptions(chunk_bytes=rng.choice([512, 40_000, 1 << 20]))
    source, sink = fleet.manifests()
    plan = plan_transfer(source, sink, options)
    senders, owner = follow(plan, fleet)
    assert senders.keys() == owner.keys()
    told = asked(plan)
    for cell, ranks in senders.items():
        # Whoever writes the scale encodes a part of the cell itself.
        assert owner[cell] in ranks
        # A source whose boxes touch a cell twice may be listed twice.
        assert set(told.pop(cell, [])) == {(r, owner[cell]) for r in ranks - {owner[cell]}}, cell
    assert not told
    shares = solve_shares(source, sink, options)
    assert plan_transfer(source, sink, options, shares=shares).digest == plan.digest
    assert Plan.from_bytes(plan.to_bytes()).digest == plan.digest
    assert Manifest.from_bytes(sink.to_bytes()) == sink


@pytest.mark.parametrize("kind", [Fp8Fleet, Mxfp4Fleet])
@pytest.mark.parametrize("relays", ["on", "off"])
@settings(max_examples=scaled(8, 500), deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_what_was_encoded_once_is_passed_on(kind: Any, relays: Any, seed: int) -> None:
    rng = random.Random(seed)
    fleet = kind(rng)
    source, sink = fleet.manifests()
    ranks = range(len(sink.ranks))
    if relays == "on":  # two replicas; otherwise one of twice as many ranks, in one node
        labels = [[f"sink {replica}/{rank}" for rank in ranks] for replica in range(2)]
    else:
        labels = [[f"sink 0/{half * len(ranks) + rank}" for rank in ranks] for half in range(2)]
    twice = repeat_ranks(sink, labels)
    twice = Manifest.from_bytes(twice.to_bytes(), ranks=twice.ranks)
    options = PlanOptions(
        chunk_bytes=rng.choice([512, 40_000]),
        ranks_per_node=2 * len(ranks),
        node_dedup="on",
        relays=relays,
    )
    plan = plan_transfer(source, twice, options)
    once = plan_transfer(source, sink, options)
    senders, owner = follow(plan, fleet)
    assert senders.keys() == owner.keys()
    assert plan.bytes_per_source().sum() == once.bytes_per_source().sum()
    assert plan.bytes_per_sink().sum() == 2 * once.bytes_per_sink().sum()
    assert (plan.rows.kind == RowKind.HOP).any()
    assert sum(map(len, asked(plan).values())) >= sum(len(r) - 1 for r in senders.values())


def test_sources_that_cut_packed_cells_are_refused() -> None:
    builder = ManifestBuilder("source", "source 0")
    builder.tensor("w", (1, 64, 2))
    for at in (0, 16):
        builder.buffer(f"w.{at}", "BF16", 96 if at else 32)
        lo, n = (0, at, 0), (1, 48 if at else 16, 2)
        builder.place("w", f"w.{at}", n, lo=lo, n=n)
    fleet = Mxfp4Fleet(random.Random(0))
    fleet.shape, fleet.dim, fleet.borders, fleet.tp = (1, 64, 2), 0, [0, 1], [0, 1]
    _, sink = fleet.manifests()
    with pytest.raises(LayoutError, match="shard it along another dim, or by whole cells"):
        plan_transfer(builder.build(), sink)


def test_quantized_sources_are_copied_and_encoding_fleets_are_refused_for_now() -> None:
    fleet = Fp8Fleet(random.Random(3))
    fleet.sources = [[[([0, 0], list(fleet.shape), [1, 1])]]]
    fleet.borders = [0, fleet.shape[fleet.dim]]
    source, sink = fleet.manifests()
    builder = ManifestBuilder("source", "source 0")
    for name, dtype, shape in (("w", "F8_E4M3", fleet.shape), ("s", "F32", fleet.scales)):
        builder.tensor(name, shape)
        builder.buffer(name, dtype, shape[0] * shape[1])
        builder.place(name, name, shape)
    plan = plan_transfer(builder.build(), sink)
    assert set(plan.rows.kind[: plan.num_sent].tolist()) == {RowKind.COPY}
    members = [("source 0", source.to_bytes())], [("sink 0", sink.to_bytes())]
    with pytest.raises(EncodingError, match="does not encode yet"):
        make_plan(*members, PlanOptions())
