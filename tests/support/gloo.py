"""Real ranks: processes of one gloo group that run a check of a test module."""

from __future__ import annotations

import importlib.util
import inspect
import multiprocessing
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Final

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["run_ranks"]

DEADLINE_S: Final = 50.0
# Imported once, by the server that all ranks are forked from: most of a rank's start.
_PRELOAD: Final = [
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.models.deepseek_v3.modeling_deepseek_v3",
    "transformers.models.gpt_oss.modeling_gpt_oss",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
]


def run_ranks(
    check: Callable[[int], None], world_size: int, folder: Path, deadline_s: float = DEADLINE_S
) -> None:
    """Run `check(rank)` on every rank of a new group; a rank that fails shows its traceback.

    `check` is a function at the top of a module; `folder` is empty and this run's own.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOAD)
    source = inspect.getsourcefile(check)
    context = mp.start_processes(
        _rank_main,
        (source, check.__name__, world_size, str(folder), deadline_s),
        nprocs=world_size,
        join=False,
        start_method="forkserver",
    )
    end = time.monotonic() + deadline_s
    try:
        while not context.join(timeout=max(0.0, end - time.monotonic())):
            if time.monotonic() > end:
                pytest.fail(f"ranks did not finish within {deadline_s} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()


def _rank_main(
    rank: int, source: str, name: str, world_size: int, folder: str, deadline_s: float
) -> None:
    torch.set_num_threads(1)
    # A test module has no name that another process could import.
    spec = importlib.util.spec_from_file_location("ranks_of_a_test", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=deadline_s),
    )
    try:
        getattr(module, name)(rank)
    finally:
        dist.destroy_process_group()
