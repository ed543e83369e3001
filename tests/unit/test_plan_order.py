"""The order in which sources send: every pair advances in proportion, and nobody crowds a sink."""

from __future__ import annotations

import random

import numpy as np
import pytest

from support.scenarios import random_scenario
from weightsync.ir import Manifest, ManifestBuilder, PlanOptions
from weightsync.planners.planner import plan_transfer


@pytest.mark.parametrize("seed", range(30))
def test_pairs_of_a_source_advance_in_proportion_to_their_bytes(seed: int) -> None:
    scenario = random_scenario(random.Random(seed))
    plan = plan_transfer(*scenario.manifests(), scenario.options)
    buckets = plan.buckets
    for source in range(len(plan.source.ranks)):
        program = plan.program(source)
        sinks, nbytes = buckets.dst_rank[program], buckets.nbytes[program]
        total = np.bincount(sinks, weights=nbytes, minlength=len(plan.sink.ranks))
        wanted = np.flatnonzero(total)
        largest = np.array([nbytes[sinks == sink].max() for sink in wanted])
        sent = np.zeros(len(total))
        for sink, size in zip(sinks.tolist(), nbytes.tolist(), strict=True):
            sent[sink] += size
            ahead = sent[wanted] / total[wanted]
            # A pair's first bucket goes at its phase, which is below one bucket.
            slack = largest / total[wanted]
            assert (ahead - slack)[:, None].max() <= (ahead + slack).min() + 1e-9


def test_sources_of_one_sink_take_turns() -> None:
    """Experts of 8 sources for 4 replicas: at every step each sink hears from two sources."""
    num_sources, num_sinks, num_buckets = 8, 4, 16
    sources, sinks = [], []
    for rank in range(num_sources):
        builder = ManifestBuilder("source", f"source {rank}")
        builder.tensor("w", (num_sources * num_buckets, 1024))
        builder.buffer("w", "BF16", num_buckets * 1024)
        lo, n = (rank * num_buckets, 0), (num_buckets, 1024)
        builder.place("w", "w", n, lo=lo, n=n)
        sources.append(builder.build())
    for rank in range(num_sinks):
        builder = ManifestBuilder("sink", f"sink {rank}")
        builder.tensor("w", (num_sources * num_buckets, 1024))
        builder.buffer("w", "BF16", num_sources * num_buckets * 1024)
        builder.place("w", "w", (num_sources * num_buckets, 1024))
        sinks.append(builder.build())
    options = PlanOptions(bucket_bytes=2048, chunk_bytes=2048, direct_run_bytes=1)
    plan = plan_transfer(Manifest.merge("source", sources), Manifest.merge("sink", sinks), options)
    steps = np.stack([plan.buckets.dst_rank[plan.program(rank)] for rank in range(num_sources)])
    assert steps.shape == (num_sources, num_buckets * num_sinks)
    for step in steps.T:
        assert np.bincount(step, minlength=num_sinks).tolist() == [2, 2, 2, 2]
