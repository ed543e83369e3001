"""WeightSyncCallback in real runs of transformers.Trainer, alone, under DDP and under FSDP2."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig

from support.engine import Engine
from support.gloo import run_ranks
from support.layout_oracle import TINY_QWEN3, TINY_QWEN3_MOE, build_model, checkpoint
from weightsync.client import Job
from weightsync.errors import ConfigError, NoQuorumError, PeerLostError
from weightsync.integrations.transformers import WeightSyncCallback

STEPS = 4
FSDP2 = {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]}


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random sequences; the one at `breaks` cannot be read."""

    def __init__(self, breaks: int | None = None) -> None:
        self.breaks = breaks

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index == self.breaks:
            raise OSError("the data set is gone")
        ids = torch.randint(0, 60, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


# Trainer wants one, though nothing is saved.
_FOLDER = tempfile.TemporaryDirectory(prefix="weightsync-test-")


def arguments(**options: Any) -> TrainingArguments:
    chosen: dict[str, Any] = {
        "use_cpu": True, "max_steps": STEPS, "per_device_train_batch_size": 2, "report_to": [],
        "gradient_accumulation_steps": 2, "learning_rate": 0.05, "lr_scheduler_type": "constant",
        "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        "ddp_find_unused_parameters": False, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    return TrainingArguments(**{"output_dir": _FOLDER.name, **chosen, **options})


def gathered(model: nn.Module, config: dict[str, Any]) -> dict[str, Tensor]:
    """The whole weights by canonical name, which weightsync itself never gathers."""
    state = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        whole = parameter.detach()
        state[name] = whole.full_tensor() if isinstance(whole, DTensor) else whole.clone()

    class Held:
        def state_dict(self) -> dict[str, Tensor]:
            return state

    return checkpoint(Held(), config)  # type: ignore[arg-type]


class Check(TrainerCallback):
    """Compares the engine with the trainer whenever the callback before it may have published."""

    def __init__(self, callback: WeightSyncCallback, engine: Callable[[], Engine | None]) -> None:
        self.callback, self.engine = callback, engine
        self.seen: list[tuple[int, int, str]] = []
        self.weights: list[Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.look(state.global_step, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.look(state.global_step, kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.seen[-1][0] != state.global_step:
            self.look(state.global_step, kwargs["model"])

    def look(self, step: int, model: nn.Module) -> None:
        report = self.callback.report
        assert report is not None
        config = TINY_QWEN3_MOE if "moe" in type(model).__name__.lower() else TINY_QWEN3
        named = gathered(model, config)  # on every rank
        if report.tag != str(step):
            return
        assert report.stage == "adopted"
        self.seen.append((step, report.version, report.tag))
        self.weights.append(named["model.norm.weight"])
        engine = self.engine()
        if engine is not None:
            engine.check(named)  # what they hold; that it is active they hear a moment later
            wait_until(lambda: engine.versions == {report.version})

    def assert_saw(self, *steps: int) -> None:
        """Versions of these steps, in order, each with other weights than the one before."""
        assert self.seen == [(s, v, str(s)) for v, s in enumerate(steps, 1)]
        for before, after in zip(self.weights, self.weights[1:], strict=False):
            assert not torch.equal(before, after)


def wait_until(found: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not found():
        assert time.monotonic() < end
        time.sleep(0.02)


def forget_accelerate() -> None:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    forget_accelerate()
    yield
    forget_accelerate()


@pytest.fixture
def job() -> Iterator[Job]:
    with Job.start() as started:
        yield started


@pytest.mark.parametrize(
    ("config", "tp", "ep", "every_steps", "published"),
    [
        (TINY_QWEN3, 2, False, 1, (0, 1, 2, 3, 4)),
        (TINY_QWEN3, 8, False, 2, (0, 2, 4)),
        (TINY_QWEN3_MOE, 2, True, 3, (0, 3, 4)),
    ],
)
def test_every_step_arrives(
    job: Job, config: dict[str, Any], tp: int, ep: bool, every_steps: int,
    published: tuple[int, ...],
) -> None:  # fmt: skip
    with Engine(job, config, tp=tp, ep=ep) as engine:
        callback = WeightSyncCallback(job=job, every_steps=every_steps)
        check = Check(callback, lambda: engine)
        model = build_model(config)
        Trainer(model, arguments(), train_dataset=Tokens(), callbacks=[callback, check]).train()
        check.assert_saw(*published)
        assert callback.source is None
        wait_until(lambda: job.status()["sources"] == [])
        wait_until(lambda: engine.versions == {len(published)})


def test_the_best_model_is_what_training_ends_with(job: Job, tmp_path: Path) -> None:
    """Trainer loads it after the last step."""
    scores = {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0}  # by step; smaller is better

    class Scored(Trainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            return {"eval_loss": scores[self.state.global_step]}

    model = build_model(TINY_QWEN3)
    with Engine(job, TINY_QWEN3) as engine:
        callback = WeightSyncCallback(job=job)
        options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
        trainer = Scored(
            model,
            arguments(
                load_best_model_at_end=True, save_steps=1, **options, output_dir=str(tmp_path)
            ),
            train_dataset=Tokens(),
            eval_dataset=Tokens(),
            callbacks=[callback],
        )
        trainer.train()
        assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
        engine.check(gathered(model, TINY_QWEN3))
        wait_until(lambda: engine.versions == {6})


def test_the_same_callback_trains_again(job: Job) -> None:
    with Engine(job, TINY_QWEN3) as engine:
        callback = WeightSyncCallback(job=job)
        trainer = Trainer(
            build_model(TINY_QWEN3), arguments(max_steps=1), train_dataset=Tokens(),
            callbacks=[callback],
        )  # fmt: skip
        for _ in range(2):
            trainer.train()
        wait_until(lambda: engine.versions == {4})


def test_a_skipped_step_publishes_nothing(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a gradient scaler skips it after an overflow: the step counts, the weights stay."""
    optimizer = accelerate.optimizer.AcceleratedOptimizer
    steps = iter([False, True, True, False])
    step = optimizer.step

    def sometimes(self: Any, closure: Any = None) -> None:
        if self.gradient_state.sync_gradients:
            self._is_overflow = next(steps)
            if self._is_overflow:
                return
        step(self, closure)

    monkeypatch.setattr(optimizer, "step", sometimes)
    with Engine(job, TINY_QWEN3) as engine:
        callback = WeightSyncCallback(job=job)
        check = Check(callback, lambda: engine)
        Trainer(
            build_model(TINY_QWEN3), arguments(), train_dataset=Tokens(),
            callbacks=[callback, check],
        ).train()  # fmt: skip
        check.assert_saw(0, 1, 4)


def test_training_that_raises_leaves_the_job(job: Job) -> None:
    with Engine(job, TINY_QWEN3) as engine:
        callback = WeightSyncCallback(job=job)
        trainer = Trainer(
            build_model(TINY_QWEN3), arguments(), train_dataset=Tokens(breaks=6),
            callbacks=[callback],
        )  # fmt: skip
        with pytest.raises(OSError, match="the data set is gone"):
            trainer.train()
        wait_until(lambda: job.status()["sources"] == [])
        assert callback.source is None
        wait_until(lambda: engine.versions == {2})  # of the beginning and of step 1


def test_without_engines_training_raises_or_goes_on(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    def train(on_abort: Any) -> WeightSyncCallback:
        callback = WeightSyncCallback(job=job, on_abort=on_abort, timeout_s=0.3)
        Trainer(
            build_model(TINY_QWEN3), arguments(max_steps=2), train_dataset=Tokens(),
            callbacks=[callback],
        ).train()  # fmt: skip
        return callback

    with pytest.raises(NoQuorumError):
        train("raise")
    wait_until(lambda: job.status()["sources"] == [])
    callback = train("warn")
    assert (callback.num_aborted, callback.report) == (3, None)
    assert "step 2 was not published, the old version serves" in caplog.text


def test_a_context_manager_closes_what_another_loop_left_open(job: Job) -> None:
    model = build_model(TINY_QWEN3)
    args, state = arguments(), types.SimpleNamespace(global_step=3)
    with Engine(job, TINY_QWEN3) as engine, WeightSyncCallback(job=job) as callback:
        with pytest.raises(ConfigError, match="after training had begun"):
            callback.on_step_end(args, state, None, model=model)  # type: ignore[arg-type]
        callback.on_train_begin(args, state, None, model=model)  # type: ignore[arg-type]
        wait_until(lambda: engine.versions == {1})
        assert callback.report is not None
        assert callback.report.tag == "3"
    wait_until(lambda: job.status()["sources"] == [])


# ---- two processes, and engines that rank 0 attaches ----


def stub_attach(attach: Callable[..., Job]) -> None:
    """In place of weightsync.integrations.vllm, which needs engines of its own."""
    module = types.ModuleType("weightsync.integrations.vllm")
    module.__dict__["attach"] = attach
    sys.modules["weightsync.integrations.vllm"] = module


def two_ranks(rank: int, model_of: Callable[[TrainingArguments], nn.Module], **options: Any) -> Any:
    engines: list[Engine] = []

    def attach(urls: tuple[str, ...], *, job: Job | str | None, **fabric: object) -> Job:
        assert (rank, urls, job) == (0, ("http://127.0.0.1:8000",), None)
        assert fabric == {"fabric": "local", "fabric_options": None}
        started = Job.start()
        engines.append(Engine(started, TINY_QWEN3).__enter__())
        return started

    stub_attach(attach)
    args = arguments(**options)
    callback = WeightSyncCallback(vllm=["http://127.0.0.1:8000"], timeout_s=20)
    check = Check(callback, lambda: engines[0] if engines else None)
    trainer = Trainer(model_of(args), args, train_dataset=Tokens(), callbacks=[callback, check])
    trainer.train()
    for engine in engines:
        engine.__exit__()
    check.assert_saw(*range(STEPS + 1))
    assert callback.source is None
    dist.barrier()
    return trainer


def check_ddp(rank: int) -> None:
    trainer = two_ranks(rank, lambda args: build_model(TINY_QWEN3))
    assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)


def check_fsdp2_by_transformers(rank: int) -> None:
    """Sharded when it is loaded."""

    def load(args: TrainingArguments) -> nn.Module:
        folder = f"{tempfile.gettempdir()}/weightsync-test-model-{os.getppid()}"
        if rank == 0:
            build_model(TINY_QWEN3).save_pretrained(folder)  # type: ignore[operator]
        dist.barrier()
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            folder, distributed_config=DistributedConfig(fsdp_size=2)
        )
        dist.barrier()
        if rank == 0:
            shutil.rmtree(folder)
        return model

    trainer = two_ranks(rank, load)
    assert all(isinstance(p, DTensor) for p in trainer.model.parameters())


def check_fsdp2_by_accelerate(rank: int) -> None:
    """Sharded by Accelerate's prepare, which shards on accelerators only: told this is one."""

    def build(args: TrainingArguments) -> nn.Module:
        assert args.process_index == rank
        kind = accelerate.utils.DistributedType.MULTI_GPU
        accelerate.PartialState._shared_state["distributed_type"] = kind
        return build_model(TINY_QWEN3)

    trainer = two_ranks(rank, build, fsdp=True, fsdp_config=FSDP2)
    assert trainer.accelerator.is_fsdp2
    assert all(isinstance(p, DTensor) for p in trainer.model.parameters())


def check_attach_fails(rank: int) -> None:
    """Rank 0 says why; the others do not wait for ever."""

    def attach(urls: tuple[str, ...], **options: object) -> Job:
        raise PeerLostError("http://127.0.0.1:8000 does not answer")

    stub_attach(attach)
    trainer = Trainer(
        build_model(TINY_QWEN3), arguments(), train_dataset=Tokens(),
        callbacks=[WeightSyncCallback(vllm=["http://127.0.0.1:8000"])],
    )  # fmt: skip
    error, text = (PeerLostError, "does not answer") if rank == 0 else (ConfigError, "rank 0 could")
    with pytest.raises(error, match=text):
        trainer.train()


def check_ranks(rank: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # the group is there already
    try:
        for check in (
            check_ddp, check_fsdp2_by_transformers, check_fsdp2_by_accelerate, check_attach_fails,
        ):  # fmt: skip
            forget_accelerate()
            check(rank)
    finally:
        _FOLDER.cleanup()


def test_two_processes(tmp_path: Path) -> None:
    run_ranks(check_ranks, 2, tmp_path)
