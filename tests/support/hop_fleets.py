"""Fleets whose sinks have something in common, as random scenarios seldom do."""

from __future__ import annotations

import dataclasses
import random

import numpy as np

from support.scenarios import Scenario, random_scenario
from weightsync.ir import Manifest, Plan, PlanOptions, Table
from weightsync.ir.repeat import repeat_ranks

__all__ = ["corrupted", "hop_options", "replicated"]


def replicated(rng: random.Random) -> tuple[Scenario, Manifest, Manifest, int]:
    """Return a scenario, its sources, and its sinks as 1 to 3 equal replicas."""
    scenario = random_scenario(rng)
    source, sink = scenario.manifests()
    count = rng.randint(1, 3)
    labels = [[f"sink {i}/{rank}" for rank in range(len(sink.ranks))] for i in range(count)]
    return scenario, source, repeat_ranks(sink, labels), count


def hop_options(rng: random.Random, options: PlanOptions, count: int) -> PlanOptions:
    """Return options that let sinks pass on."""
    return dataclasses.replace(
        options,
        ranks_per_node=rng.randint(1, 4),
        node_dedup=rng.choice(["on", "on", "auto", "off"]),
        relays=rng.choice(["on", "auto", "off"] if count > 1 else ["auto", "off"]),
        node_link_ratio=rng.choice([0.5, 1.0, 8.0]),
    )


def corrupted(plan: Plan, rng: random.Random) -> Plan:
    """Return the plan with one random number of one random table changed."""
    names = ("rows", "rows", "nests", "chunks", "buckets")
    name = rng.choice([t for t in names if len(getattr(plan, t))])
    table: Table = getattr(plan, name)
    column = rng.choice([c for c in table.COLUMNS])
    values = np.array(getattr(table, column))
    flat = values.reshape(-1)
    at = rng.randrange(len(flat))
    old = flat[at]
    if values.dtype == np.bool_:
        flat[at] = not old
    else:
        other = rng.choice(
            [int(old) + 1, int(old) - 1, int(rng.choice(flat)), 0, 1 << 40, -(1 << 62)]
        )
        info = np.iinfo(values.dtype)
        flat[at] = min(max(other, int(info.min)), int(info.max))
    return dataclasses.replace(plan, **{name: dataclasses.replace(table, **{column: values})})
