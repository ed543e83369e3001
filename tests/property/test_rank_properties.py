"""The program of one rank alone is its part of the whole plan."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from support import scaled
from support.hop_fleets import hop_options, replicated
from weightsync.errors import PlanError
from weightsync.ir.tables import Table
from weightsync.planners.outline import Outline
from weightsync.planners.planner import RankProgram, plan_rank, plan_transfer

seeds = st.integers(0, 2**32 - 1)


def _equal(one: Table, other: Table) -> bool:
    names = set(type(one).COLUMNS) - {"nest"}
    return all(np.array_equal(getattr(one, n), getattr(other, n)) for n in names)


def _moved(found: RankProgram, row: int, chunk: int, bucket: int) -> RankProgram:
    """The program with the numbers that it has in the whole plan."""
    rows = dataclasses.replace(found.rows, chunk=found.rows.chunk + chunk)
    chunks = dataclasses.replace(
        found.chunks,
        bucket=found.chunks.bucket + bucket,
        row_lo=found.chunks.row_lo + row,
        row_hi=found.chunks.row_hi + row,
    )
    buckets = dataclasses.replace(
        found.buckets,
        chunk_lo=found.buckets.chunk_lo + chunk,
        chunk_hi=found.buckets.chunk_hi + chunk,
    )
    return RankProgram(rows, found.nests, chunks, buckets)


@settings(max_examples=scaled(100, 4000), deadline=None)
@given(seeds)
def test_a_rank_alone_plans_what_all_planned_for_it(seed: int) -> None:
    rng = random.Random(seed)
    scenario, source, sink, count = replicated(rng)
    options = hop_options(rng, scenario.options, count)
    plan = plan_transfer(source, sink, options)
    outline = Outline.of(source, sink, options, plan.shares)
    if outline.is_relayed.any():
        event("relayed")
        with pytest.raises(PlanError, match="relays"):
            plan_rank(outline, 0)
        return
    event("hops" if len(plan.edges) else "direct")
    for rank in range(len(source.ranks)):
        own = plan.program(rank)
        found = plan_rank(outline, rank)
        assert len(found.buckets) == len(own)
        if not len(own):
            assert len(found.rows) == len(found.chunks) == 0
            continue
        buckets = slice(int(own[0]), int(own[-1]) + 1)
        chunks = slice(int(plan.buckets.chunk_lo[own[0]]), int(plan.buckets.chunk_hi[own[-1]]))
        rows = slice(
            int(plan.chunks.row_lo[chunks.start]), int(plan.chunks.row_hi[chunks.stop - 1])
        )
        moved = _moved(found, rows.start, chunks.start, buckets.start)
        assert _equal(moved.buckets, plan.buckets.take(buckets))
        assert _equal(moved.chunks, plan.chunks.take(chunks))
        assert _equal(moved.rows, plan.rows.take(rows))
        assert _equal(moved.nests.take(moved.rows.nest), plan.nest_of(rows))
