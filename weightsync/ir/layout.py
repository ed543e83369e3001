"""The protocol that every layout follows, made by a rule or read from live weights."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from weightsync.ir.manifest import Manifest
from weightsync.ir.pieces import CONSTANT

__all__ = ["Layout", "SourceLayout"]


class Layout(Protocol):
    """How one side holds the weights."""

    def manifest(self, rank: int) -> Manifest:
        """The manifest of one rank; pure, no torch."""


@dataclasses.dataclass(frozen=True)
class SourceLayout:
    """Any layout, for the side that publishes: what an engine holds can be a source this way.

    Padding is left out: a source says where weights are, not what lies between them. What a rank
    holds twice, or several ranks hold, such as a replicated head, stays described everywhere.

    Args:
        layout: Of sources, whose manifests stay as they are, or of sinks.
    """

    layout: Layout

    def manifest(self, rank: int) -> Manifest:
        """The manifest of one rank, of the same buffers; see `Layout`."""
        manifest = self.layout.manifest(rank)
        if manifest.side == "source":
            return manifest
        pieces = manifest.pieces
        return dataclasses.replace(
            manifest,
            side="source",
            ranks=(f"source {rank}",),
            pieces=pieces.take(np.flatnonzero(pieces.tensor != CONSTANT)),
        )
