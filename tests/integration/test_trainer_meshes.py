"""Live weights on meshes of several axes: FSDP2 with tensor and expert parallelism, over gloo.

Every element of the model holds a number of its own before it is cut, so what lies where afterwards
is torch's word alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, ShardOrderEntry, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement, _StridedShard

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
    read_buffers,
)
from support.titan import titan_module
from weightsync.errors import LayoutError
from weightsync.live.layout import module_layout

# Odd widths: no axis divides them.
ODD_QWEN3 = {**TINY_QWEN3, "vocab_size": 99, "intermediate_size": 21, "head_dim": 6}


def numbered(config: dict[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """A real model of element numbers, and its checkpoint from before it is cut."""
    model = build_model(config)
    number_elements(model)
    return model, {name: tensor.clone() for name, tensor in checkpoint(model, config).items()}


def assert_described(
    weights: nn.Module, named: dict[str, Tensor], config: dict[str, Any] | None = None
) -> None:
    """Every element of local memory is described once, and is what the description says."""
    live = module_layout(weights, config=config)
    read_buffers(live.manifest(), named)
    assert_holds(live.tensors(), live.manifest(), named)
    local = sum(tensor.numel() for tensor in live.tensors().values())
    assert int(live.manifest().buffers.numel.sum()) == local
    # Nothing is lost between ranks: somebody holds each element.
    seen = torch.zeros(1 << 18)
    for tensor in live.tensors().values():
        seen[tensor.flatten().long()] = 1
    dist.all_reduce(seen, dist.ReduceOp.MAX)
    assert int(seen.sum()) == sum(tensor.numel() for tensor in named.values())


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    plan = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "model.layers.*.self_attn.[qkv]_proj": ColwiseParallel(),
        "model.layers.*.self_attn.o_proj": RowwiseParallel(),
        "model.layers.*.mlp.gate_proj": ColwiseParallel(),
        "model.layers.*.mlp.up_proj": ColwiseParallel(),
        "model.layers.*.mlp.down_proj": RowwiseParallel(),
    }
    parallelize_module(model, mesh, plan)


def shard_fully(model: nn.Module, mesh: DeviceMesh) -> None:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def placed(model: nn.Module, name: str, mesh: DeviceMesh, *placements: Placement) -> None:
    """Replaces a parameter by a DTensor, as expert parallelism does."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    whole = module.get_parameter(last).detach()
    made = distribute_tensor(whole, mesh, list(placements), src_data_rank=None)
    module.register_parameter(last, nn.Parameter(made))


def check_tensor_parallel(rank: int) -> None:
    flat = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for config in (TINY_QWEN3, ODD_QWEN3):
        model, named = numbered(config)
        tensor_parallel(model, flat["tp"])
        assert_described(model, named)  # without FSDP2
        shard_fully(model, flat["dp"])
        up = model.get_parameter("model.layers.0.mlp.up_proj.weight")
        assert isinstance(up, DTensor)
        assert up.placements == (_StridedShard(0, split_factor=2), Shard(0))
        down = model.get_parameter("model.layers.0.mlp.down_proj.weight")
        assert isinstance(down, DTensor)
        assert down.placements == (Shard(0), Shard(1))
        assert_described(model, named)
        if config is TINY_QWEN3:  # what torch itself gathers, where nothing is uneven
            assert torch.equal(up.full_tensor(), named["model.layers.0.mlp.up_proj.weight"])
    for shape in ((2, 1, 2), (1, 2, 2), (2, 2, 1)):
        hybrid = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard", "tp"))
        model, named = numbered(ODD_QWEN3)
        tensor_parallel(model, hybrid["tp"])
        shard_fully(model, hybrid["replicate", "shard"])
        assert_described(model, named)


def check_uneven(rank: int) -> None:
    """9 rows: 5 and 4 by tensor parallelism, then 2, 2, 1, 0 and 1, 1, 1, 1 by FSDP2.

    `compute_local_shape_and_global_offset` puts the last row on another rank than FSDP2 does.
    """
    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "tp"))
    module = nn.Sequential(nn.Linear(3, 9))
    number_elements(module)
    named = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    parallelize_module(module, mesh["tp"], {"0": ColwiseParallel()})
    fully_shard(module, mesh=mesh["dp"])
    weight = module.get_parameter("0.weight")
    assert isinstance(weight, DTensor)
    shape, _ = compute_local_shape_and_global_offset(weight.shape, mesh, weight.placements)
    assert (shape == weight.to_local().shape) == (rank < 6)
    assert_described(module, named)


def expert_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if ".mlp.experts." in name]


