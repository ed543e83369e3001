"""Megatron-Core's layout against plain slicing; tests/engines holds it against its real modules."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from support.layout_oracle import (
    TINY_DEEPSEEK_V3,
    TINY_GPT_OSS,
    TINY_KIMI_K2,
    TINY_LLAMA,
    TINY_QWEN3,
    TINY_QWEN3_MOE,
    build_model,
    checkpoint,
    read_buffers,
)
from support.trainer_cells import MEGATRON_CELLS, MegatronCell
from weightsync.errors import ConfigError
from weightsync.ir.dtypes import Dtype
from weightsync.planners import rules
from weightsync.planners.rules.megatron_parts.degrees import Stages

CONFIGS = Path(__file__).parents[2] / "configs" / "model"


def by_name(cell: str) -> MegatronCell:
    [found] = [one for one in MEGATRON_CELLS if one.name == cell]
    return found


@pytest.mark.parametrize("cell", MEGATRON_CELLS, ids=lambda cell: cell.name)
def test_every_rank_holds_what_plain_slicing_gives(cell: MegatronCell) -> None:
    named = checkpoint(build_model(cell.config), cell.config)
    layout = cell.layout()
    assert layout.world_size == cell.cut.world_size
    for rank in range(layout.world_size):
        expected = cell.cut.tensors(named, cell.config, rank)
        buffers = read_buffers(layout.manifest(rank), named, has_gaps=True)
        assert buffers.keys() == expected.keys(), f"rank {rank}"
        for name, tensor in expected.items():
            same = torch.equal(buffers[name].nan_to_num(), tensor.flatten().nan_to_num())
            assert same, f"rank {rank}: {name}"
            assert torch.equal(buffers[name].isnan(), tensor.flatten().isnan()), name


@pytest.mark.parametrize("cell", MEGATRON_CELLS, ids=lambda cell: cell.name)
def test_shapes_are_those_of_the_modules(cell: MegatronCell) -> None:
    named = checkpoint(build_model(cell.config), cell.config)
    shapes = {p.name: p.shape for p in cell.layout().parameters(cell.layout().world_size - 1)}
    expected = cell.cut.tensors(named, cell.config, cell.cut.world_size - 1)
    for name, tensor in expected.items():
        # Experts have a dimension of their number, which is 1 where each has its own parameter.
        assert tuple(n for n in shapes[name] if n > 1) == tuple(n for n in tensor.shape if n > 1)


def test_padding_is_in_no_piece() -> None:
    layout = by_name("llama tp2, all biases").layout()
    held = [layout.manifest(rank) for rank in range(2)]
    for manifest in held:
        index = manifest.buffers.names.index("output_layer.weight")
        assert int(manifest.buffers.numel[index]) == 128 * 16  # 130 rows are padded to 256
    rows = [
        int(manifest.pieces.volume[manifest.pieces.buffer == index].sum()) // 16
        for manifest in held
        for index in [manifest.buffers.names.index("output_layer.weight")]
    ]
    assert rows == [128, 2]


def test_types_are_those_of_the_modules() -> None:
    manifest = by_name("deepseek tp2 dp3 ep3").layout("BF16").manifest(0)
    codes = dict(zip(manifest.buffers.names, manifest.buffers.dtype, strict=True))
    assert codes.pop("decoder.layers.1.mlp.router.expert_bias") == Dtype.F32
    assert set(codes.values()) == {Dtype.BF16}


def layers_of(num_layers: int, pp: int, vpp: int = 1, **how: Any) -> list[list[list[int]]]:
    chunks = Stages(**how).chunks(num_layers, pp, vpp)
    return [[list(chunk.layers) for chunk in stage] for stage in chunks]


def test_layers_are_dealt_out_as_the_comments_of_megatron_say() -> None:
    # "With 8 layers, 2 stages, and 4 model chunks": get_num_layers_to_build.
    assert layers_of(8, 2, 4) == [[[0], [2], [4], [6]], [[1], [3], [5], [7]]]
    assert layers_of(8, 2, 2) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    assert layers_of(6, 3) == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert layers_of(7, 3, first=1, last=2) == [[[0]], [[1, 2, 3, 4]], [[5, 6]]]
    assert layers_of(5, 2, first=2) == [[[0, 1]], [[2, 3, 4]]]
    assert layers_of(6, 4, embedding=True, loss=True) == [[[0]], [[1, 2]], [[3, 4]], [[5]]]
    assert layers_of(7, 2, 2, embedding=True) == [[[0], [3, 4]], [[1, 2], [5, 6]]]
    assert layers_of(3, 2, embedding=True) == [[[0]], [[1, 2]]]
    # The example of `parse_str_to_list`, with fewer layers.
    assert layers_of(7, 2, 2, layout="Ettt|(tt|)*1,tt|L") == [[[0, 1, 2], [5, 6]], [[3, 4], []]]
    assert layers_of(61, 1, layout="Et*3|(tt|)*28ttL".replace("|", ""))[0][0] == list(range(61))


@pytest.mark.parametrize(
    ("layout", "embedding", "norm", "head"),
    [
        ("Ett|tt|L", [0], 2, 2),
        ("E|tttt|L", [0], 2, 2),
        # Layers of multi-token prediction: the norm stays with the last layer before them.
        ("Ett|tt|mL", [0, 2], 1, 2),
        ("Ett|ttm|L", [0, 1], 1, 2),
    ],
)
def test_the_ends_are_where_the_drawing_has_them(
    layout: str, embedding: list[int], norm: int, head: int
) -> None:
    stages = Stages(layout=layout).chunks(4, 3, 1)
    assert [n for n, [chunk] in enumerate(stages) if chunk.has_embedding] == embedding
    assert [n for n, [chunk] in enumerate(stages) if chunk.has_norm] == [norm]
    assert [n for n, [chunk] in enumerate(stages) if chunk.has_head] == [head]


def test_all_layers_are_somewhere_once() -> None:
    for layers, pp, vpp in itertools.product(range(1, 13), range(1, 5), range(1, 4)):
        if layers % (pp * vpp) == 0 and (vpp == 1 or pp > 1):
            stages = layers_of(layers, pp, vpp)
            # Going around the stages once for every chunk gives the layers in order.
            around = [n for chunks in zip(*stages, strict=True) for chunk in chunks for n in chunk]
            assert around == list(range(layers))


REFUSED = [
    (TINY_QWEN3, {"tp": 3}, "neither multiple nor divisor of the 2 kv", "tp"),
    ({**TINY_QWEN3, "num_key_value_heads": 8}, {"tp": 16}, "num_attention_heads", "tp"),
    ({**TINY_QWEN3, "num_attention_heads": 12, "num_key_value_heads": 3}, {"tp": 4}, "3 kv", "tp"),
    ({**TINY_QWEN3, "intermediate_size": 25}, {"tp": 2}, "intermediate_size, 25", "tp"),
    ({**TINY_QWEN3, "head_dim": 1, "num_key_value_heads": 1}, {"tp": 4}, "the rows of", "tp"),
    (TINY_QWEN3, {"pp": 4}, "do not divide 2 layers", "pp"),
    (TINY_QWEN3, {"pp": 2, "vpp": 2}, "do not divide 2 layers", "vpp"),
    (TINY_QWEN3, {"vpp": 2}, "more than one stage", "vpp"),
    (TINY_QWEN3, {"pp": 2, "first_layers": 0}, "first_layers=0", "first_layers"),
    (TINY_QWEN3, {"first_layers": 1}, "first_layers=1", "first_layers"),
    (TINY_QWEN3, {"pp": 2, "last_layers": 3}, "-1 layers that", "pp"),
    (
        TINY_QWEN3,
        {"pp": 2, "last_layers": 1, "account_for_loss": True},
        "cannot be combined",
        "first_layers",
    ),
    (TINY_QWEN3, {"pp": 4, "account_for_loss": True, "account_for_embedding": True}, None, None),
    (TINY_QWEN3, {"pp": 2, "pipeline_layout": "Et|t"}, "it must be E", "pipeline_layout"),
    (TINY_QWEN3, {"pp": 2, "pipeline_layout": "Et|ttL"}, "it has 3 layers", "pipeline_layout"),
    (TINY_QWEN3, {"pp": 2, "pipeline_layout": "Et|t|L"}, "it has 3 stages", "pipeline_layout"),
    (
        TINY_QWEN3,
        {"pp": 2, "pipeline_layout": "Et|tL", "first_layers": 1},
        "other settings",
        "pipeline_layout",
    ),
    (TINY_QWEN3, {"ep": 2, "dp": 2}, "no experts", "ep"),
    (TINY_QWEN3, {"tp": 0}, "tp must be", "tp"),
    (TINY_QWEN3, {"etp": -1}, "etp must be", "etp"),
    (TINY_QWEN3, {"vocab_divisible_by": 0}, "vocab_divisible_by", "vocab_divisible_by"),
    (TINY_QWEN3_MOE, {"ep": 2}, "does not divide the 1 ranks", "ep"),
    (TINY_QWEN3_MOE, {"tp": 2, "dp": 3, "ep": 2}, "does not divide the 6 ranks", "ep"),
    (TINY_QWEN3_MOE, {"dp": 4, "ep": 4}, "does not divide the 6 experts", "ep"),
    (TINY_QWEN3_MOE, {"dp": 5, "etp": 5}, "moe_intermediate_size, 12", "etp"),
    (TINY_QWEN3_MOE, {"experts": "stacked"}, "must be one of", "experts"),
    (TINY_QWEN3_MOE, {"experts": "single", "transformer_engine": False}, "modules of", "experts"),
    (TINY_DEEPSEEK_V3, {"tp": 2, "transformer_engine": False}, "kv_lora_rank", "tp"),
    (TINY_DEEPSEEK_V3, {"tp": 8, "etp": 1}, "num_attention_heads, 4", "tp"),
    ({**TINY_DEEPSEEK_V3, "moe_intermediate_size": 7}, {"tp": 4, "etp": 1}, "the shared", "tp"),
    (TINY_KIMI_K2, {}, "attention_bias on kimi_k2", "attention_bias"),
    ({**TINY_QWEN3, "attention_bias": True}, {}, "attention_bias on qwen3", "attention_bias"),
    ({**TINY_LLAMA, "attention_bias": False}, {}, "mlp_bias on llama", "mlp_bias"),
    ({**TINY_LLAMA, "mlp_bias": False}, {}, "attention_bias on llama", "attention_bias"),
    ({**TINY_GPT_OSS, "attention_bias": False}, {}, "attention_bias on gpt_oss", "attention_bias"),
    (TINY_GPT_OSS, {"tp": 2}, "need etp=1", "etp"),
    (TINY_GPT_OSS, {"tp": 4, "etp": 1}, None, None),
]


@pytest.mark.parametrize(("config", "degrees", "words", "key"), REFUSED)
def test_what_megatron_refuses_is_refused(
    config: dict[str, Any], degrees: dict[str, Any], words: str | None, key: str | None
) -> None:
    if words is None:
        assert rules.megatron(config, **degrees).manifest(0).pieces.n.size
        return
    with pytest.raises(ConfigError, match=words) as caught:
        rules.megatron(config, **degrees)
    assert caught.value.context["key"] == key


def test_published_models_can_be_laid_out() -> None:
    """At true sizes, all ranks together hold every element, and copies are cut alike."""
    for name, degrees in (
        ("llama-3.1-405b", {"tp": 8, "pp": 16, "first_layers": 7, "last_layers": 7}),
        ("kimi-k2", {"tp": 8, "pp": 2, "ep": 64, "etp": 1, "dp": 8, "first_layers": 31}),
        ("gpt-oss-120b", {"tp": 4, "pp": 4, "ep": 8, "etp": 1, "dp": 2}),
    ):
        config = rules.model_config(CONFIGS / f"{name}.json")
        layout = rules.megatron(config, **degrees)
        shapes = rules.canonical_tensors(config)
        seen: dict[tuple[str, tuple[int, ...], tuple[int, ...]], int] = {}
        for rank in range(layout.world_size):
            for parameter in layout.parameters(rank):
                for part in parameter.parts:
                    seen[part.tensor, part.lo, part.n] = math.prod(part.n)
        held: dict[str, int] = {}
        for (tensor, _, _), volume in seen.items():
            held[tensor] = held.get(tensor, 0) + volume
        assert held == {tensor: math.prod(shape) for tensor, shape in shapes.items()}, name
