from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.layout_oracle import (
    TINY_DEEPSEEK_V3,
    TINY_MODELS,
    TINY_QWEN3,
    build_model,
    checkpoint,
    read_buffers,
)
from weightsync.errors import ConfigError
from weightsync.ir.dtypes import Dtype
from weightsync.planners import rules
from weightsync.planners.rules.parts import flat_boxes


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("dp", [1, 3, 8])
def test_partitions_are_ranges_of_the_flattened_parameters(name: str, dp: int) -> None:
    config = TINY_MODELS[name]
    model = build_model(config)
    named = checkpoint(model, config)
    layout = rules.zero3(config, dp=dp, dtype="F32")
    for rank in range(dp):
        manifest = layout.manifest(rank)
        buffers = read_buffers(manifest, named, has_gaps=True)
        for parameter_name, parameter in model.named_parameters():
            flat = parameter.detach().flatten()
            size = math.ceil(len(flat) / dp)
            mine = flat[rank * size : (rank + 1) * size]
            if not len(mine):
                assert parameter_name not in buffers
                continue
            held = buffers.pop(parameter_name)
            assert len(held) == size
            assert torch.equal(held[: len(mine)], mine)
            assert held[len(mine) :].isnan().all()
        assert all(key.endswith("e_score_correction_bias") for key in buffers)
        assert all(torch.equal(buffers[key], named[key]) for key in buffers)


def test_ranks_of_padding_alone_hold_nothing() -> None:
    layout = rules.zero3(TINY_QWEN3, dp=40)
    norm = "model.layers.0.self_attn.q_norm.weight"  # 4 elements: one each, 36 ranks of padding
    holders = [r for r in range(40) if norm in layout.manifest(r).buffers.names]
    assert holders == [0, 1, 2, 3]


def test_buffers_are_whole_and_keep_their_type() -> None:
    manifest = rules.zero3(TINY_DEEPSEEK_V3, dp=4).manifest(3)
    codes = dict(zip(manifest.buffers.names, manifest.buffers.dtype, strict=True))
    assert codes.pop("model.layers.1.mlp.gate.e_score_correction_bias") == Dtype.F32
    assert set(codes.values()) == {Dtype.BF16}


@pytest.mark.parametrize("degrees", [{"dp": 0}, {"dp": True}, {"dp": 2, "dtype": "F8_E4M3"}])
def test_wrong_arguments_are_refused(degrees: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        rules.zero3(TINY_QWEN3, **degrees)


@given(st.data(), st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple))
def test_few_boxes_are_a_range(data: st.DataObject, shape: tuple[int, ...]) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    numbers = torch.arange(numel).reshape(shape)
    found: list[int] = []
    boxes = list(flat_boxes(shape, start, stop))
    for lo, n in boxes:
        box = tuple(slice(a, a + k) for a, k in zip(lo, n, strict=True))
        found += numbers[box].flatten().tolist()
    assert found == list(range(start, stop))
    assert len(boxes) <= 2 * len(shape) - 1
