"""Records which elements a weight loader copies where, by running it on tensors without storage.

An engine knows best how it lays weights out: its own `load_weights` cuts, fuses and places them.
`Recorder` runs such a loader on meta tensors and watches every operation below it. Views of a meta
tensor keep its storage, offset and strides, so a copy from one view to another says exactly which
canonical elements go to which elements of a parameter; no model is known here, and no byte is read.

What a loader may do: any view (slices, transposes, reshapes), copies, casts by a copy, `cat` and
`stack`, fills with a constant. A loader that computes on weights is refused by name.
"""

from __future__ import annotations

from weightsync.integrations.recording.recorder import Recorder
from weightsync.integrations.recording.twin import Recording, load_twin, read_twin
from weightsync.integrations.recording.writes import Fill, Recorded, RecordedPiece

__all__ = [
    "Fill",
    "Recorded",
    "RecordedPiece",
    "Recorder",
    "Recording",
    "load_twin",
    "read_twin",
]
