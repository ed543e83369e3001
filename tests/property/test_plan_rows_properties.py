"""Files of `weightsync plan --out`, of random fleets, carried out alone."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from support import scaled
from support.clusters import random_cluster
from support.hop_fleets import hop_options, replicated
from support.oracle import memory_of
from support.plan_rows import Carried, carry_out
from support.scenarios import random_scenario
from weightsync.dryrun.rows import write_rows
from weightsync.errors import PlanError
from weightsync.ir import Arena, Manifest
from weightsync.planners.planner import plan_transfer


def _arena_of(side: Manifest, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """What a rank's arena must hold, and which of its bytes lie in buffers."""
    memory, arena = memory_of(side), Arena(side, rank)
    content = np.zeros(arena.nbytes, np.uint8)
    inside = np.zeros(arena.nbytes, np.bool_)
    for buffer, offset in zip(arena.buffers.tolist(), arena.offset_bytes.tolist(), strict=True):
        codes = memory[buffer].view(np.uint8)
        content[offset : offset + len(codes)] = codes
        inside[offset : offset + len(codes)] = True
    return content, inside


def check(source: Manifest, sink: Manifest, carried: Carried) -> None:
    for rank in range(len(source.ranks)):
        content, _ = _arena_of(source, rank)
        known = carried.is_known[rank]
        assert np.array_equal(carried.sources[rank][known], content[known])
    for rank in range(len(sink.ranks)):
        content, inside = _arena_of(sink, rank)
        assert np.array_equal(carried.written[rank], inside.astype(np.int64))
        assert np.array_equal(carried.sinks[rank][inside], content[inside])


@settings(max_examples=scaled(40, 2000), deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_file_alone_gives_every_sink_its_bytes(seed: int) -> None:
    rng = random.Random(seed)
    scenario = random_scenario(rng)
    plan = plan_transfer(*scenario.manifests(), scenario.options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.parquet")
        try:
            write_rows(plan, random_cluster(rng), path, {})
        except PlanError:
            reject()  # a tensor in two dtypes, which no rule makes
        check(plan.source, plan.sink, carry_out(path, scenario.tensors))


@settings(max_examples=scaled(40, 2000), deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_file_alone_passes_on_what_sinks_received(seed: int) -> None:
    rng = random.Random(seed)
    scenario, source, sink, count = replicated(rng)
    plan = plan_transfer(source, sink, hop_options(rng, scenario.options, count))
    where = random_cluster(rng)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.parquet")
        try:
            write_rows(plan, where, path, {})
        except PlanError:
            reject()
        check(source, sink, carry_out(path, scenario.tensors))
        rows = pq.read_table(path).to_pylist()
    hops = [row for row in rows if row["kind"] == "hop"]
    assert sum(row["nbytes"] for row in hops) == plan.bytes_per_forwarder().sum()
    assert all(row["source_rank"] != row["sink_rank"] for row in hops)
    assert all(0 <= row["rail"] < where.nics_per_node for row in hops)
