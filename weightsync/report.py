"""What a publish tells its caller."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Stage", "VersionReport"]

Stage = Literal["local", "prepared", "committed", "adopted"]


@dataclass(frozen=True)
class VersionReport:
    """One version as one source rank saw it.

    Args:
        version: Its number.
        tag: What the publisher attached to it.
        stage: How far it had come when the report was made.
        num_bytes: Payload that this rank wrote.
        num_replicas: Replicas that hold the version.
        seconds: From the call to the stage.
        stages_s: Busy seconds of every stage of this rank's pipeline, and `wait_open` (all
            ranks called, sinks made room), `transfer` (the pipeline from end to end) and
            `decide` (votes and decision). When adopted, also of the slowest sink: `sink_fill`
            (bytes arriving and being checked while it serves the old version), `sink_verify`
            (checking, a part of that) and `sink_pause` (making the version live, while it serves
            nothing).
        spans: (name, start, end) of the same on this process's monotonic clock, for traces.
        peak_staging_bytes: Most staging in use at once.
    """

    version: int
    tag: str
    stage: Stage
    num_bytes: int
    num_replicas: int
    seconds: float
    stages_s: dict[str, float]
    spans: list[tuple[str, float, float]] = field(default_factory=list, repr=False)
    peak_staging_bytes: int = 0

    @property
    def gb_per_s(self) -> float:
        """Payload of this rank over `seconds`, in 10^9 bytes per second."""
        return self.num_bytes / self.seconds / 1e9 if self.seconds > 0 else 0.0
