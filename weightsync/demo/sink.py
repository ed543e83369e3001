"""A rollout rank of the demo: vLLM's fused tensors, `Sink.refit` between tokens."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from weightsync import Job, Sink
from weightsync.demo.model import model_config
from weightsync.demo.worker import Channel, Message
from weightsync.errors import TornError, WeightSyncError
from weightsync.planners import rules

__all__ = ["run"]

_LISTEN_S = 0.1  # between looks for a command of the parent
_SETTLE_S = 1.0  # from "stop" to the end of waiting


def run(channel: Channel, options: Message, commands: Iterator[Message]) -> None:
    """The life of one rollout rank."""
    torch.set_num_threads(1)
    replica, rank = str(options["replica"]), int(options["rank"])
    tp, folder = int(options["tp"]), Path(options["folder"])
    layout = rules.vllm(model_config(options["model"]), tp=tp, ep=bool(options["ep"]))
    weights = {
        parameter.name: torch.zeros(parameter.shape, dtype=torch.bfloat16)
        for parameter in layout.parameters(rank)
    }
    sink = Sink(
        weights,
        layout=layout,
        replica=replica,
        rank=rank,
        world_size=tp,
        job=Job.connect(options["job"], token_file=options["token_file"]),
        mode=options["mode"],
        timeout_s=float(options["timeout_s"]),
    )
    with sink:
        channel.send(event="ready")
        for command in commands:
            if command["do"] == "refit":
                started = time.monotonic()
                torn = _refit(channel, sink, int(command["version"]))
                spans = [("refit", "refit", started, time.monotonic())]
                spans += [(name, name, start, end) for name, (start, end) in sink.spans.items()]
                dump = folder / f"sink-{replica}-{rank}.safetensors"
                save_file(weights, dump)  # the live memory, as the engine would read it
                channel.send(
                    event="refitted",
                    version=sink.version,
                    torn=torn,
                    dump=str(dump),
                    stages_s=sink.seconds,
                    spans=spans,
                )


def _refit(channel: Channel, sink: Sink, version: int) -> str | None:
    """Adopt `version`; give up when the parent says so. Returns why the replica is torn, if so."""
    done: queue.SimpleQueue[WeightSyncError | None] = queue.SimpleQueue()

    def adopt() -> None:
        try:
            sink.refit(version)
        except WeightSyncError as error:
            done.put(error)
        else:
            done.put(None)

    threading.Thread(target=adopt, name="refit", daemon=True).start()
    while True:
        # In place, a version that is given up may need a moment to be undone.
        given_up = channel.is_waiting()
        try:
            error = done.get(timeout=_SETTLE_S if given_up else _LISTEN_S)
        except queue.Empty:
            if given_up:
                return None
        else:
            if error is not None and not isinstance(error, TornError):
                raise error
            return None if error is None else str(error)
