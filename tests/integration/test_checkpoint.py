"""Checkpoints as sources and sinks of real jobs, judged by safetensors and transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.engine import Engine, same_bits
from support.layout_oracle import TINY_QWEN3, TINY_QWEN3_MOE, build_model, checkpoint
from weightsync import errors
from weightsync.checkpoint import CheckpointSink, CheckpointSource, read_checkpoint
from weightsync.client import Job, Source
from weightsync.planners import rules

TIMEOUT_S = 20.0
MODELS = {"qwen3": TINY_QWEN3, "qwen3_moe": TINY_QWEN3_MOE}


@pytest.fixture
def job() -> Iterator[Job]:
    with Job.start() as started:
        yield started


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as made:
        yield made


def stored_model(
    folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.bfloat16, **options: Any
) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """A checkpoint by transformers itself, and its tensors by canonical name."""
    model = build_model(config).to(dtype)
    model.save_pretrained(folder, **options)  # type: ignore[operator]
    return model, {n: t.clone() for n, t in checkpoint(model, config).items()}


def results(futures: list[Future[Any]]) -> list[Any]:
    return [future.result(TIMEOUT_S + 5) for future in futures]


def assert_same_model(path: Path, expected: dict[str, Tensor], model: torch.nn.Module) -> None:
    """By safetensors, tensor for tensor, and as transformers puts it together."""
    found: dict[str, Tensor] = {}
    for file in path.glob("*.safetensors"):
        with safetensors.safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bits(found[name], tensor), name
    dtype = next(iter(expected.values())).dtype
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    wanted = model.state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    for name, tensor in loaded.state_dict().items():
        assert same_bits(tensor, wanted[name]), name


@pytest.mark.parametrize("fabric", ["local", "tcp"])
@pytest.mark.parametrize(
    ("model", "tp", "ep", "readers", "dtype"),
    [
        ("qwen3", 2, False, 1, torch.bfloat16),
        ("qwen3", 8, False, 3, torch.float32),
        ("qwen3_moe", 2, True, 2, torch.bfloat16),
    ],
)
def test_cold_start_of_an_engine(
    job: Job, pool: ThreadPoolExecutor, tmp_path: Path, model: str, tp: int, ep: bool,
    readers: int, dtype: torch.dtype, fabric: str,
) -> None:  # fmt: skip
    config = MODELS[model]
    _, named = stored_model(tmp_path, config, dtype, max_shard_size="10KB")
    with ExitStack() as stack:
        engine = Engine(job, config, tp=tp, ep=ep, fabric=fabric)
        stack.callback(engine.close)
        sources = [
            stack.enter_context(
                CheckpointSource(
                    tmp_path, job=job, rank=rank, world_size=readers, timeout_s=TIMEOUT_S,
                    fabric=fabric,
                )
            )
            for rank in range(readers)
        ]  # fmt: skip
        waiting = [pool.submit(sink.refit) for sink in engine.sinks]
        reports = results([pool.submit(s.publish, tag="cold", until="adopted") for s in sources])
        assert results(waiting) == [1] * tp
        assert {report.tag for report in reports} == {"cold"}
        assert all(report.num_bytes for report in reports)
        engine.check({name: tensor.to(torch.bfloat16) for name, tensor in named.items()})
        total = sum(source.num_bytes for source in sources)
        assert total == sum(tensor.nbytes for tensor in named.values())


def test_a_trainer_goes_on_where_the_checkpoint_began(
    job: Job, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    _, named = stored_model(tmp_path, TINY_QWEN3)
    with ExitStack() as stack:
        engine = Engine(job, TINY_QWEN3)
        stack.callback(engine.close)
        with CheckpointSource(tmp_path, job=job) as source:
            waiting = [pool.submit(sink.refit) for sink in engine.sinks]
            source.publish(until="adopted")
            results(waiting)
        trained = {name: tensor * 2 for name, tensor in named.items()}
        half = [{n: t.chunk(2)[rank].clone() for n, t in trained.items()} for rank in range(2)]
        layout = rules.fsdp2(TINY_QWEN3, fsdp=2, dtype="BF16")
        trainers = [
            stack.enter_context(
                Source(half[r], layout=layout, job=job, rank=r, world_size=2, timeout_s=TIMEOUT_S)
            )
            for r in range(2)
        ]
        waiting = [pool.submit(sink.refit) for sink in engine.sinks]
        assert {r.version for r in results([pool.submit(t.publish) for t in trainers])} == {2}
        assert results(waiting) == [2, 2]
        engine.check(trained)


@pytest.mark.parametrize(
    ("mode", "fabric"), [("in_place", "local"), ("staged", "local"), ("in_place", "tcp")]
)
@pytest.mark.parametrize(
    ("model", "writers", "options"),
    [
        ("qwen3", 1, {}),
        ("qwen3", 3, {"max_file_bytes": 4000}),
        ("qwen3_moe", 2, {"max_file_bytes": 6000}),
    ],
)
def test_from_trainers_to_sinks_to_a_checkpoint(
    pool: ThreadPoolExecutor, tmp_path: Path, model: str, writers: int, options: dict[str, Any],
    mode: str, fabric: str,
) -> None:  # fmt: skip
    """fp32 shards of FSDP2 -> fused bf16 shards of an engine -> what transformers reads."""
    config, out = MODELS[model], tmp_path / "out"
    trained = build_model(config)
    named = checkpoint(trained, config)
    layout = rules.fsdp2(config, fsdp=2)
    state = dict(trained.named_parameters())
    shards = []
    for rank in range(2):
        chunks = {n: p.detach().split(-(-p.shape[0] // 2)) for n, p in state.items()}
        shards.append({n: c[rank].clone() for n, c in chunks.items() if len(c) > rank})
    with ExitStack() as stack:
        first, second = (stack.enter_context(Job.start()) for _ in range(2))
        engine = Engine(first, config, tp=2, ep=model == "qwen3_moe")
        stack.callback(engine.close)
        trainers = [
            stack.enter_context(Source(shards[r], layout=layout, job=first, rank=r, world_size=2))
            for r in range(2)
        ]
        waiting = [pool.submit(sink.refit) for sink in engine.sinks]
        results([pool.submit(t.publish) for t in trainers])
        results(waiting)
        served = [
            stack.enter_context(
                Source(
                    memory, layout=engine.layout, job=second, rank=rank, world_size=2, fabric=fabric
                )
            )
            for rank, memory in enumerate(engine.memory)
        ]  # fmt: skip
        sinks = [
            stack.enter_context(
                CheckpointSink(
                    out, job=second, config=config, rank=rank, world_size=writers,
                    timeout_s=TIMEOUT_S, mode=mode, fabric=fabric, **options,  # type: ignore[arg-type]
                )
            )
            for rank in range(writers)
        ]  # fmt: skip
        assert not out.exists()
        written = [pool.submit(sink.write) for sink in sinks]
        results([pool.submit(s.publish, until="adopted") for s in served])
        done = results(written)
    bf16 = {name: tensor.to(torch.bfloat16) for name, tensor in named.items()}
    assert {d.version for d in done} == {1}
    assert sum(d.num_bytes for d in done) == sum(tensor.nbytes for tensor in bf16.values())
    files = sorted(name for d in done for name in d.files)
    if writers == 1:
        assert files == ["model.safetensors"]
    else:
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(d.num_bytes for d in done)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same_model(out, bf16, trained.to(torch.bfloat16))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_like_another_checkpoint(job: Job, pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    """Dtypes tensor by tensor, scalars, a model that no rule knows, small files beside it."""
    old, out = tmp_path / "old", tmp_path / "out"
    old.mkdir()
    tensors = {
        "a": torch.randn(5, 3), "b": torch.randn(2, 3, 4, 5).half(), "scalar": torch.tensor(7),
        "flags": torch.tensor([True, False, True]), "eight": torch.randn(6).to(torch.float8_e4m3fn),
        "n\u00e4me": torch.randn(3).bfloat16(), "empty": torch.zeros(0, 3),
    }  # fmt: skip
    save_file(tensors, old / "model.safetensors")
    for name, text in {"config.json": '{"model_type": "mine"}', "tokenizer.json": "{}"}.items():
        (old / name).write_text(text)
    (old / "pytorch_model.bin").write_bytes(b"\x80")
    (old / "runs").mkdir()
    with ExitStack() as stack:
        # More readers than the tensors have rows of an even share: some have nothing to send.
        sources = [
            stack.enter_context(CheckpointSource(old, job=job, rank=rank, world_size=7))
            for rank in range(7)
        ]
        assert min(source.num_bytes for source in sources) == 0
        sink = stack.enter_context(CheckpointSink(out, job=job, like=old, timeout_s=TIMEOUT_S))
        writing = pool.submit(sink.write)
        results([pool.submit(source.publish) for source in sources])
        writing.result(TIMEOUT_S)
        with pytest.raises(errors.ConfigError, match="make another"):
            sink.write()
    found = load_file(out / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert (out / "config.json").read_text() == '{"model_type": "mine"}'


def test_tensors_at_odd_addresses_are_read(
    job: Job, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    """Nothing in the format aligns them: a header of odd length, a byte before the floats."""
    tensors = {"a": torch.tensor([1, 2, 3], dtype=torch.uint8), "b": torch.randn(40, 30)}
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [40, 30], "data_offsets": [3, 4803]},
    }
    text = json.dumps(header).encode()
    text += b" " * (2 - len(text) % 2 - 1)
    data = b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
    (tmp_path / "odd.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    with ExitStack() as stack:
        source = stack.enter_context(CheckpointSource(tmp_path / "odd.safetensors", job=job))
        sink = stack.enter_context(
            CheckpointSink(tmp_path / "out", job=job, like=tmp_path / "odd.safetensors")
        )
        writing = pool.submit(sink.write)
        source.publish()
        writing.result(TIMEOUT_S)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())


def test_a_tied_weight_that_is_stored_twice(job: Job, tmp_path: Path) -> None:
    _, named = stored_model(tmp_path, TINY_QWEN3)
    head = named["model.embed_tokens.weight"].clone()
    save_file({**named, "lm_head.weight": head}, tmp_path / "model.safetensors")
    with CheckpointSource(tmp_path, job=job) as source:
        assert source.skipped == ["lm_head.weight"]
    head[3, 3] += 1
    save_file({**named, "lm_head.weight": head}, tmp_path / "model.safetensors")
    with pytest.raises(errors.CheckpointError, match=r"lm_head\.weight is tied .* but they differ"):
        CheckpointSource(tmp_path, job=job)


def test_a_checkpoint_of_another_model_is_refused_before_it_joins(job: Job, tmp_path: Path) -> None:
    stored_model(tmp_path, TINY_QWEN3)
    with pytest.raises(errors.CheckpointError, match=r"has shape \(100, 16\), by its config"):
        CheckpointSource(tmp_path, job=job, config={**TINY_QWEN3, "vocab_size": 99})
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(errors.CheckpointError, match="a is not part of the qwen3"):
        CheckpointSource(tmp_path, job=job)
    assert job.status()["sources"] == []
    # What no config checks the two sides compare with each other.
    with ExitStack() as stack:
        source = stack.enter_context(CheckpointSource(tmp_path, job=job, config=None))
        engine = Engine(job, TINY_QWEN3, tp=1)
        stack.callback(engine.close)
        with pytest.raises(errors.UnknownTensorError, match=r"model\.embed_tokens\.weight"):
            source.publish(timeout_s=5)


def export_fails(
    job: Job, tmp_path: Path, during: Callable[[CheckpointSink], None], error: type[Exception]
) -> None:
    """Run an export over an old checkpoint; it must fail and leave the old one as it was."""
    out = tmp_path / "out"
    stored_model(out, TINY_QWEN3)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    sink = CheckpointSink(out, job=job, like=out, overwrite=True, timeout_s=TIMEOUT_S)
    with sink, pytest.raises(error):
        during(sink)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert job.status()["replicas"] == {}


def test_nothing_is_written_if_nothing_comes(job: Job, tmp_path: Path) -> None:
    export_fails(job, tmp_path, lambda s: s.write(timeout_s=0.3), errors.TransferTimeoutError)


def test_nothing_is_written_if_the_sides_differ(
    job: Job, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    def during(sink: CheckpointSink) -> None:
        with Source({"a": torch.zeros(3)}, job=job, rank=0, world_size=1) as source:
            failed = pool.submit(source.publish, timeout_s=5)
            try:
                sink.write(timeout_s=5)
            finally:
                assert isinstance(failed.exception(10), errors.UnknownTensorError)

    export_fails(job, tmp_path, during, errors.UnknownTensorError)


def test_nothing_is_written_if_it_is_interrupted(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> int:
        raise KeyboardInterrupt

    def during(sink: CheckpointSink) -> None:
        monkeypatch.setattr(sink._sink, "refit", interrupted)
        sink.write()

    export_fails(job, tmp_path, during, KeyboardInterrupt)  # type: ignore[arg-type]


def test_no_rank_reports_success_if_rank_0_cannot_give_the_name(
    job: Job, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    _, named = stored_model(tmp_path / "old", TINY_QWEN3)
    sinks = [
        CheckpointSink(
            out, job=job, like=tmp_path / "old", rank=rank, world_size=2, timeout_s=TIMEOUT_S
        )
        for rank in range(2)
    ]
    writing = [pool.submit(sink.write) for sink in sinks]
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with Source(named, job=job, rank=0, world_size=1) as source:
        source.publish()
    first, second = (future.exception(TIMEOUT_S) for future in writing)
    assert isinstance(first, errors.ConfigError)
    assert "is there already" in str(first)
    assert isinstance(second, errors.CheckpointError)
    assert second.rank == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "out"]
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_what_was_exported_can_be_replaced_with_all_its_copies(job: Job, tmp_path: Path) -> None:
    old, out = tmp_path / "old", tmp_path / "out"
    stored_model(old, TINY_QWEN3)
    (old / "modeling_own.py").write_text("")
    shutil.copytree(old, out)
    CheckpointSink(out, job=job, like=old, overwrite=True).close()
    (out / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(errors.ConfigError, match=r"'optimizer\.pt' in it"):
        CheckpointSink(out, job=job, like=old, overwrite=True)
    (out / "optimizer.pt").unlink()
    (old / "modeling_own.py").unlink()
    with pytest.raises(errors.ConfigError, match=r"'modeling_own\.py' in it"):
        CheckpointSink(out, job=job, like=old, overwrite=True)


def test_a_full_disk_is_an_error_and_no_signal(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(errors.CheckpointError, match=r"model\.safetensors: .* No space left"):
        CheckpointSink(tmp_path / "out", job=job, config=TINY_QWEN3)
    assert list(tmp_path.iterdir()) == []


def test_a_version_that_is_given_up_is_waited_over(
    job: Job, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    """In place its first bytes had come; the next version overwrites them all."""
    _, named = stored_model(tmp_path / "old", TINY_QWEN3)
    weights = {name: tensor.clone() for name, tensor in named.items()}
    with ExitStack() as stack:
        source = stack.enter_context(Source(weights, job=job, rank=0, world_size=1))
        sink = stack.enter_context(
            CheckpointSink(tmp_path / "out", job=job, like=tmp_path / "old", timeout_s=TIMEOUT_S)
        )
        writing = pool.submit(sink.write)
        unchanged = source._member._changed_since
        # Said after every byte was written.
        source._member._changed_since = lambda before: "model.norm.weight"
        with pytest.raises(errors.SourceMutatedError):
            source.publish()
        assert not (tmp_path / "out").exists()
        source._member._changed_since = unchanged
        for tensor in weights.values():
            tensor.mul_(2)
        assert source.publish().version == 2
        assert writing.result(TIMEOUT_S).version == 2
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(same_bits(found[name], tensor) for name, tensor in weights.items())


CHILD = """
import os, re, sys, threading
from pathlib import Path
import torch
from weightsync.checkpoint import CheckpointSink, CheckpointSource
torch.set_num_threads(1)

