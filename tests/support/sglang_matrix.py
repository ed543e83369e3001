"""The cells of SGLang's layout matrix as layouts and recordings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from support.layout_matrix import Canonical
from support.sglang_cells import Cell
from weightsync.planners import rules

if TYPE_CHECKING:
    from weightsync.integrations.recording import Recording

__all__ = ["recorded", "sink_layout"]


def sink_layout(cell: Cell) -> rules.SglangLayout:
    """What the hand-written rule says about a cell."""
    return rules.sglang(cell.config, **cell.degrees.flags)


def recorded(model_config: Any, canonical: Canonical) -> Recording:
    """The layout of the current rank, recorded from SGLang's own loader."""
    from support.sglang_ranks import built
    from weightsync.integrations.recording import Recorder, load_twin, read_twin

    shapes = {name: (shape, canonical.dtypes[name]) for name, shape in canonical.shapes.items()}
    with Recorder() as recorder:
        twin = built(model_config, "meta")
        with torch.device("meta"):
            load_twin("SGLang", twin, recorder, shapes)
        return read_twin(twin, recorder, shapes)
