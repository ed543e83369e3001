"""Measure how new weights get into a real vLLM: ours, vLLM's own reload, gather and broadcast.

Usage: scripts/stack vllm -- python scripts/bench/vllm_refit.py [--model qwen3-0.6b] [--repeats N]

Two FSDP2 ranks hold the model in bf16, one vLLM engine (CPU, one rank) serves it; weights change
before every round, and in each round all three ways bring the same weights over, in turn:

  ours       Source.publish on both ranks, refit in the engine. Bytes go while the engine could
             generate; only `pause` stops it.
  reload     all-gather on the trainers, safetensors in shared memory by rank 0, vLLM's
             `reload_weights` from there.
  broadcast  all-gather on the trainers, gloo broadcast tensor by tensor from rank 0 to the engine,
             vLLM's `reload_weights` from those.

`wire` is everything until the bytes are at the engine, `load` what the engine does with them,
`pause` how long it cannot generate. After each, the engine's greedy tokens are judged by
transformers on the trainers' weights (`right`: rounds in which all of them agree). Prints one JSON
object; seconds are medians.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PROMPT = [3, 14, 15, 92, 65, 35, 89]
NUM_TOKENS = 12
WAYS = ("ours", "reload", "broadcast")
_STEP_S = 600.0
_WORLD = 2


def timed(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def pair_group(folder: str, rank: int) -> Any:
    """A gloo group of trainer 0 and the engine, beside the groups that each of them has."""
    import torch.distributed as dist

    store = dist.FileStore(f"{folder}/pair", 2)
    return dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=_STEP_S))


class Trainer:
    """One FSDP2 rank."""

    def __init__(self, folder: str, job: str, rank: int) -> None:
        import torch
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from transformers import AutoConfig, AutoModelForCausalLM

        from weightsync import Source

        torch.set_num_threads(1)
        self.rank, self.folder = rank, folder
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/trainers", rank=rank, world_size=_WORLD
        )
        torch.manual_seed(7)
        config = AutoConfig.from_pretrained(f"{folder}/model")
        self.reference: Any = None
        self.model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        mesh = init_device_mesh("cpu", (_WORLD,))
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.pair = pair_group(folder, 0) if rank == 0 else None
        self.source = Source(self.model, job=job, timeout_s=_STEP_S)

    def change(self, step: int) -> dict[str, float]:
        """New values everywhere."""
        import torch

        generator = torch.Generator().manual_seed(100 * step + self.rank)
        with torch.no_grad():
            for parameter in self.model.parameters():
                local = parameter.to_local()
                local.add_(torch.randn(local.shape, generator=generator).to(local) * 0.02)
        return {}

    def ours(self) -> dict[str, float]:
        """Publish until the engine serves it."""
        report = self.source.publish(until="adopted")
        return {name: report.stages_s[f"sink_{name}"] for name in ("fill", "verify", "pause")}

    def full(self) -> Iterator[tuple[str, Any]]:
        """Every tensor, whole, on every rank: what frameworks do."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach().full_tensor()

    def reload(self) -> dict[str, float]:
        """Gather, then write where the engine can map it."""
        from safetensors.torch import save_file

        whole: dict[str, Any] = {}
        gather = timed(lambda: whole.update(self.full()))
        if self.rank:
            return {}
        path = Path("/dev/shm", f"weightsync-bench-{Path(self.folder).name}")
        path.mkdir(exist_ok=True)
        save = timed(lambda: save_file(whole, path / "model.safetensors"))
        return {"gather": gather, "save": save}

    def broadcast(self) -> dict[str, float]:
        """Gather and send on, tensor by tensor."""
        for _, tensor in self.full():
            if self.pair is not None:
                self.pair.broadcast([tensor]).wait()
        return {}

    def judge(self, tokens: list[int]) -> bool:
        """Whether transformers would have said the same, up to what bf16 can tell apart."""
        import torch

        whole = dict(self.full())  # on every rank: a collective
        if self.rank:
            return True
        if self.reference is None:
            self.reference = type(self.model)(self.model.config).to(torch.bfloat16).eval()
        for name, parameter in self.reference.named_parameters():
            parameter.data.copy_(whole[name])
        ids = torch.tensor([PROMPT + tokens])
        with torch.no_grad():
            logits = self.reference(input_ids=ids, use_cache=False).logits[0].float()
        logits = logits[len(PROMPT) - 1 : -1]
        said = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        best = logits.max(dim=1).values
        return bool((said >= best - 0.03 * best.abs()).all())

    def close(self) -> None:
        """Leave the job."""
        self.source.close()


class Engine:
    """A vLLM engine in this process."""

    def __init__(self, folder: str, job: str) -> None:
        from weightsync.demo.vllm.settings import engine_environment

        os.environ.update(engine_environment() | {"VLLM_LOGGING_LEVEL": "ERROR"})
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        from weightsync.integrations.vllm import attach

        self.folder = folder
        self.llm = LLM(
            f"{folder}/model",
            dtype="bfloat16",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=64,
            max_num_seqs=2,
            weight_transfer_config={"backend": "weightsync"},
        )
        attach([self.llm], job=job, timeout_s=_STEP_S)
        self.pair = pair_group(folder, 1)
        shapes = json.loads(Path(folder, "shapes.json").read_text(encoding="utf-8"))
        self.shapes: list[tuple[str, list[int]]] = shapes

    def ours(self) -> dict[str, float]:
        """Adopt what is published; the wait for it is the trainers' time."""
        from weightsync.integrations.vllm import refit

        refit(self.llm, timeout_s=_STEP_S)
        return {}

    def reload(self) -> dict[str, float]:
        """VLLM's own reload from files."""
        path = f"/dev/shm/weightsync-bench-{Path(self.folder).name}"
        call = {"weights_path": path}
        return {"load": timed(lambda: self.llm.collective_rpc("reload_weights", kwargs=call))}

    def broadcast(self) -> dict[str, float]:
        """Receive all, then vLLM's own reload from memory."""
        import torch

        received: list[tuple[str, Any]] = []

        def receive() -> None:
            for name, shape in self.shapes:
                tensor = torch.empty(shape, dtype=torch.bfloat16)
                self.pair.broadcast([tensor]).wait()
                received.append((name, tensor))

        wire = timed(receive)
        call = {"weights_iterator": received}
        load = timed(lambda: self.llm.collective_rpc("reload_weights", kwargs=call))
        return {"wire": wire, "load": load}

    def tokens(self) -> list[int]:
        """Greedy tokens, from no cache."""
        from vllm import SamplingParams

        self.llm.reset_prefix_cache()
        sampling = SamplingParams(
            temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False
        )
        made = self.llm.generate({"prompt_token_ids": PROMPT}, sampling, use_tqdm=False)
        return list(made[0].outputs[0].token_ids)

    def close(self) -> None:
        """VLLM ends with the process."""


