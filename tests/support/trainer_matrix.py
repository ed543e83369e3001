"""Plans from trainers to vLLM, carried out row by row on what the trainers' ranks really hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from support.layout_oracle import read_buffers
from support.oracle import Codes, execute
from weightsync.integrations import readback
from weightsync.ir import Arena, Manifest
from weightsync.planners import rules
from weightsync.planners.planner import plan_transfer

__all__ = ["assert_delivers"]

# Families that the second oracle of engines knows, at plain tensor or expert parallelism.
READ_BACK = ("llama", "qwen3", "qwen3_moe")


def codes(tensor: Tensor) -> Codes:
    bits: Codes = tensor.contiguous().flatten().numpy().view(np.uint32)
    return bits


def assert_delivers(
    sources: Sequence[Manifest],
    held: Sequence[Mapping[str, Tensor]],
    named: Mapping[str, Tensor],
    config: Mapping[str, Any],
    degrees: Mapping[str, Any],
) -> None:
    """Plans from these ranks to an engine, carries the plan out, and looks at every engine rank.

    Args:
        sources: What each trainer rank says it holds.
        held: What it holds: float32 tensors by buffer; padding is anything.
        named: The checkpoint.
        config: The model.
        degrees: Of `rules.vllm`.
    """
    engine = rules.vllm(config, dtype="F32", **degrees)
    sinks = [engine.manifest(rank) for rank in range(engine.world_size)]
    plan = plan_transfer(Manifest.merge("source", sources), Manifest.merge("sink", sinks))
    memory = [
        codes(held[rank][name])
        for rank, manifest in enumerate(sources)
        for name in manifest.buffers.names
    ]
    arenas, counts = execute(plan, memory)
    for rank, sink in enumerate(sinks):
        expected = read_buffers(sink, named)
        if config["model_type"] in READ_BACK and degrees.keys() <= {"tp", "ep"}:
            second = readback.shard(named, config, rank=rank, **degrees)
            assert second.keys() == expected.keys()
            assert all(torch.equal(second[name].flatten(), expected[name]) for name in second)
        arena = Arena(plan.sink, rank)
        places = zip(arena.buffers.tolist(), arena.offset_bytes.tolist(), strict=True)
        for buffer, offset in places:
            name = plan.sink.buffers.names[buffer]
            content = codes(expected[name]).view(np.uint8)
            place = slice(offset, offset + len(content))
            assert np.array_equal(arenas[rank][place], content), f"sink {rank}: {name}"
            assert (counts[rank][place] == 1).all(), f"sink {rank}: {name}"
