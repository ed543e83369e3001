from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.layout_oracle import TINY_MODELS, build_model, checkpoint, read_buffers
from weightsync.errors import ConfigError
from weightsync.ir.dtypes import Dtype
from weightsync.ir.manifest import Manifest
from weightsync.planners import rules
from weightsync.planners.planner import plan_transfer

CONFIGS = Path(__file__).parents[2] / "configs" / "model"


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


@dataclass(frozen=True)
class Mesh:
    """Degrees of a mesh, and the layers of each of its stages."""

    fsdp: int
    replicate: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    copies: int = 1
    stages: tuple[tuple[int, ...], ...] = ((0, 1),)

    def held(self, name: str, tensor: Tensor, rank: int, config: Mapping[str, Any]) -> Tensor:
        """What a rank holds of a parameter, by `torch.chunk` alone; a rank of the right stage."""
        ranks = torch.arange(self.layout(config).world_size)
        shape = self.pp, self.replicate, -1
        dense = ranks.view(*shape, self.tp, self.copies)
        *_, shard, tp_rank, _ = (dense == rank).nonzero()[0].tolist()
        num_shards = dense.shape[2]
        if self.ep > 1 and ".experts." in name:
            *_, inner, ep_rank = (ranks.view(*shape, self.ep) == rank).nonzero()[0].tolist()
            dim = int(self.fsdp * self.ep > len(tensor))
            return chunk(tensor.chunk(self.ep)[ep_rank], self.fsdp, inner, dim)
        is_latent = "kv_lora_rank" in config and "self_attn" in name
        if name.endswith("experts.gate_up_proj"):
            halves = [chunk(half, self.tp, tp_rank, 1) for half in tensor.chunk(2, 1)]
            tensor = torch.cat(halves, 1) if self.tp > 1 else tensor
        elif not is_latent and name.endswith(ROWS):
            tensor = chunk(tensor, self.tp, tp_rank)
        elif not is_latent and name.endswith(COLUMNS):
            tensor = chunk(tensor, self.tp, tp_rank, tensor.ndim - 1)
        return chunk(tensor, num_shards, shard)

    def layout(self, config: Mapping[str, Any]) -> rules.Fsdp2Layout:
        return rules.fsdp2(
            config, fsdp=self.fsdp, replicate=self.replicate, tp=self.tp, pp=self.pp, ep=self.ep,
            dense_replicate=self.copies,
        )  # fmt: skip


