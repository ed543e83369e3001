"""Models that transformers itself loads onto a mesh, by its own plans, over gloo."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from transformers.distributed import DistributedConfig

from support.gloo import run_ranks
from support.layout_oracle import (
    TINY_DEEPSEEK_V3,
    TINY_GLM4_MOE,
    TINY_GPT_OSS,
    TINY_LLAMA,
    TINY_QWEN3,
    TINY_QWEN3_MOE,
    assert_holds,
    build_model,
    checkpoint,
    number_elements,
    piece_rows,
    read_buffers,
)
from weightsync.live.layout import module_layout
from weightsync.planners import rules

TINY_GPT_OSS_EVEN = {**TINY_GPT_OSS, "num_local_experts": 4}
# Model and sizes of the mesh; what they do not name is 1, and all together are 4 ranks.
CASES: list[tuple[dict[str, Any], dict[str, int]]] = [
    (TINY_QWEN3, {"fsdp_size": 2, "tp_size": 2}),
    (TINY_QWEN3, {"dp_replicate_size": 2, "tp_size": 2}),
    (TINY_QWEN3_MOE, {"fsdp_size": 2, "tp_size": 2}),
    (TINY_QWEN3_MOE, {"fsdp_size": 2, "tp_size": 2, "ep_size": 2}),
    (TINY_DEEPSEEK_V3, {"fsdp_size": 2, "tp_size": 2}),
    (TINY_DEEPSEEK_V3, {"fsdp_size": 4, "ep_size": 2}),
    (TINY_GLM4_MOE, {"dp_replicate_size": 2, "fsdp_size": 2}),
    (TINY_GPT_OSS, {"fsdp_size": 4}),
    (TINY_GPT_OSS_EVEN, {"fsdp_size": 4, "ep_size": 2}),
    (TINY_LLAMA, {"fsdp_size": 2, "tp_size": 2}),
]
FUSED = "model.layers.0.mlp.experts.gate_up_proj"


def rule(
    config: dict[str, Any],
    dp_replicate_size: int = 1,
    fsdp_size: int = 1,
    tp_size: int = 1,
    ep_size: int = 1,
) -> rules.Fsdp2Layout:
    """The rule by transformers' own sizes."""
    fsdp = fsdp_size * tp_size // ep_size if ep_size > 1 else fsdp_size
    return rules.fsdp2(config, fsdp=fsdp, replicate=dp_replicate_size, tp=tp_size, ep=ep_size)


def placed(case: tuple[dict[str, Any], dict[str, int]], path: Path) -> dict[str, Any]:
    """Saves a model of element numbers, loads it cut, and holds what is said of it against it."""
    config, sizes = case
    model = build_model(config)
    number_elements(model)
    named = {name: tensor.clone() for name, tensor in checkpoint(model, config).items()}
    if dist.get_rank() == 0:
        model.save_pretrained(path)
    dist.barrier()
    cut = transformers.AutoModelForCausalLM.from_pretrained(
        path, distributed_config=DistributedConfig(**sizes)
    )
    live = module_layout(cut)
    read_buffers(live.manifest(), named)
    assert_holds(live.tensors(), live.manifest(), named)
    expected = rule(config, **sizes).manifest(dist.get_rank())
    assert piece_rows(live.manifest()) == piece_rows(expected), sizes
    assert live.manifest() == expected
    return {n: p.placements for n, p in cut.named_parameters() if isinstance(p, DTensor)}


def check_plans(rank: int) -> None:
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder, src=0)
        found = [placed(case, Path(folder[0], str(n))) for n, case in enumerate(CASES)]
        dist.barrier()  # nobody reads any more
    # The plans do what this test is about: strided shards, alone and under FSDP2.
    strided = _StridedShard(0, split_factor=2)
    assert found[0]["model.layers.0.mlp.up_proj.weight"] == (strided, Shard(0))
    assert found[2][FUSED] == (Shard(0), _StridedShard(1, split_factor=2))
    assert found[3][FUSED] == (strided, Shard(0))


def test_every_element_is_where_its_description_says(tmp_path: Path) -> None:
    run_ranks(check_plans, 4, tmp_path)
