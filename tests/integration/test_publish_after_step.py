"""publish_after_step in plain training loops: one process, Accelerate, a gradient scaler, FSDP2."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from support.engine import Engine, same_bits
from support.gloo import run_ranks
from support.layout_oracle import TINY_QWEN3, build_model, checkpoint
from weightsync.checkpoint import CheckpointSink
from weightsync.client import Job, Source
from weightsync.errors import ConfigError, NoQuorumError
from weightsync.integrations.torch import publish_after_step


@pytest.fixture
def job() -> Iterator[Job]:
    with Job.start() as started:
        yield started


@pytest.fixture
def accelerator() -> Iterator[accelerate.Accelerator]:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def loss_of(model: nn.Module, seed: int) -> Tensor:
    ids = torch.randint(0, 100, (2, 8), generator=torch.Generator().manual_seed(seed))
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05)


def whole(model: nn.Module) -> dict[str, Tensor]:
    named = checkpoint(model, TINY_QWEN3)
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in named.items()}


def test_two_lines_in_a_loop(job: Job) -> None:
    model = build_model(TINY_QWEN3)
    optimizer = optimizer_of(model)
    with Engine(job, TINY_QWEN3) as engine:
        handle = publish_after_step(optimizer, model, job=job, until="adopted")
        for step in range(1, 4):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert handle.report is not None
            assert (handle.report.version, handle.report.tag) == (step, str(step))
            engine.check(whole(model))
        handle.remove()
        handle.remove()
        optimizer.step()
        assert handle.step == 3
        assert job.status()["committed_version"] == 3
    assert job.status()["sources"] == []


def test_every_so_many_steps_of_a_source_of_ones_own(job: Job) -> None:
    model = build_model(TINY_QWEN3)
    optimizer = optimizer_of(model)
    with Engine(job, TINY_QWEN3) as engine, Source(model, job=job, rank=0, world_size=1) as source:
        with publish_after_step(optimizer, source, every_steps=2, until="adopted") as handle:
            assert handle.source is source
            for step in range(1, 6):
                loss_of(model, step).backward()
                optimizer.step()
                if step == 4:
                    engine.check(whole(model))
        assert job.status()["committed_version"] == 2
        source.publish(until="adopted")  # it is still open
        engine.check(whole(model))


def test_options_that_a_source_of_ones_own_has_already(job: Job) -> None:
    model = build_model(TINY_QWEN3)
    optimizer = optimizer_of(model)
    with Source(model, job=job, rank=0, world_size=1, timeout_s=0.2) as source:
        with pytest.raises(ConfigError, match="job, rank, threads: the given Source has its own"):
            publish_after_step(optimizer, source, job=job, rank=0, threads=2)
        # Its deadline holds: nobody is there to take the version.
        with publish_after_step(optimizer, source):
            loss_of(model, 1).backward()
            with pytest.raises(NoQuorumError):
                optimizer.step()


class Lookahead(torch.optim.Optimizer):
    """An optimizer around another that goes on changing weights after the inner step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        super().__init__(parameters, {})
        self.slow = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step(closure)
        for slow, parameter in zip(self.slow, self.param_groups[0]["params"], strict=True):
            slow.lerp_(parameter, 0.5)
            parameter.copy_(slow)


def test_an_optimizer_that_changes_weights_after_the_inner_step(job: Job) -> None:
    model = build_model(TINY_QWEN3)
    optimizer = Lookahead(optimizer_of(model))
    with (
        Engine(job, TINY_QWEN3) as engine,
        publish_after_step(optimizer, model, job=job, until="adopted") as handle,
    ):
        loss_of(model, 1).backward()
        optimizer.step()
        assert handle.step == 1
        engine.check(whole(model))


def test_an_optimizer_without_hooks(job: Job) -> None:
    class Bare:
        """As of libraries that bring their own."""

    with pytest.raises(ConfigError, match=r"Bare is no torch.optim.Optimizer"):
        publish_after_step(Bare(), build_model(TINY_QWEN3), job=job)  # type: ignore[arg-type]


def test_accumulated_gradients_and_accelerate(
    job: Job, accelerator: accelerate.Accelerator
) -> None:
    model, optimizer = accelerator.prepare(model := build_model(TINY_QWEN3), optimizer_of(model))
    with (
        Engine(job, TINY_QWEN3) as engine,
        publish_after_step(optimizer, model, job=job, until="adopted") as handle,
    ):
        for step in range(1, 7):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, step))
                optimizer.step()
                optimizer.zero_grad()
            assert handle.step == step // 3
        assert job.status()["committed_version"] == 2
        engine.check(whole(model))


@pytest.mark.parametrize("fused", [False, True])  # the scaler, or the kernel, skips the step
def test_a_step_that_a_scaler_skips_is_none(job: Job, fused: bool) -> None:
    model = build_model(TINY_QWEN3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    with (
        Engine(job, TINY_QWEN3) as engine,
        publish_after_step(optimizer, model, job=job, until="adopted") as handle,
    ):
        for step in range(1, 4):
            scaler.scale(loss_of(model, step)).backward()
            if step == 2:
                parameter = next(model.parameters())
                assert parameter.grad is not None
                parameter.grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert handle.step == 2
        assert job.status()["committed_version"] == 2
        engine.check(whole(model))


def test_an_abort_is_raised_out_of_the_step_or_said(job: Job) -> None:
    model = build_model(TINY_QWEN3)
    optimizer = optimizer_of(model)
    loss_of(model, 0).backward()
    options: dict[str, Any] = {"job": job, "timeout_s": 0.3}
    with publish_after_step(optimizer, model, **options), pytest.raises(NoQuorumError):
        optimizer.step()
    with publish_after_step(optimizer, model, on_abort="warn", **options) as handle:
        optimizer.step()
        assert handle.num_aborted == 1


def check_fsdp2(rank: int) -> None:
    """The job, the engine and a checkpoint live on rank 0; every rank has the same two lines."""
    url = torch.zeros(200, dtype=torch.uint8)
    engine = None
    pool = ThreadPoolExecutor()
    folder = tempfile.TemporaryDirectory(prefix="weightsync-test-")
    if rank == 0:
        job = Job.start()
        engine = Engine(job, TINY_QWEN3).__enter__()
        sink = CheckpointSink(Path(folder.name) / "step-2", job=job, config=TINY_QWEN3)
        writing = pool.submit(sink.write, 2)
        url[: len(job.url)] = torch.tensor(list(job.url.encode()))
    dist.broadcast(url, 0)
    model = build_model(TINY_QWEN3)
    mesh = init_device_mesh("cpu", (2,))
    decoder: Any = model.get_submodule("model.layers")
    for layer in decoder:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = optimizer_of(model)
    with publish_after_step(
        optimizer, model, job=bytes(url.tolist()).rstrip(b"\0").decode(), until="adopted"
    ) as handle:
        for step in range(1, 4):
            loss_of(model, step + 10 * rank).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert handle.report is not None
            assert handle.report.version == step
            named = whole(model)
            if engine is not None:
                engine.check(named)
                if step == 2:
                    assert writing.result(20).version == 2
                    written = load_file(sink.path / "model.safetensors")
                    assert written.keys() == named.keys()
                    for name, tensor in named.items():
                        assert same_bits(written[name], tensor.bfloat16()), name
        dist.barrier()
    if engine is not None:
        engine.__exit__()
    folder.cleanup()


def test_fsdp2(tmp_path: Path) -> None:
    run_ranks(check_fsdp2, 2, tmp_path)
