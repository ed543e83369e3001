"""Publishing from a mesh gathers nothing: memory is watched while sources publish."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from support.gloo import run_ranks
from support.layout_oracle import TINY_QWEN3_MOE, build_model
from weightsync.client import Job, Sink, Source
from weightsync.live.layout import module_layout
from weightsync.planners import rules

MIB = 1 << 20
CONFIG: dict[str, Any] = {
    **TINY_QWEN3_MOE,
    "hidden_size": 512,
    "moe_intermediate_size": 2048,
    "num_experts": 8,
    "num_hidden_layers": 1,
    "mlp_only_layers": [],
}
FUSED = "model.layers.0.mlp.experts.gate_up_proj"
GATHERED_BYTES = 64 * MIB  # that parameter, whole, in float32
# Staging is eight buckets; what else a publish needs is tables.
BUCKET_BYTES = MIB // 2
BUDGET_BYTES = GATHERED_BYTES // 8
TIMEOUT_S = 30.0


def anonymous_bytes() -> int:
    """Resident memory of this process that is not a file's: heap and private maps."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")


@contextmanager
def watched() -> Iterator[list[int]]:
    """Gives a list whose only entry is, afterwards, by how much memory grew at most, in bytes."""
    grown = [0]
    before = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            grown[0] = max(grown[0], anonymous_bytes() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield grown
    finally:
        done.set()
        thread.join()


def trained(mesh: DeviceMesh) -> nn.Module:
    """Attention under tensor, experts under expert parallelism, all under FSDP2; never whole."""
    model = build_model(CONFIG, "meta")
    plan = {
        "model.layers.*.self_attn.[qkv]_proj": ColwiseParallel(),
        "model.layers.*.self_attn.o_proj": RowwiseParallel(),
    }
    parallelize_module(model, mesh["model"], plan)
    for layer in model.model.layers:
        experts = layer.mlp.experts
        for name, parameter in list(experts.named_parameters()):
            whole = parameter.detach()
            cut = distribute_tensor(whole, mesh["model"], [Shard(0)], src_data_rank=None)
            experts.register_parameter(name, nn.Parameter(cut))
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    model.to_empty(device="cpu")
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.fill_(number + 1)
    return model


def check_sources(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "model"))
    model = trained(mesh)
    fused = model.get_parameter(FUSED)
    assert isinstance(fused, DTensor)
    assert fused.numel() * 4 == GATHERED_BYTES
    assert fused.to_local().numel() * 4 == GATHERED_BYTES // 4

    job = Job.start(bucket_bytes=BUCKET_BYTES) if rank == 0 else None
    url = [job.url if job is not None else None]
    dist.broadcast_object_list(url, src=0)
    layout = rules.vllm(CONFIG)
    live = {p.name: torch.zeros(p.shape, dtype=torch.bfloat16) for p in layout.parameters(0)}
    with ThreadPoolExecutor(1) as pool:
        sink = None
        if rank == 0:
            sink = Sink(live, layout=layout, replica="a", rank=0, world_size=1, job=url[0])
        # A layout of one's own is how trainers pass a config.
        own = module_layout(model, config=CONFIG)
        with Source(model, layout=own, job=url[0], timeout_s=TIMEOUT_S) as source:
            for gathers in (False, False, True):
                refit = pool.submit(sink.refit, timeout_s=TIMEOUT_S) if sink is not None else None
                dist.barrier()
                with CommDebugMode() as collectives, watched() as grown:
                    if gathers:  # the control: what this test must notice
                        fused.full_tensor()
                    source.publish(until="adopted")
                assert (collectives.get_total_counts() > 0) == gathers
                # Rank 0 holds the sink, its staging and the coordinator besides.
                if rank != 0:
                    assert (grown[0] > BUDGET_BYTES) == gathers, f"{grown[0] / MIB:.1f} MiB"
                assert refit is None or refit.result(TIMEOUT_S)
        if sink is not None:
            number = [name for name, _ in model.named_parameters()].index(FUSED) + 1
            held = live["model.layers.0.mlp.experts.routed_experts.w13_weight"]
            assert (held == number).all()
            sink.close()
    dist.barrier()
    if job is not None:
        job.close()


def test_publishing_from_a_mesh_gathers_nothing(tmp_path: Path) -> None:
    run_ranks(check_sources, 4, tmp_path)
