"""Safetensors checkpoints as sources and as sinks: memory-mapped, never loaded whole.

`CheckpointSource` publishes a folder of safetensors files to the sinks of a job (cold start of an
engine). `CheckpointSink` joins a job as a replica, receives one version straight into the files of
a new folder, and gives that folder its name once the version is committed and on disk.
"""

from __future__ import annotations

from weightsync.checkpoint.files import StoredCheckpoint, StoredTensor, read_checkpoint
from weightsync.checkpoint.sink import CheckpointSink, Written
from weightsync.checkpoint.source import CheckpointSource

__all__ = [
    "CheckpointSink",
    "CheckpointSource",
    "StoredCheckpoint",
    "StoredTensor",
    "Written",
    "read_checkpoint",
]
