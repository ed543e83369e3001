"""The protocol that every layout follows, made by a rule or read from live weights."""

from __future__ import annotations

from typing import Protocol

from weightsync.ir.manifest import Manifest

__all__ = ["Layout"]


class Layout(Protocol):
    """How one side holds the weights."""

    def manifest(self, rank: int) -> Manifest:
        """The manifest of one rank; pure, no torch."""
