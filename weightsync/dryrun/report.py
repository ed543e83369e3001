"""What a dry run found: the plan, what it moves, how fast it can be, and how fast it should be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from weightsync.ir import Manifest, Plan
from weightsync.ir.tables import IntArray, sum_by
from weightsync.planners.cluster import Cluster
from weightsync.planners.limits import Limits
from weightsync.planners.predict import Prediction
from weightsync.planners.traffic import Traffic

__all__ = ["Memory", "Mode", "PlanReport"]

Mode = Literal["staged", "in_place"]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of weights and of what an update needs beside them, on every rank.

    Attributes:
        source_weights: What each source holds, `(S,)`.
        source_staging: Staging that each source uses at most, `(S,)`.
        sink_weights: What each sink serves, `(D,)`. In place it needs no more.
        sink_staging: What staged mode needs beside that, `(D,)`.
    """

    source_weights: IntArray
    source_staging: IntArray
    sink_weights: IntArray
    sink_staging: IntArray

    @classmethod
    def of(cls, plan: Plan, source_staging: IntArray) -> Memory:
        """Add up the buffers of a plan's ranks."""
        arenas = [plan.sink.arena_nbytes(rank) for rank in range(len(plan.sink.ranks))]
        return cls(
            source_weights=_weights(plan.source),
            source_staging=source_staging,
            sink_weights=_weights(plan.sink),
            sink_staging=np.array(arenas, np.int64),
        )

    @property
    def source_total(self) -> IntArray:
        """Of each source, `(S,)`."""
        return self.source_weights + self.source_staging

    def sink_total(self, mode: Mode) -> IntArray:
        """Of each sink in a mode, `(D,)`."""
        return self.sink_weights + (self.sink_staging if mode == "staged" else 0)


def _weights(side: Manifest) -> IntArray:
    buffers = side.buffers
    return sum_by(buffers.rank, buffers.numel * buffers.itemsize, len(side.ranks))


@dataclasses.dataclass(frozen=True)
class PlanReport:
    """A plan that was made offline, and what it means on a cluster; made by `weightsync.plan`.

    Attributes:
        model: Its name.
        trainer, rollout: Kind, ranks (of the trainer, or of one replica) and degrees; `rollout` has
            `replicas` and `mode` besides.
        cluster: What limits and prediction are of.
        plan: The plan, validated: every byte of a sink is written once.
        traffic: What it moves.
        limits: Seconds that no software can beat, at the rates of data sheets.
        attainable: The same at rates that good software reaches.
        prediction: What the model of the executor says, at attainable rates; no measurement.
        fixed_s: What it says if no byte took any time: writes, buckets and messages; None where the
            plan is so large that this was left out.
        memory: Of every rank.
        plan_seconds: Time that manifests, plan and proof took here.
    """

    model: str
    trainer: Mapping[str, Any]
    rollout: Mapping[str, Any]
    cluster: Cluster
    plan: Plan
    traffic: Traffic
    limits: Limits
    attainable: Limits
    prediction: Prediction
    fixed_s: float | None
    memory: Memory
    plan_seconds: float

    @property
    def efficiency(self) -> float:
        """Physical limit at nominal rates over predicted time; 1 would be perfect."""
        predicted = self.prediction.predicted_s
        return self.limits.physical_limit_s / predicted if predicted else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the report as `weightsync plan --json` prints it; docs/plan.md explains the keys.

        Times are seconds, sizes bytes.
        """
        plan, prediction, memory = self.plan, self.prediction, self.memory
        return {
            "schema": "weightsync.plan/1",
            "model": self.model,
            "trainer": dict(self.trainer),
            "rollout": dict(self.rollout),
            "cluster": self.cluster.name,
            "num_tensors": len(plan.sink.tensors),
            "num_regions": plan.num_sent,
            "num_writes": len(plan.chunks),
            "bytes_total": int(plan.buckets.nbytes.sum()),
            "bytes_per_source": _spread(plan.bytes_per_source()),
            "bytes_per_sink": _spread(plan.bytes_per_sink()),
            "bytes_passed_on": int(plan.bytes_per_forwarder().sum()),
            "strategy": self.limits.strategy,
            "gateways": prediction.num_gateways,
            "plan_seconds": self.plan_seconds,
            "limits": self.limits.by_name(),
            "physical_limit_s": self.limits.physical_limit_s,
            "limiting": self.limits.limiting,
            "predicted_s": prediction.predicted_s,
            "commit_s": prediction.commit_s,
            "pause_s": prediction.pause_s,
            "efficiency": self.efficiency,
            "memory_per_rank": {
                "source": {
                    "weights_bytes": int(memory.source_weights.max()),
                    "staging_bytes": int(memory.source_staging.max()),
                    "total_bytes": int(memory.source_total.max()),
                },
                "sink": {
                    "weights_bytes": int(memory.sink_weights.max()),
                    "staged_bytes": int(memory.sink_total("staged").max()),
                    "in_place_bytes": int(memory.sink_total("in_place").max()),
                },
            },
            "peak_staging_bytes": int(memory.source_staging.max()),
            "digest": plan.digest,
        }

    def print(self, console: Console) -> None:
        """Print tables for people."""
        from weightsync.dryrun.tables import print_report

        print_report(self, console)

    def write_rows(self, path: str | Path) -> None:
        """Write every row of the plan to a Parquet file; docs/plan.md explains the columns.

        Raises:
            ConfigError: pyarrow is not installed, or the file cannot be written.
        """
        from weightsync.dryrun.rows import write_rows

        facts = {
            "model": self.model,
            "trainer": dict(self.trainer),
            "rollout": dict(self.rollout),
            "cluster": self.cluster.name,
            "replicas": self.rollout["replicas"],
            "ranks_per_replica": self.rollout["ranks"],
        }
        write_rows(self.plan, self.cluster, Path(path), facts)

    def write_page(self, path: str | Path) -> None:
        """Write the report as one HTML file that needs no network.

        Raises:
            ConfigError: Jinja2 is not installed, or the file cannot be written.
        """
        from weightsync.dryrun.page import write_page

        write_page(self, Path(path))

    def write_trace(self, path: str | Path) -> None:
        """Write the predicted timeline for ui.perfetto.dev.

        Raises:
            ConfigError: The file cannot be written.
        """
        from weightsync.dryrun.timeline import write_trace

        write_trace(self, Path(path))


def _spread(values: IntArray) -> dict[str, Any]:
    return {"min": int(values.min()), "mean": float(values.mean()), "max": int(values.max())}