def anonymous():
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"^Anonymous: +(\\d+) kB", text, re.M)[1]) << 10

role, path, job = sys.argv[1:4]
if role == "load":
    member = CheckpointSource(path, job=job, staging_bytes=4 << 20)
    work = member.publish
else:
    member = CheckpointSink(path, job=job, like=sys.argv[4], max_file_bytes=64 << 20)
    work = member.write
before, most, done = anonymous(), 0, threading.Event()
def watch():
    global most
    while not done.wait(0.005):
        most = max(most, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
with member:
    work()
    done.set()
    watcher.join()
print(most - before)
"""


def test_memory_is_bounded_by_the_budget_not_by_the_checkpoint(tmp_path: Path) -> None:
    """Two processes, 160 MiB, staging of 4 MiB: what is allocated, as the kernel counts it."""
    old, out = tmp_path / "old", tmp_path / "out"
    old.mkdir()
    generator = torch.Generator().manual_seed(5)
    tensors = {
        f"w{i}": torch.randint(-(2**31), 2**31 - 1, (1024, 2048), generator=generator).int()
        for i in range(20)
    }
    save_file(tensors, old / "model.safetensors")
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size == 160 << 20
    with Job.start(bucket_bytes=2 << 20) as job:
        url = job.url
        command = [sys.executable, "-c", CHILD]
        children = [
            subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True)
            for arguments in (["load", str(old), url], ["export", str(out), url, str(old)])
        ]
        try:
            grown = [int(child.communicate(timeout=50)[0]) for child in children]
        finally:
            for child in children:
                child.kill()
                child.wait()
        assert [child.returncode for child in children] == [0, 0]
    assert max(grown) < 24 << 20, [f"{g >> 20} MiB" for g in grown]
    stored = read_checkpoint(out)
    assert len(stored.files) == 3
    for file in stored.files:
        assert all(same_bits(t, tensors[name]) for name, t in load_file(file).items())