ROWS = tuple(f"{which}.weight" for which in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
ROWS += ("q_proj.bias", "k_proj.bias", "v_proj.bias", "gate_proj.bias", "up_proj.bias")
ROWS += ("embed_tokens.weight", "lm_head.weight")
COLUMNS = ("o_proj.weight", "down_proj.weight", "experts.down_proj")


def chunk(tensor: Tensor, num_chunks: int, index: int, dim: int = 0) -> Tensor:
    found = tensor.chunk(num_chunks, dim)
    return found[index] if index < len(found) else tensor[:0]


MESHES = [
    ("qwen3", {}, Mesh(fsdp=3, tp=2, replicate=2)),
    ("llama", {"num_hidden_layers": 2}, Mesh(fsdp=2, tp=2)),
    ("qwen3_moe", {}, Mesh(fsdp=2, tp=2)),
    ("qwen3_moe", {}, Mesh(fsdp=2, ep=3)),
    ("qwen3_moe", {}, Mesh(fsdp=2, ep=2, tp=2)),
    ("qwen3_moe", {}, Mesh(fsdp=5, ep=2)),  # more ranks than experts: inside experts
    ("qwen3_moe", {}, Mesh(fsdp=2, ep=3, copies=3)),
    ("deepseek_v3", {}, Mesh(fsdp=1, ep=6, tp=2, copies=3)),
    ("deepseek_v3", {}, Mesh(fsdp=3, tp=2)),
    ("deepseek_v3", {}, Mesh(fsdp=1, ep=6, tp=3)),
    ("gpt_oss", {"num_local_experts": 4, "num_hidden_layers": 2}, Mesh(fsdp=2, ep=2)),
    ("glm4_moe", {"num_hidden_layers": 5, "n_routed_experts": 4},
     Mesh(fsdp=2, ep=2, pp=3, stages=((0, 1), (2, 3), (4,)))),
    ("qwen3", {"num_hidden_layers": 4}, Mesh(fsdp=3, pp=4, stages=((0,), (1, 2), (3,), ()))),
    ("qwen3_moe", {"num_hidden_layers": 2},
     Mesh(fsdp=2, ep=2, pp=2, replicate=2, stages=((0,), (1,)))),
    ("qwen3", {}, Mesh(fsdp=1, pp=4, stages=((), (0,), (1,), ()))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "mesh"), MESHES)
def test_meshes_cut_as_torch_does(name: str, changes: dict[str, Any], mesh: Mesh) -> None:
    config = {**TINY_MODELS[name], **changes}
    model = build_model(config)
    named = checkpoint(model, config)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    layout = mesh.layout(config)
    for rank in range(layout.world_size):
        stage = rank // (layout.world_size // mesh.pp)
        top = set[str]()
        if stage == 0 or (stage == mesh.pp - 1 and config["tie_word_embeddings"]):
            top.add("model.embed_tokens.weight")
        if stage == mesh.pp - 1:
            top |= {"model.norm.weight", "lm_head.weight"}
        expected: dict[str, Tensor] = {}
        for tensor_name, tensor in tensors.items():
            layer = tensor_name.split(".")[2] if ".layers." in tensor_name else None
            if tensor_name.endswith("inv_freq") or (
                tensor_name not in top if layer is None else int(layer) not in mesh.stages[stage]
            ):
                continue
            is_buffer = tensor_name.endswith("e_score_correction_bias")
            whole = tensor.detach()
            held = whole if is_buffer else mesh.held(tensor_name, whole, rank, config)
            if held.numel():
                expected[tensor_name] = held.flatten()
        buffers = read_buffers(layout.manifest(rank), named)
        assert buffers.keys() == expected.keys(), f"rank {rank}"
        for tensor_name, tensor in expected.items():
            assert torch.equal(buffers[tensor_name], tensor), f"rank {rank}: {tensor_name}"


def test_the_published_run_of_kimi_holds_every_element_once() -> None:
    """256 ranks: FSDP 16, two stages, experts over 8; 31 layers on the first stage."""
    config = rules.model_config(CONFIGS / "kimi-k2.json")
    layout = rules.fsdp2(config, fsdp=16, pp=2, ep=8, dtype="BF16")
    assert layout.world_size == 256
    held: Counter[str] = Counter()
    for rank in range(256):
        manifest = layout.manifest(rank)
        for tensor, volume in zip(manifest.pieces.tensor, manifest.pieces.volume, strict=True):
            held[manifest.tensors.names[tensor]] += int(volume)
        layers = {int(n.split(".")[2]) for n in manifest.tensors.names if ".layers." in n}
        assert layers == set(range(31) if rank < 128 else range(31, 61))
    for name, shape in rules.canonical_tensors(config).items():
        is_buffer = name.endswith("e_score_correction_bias")
        assert held[name] == math.prod(shape) * (128 if is_buffer else 1), name
    # Three whole experts of every layer, 16 of them from one rank to the next.
    [experts] = [p for p in layout.parameters(130) if p.name.endswith("31.mlp.experts.down_proj")]
    assert experts.shape == (3, 7168, 2048)
    assert [part.tensor.split(".")[5] for part in experts.parts] == ["96", "97", "98"]


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


@pytest.mark.parametrize(
    ("name", "degrees", "key"),
    [
        ("qwen3", {"ep": 2}, "ep"),
        ("qwen3_moe", {"ep": 4}, "ep"),
        ("qwen3_moe", {"ep": 3, "tp": 2}, "tp"),
        ("qwen3", {"tp": 4}, "tp"),
        ("gpt_oss", {"tp": 2}, "tp"),
        ("qwen3", {"pp": 5}, "pp"),
        ("qwen3", {"ep": 0}, "ep"),
        ("qwen3", {"tp": 2.0}, "tp"),
        ("qwen3", {"dense_replicate": 2}, "dense_replicate"),
        ("qwen3_moe", {"ep": 3, "dense_replicate": 2}, "dense_replicate"),
        ("qwen3_moe", {"ep": 6, "dense_replicate": 3, "tp": 4}, "tp"),
    ],
)
def test_degrees_that_a_trainer_refuses_are_refused(
    name: str, degrees: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        rules.fsdp2(TINY_MODELS[name], fsdp=1, **degrees)
    assert caught.value.context["key"] == key
