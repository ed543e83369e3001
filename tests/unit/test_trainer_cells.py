"""The layout matrix of trainers, byte for byte: Megatron-Core and ZeRO-3 to vLLM.

Sources hold what an independent oracle cuts out of random tensors, with NaN for padding. The plan
is carried out row by row, and every engine rank must then hold what its layout demands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from support.layout_oracle import build_model, checkpoint
from support.trainer_cells import MEGATRON_CELLS, ZERO3_CELLS, MegatronCell, Zero3Cell
from support.trainer_matrix import assert_delivers
from weightsync.planners import rules

Named = dict[str, Tensor]


@pytest.mark.parametrize("cell", MEGATRON_CELLS, ids=lambda cell: cell.name)
def test_megatron_delivers(cell: MegatronCell) -> None:
    named = checkpoint(build_model(cell.config), cell.config)
    trainer = cell.layout()
    held = [cell.cut.tensors(named, cell.config, rank) for rank in range(trainer.world_size)]
    manifests = [trainer.manifest(rank) for rank in range(trainer.world_size)]
    for degrees in cell.engines:
        assert_delivers(manifests, held, named, cell.config, degrees)


def partitions(config: Mapping[str, Any], dp: int) -> list[Named]:
    """What ZeRO-3 makes of a model: flattened, padded with NaN, cut into equal parts."""
    model = build_model(config)
    found: list[Named] = [{} for _ in range(dp)]
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        padded = torch.nn.functional.pad(flat, (0, -len(flat) % dp), value=float("nan"))
        for rank, part in enumerate(padded.chunk(dp)):
            found[rank][name] = part
    for name, buffer in model.named_buffers():
        for rank in range(dp):
            found[rank][name] = buffer
    return found


@pytest.mark.parametrize("cell", ZERO3_CELLS, ids=lambda cell: cell.name)
def test_zero3_delivers(cell: Zero3Cell) -> None:
    held = partitions(cell.config, cell.dp)
    named = checkpoint(build_model(cell.config), cell.config)
    trainer = rules.zero3(cell.config, dp=cell.dp, dtype="F32")
    manifests = [trainer.manifest(rank) for rank in range(cell.dp)]
    for degrees in cell.engines:
        assert_delivers(manifests, held, named, cell.config, degrees)


def test_a_mistake_of_the_layout_is_seen() -> None:
    """Queries in the order of heads instead of groups: the bytes are other ones."""
    [cell] = [cell for cell in MEGATRON_CELLS if cell.name == "qwen3 tp2 pp2 vpp2"]
    named = checkpoint(build_model(cell.config), cell.config)
    held = [cell.cut.tensors(named, cell.config, rank) for rank in range(4)]
    manifests = [cell.layout().manifest(rank) for rank in range(4)]
    for tensors in held:
        for name, tensor in tensors.items():
            if name.endswith("linear_qkv.weight"):
                tensors[name] = tensor.flip(0)
    with pytest.raises(AssertionError, match="qkv_proj"):
        assert_delivers(manifests, held, named, cell.config, {"tp": 1})


def test_the_matrix_has_every_family() -> None:
    for cells in (MEGATRON_CELLS, ZERO3_CELLS):
        assert {cell.config["model_type"] for cell in cells} == set(rules.SUPPORTED_MODELS)
        assert len({cell.name for cell in cells}) == len(cells) >= 8
