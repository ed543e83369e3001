"""One small plan, written down: a changed digest means that ranks of two releases disagree.

After an intended change run `UPDATE_GOLDEN=1 pytest tests/unit/test_plan_golden.py` and say in the
change log that plans changed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from support.oracle import moves_exactly
from weightsync.ir import Manifest, ManifestBuilder, Plan, PlanOptions, Table
from weightsync.ir.repeat import repeat_ranks
from weightsync.planners.planner import plan_transfer

_FOLDER = Path(__file__).parents[1] / "golden"


def _small_plan(**hops: Any) -> Plan:
    """Two FSDP sources with FP32 masters and a replicated norm; two TP sinks in BF16, padded."""
    sources, sinks = [], []
    for rank in range(2):
        builder = ManifestBuilder("source", f"source {rank}")
        for name in ("gate", "up"):
            builder.tensor(name, (6, 4))
            builder.buffer(name, "F32", 12)
            builder.place(name, name, (3, 4), lo=(3 * rank, 0), n=(3, 4))
        builder.tensor("norm", (10,))
        builder.buffer("norm", "BF16", 10)
        builder.place("norm", "norm", (10,))
        sources.append(builder.build())
        builder = ManifestBuilder("sink", f"sink {rank}")
        builder.buffer("gate_up", "BF16", 28)
        for slot, name in enumerate(("gate", "up")):
            builder.tensor(name, (6, 4))
            box = {"lo": (3 * rank, 0), "n": (3, 4)}
            builder.place(name, "gate_up", (3, 2, 4), at=(0, slot, 0), axes=(0, 2), **box)
        builder.constant("gate_up", 24, (4,), (1,), 0)
        builder.tensor("norm", (10,))
        builder.buffer("norm", "BF16", 10)
        builder.place("norm", "norm", (10,))
        sinks.append(builder.build())
    options = PlanOptions(
        chunk_bytes=32, bucket_bytes=64, slot_bytes=64, direct_run_bytes=16, **hops
    )
    sink = Manifest.merge("sink", sinks)
    if hops:
        sink = repeat_ranks(sink, [[f"sink {r}/{rank}" for rank in range(2)] for r in range(2)])
    return plan_transfer(Manifest.merge("source", sources), sink, options)


def _described(plan: Plan) -> dict[str, Any]:
    def rows(table: Table) -> list[dict[str, Any]]:
        columns = {name: getattr(table, name).tolist() for name in table.COLUMNS}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    return {
        "digest": plan.digest,
        "source": plan.source.digest,
        "sink": plan.sink.digest,
        "rows": rows(plan.rows),
        "nests": rows(plan.nests),
        "chunks": rows(plan.chunks),
        "buckets": rows(plan.buckets),
        "shares": rows(plan.shares),
        "bound_bytes": plan.shares.bound_bytes,
    } | ({"edges": plan.edges.tolist()} if len(plan.edges) else {})


def _compact(described: dict[str, Any]) -> str:
    """Return JSON with one table row per line."""
    lines = []
    for key, value in described.items():
        if isinstance(value, list):
            items = ",\n  ".join(json.dumps(item) for item in value)
            lines.append(f'"{key}": [\n  {items}\n ]')
        else:
            lines.append(f'"{key}": {json.dumps(value)}')
    return "{\n " + ",\n ".join(lines) + "\n}\n"


@pytest.mark.parametrize(
    ("name", "hops"),
    [
        ("small_plan", {}),
        ("small_hop_plan", {"ranks_per_node": 2, "node_dedup": "on", "relays": "on"}),
    ],
)
def test_the_small_plan_is_the_golden_one(name: str, hops: dict[str, Any]) -> None:
    plan, path = _small_plan(**hops), _FOLDER / f"{name}.json"
    assert moves_exactly(plan)
    described = _described(plan)
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.write_text(_compact(described), encoding="ascii")
    golden = json.loads(path.read_text(encoding="ascii"))
    for key in ("source", "sink", "shares", "rows", "chunks", "buckets", "digest"):
        assert described[key] == golden[key], key
    assert described == golden
