"""Live FSDP2 modules against the rules, in real processes over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

from support.gloo import run_ranks
from support.layout_oracle import (
    TINY_DEEPSEEK_V3,
    TINY_GPT_OSS,
    TINY_QWEN3,
    TINY_QWEN3_MOE,
    assert_holds,
    build_model,
    checkpoint,
    read_buffers,
)
from weightsync.errors import LayoutError
from weightsync.live.layout import LiveLayout, module_layout
from weightsync.live.weights import SourceWeights
from weightsync.planners import rules


def sharded(config: dict[str, Any], mesh: DeviceMesh) -> tuple[nn.Module, dict[str, Tensor]]:
    """A real model under fully_shard, as trainers do it, and its checkpoint from before."""
    model = build_model(config)
    named = {name: tensor.clone() for name, tensor in checkpoint(model, config).items()}
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, named


def assert_live_holds(live: LiveLayout, named: dict[str, Tensor]) -> None:
    assert_holds(live.tensors(), live.manifest(), named)


def assert_equals_rule(
    config: dict[str, Any], mesh: DeviceMesh, fsdp: int, replicate: int = 1
) -> None:
    model, named = sharded(config, mesh)
    live = module_layout(model)
    layout = rules.fsdp2(config, fsdp=fsdp, replicate=replicate)
    assert live.manifest().to_bytes() == layout.manifest(dist.get_rank()).to_bytes()
    assert_live_holds(live, named)
    read_buffers(live.manifest(), named)  # every element of every buffer exactly once
    assert set(live.skipped) >= {"model.rotary_emb.inv_freq"}


def assert_unsharded_is_resharded(mesh: DeviceMesh) -> None:
    model, named = sharded(TINY_QWEN3, mesh)
    with torch.no_grad():
        model(torch.arange(4)[None])
    assert isinstance(model, FSDPModule)
    model.unshard()
    # The root keeps whole parameters after a forward pass; reading them as shards would be wrong.
    assert not isinstance(model.model.norm.weight, DTensor)
    live = module_layout(model)
    assert isinstance(model.model.norm.weight, DTensor)
    model.unshard()
    assert_live_holds(live, named)
    assert (
        live.manifest().to_bytes()
        == rules.fsdp2(TINY_QWEN3, fsdp=3).manifest(dist.get_rank()).to_bytes()
    )


def check_ranks(rank: int) -> None:
    three = DeviceMesh("cpu", [0, 1, 2])
    flat = init_device_mesh("cpu", (4,))
    hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    if rank < 3:
        # Heads and vocabulary are cut unevenly.
        assert_equals_rule(TINY_QWEN3, three, fsdp=3)
        assert_equals_rule(TINY_QWEN3_MOE, three, fsdp=3)
        assert_unsharded_is_resharded(three)
    assert_outsiders_hold_nothing(three)
    # 6 experts on 4 ranks: 2, 2, 2, 0.
    assert_equals_rule(TINY_QWEN3_MOE, flat, fsdp=4)
    # A buffer that stays whole, and experts in one tensor with their inputs first.
    assert_equals_rule(TINY_DEEPSEEK_V3, flat, fsdp=4)
    assert_equals_rule(TINY_GPT_OSS, hybrid, fsdp=2, replicate=2)
    assert_equals_rule(TINY_QWEN3, hybrid, fsdp=2, replicate=2)
    assert_equals_rule(TINY_QWEN3_MOE, hybrid, fsdp=2, replicate=2)
    assert_steps_are_seen(hybrid)
    assert_a_forward_goes_on_while_a_version_is_open(hybrid)
    assert_own_names(flat)
    assert_older_wrappers()
    assert_any_placement(hybrid)
    assert_unsupported_placements_are_named(hybrid)


def assert_outsiders_hold_nothing(mesh: DeviceMesh) -> None:
    inside = dist.get_rank() < 3
    local = torch.ones(1 if inside else 0)
    tensors = {
        "inside": DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=torch.Size([3]), stride=(1,)
        ),
        "own": torch.ones(2),
    }
    expected = {"inside", "own"} if inside else {"own"}
    assert set(module_layout(tensors).manifest().buffers.names) == expected


def assert_steps_are_seen(mesh: DeviceMesh) -> None:
    model, _ = sharded(TINY_QWEN3, mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    held = watched(model, mesh)
    before = held.fingerprint()
    model(torch.arange(4)[None]).logits.sum().backward()
    assert held.changed_since(before) is None
    optimizer.step()
    assert held.changed_since(before) is not None


def assert_a_forward_goes_on_while_a_version_is_open(mesh: DeviceMesh) -> None:
    """A version is written on another thread: it must find the shards, and leave FSDP alone."""
    model, _ = sharded(TINY_QWEN3, mesh)
    ids = torch.arange(4)[None]
    expected = model(ids).logits
    held = watched(model, mesh)
    before, addresses = held.fingerprint(), held.addresses().tolist()
    looks = 0

    def look(*_: object) -> None:
        nonlocal looks
        looks += 1
        assert held.addresses().tolist() == addresses
        assert held.changed_since(before) is None

    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(look)
    assert torch.equal(model(ids).logits, expected)
    assert looks == len(model.model.layers)


def watched(model: nn.Module, mesh: DeviceMesh) -> SourceWeights:
    held = SourceWeights(model, layout=None, rank=mesh.get_rank(), dtype=None)
    held.prepare()
    return held


class Small(nn.Module):
    """Uneven and short dims, a scalar, a tie, a transposed parameter, both kinds of buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(5, 7, bias=False)
        self.second.weight = self.first.weight
        self.short = nn.Parameter(torch.arange(2.0))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("cache", torch.zeros(4), persistent=False)


