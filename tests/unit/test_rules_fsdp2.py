from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support.layout_oracle import TINY_MODELS, build_model, checkpoint, read_buffers
from weightsync.errors import ConfigError
from weightsync.ir.dtypes import Dtype
from weightsync.ir.manifest import Manifest
from weightsync.planners import rules
from weightsync.planners.planner import plan_transfer


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("fsdp", [1, 3, 7])
def test_shards_are_the_chunks_of_the_module(name: str, fsdp: int) -> None:
    config = TINY_MODELS[name]
    model = build_model(config)
    named = checkpoint(model, config)
    layout = rules.fsdp2(config, fsdp=fsdp)
    for rank in range(fsdp):
        expected: dict[str, Tensor] = {}
        for parameter_name, parameter in model.named_parameters():
            chunks = parameter.detach().chunk(fsdp)
            if rank < len(chunks):
                expected[parameter_name] = chunks[rank].flatten()
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                expected[buffer_name] = buffer  # fully_shard leaves buffers alone
        buffers = read_buffers(layout.manifest(rank), named)
        assert buffers.keys() == expected.keys()
        for parameter_name, tensor in expected.items():
            assert torch.equal(buffers[parameter_name], tensor), f"rank {rank}: {parameter_name}"


def test_copies_of_a_hybrid_mesh_are_equal() -> None:
    config = TINY_MODELS["qwen3_moe"]
    layout = rules.fsdp2(config, fsdp=3, replicate=2, dtype="BF16")
    assert layout.world_size == 6
    for rank in range(3):
        one, other = layout.manifest(rank), layout.manifest(rank + 3)
        assert one.buffers.names == other.buffers.names
        for column in ("tensor", "buffer", "lo", "n", "step", "offset", "stride"):
            assert (getattr(one.pieces, column) == getattr(other.pieces, column)).all()


def test_buffers_keep_their_dtype() -> None:
    manifest = rules.fsdp2(TINY_MODELS["deepseek_v3"], fsdp=2, dtype="BF16").manifest(1)
    codes = dict(zip(manifest.buffers.names, manifest.buffers.dtype, strict=True))
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert codes.pop(bias) == Dtype.F32
    assert set(codes.values()) == {Dtype.BF16}


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_model_can_be_planned(name: str) -> None:
    config = TINY_MODELS[name]
    trainer = rules.fsdp2(config, fsdp=2, replicate=2)
    sources = Manifest.merge("source", [trainer.manifest(rank) for rank in range(4)])
    sink = rules.hf(config, side="sink").manifest(0)
    plan_transfer(sources, sink)  # which proves that every byte of the sink is written once


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_checkpoint_is_whole_on_every_rank(name: str) -> None:
    config = TINY_MODELS[name]
    named = checkpoint(build_model(config), config)
    layout = rules.hf(config, world=2, dtype="F32")
    for rank in range(2):
        buffers = read_buffers(layout.manifest(rank), named)
        assert buffers.keys() == named.keys()
        assert all(torch.equal(buffers[name], named[name].flatten()) for name in named)


def test_a_checkpoint_can_be_a_sink() -> None:
    assert rules.hf(TINY_MODELS["qwen3"], side="sink").manifest(0).ranks == ("sink 0",)


def test_wrong_degrees_are_refused() -> None:
    for call in (
        lambda: rules.fsdp2(TINY_MODELS["qwen3"], fsdp=0),
        lambda: rules.fsdp2(TINY_MODELS["qwen3"], fsdp=2, replicate=-1),
        lambda: rules.hf(TINY_MODELS["qwen3"], world=0),
        lambda: rules.fsdp2(TINY_MODELS["qwen3"], fsdp=2).manifest(2),
    ):
        with pytest.raises(ConfigError):
            call()
