"""The offline dry run: plan a transfer that nobody started, its physical limit and its prediction.

Needs no torch, GPU or NIC: manifests come from rules, the plan from the planner that jobs use.
"""

from __future__ import annotations

from weightsync.dryrun.planning import plan
from weightsync.dryrun.report import PlanReport

__all__ = ["PlanReport", "plan"]
