"""An engine's layout as a source's: the same memory, without the padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.layout_oracle import TINY_QWEN3, TINY_QWEN3_MOE, build_model, checkpoint, piece_rows
from weightsync.integrations import readback
from weightsync.ir.layout import SourceLayout
from weightsync.planners import rules


@pytest.mark.parametrize(
    ("config", "tp", "ep"),
    [(TINY_QWEN3, 1, False), (TINY_QWEN3, 8, False), (TINY_QWEN3_MOE, 2, True)],
)
def test_every_piece_lies_where_the_engine_holds_it(
    config: dict[str, Any], tp: int, ep: bool
) -> None:
    named = checkpoint(build_model(config), config)
    layout = rules.vllm(config, tp=tp, ep=ep)
    times = {name: torch.zeros(tensor.shape) for name, tensor in named.items()}
    for rank in range(tp):
        held = readback.shard(named, config, tp=tp, ep=ep, rank=rank)
        manifest = SourceLayout(layout).manifest(rank)
        assert manifest.side == "source"
        assert manifest.ranks == (f"source {rank}",)
        for row in piece_rows(manifest):
            assert row.tensor is not None
            box = tuple(
                slice(lo, lo + step * (n - 1) + 1, step)
                for lo, n, step in zip(row.lo, row.n, row.step, strict=True)
            )
            found = held[row.buffer].as_strided(row.n, row.stride, row.offset)
            assert torch.equal(found, named[row.tensor][box])
            times[row.tensor][box] += 1
    assert all(count.ge(1).all() for count in times.values())  # together they hold everything


def test_a_source_stays_as_it_is() -> None:
    layout = rules.fsdp2(TINY_QWEN3, fsdp=2)
    assert SourceLayout(layout).manifest(1) == layout.manifest(1)