def serve(kind: type[Any], arguments: tuple[Any, ...], pipe: Connection) -> None:
    """The life of a process: method names in, results out."""
    member = kind(*arguments)
    pipe.send("ready")
    while (command := pipe.recv()) is not None:
        name, *rest = command
        pipe.send(getattr(member, name)(*rest))
    member.close()
    pipe.send("done")
    os._exit(0)


class Peer:
    """A process, seen from the parent."""

    def __init__(self, kind: type[Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=serve, args=(kind, arguments, there), daemon=True)
        self.process.start()
        there.close()

    def send(self, *command: Any) -> None:
        """Start a method."""
        self.pipe.send(command)

    def result(self) -> Any:
        """What it returned."""
        if not self.pipe.poll(_STEP_S):
            raise SystemExit("a process did not answer in time")
        return self.pipe.recv()


def run(way: str, trainers: list[Peer], engine: Peer) -> dict[str, float]:
    """Bring the weights over one way; seconds by part."""
    began = time.perf_counter()
    for trainer in trainers:
        trainer.send(way)
    if way == "reload":
        sent = trainers[0].result()
        engine.send(way)
    else:
        engine.send(way)
        sent = trainers[0].result()
    loaded = engine.result()
    total = time.perf_counter() - began
    for trainer in trainers[1:]:
        trainer.result()
    if way == "ours":
        wire = total - sent["pause"]
        return {"total": total, "wire": wire, "load": sent["pause"], "pause": sent["pause"], **sent}
    load = loaded["load"]
    pause = load if way == "reload" else total  # the engine's process does the receiving
    return {"total": total, "wire": total - load, "load": load, "pause": pause, **sent}


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="qwen3-0.6b", help="a file of configs/model")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    root = Path(__file__).resolve().parents[2]
    found = json.loads((root / "configs" / "model" / f"{options.model}.json").read_text())
    folder = tempfile.mkdtemp(prefix="weightsync-refit-")
    try:
        result = measure(found["config"], folder, options.repeats)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(f"/dev/shm/weightsync-bench-{Path(folder).name}", ignore_errors=True)
    print(json.dumps({"model": options.model, "python": platform.python_version(), **result}))


def measure(config: dict[str, Any], folder: str, repeats: int) -> dict[str, Any]:
    """Start everything, run all ways `repeats` times, turn by turn."""
    from weightsync import Job
    from weightsync.planners import rules

    model = Path(folder, "model")
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    shapes = rules.canonical_tensors(config)
    num_bytes = 2 * sum(_volume(shape) for shape in shapes.values())
    with Job.start(f"unix:{folder}/job") as job:
        names = _save_checkpoint(str(model))
        Path(folder, "shapes.json").write_text(json.dumps([(n, shapes[n]) for n in names]))
        trainers = [Peer(Trainer, folder, job.url, rank) for rank in range(_WORLD)]
        engine = Peer(Engine, folder, job.url)
        for peer in (*trainers, engine):
            assert peer.result() == "ready"
        rounds: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        right = dict.fromkeys(WAYS, 0)
        for step in range(repeats + 1):
            for trainer in trainers:
                trainer.send("change", step)
            for trainer in trainers:
                trainer.result()
            order = WAYS[step % 3 :] + WAYS[: step % 3]
            for way in order:
                seconds = run(way, trainers, engine)
                engine.send("tokens")
                tokens = engine.result()
                for trainer in trainers:
                    trainer.send("judge", tokens)
                agrees = all([trainer.result() for trainer in trainers])
                if step:  # the first round warms up
                    rounds[way].append(seconds)
                    right[way] += agrees
                print(f"{step} {way}: {seconds}", file=sys.stderr)
        for peer in (*trainers, engine):
            peer.pipe.send(None)
            peer.result()
            peer.process.join(10.0)
    middle = {
        way: {part: statistics.median(r[part] for r in found) for part in found[0]}
        for way, found in rounds.items()
    }
    ours = middle["ours"]["total"]
    ratios = {way: middle[way]["total"] / ours for way in WAYS[1:]}
    return {
        "bytes": num_bytes,
        "repeats": repeats,
        "seconds": middle,
        "times_ours": ratios,
        "right": right,
        "verified": right["ours"] == repeats,
    }


def _save_checkpoint(model: str) -> list[str]:
    """Random weights for the engine to begin with; names in the order of the module."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    made: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(model)
    return [name for name, _ in made.named_parameters()]


def _volume(shape: tuple[int, ...]) -> int:
    volume = 1
    for size in shape:
        volume *= size
    return volume


if __name__ == "__main__":
    main()
