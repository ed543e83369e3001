"""The cells of vLLM's layout matrix as layouts and recordings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from support.layout_matrix import Canonical
from support.vllm_cells import Cell
from weightsync.planners import rules

if TYPE_CHECKING:
    from weightsync.integrations.recording import Recording

__all__ = ["recorded", "sink_layout"]


def sink_layout(cell: Cell) -> rules.VllmLayout:
    """What the hand-written rule says about a cell."""
    degrees = cell.degrees
    return rules.vllm(
        cell.config,
        tp=degrees.tp,
        dp=degrees.dp,
        pp=degrees.pp,
        ep=degrees.ep,
        expert_placement=degrees.placement,
        num_redundant_experts=degrees.num_redundant,
    )


def recorded(vllm_config: Any, canonical: Canonical) -> Recording:
    """The layout of the current rank, recorded from vLLM's own loader."""
    from weightsync.integrations.vllm.twin import record_worker

    shapes = {name: (shape, canonical.dtypes[name]) for name, shape in canonical.shapes.items()}
    return record_worker(vllm_config, shapes)
