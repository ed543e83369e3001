"""Plans that encode: every code from its own values, one scale a cell, maxima of shared cells.

The oracle knows neither pieces of codes nor elections. Sources hold the flat canonical number of
every value; rows are followed element by element, and who needs whose maximum is told from who
writes what.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from support import scaled
from support.encode_fleets import Fp8Fleet, Mxfp4Fleet
from weightsync.errors import EncodingError, LayoutError
from weightsync.ir import Manifest, ManifestBuilder, Plan, PlanOptions, RowKind
from weightsync.ir.repeat import repeat_ranks
from weightsync.planners.planner import plan_transfer, solve_shares
from weightsync.service.planning import make_plan

Array = NDArray[np.int64]


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
        nest = plan.nests.take(rows.nest[row : row + 1])
        n = nest.n[0].tolist()
        origin = ("dst", sink, src, name) if is_hop else ("src", source, src, "w")
        for key, side, buffer, of in (origin, ("dst", sink, dst, name)):
            if (key, buffer, of) not in known:
                known[key, buffer, of] = meaning(side, buffer, of)
        read = addresses(int(rows.src_offset[row]), n, nest.src_stride[0].tolist())
        write = addresses(int(rows.dst_offset[row]), n, nest.dst_stride[0].tolist())
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
