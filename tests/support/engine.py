"""An engine that follows a job: the memory of all ranks of a vLLM replica, and their sinks."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from weightsync.client import Job, Sink
from weightsync.errors import TransferTimeoutError
from weightsync.integrations import readback
from weightsync.planners import rules

__all__ = ["Engine", "same_bits"]

_REFIT_S = 0.5  # between looks whether the engine is to end


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Equal dtype, shape and bits; NaN equals itself."""
    return (first.dtype, first.shape) == (second.dtype, second.shape) and torch.equal(
        first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8)
    )


class Engine:
    """One replica in this process. Entered as a context manager it refits by itself.

    Args:
        job: Whose versions it adopts.
        config: Content of the model's `config.json`.
        tp: Tensor-parallel ranks.
        ep: Whether experts lie whole on the ranks.
        name: Of the replica.
    """

    def __init__(
        self, job: Job | str, config: dict[str, Any], *, tp: int = 2, ep: bool = False,
        name: str = "engine", **options: Any,
    ) -> None:  # fmt: skip
        layout = rules.vllm(config, tp=tp, ep=ep)
        self.layout, self.config, self.tp, self.ep = layout, config, tp, ep
        self.memory = [
            {p.name: torch.zeros(p.shape, dtype=torch.bfloat16) for p in layout.parameters(r)}
            for r in range(tp)
        ]
        self.sinks = [
            Sink(
                self.memory[rank], layout=layout, replica=name, rank=rank, world_size=tp, job=job,
                **options,
            )
            for rank in range(tp)
        ]  # fmt: skip
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._follow, args=(s,)) for s in self.sinks]

    @property
    def versions(self) -> set[int | None]:
        """What the ranks serve."""
        return {sink.version for sink in self.sinks}

    def check(self, named: dict[str, Tensor]) -> None:
        """Compare the memory with canonical tensors, bit for bit."""
        bf16 = {name: tensor.to(torch.bfloat16) for name, tensor in named.items()}
        for rank, memory in enumerate(self.memory):
            expected = readback.shard(bf16, self.config, tp=self.tp, ep=self.ep, rank=rank)
            assert expected.keys() == memory.keys()
            for name, tensor in expected.items():
                assert same_bits(memory[name], tensor), name

    def _follow(self, sink: Sink) -> None:
        while not self._stop.is_set():
            try:
                sink.refit(timeout_s=_REFIT_S)
            except TransferTimeoutError:
                continue

    def __enter__(self) -> Engine:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self.close()

    def close(self) -> None:
        """Leave the job."""
        for sink in self.sinks:
            sink.close()