def check_expert_parallel(rank: int) -> None:
    flat = init_device_mesh("cpu", (4,))
    two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))

    def experts_first(model: nn.Module, inner: Callable[[nn.Parameter], Shard | None]) -> None:
        for layer in model.model.layers:
            experts = getattr(layer.mlp, "experts", None)
            if experts is not None:
                fully_shard(experts, mesh=two["efsdp"], shard_placement_fn=inner)

    # 6 experts over 2 x 2: 2, 2, 1, 1; 5 and 3 cannot even be halved.
    for config in (TINY_QWEN3_MOE, TINY_DEEPSEEK_V3, TINY_GLM4_MOE, TINY_GPT_OSS):
        for dim in (0, 1):
            model, named = numbered(config)
            for name in expert_names(model):
                placed(model, name, two["ep"], Shard(0))
            experts_first(model, lambda parameter, dim=dim: Shard(min(dim, parameter.ndim - 1)))
            shard_fully(model, flat)
            fused = model.get_parameter(expert_names(model)[0])
            assert isinstance(fused, DTensor)
            first = _StridedShard(0, split_factor=2) if dim == 0 else Shard(1)
            assert fused.placements == (first, Shard(0))
            assert_described(model, named)

    for shape in ((1, 2, 2), (2, 2, 1), (2, 1, 2)):
        three = init_device_mesh("cpu", shape, mesh_dim_names=("efsdp", "ep", "etp"))
        model, named = numbered(TINY_QWEN3_MOE)
        for name in expert_names(model):
            if name.endswith("gate_up_proj"):
                # As transformers cuts it: a part of gate and the same part of up.
                packed = _StridedShard(1, split_factor=2)
                placed(model, name, three["ep", "etp"], Shard(0), packed)
            else:
                placed(model, name, three["ep", "etp"], Shard(0), Shard(2))
        for layer in model.model.layers:
            if hasattr(layer.mlp, "experts"):
                fully_shard(layer.mlp.experts, mesh=three["efsdp"])
        shard_fully(model, flat)
        assert_described(model, named)


def check_torchtitan(rank: int) -> None:
    """As torchtitan 0.3 cuts (`apply_fsdp` in torchtitan/distributed/fsdp.py, `sharding.py`)."""
    flat = init_device_mesh("cpu", (4,))
    two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "model"))
    plain_llama = {**TINY_LLAMA, "attention_bias": False, "mlp_bias": False}
    for config in (plain_llama, TINY_QWEN3_MOE, TINY_DEEPSEEK_V3):
        _, named = numbered(config)
        for dim in (0, 1):
            module = titan_module(named, config)
            for name, _ in list(module.named_parameters()):
                if name.endswith(("_EFD", "_EDF", ".wqkv.weight", ".wkv_b.weight", ".w1.weight")):
                    placed(module, name, two["model"], Shard(0))
                elif name.endswith((".wo.weight", ".w2.weight")):
                    placed(module, name, two["model"], Shard(1))
            for layer in module.get_submodule("layers").children():
                if hasattr(layer, "moe"):
                    experts = layer.moe.routed_experts.inner_experts
                    placement = Shard(dim)
                    fully_shard(
                        experts, mesh=two["dp"], shard_placement_fn=lambda _, p=placement: p
                    )
                fully_shard(layer, mesh=two["dp"])
            fully_shard(module, mesh=flat)
            assert_described(module, named, config)


def check_all_placements(rank: int) -> None:
    whole = torch.arange(1.0, 1.0 + 7 * 5 * 6).reshape(7, 5, 6)
    kinds: list[Placement] = [Replicate(), Shard(0), Shard(2)]
    kinds += [_StridedShard(0, split_factor=2), _StridedShard(2, split_factor=3)]
    for shape in ((4,), (2, 2), (2, 1, 2), (1, 4)):
        mesh = init_device_mesh("cpu", shape)
        for number, placements in enumerate(itertools.product(kinds, repeat=len(shape))):
            tensor = distribute_tensor(whole, mesh, list(placements), src_data_rank=None)
            name = f"{shape} {number} {placements}"
            try:
                live = module_layout({name: tensor})
            except LayoutError as error:
                # The only excuse: FSDP2 would mean other elements by the same placements.
                message = str(error)
                assert "is not said" in message
                assert sum(isinstance(p, _StridedShard) for p in placements) > 1, name
                continue
            assert_holds(live.tensors(), live.manifest(), {name: whole})
            if live.tensors():
                read_buffers(live.manifest(), {name: whole})


def check_order_of_axes(rank: int) -> None:
    """Newer torch can cut a dimension by the axes of a mesh in another order than theirs."""
    mesh = init_device_mesh("cpu", (2, 2))
    whole = torch.arange(1.0, 8.0 * 3 + 1).reshape(8, 3)[:7]
    outer, inner = mesh.get_coordinate()
    local = whole.chunk(2)[inner].chunk(2)[outer]
    meta = TensorMeta(whole.shape, whole.stride(), whole.dtype)
    order = (ShardOrderEntry(tensor_dim=0, mesh_dims=(1, 0)),)
    spec = DTensorSpec(mesh, (Shard(0), Shard(0)), meta, shard_order=order)
    live = module_layout({"a": DTensor(local, spec, requires_grad=False)})
    assert_holds(live.tensors(), live.manifest(), {"a": whole})


@pytest.mark.parametrize(
    "check",
    [
        check_tensor_parallel,
        check_expert_parallel,
        check_torchtitan,
        check_all_placements,
        check_order_of_axes,
    ],
)
def test_every_element_is_where_its_description_says(
    check: Callable[[int], None], tmp_path: Path
) -> None:
    run_ranks(check, 4, tmp_path)


def test_uneven_shards_of_fsdp_are_where_fsdp_puts_them(tmp_path: Path) -> None:
    run_ranks(check_uneven, 8, tmp_path)
