from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.testing._internal.two_tensor import TwoTensor

from support.layout_oracle import (
    TINY_LLAMA,
    TINY_MODELS,
    TINY_QWEN3,
    TINY_QWEN3_MOE,
    build_model,
    checkpoint,
    piece_rows,
    read_buffers,
)
from weightsync.errors import ConfigError, DtypeMismatchError, LayoutError, UnknownTensorError
from weightsync.integrations import readback
from weightsync.live.layout import match_buffers, module_layout
from weightsync.planners import rules


@pytest.mark.parametrize("name", TINY_MODELS)
def test_an_unsharded_module_equals_the_rule(name: str) -> None:
    config = TINY_MODELS[name]
    model = build_model(config)
    live = module_layout(model, rank=0)
    assert live.manifest().to_bytes() == rules.fsdp2(config, fsdp=1).manifest(0).to_bytes()
    named = checkpoint(model, config)
    buffers = read_buffers(live.manifest(), named)
    for buffer, tensor in live.tensors().items():
        assert torch.equal(buffers[buffer], tensor.flatten())


def test_tensors_are_the_memory_of_the_module() -> None:
    model = build_model(TINY_QWEN3)
    tensors = module_layout(model).tensors()
    parameters = dict(model.named_parameters())
    assert tensors.keys() == parameters.keys()
    for name, parameter in parameters.items():
        assert tensors[name].data_ptr() == parameter.data_ptr()
        assert not tensors[name].requires_grad


def test_weights_that_come_or_go_need_a_new_layout() -> None:
    tensors = {"b": torch.zeros(2), "a": torch.zeros(2)}
    live = module_layout(tensors)
    assert list(live.tensors()) == ["a", "b"]
    tensors["c"] = torch.zeros(2)
    with pytest.raises(LayoutError, match="came or went since their layout was made: c"):
        live.tensors()


def test_a_mapping_with_a_config_gets_canonical_names() -> None:
    model = build_model(TINY_QWEN3_MOE)
    live = module_layout(dict(model.named_parameters()), config=TINY_QWEN3_MOE, rank=2)
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in live.manifest().tensors.names
    assert live.manifest(2).ranks == ("source 2",)
    with pytest.raises(ConfigError, match="rank 2 cannot describe rank 1"):
        live.manifest(1)


def test_a_mapping_of_the_checkpoint_itself_is_understood() -> None:
    named = checkpoint(build_model(TINY_QWEN3_MOE), TINY_QWEN3_MOE)
    with_config = module_layout(named, config=TINY_QWEN3_MOE)
    assert with_config.manifest().to_bytes() == module_layout(named).manifest().to_bytes()


def test_a_state_dict_with_a_tied_head_is_one_tensor() -> None:
    state = build_model(TINY_QWEN3).state_dict()
    assert "lm_head.weight" in state
    live = module_layout(state, config=TINY_QWEN3)
    assert "lm_head.weight" not in live.manifest().tensors.names
    assert "lm_head.weight" not in live.tensors()
    # Saved apart, they are two sites of one tensor.
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    apart = piece_rows(module_layout(state, config=TINY_QWEN3).manifest())
    sites = {row.buffer for row in apart if row.tensor == "model.embed_tokens.weight"}
    assert sites == {"model.embed_tokens.weight", "lm_head.weight"}


def test_memory_tied_against_the_config_holds_both_tensors() -> None:
    model = build_model({**TINY_QWEN3, "tie_word_embeddings": False})
    model.lm_head.weight = model.model.embed_tokens.weight
    rows = piece_rows(module_layout(model).manifest())
    held = {row.tensor for row in rows if row.buffer == "model.embed_tokens.weight"}
    assert held == {"model.embed_tokens.weight", "lm_head.weight"}


def test_strides_and_offsets_are_those_of_the_memory() -> None:
    base = torch.arange(60.0)
    tensors = {
        "transposed": base[:15].reshape(3, 5).t(),
        "columns": base.reshape(6, 10)[1:5, 2:9:3],
        "scalar": base[7],
    }
    live = module_layout(tensors)
    rows = {row.buffer: row for row in piece_rows(live.manifest())}
    assert (rows["transposed"].n, rows["transposed"].stride) == ((5, 3), (1, 5))
    assert (rows["columns"].n, rows["columns"].stride) == ((4, 3), (10, 3))
    assert (rows["scalar"].n, rows["scalar"].offset) == ((1,), 0)
    numel = dict(zip(live.manifest().buffers.names, live.manifest().buffers.numel, strict=True))
    assert numel == {"transposed": 15, "columns": 37, "scalar": 1}
    assert {name: t.data_ptr() for name, t in live.tensors().items()} == {
        name: tensor.data_ptr() for name, tensor in tensors.items()
    }


