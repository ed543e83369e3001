"""Shares: optimal against a linear program, exact sums, large weights; cuts where quotas end."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy.optimize import linprog

from support.oracle import moves_exactly
from weightsync.errors import ConfigError, PlanError
from weightsync.ir import Manifest, ManifestBuilder, Plan, Shares
from weightsync.planners.choose import HolderSets, solve
from weightsync.planners.planner import plan_transfer, solve_shares


def _sets(ranks: list[list[int]], nbytes: list[int]) -> HolderSets:
    none = np.zeros(0, np.int64)
    start = np.cumsum([0] + [len(r) for r in ranks])
    flat = np.array([r for of_set in ranks for r in of_set], np.int64)
    return HolderSets(none, start, flat, np.array(nbytes, np.int64), none)


def _loads(shares: Shares) -> list[int]:
    loads = np.zeros(int(shares.rank.max()) + 1, np.int64)
    np.add.at(loads, shares.rank, shares.quota_bytes)
    return loads.tolist()


@pytest.mark.parametrize("seed", range(40))
def test_holders_keep_their_parts_when_every_set_grows_alike(seed: int) -> None:
    """Twice the replicas are twice the bytes of every set: nobody else should send them."""
    rng = random.Random(seed)
    num_ranks, most = rng.randint(1, 9), rng.choice([9, 1000, 1 << 36])
    ranks = [sorted(rng.sample(range(num_ranks), rng.randint(1, num_ranks))) for _ in range(8)]
    nbytes = [rng.randint(0, most) for _ in ranks]
    once = solve(_sets(ranks, nbytes)).quota_bytes
    for times in (2, 3, 7):
        more = solve(_sets(ranks, [times * n for n in nbytes])).quota_bytes
        assert np.abs(more - times * once).max() < times  # each part ends at a whole byte


@pytest.mark.parametrize("seed", range(30))
def test_the_largest_load_is_the_optimum_of_the_linear_program(seed: int) -> None:
    rng = random.Random(seed)
    num_ranks = rng.randint(1, 7)
    ranks = [
        sorted(rng.sample(range(num_ranks), rng.randint(1, num_ranks)))
        for _ in range(rng.randint(1, 8))
    ]
    nbytes = [rng.choice([0, rng.randint(1, 1000)]) for _ in ranks]
    sets = _sets(ranks, nbytes)
    shares = solve(sets)
    for number, total in enumerate(nbytes):
        assert shares.quota_bytes[shares.holder_set == number].sum() == total
    assert (shares.quota_bytes >= 0).all()
    # min t: sum of each set's edges = its bytes; sum of each rank's edges <= t.
    num_edges = len(sets.rank)
    equal = (shares.holder_set[None, :] == np.arange(len(ranks))[:, None]).astype(float)
    upper = (sets.rank[None, :] == np.arange(num_ranks)[:, None]).astype(float)
    best = linprog(
        [0.0] * num_edges + [1.0],
        A_ub=np.c_[upper, -np.ones(num_ranks)],
        b_ub=np.zeros(num_ranks),
        A_eq=np.c_[equal, np.zeros(len(ranks))],
        b_eq=nbytes,
    )
    optimum = int(np.ceil(best.fun - 1e-6))
    assert shares.bound_bytes == optimum
    # Even splits round up once for each set that a rank shares alone with its peers.
    assert optimum <= max(_loads(shares)) <= optimum + 1


def test_ranks_below_the_peak_are_balanced_too() -> None:
    # Rank 0 must send 900 alone; the other sets should share ranks 1..3 evenly, not pile up.
    shares = solve(_sets([[0], [0, 1, 2], [1, 2, 3]], [900, 300, 300]))
    assert _loads(shares) == [900, 200, 200, 200]
    assert shares.bound_bytes == 900


def test_weights_beyond_32_bits_stay_balanced_and_sum_exactly() -> None:
    nbytes = [3 * 10**12 + 1, 10**12 + 7, 5 * 10**11 + 3]
    shares = solve(_sets([[0, 1], [1, 2], [0, 2]], nbytes))
    assert sum(_loads(shares)) == sum(nbytes)
    assert max(_loads(shares)) <= shares.bound_bytes * (1 + 1e-8)
    assert shares.bound_bytes == -(-sum(nbytes) // 3)


def _replicated(num_sources: int, rows: int, num_sinks: int) -> tuple[Manifest, Manifest]:
    sources, sinks = [], []
    for rank in range(num_sources):
        builder = ManifestBuilder("source", f"source {rank}")
        builder.tensor("w", (rows, 8))
        builder.buffer("w", "BF16", rows * 8)
        builder.place("w", "w", (rows, 8))
        sources.append(builder.build())
    for rank in range(num_sinks):
        builder = ManifestBuilder("sink", f"sink {rank}")
        builder.tensor("w", (rows, 8))
        builder.buffer("w", "BF16", rows * 8)
        builder.place("w", "w", (rows, 8))
        sinks.append(builder.build())
    return Manifest.merge("source", sources), Manifest.merge("sink", sinks)


def test_replicas_share_one_tensor_by_rows() -> None:
    plan = plan_transfer(*_replicated(3, 12, 2))
    assert plan.bytes_per_source().tolist() == [128, 128, 128]
    assert plan.shares.bound_bytes == plan.max_load_bytes == 128
    assert moves_exactly(plan)
    for src_rank in range(3):  # one holder for all sinks
        rows = plan.rows.take(plan.source.buffers.rank[plan.rows.src_buffer] == src_rank)
        assert set(rows.src_offset.tolist()) == {src_rank * 4 * 8}


def test_what_cannot_be_cut_goes_to_the_nearest_quota() -> None:
    plan = plan_transfer(*_replicated(3, 4, 1))
    assert sorted(plan.bytes_per_source().tolist()) == [16, 16, 32]
    assert plan.shares.bound_bytes == 22
    assert moves_exactly(plan)


def test_a_rank_that_must_send_more_is_spared_the_shared_work() -> None:
    sources = []
    for rank in range(2):
        builder = ManifestBuilder("source", f"source {rank}")
        builder.tensor("shared", (64, 4))
        builder.buffer("shared", "BF16", 256)
        builder.place("shared", "shared", (64, 4))
        if rank == 0:
            builder.tensor("own", (32, 4))
            builder.buffer("own", "BF16", 128)
            builder.place("own", "own", (32, 4))
        sources.append(builder.build())
    sink = ManifestBuilder("sink", "sink 0")
    for name, rows in (("shared", 64), ("own", 32)):
        sink.tensor(name, (rows, 4))
        sink.buffer(name, "BF16", rows * 4)
        sink.place(name, name, (rows, 4))
    plan = plan_transfer(Manifest.merge("source", sources), sink.build())
    assert plan.bytes_per_source().tolist() == [384, 384]


def test_shares_travel_and_are_checked() -> None:
    source, sink = _replicated(3, 12, 2)
    shares = solve_shares(source, sink)
    again = Shares.from_bytes(shares.to_bytes())
    assert plan_transfer(source, sink, shares=again) == plan_transfer(source, sink)
    skewed = Shares(shares.holder_set, shares.rank, np.array([384, 0, 0]), shares.bound_bytes)
    plan: Plan = plan_transfer(source, sink, shares=skewed)
    assert plan.bytes_per_source().tolist() == [384, 0, 0]
    assert moves_exactly(plan)
    with pytest.raises(PlanError, match="solved for other manifests"):
        plan_transfer(*_replicated(3, 13, 2), shares=shares)
    with pytest.raises(PlanError, match="solved for other manifests"):
        plan_transfer(*_replicated(2, 12, 2), shares=shares)
    with pytest.raises(ConfigError, match="bad bound_bytes"):
        Shares.from_bytes(shares.to_bytes().replace(b'"bound_bytes":128', b'"bound_bytes":-28'))