def assert_own_names(mesh: DeviceMesh) -> None:
    torch.manual_seed(1)
    module = Small()
    named = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    named["count"] = named["count"].reshape(1)
    fully_shard(module, mesh=mesh)
    live = module_layout(module)
    rank = dist.get_rank()
    # 7 rows on 4 ranks: 2, 2, 2, 1; 2 rows: 1, 1, 0, 0. The tied weight is there once.
    expected = {"first.weight", "first.bias", "count"} | ({"short"} if rank < 2 else set())
    assert set(live.manifest().buffers.names) == expected
    assert "second.weight" not in live.manifest().tensors.names
    assert live.skipped == ("cache",)
    assert_live_holds(live, named)


def assert_older_wrappers() -> None:
    module = Small()
    plain = module_layout(module).manifest().to_bytes()
    replicated = DistributedDataParallel(module)
    assert module_layout(replicated).manifest().to_bytes() == plain
    compiled = nn.Module()  # as torch.compile holds it
    compiled._orig_mod = replicated
    assert module_layout(compiled).manifest().to_bytes() == plain
    flattened = FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"))
    with pytest.raises(LayoutError, match="FSDP1"):
        module_layout(flattened)


def assert_any_placement(mesh: DeviceMesh) -> None:
    whole = torch.arange(7.0 * 5 * 3).reshape(7, 5, 3)
    named = {"a": whole, "b": whole, "c": whole, "d": whole, "e": whole}
    placed = {
        "a": distribute_tensor(whole, mesh, [Shard(0), Shard(0)]),
        "b": distribute_tensor(whole, mesh, [Shard(1), Shard(0)]),
        "c": distribute_tensor(whole, mesh, [Replicate(), Shard(2)]),
        "d": distribute_tensor(whole, mesh, [Replicate(), Replicate()]),
        "e": DTensor.from_local(
            # Rows of a longer matrix, from its middle on: strides and a storage offset.
            whole.chunk(2)[mesh.get_coordinate()[0]].repeat(1, 1, 2)[:, :, 3:],
            mesh,
            [Shard(0), Replicate()],
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        ),
    }
    assert_live_holds(module_layout(placed), named)


def assert_unsupported_placements_are_named(mesh: DeviceMesh) -> None:
    local = torch.zeros(2, 4)
    tensor = DTensor.from_local(local, mesh, [Partial(), Replicate()], run_check=False)
    with pytest.raises(LayoutError, match=r"odd has placements .*supported are Shard"):
        module_layout({"odd": tensor})
    # Gate over up, cut by tensor parallelism and then by FSDP2: what FSDP2 writes down then means
    # other rows of the same number to torch itself.
    packed = [_StridedShard(0, split_factor=2), _StridedShard(0, split_factor=2)]
    tensor = DTensor.from_local(local, mesh, packed, run_check=False)
    with pytest.raises(LayoutError, match="which elements of dimension 0 is not said"):
        module_layout({"odd": tensor})
    placed = DTensor.from_local(
        local, mesh, [Shard(0), Shard(0)], run_check=False, shape=torch.Size([9, 4]), stride=(4, 1)
    )
    if dist.get_rank() == 0:
        with pytest.raises(LayoutError, match="placements give dimension 0 another size"):
            module_layout({"odd": placed})


def test_live_modules_equal_the_rules(tmp_path: Path) -> None:
    run_ranks(check_ranks, 4, tmp_path)