def test_wrappers_leave_names_alone() -> None:
    model = build_model(TINY_LLAMA)
    plain = module_layout(model).manifest().to_bytes()
    # What torch.compile and activation checkpointing do to a module.
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    compiled = nn.Module()
    compiled._orig_mod = model
    compiled.config = model.config
    assert module_layout(compiled).manifest().to_bytes() == plain


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1, 1, 1, 1, 1), "odd has 5 dimensions"),
        (torch.zeros(2, dtype=torch.complex64), "odd has dtype torch.complex64"),
        (torch.zeros(2, 2).to_sparse(), "layout torch.sparse_coo"),
        (TwoTensor(torch.zeros(2), torch.zeros(2)), "odd is a TwoTensor"),
        (torch.zeros(2, 1).expand(2, 3), "odd is expanded"),
        (torch._neg_view(torch.zeros(2)), "odd is a negated view"),
    ],
)
def test_tensors_that_cannot_be_described_are_named(tensor: Tensor, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        module_layout({"odd": tensor})


def partitioned(rank: int, **attributes: object) -> dict[str, Tensor]:
    """What DeepSpeed makes of a parameter of 10 elements on one of 4 ranks: 3, 3, 3 and 1 of them.

    tests/engines holds real ones; here every process would need a group.
    """
    parameter = nn.Parameter(torch.zeros(0))
    made: dict[str, object] = {
        "ds_tensor": torch.zeros(3), "ds_shape": torch.Size([5, 2]), "ds_process_group": rank,
    }  # fmt: skip
    for name, value in (made | attributes).items():
        setattr(parameter, name, value)
    return {"odd": parameter}


@pytest.fixture
def four_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 4)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: group)


@pytest.mark.usefixtures("four_ranks")
def test_a_partition_of_deepspeed_is_a_range() -> None:
    whole = {"odd": torch.arange(10.0).reshape(5, 2)}
    for rank, expected in enumerate(([0, 1, 2], [3, 4, 5], [6, 7, 8], [9])):
        live = module_layout(partitioned(rank), rank=rank)
        held = read_buffers(live.manifest(), whole, has_gaps=True)["odd"]
        assert len(held) == 3
        assert held[: len(expected)].tolist() == expected
        assert held[len(expected) :].isnan().all()
        assert live.tensors()["odd"].shape == (3,)
    beyond = module_layout(partitioned(3, ds_shape=torch.Size([9])), rank=3)
    assert not beyond.manifest().buffers.names  # all padding


@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"ds_tensor": torch.zeros(0)}, "odd, partitioned by DeepSpeed ZeRO-3, is swapped out"),
        ({"ds_tensor": torch.zeros(5)}, "an equal share of 10 elements among 4 ranks is 3"),
        ({"ds_tensor": torch.zeros(3, dtype=torch.complex64)}, "dtype torch.complex64"),
    ],
)
def test_partitions_that_cannot_be_described_are_named(
    attributes: dict[str, object], message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        module_layout(partitioned(1, **attributes))


@pytest.mark.usefixtures("four_ranks")
def test_a_quantized_partition_is_refused() -> None:
    tensors = partitioned(1)
    tensors["odd"].ds_tensor.ds_quant_scale = torch.ones(1)  # type: ignore[attr-defined]
    with pytest.raises(LayoutError, match="is quantized"):
        module_layout(tensors)


def test_parameters_unknown_to_the_model_are_named() -> None:
    model = build_model(TINY_QWEN3)
    model.score = nn.Linear(2, 2, bias=False)
    with pytest.raises(UnknownTensorError, match=r"score\.weight; pass the tensors as a mapping"):
        module_layout(model)


def test_a_shape_of_another_model_is_refused() -> None:
    model = build_model(TINY_QWEN3)
    with pytest.raises(LayoutError, match=r"embed_tokens.weight has shape \(100, 16\)"):
        module_layout(model, config={**TINY_QWEN3, "vocab_size": 101})


def test_rank_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.zeros(2)}
    monkeypatch.setenv("RANK", "5")
    assert module_layout(tensors).rank == 5
    monkeypatch.setenv("RANK", "five")
    with pytest.raises(ConfigError, match="RANK must be a number"):
        module_layout(tensors)
    monkeypatch.delenv("RANK")
    assert module_layout(tensors).rank == 0


def test_buffers_of_an_engine_are_found_by_name() -> None:
    named = checkpoint(build_model(TINY_QWEN3_MOE), TINY_QWEN3_MOE)
    shard = readback.shard(named, TINY_QWEN3_MOE, tp=2, rank=1)
    manifest = rules.vllm(TINY_QWEN3_MOE, tp=2, dtype="F32").manifest(1)
    matched = match_buffers(manifest, shard)
    assert list(matched) == list(manifest.buffers.names)
    assert all(matched[name].data_ptr() == shard[name].data_ptr() for name in matched)

    with pytest.raises(UnknownTensorError, match=r"missing: model.norm.weight; extra: stray"):
        match_buffers(
            manifest,
            {n: t for n, t in shard.items() if n != "model.norm.weight"}
            | {"stray": named["model.norm.weight"]},
        )
    with pytest.raises(DtypeMismatchError, match=r"model\.norm\.weight is BF16"):
        match_buffers(manifest, shard | {"model.norm.weight": torch.zeros(16).bfloat16()})
    with pytest.raises(LayoutError, match="contiguous with 16 elements"):
        match_buffers(manifest, shard | {"model.norm.weight": torch.zeros(32)[::2]})
