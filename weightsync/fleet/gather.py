"""The usual way, for comparison: gather the model to rank 0 over gloo, broadcast it to sinks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Final

import numpy as np
import torch
import torch.distributed as dist

from weightsync.demo.worker import Channel, Message
from weightsync.units import MIB

__all__ = ["run"]

_BUCKET_BYTES: Final = 16 * MIB  # as frameworks cut models for collectives
_TIMEOUT: Final = timedelta(seconds=300)
_SEED: Final = 20261122


def run(channel: Channel, options: Message, commands: Iterator[Message]) -> None:
    """Move `bytes` of weights from all sources to all sinks, when told.

    Ranks are the sources, then the sinks. Each source holds an equal share; every sink gets the
    whole model, as it does where frameworks broadcast.
    """
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = ",".join(options["interfaces"])
    rank, num_sources = int(options["rank"]), int(options["sources"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{options['store']}",
        rank=rank,
        world_size=num_sources + int(options["sinks"]),
        timeout=_TIMEOUT,
    )
    trainers = dist.new_group(list(range(num_sources)), timeout=_TIMEOUT)
    receivers = dist.new_group([0, *range(num_sources, dist.get_world_size())], timeout=_TIMEOUT)
    nbytes = int(options["bytes"]) // num_sources * num_sources
    share = nbytes // num_sources
    model = torch.empty(nbytes, dtype=torch.uint8)
    model.fill_(0)
    own = torch.from_numpy(_content(rank, share)) if rank < num_sources else None
    channel.send(event="ready")
    for _ in commands:
        dist.barrier()
        began = time.monotonic()
        step = max(1, _BUCKET_BYTES // num_sources)
        for first in range(0, share, step):
            size = min(step, share - first)
            bucket = model[first * num_sources : (first + size) * num_sources]
            if own is not None:
                parts = list(torch.split(bucket, size)) if rank == 0 else None
                dist.gather(own[first : first + size], parts, dst=0, group=trainers)
            if rank == 0 or own is None:
                dist.broadcast(bucket, src=0, group=receivers)
        ended = time.monotonic()
        dist.barrier()
        problem = None
        if own is None and not _is_whole(model.numpy(), num_sources, share, step):
            problem = f"rank {rank} did not get what the sources hold"
        channel.send(event="gather", began=began, ended=ended, bytes=nbytes, problem=problem)
    dist.destroy_process_group()


def _content(rank: int, nbytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    generator = np.random.SFC64(np.random.SeedSequence((_SEED, rank)))
    words = generator.random_raw(-(-nbytes // 8))
    return np.asarray(words, np.uint64).view(np.uint8)[:nbytes]


def _is_whole(
    model: np.ndarray[tuple[int], np.dtype[np.uint8]], num_sources: int, share: int, step: int
) -> bool:
    """Whether every share lies where its bucket has it."""
    for rank in range(num_sources):
        own = _content(rank, share)
        for first in range(0, share, step):
            size = min(step, share - first)
            at = first * num_sources + rank * size
            if not np.array_equal(model[at : at + size], own[first : first + size]):
                return False
    return True
