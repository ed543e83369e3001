"""Real DeepSpeed engines on ranks of their own, over gloo: ZeRO-3 partitions against the rule."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from support.gloo import run_ranks
from support.layout_oracle import (
    TINY_MODELS,
    TINY_QWEN3,
    assert_holds,
    build_model,
    checkpoint,
    piece_rows,
)
from support.trainer_cells import ZERO3_CELLS
from support.trainer_matrix import assert_delivers
from weightsync.client import Job, Sink, Source
from weightsync.integrations import readback
from weightsync.live.layout import module_layout
from weightsync.planners import rules

# Three ranks: most parameters are padded. Names of 4 and 10 elements give a rank without any.
RANKS = 3
TIMEOUT_S = 60.0


@contextmanager
def engine(config: dict[str, Any], dtype: str = "BF16", **zero: Any) -> Iterator[Any]:
    """A DeepSpeed engine around the seeded transformers model."""
    os.environ |= {"LOCAL_RANK": str(dist.get_rank()), "DS_ACCELERATOR": "cpu"}
    import deepspeed

    model = build_model(config)
    made, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, **zero},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": dtype == "BF16"},
        },
    )
    try:
        yield made
    finally:
        made.destroy()


def gathered(model: nn.Module, config: dict[str, Any]) -> dict[str, Tensor]:
    """The checkpoint that DeepSpeed itself gathers."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: tensor.clone() for name, tensor in checkpoint(model, config).items()}


def step(made: Any, config: dict[str, Any]) -> None:
    torch.manual_seed(dist.get_rank())
    ids = torch.randint(0, config["vocab_size"], (1, 6))
    loss = made(input_ids=ids, labels=ids).loss
    made.backward(loss)
    made.step()


def check_partitions(rank: int) -> None:
    for config in TINY_MODELS.values():
        named = checkpoint(build_model(config), config)
        biases = {name for name in named if name.endswith("e_score_correction_bias")}
        named = {n: t if n in biases else t.bfloat16() for n, t in named.items()}
        with engine(config) as made:
            for weights in (made, made.module):
                live = module_layout(weights)
                expected = rules.zero3(config, dp=RANKS).manifest(rank)
                assert piece_rows(live.manifest()) == piece_rows(expected)
                assert live.manifest() == expected
            assert_holds(live.tensors(), live.manifest(), named)


def check_delivery(rank: int) -> None:
    """Every family of the matrix, from the memory of the real partitions, garbage included."""
    for cell in ZERO3_CELLS:
        named = checkpoint(build_model(cell.config), cell.config)
        with engine(cell.config, "F32") as made:
            live = module_layout(made)
            mine = (
                live.manifest(),
                {name: tensor.clone() for name, tensor in live.tensors().items()},
            )
            everyone: list[Any] = [None] * RANKS
            dist.all_gather_object(everyone, mine)
            if rank == 0:
                manifests, held = zip(*everyone, strict=True)
                for degrees in cell.engines:
                    assert_delivers(manifests, held, named, cell.config, degrees)
            dist.barrier()


def check_steps(rank: int) -> None:
    """Partitions are what lasts, also of parameters that stay gathered, and after a step."""
    for threshold in (0, 100_000):
        with engine(TINY_QWEN3, stage3_param_persistence_threshold=threshold) as made:
            before = gathered(made.module, TINY_QWEN3)
            live = module_layout(made)
            kept = [p.ds_persist for p in made.module.parameters()]
            assert all(kept) if threshold else not any(kept)
            step(made, TINY_QWEN3)
            after = gathered(made.module, TINY_QWEN3)
            assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])
            assert_holds(live.tensors(), live.manifest(), after)


def check_publish(rank: int) -> None:
    """`Source(engine)`: a step, a version, and what vLLM's ranks hold of it."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, src=0)
    url = f"unix://{folder[0]}/job.sock"
    with engine(TINY_QWEN3) as made:
        job = Job.start(url) if rank == 0 else None
        dist.barrier()
        layout = rules.vllm(TINY_QWEN3, tp=2)
        sinks = []
        for tp_rank in range(2 if rank == 0 else 0):
            manifest = layout.manifest(tp_rank)
            memory = {
                name: torch.zeros(int(numel), dtype=torch.bfloat16)
                for name, numel in zip(manifest.buffers.names, manifest.buffers.numel, strict=True)
            }
            sink = Sink(
                memory, layout=layout, replica="a", rank=tp_rank, world_size=2, job=url,
                timeout_s=TIMEOUT_S,
            )  # fmt: skip
            sinks.append((sink, memory))
        with Source(made, job=url, timeout_s=TIMEOUT_S) as source, ThreadPoolExecutor() as pool:
            for version in (1, 2):
                step(made, TINY_QWEN3)
                named = gathered(made.module, TINY_QWEN3)
                adopted = [pool.submit(s.refit, timeout_s=TIMEOUT_S) for s, _ in sinks]
                report = source.publish()
                assert report.version == version
                for tp_rank, future in enumerate(adopted):
                    assert future.result(TIMEOUT_S) == version
                    expected = readback.shard(named, TINY_QWEN3, tp=2, rank=tp_rank)
                    memory = sinks[tp_rank][1]
                    assert memory.keys() == expected.keys()
                    for name, tensor in expected.items():
                        assert torch.equal(memory[name], tensor.flatten()), name
                dist.barrier()
        for sink, _ in sinks:
            sink.close()
        if job is not None:
            job.close()


def test_partitions_are_those_of_the_rule(tmp_path: Path) -> None:
    run_ranks(check_partitions, RANKS, tmp_path, deadline_s=180.0)


def test_partitions_are_delivered(tmp_path: Path) -> None:
    run_ranks(check_delivery, RANKS, tmp_path, deadline_s=180.0)


def test_partitions_last(tmp_path: Path) -> None:
    run_ranks(check_steps, RANKS, tmp_path)


def test_an_engine_is_published(tmp_path: Path) -> None:
    run_ranks(check_publish, RANKS, tmp_path)
