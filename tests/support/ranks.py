"""Manifests of single ranks, as members of a job send them."""

from __future__ import annotations

import dataclasses

import numpy as np

from weightsync.ir import Manifest
from weightsync.ir.manifest import BufferTable

__all__ = ["rank_bytes"]


def rank_bytes(merged: Manifest) -> list[bytes]:
    """Return what each rank of a merged manifest would send."""
    found = []
    for rank in range(len(merged.ranks)):
        ids = merged.buffers_of(rank)
        number = np.full(len(merged.buffers), -1, np.int32)
        number[ids] = np.arange(len(ids))
        buffers, pieces = merged.buffers, merged.pieces
        own = pieces.take(number[pieces.buffer] >= 0)
        alone = Manifest(
            side=merged.side,
            ranks=("somebody",),
            tensors=merged.tensors,
            buffers=BufferTable(
                tuple(buffers.names[i] for i in ids),
                np.zeros(len(ids), np.int32),
                buffers.dtype[ids],
                buffers.numel[ids],
            ),
            pieces=dataclasses.replace(own, buffer=number[own.buffer]),
            encodings=merged.encodings,
        )
        found.append(alone.to_bytes())
    return found
