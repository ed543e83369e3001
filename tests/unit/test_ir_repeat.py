"""Repeated layers and replicas are what was built layer by layer and merged rank by rank."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.layout_oracle import TINY_MODELS
from weightsync.errors import LayoutError, PlanError
from weightsync.ir import Manifest, ManifestBuilder, PlanOptions
from weightsync.ir.repeat import repeat_blocks, repeat_ranks
from weightsync.planners import rules
from weightsync.planners.planner import plan_transfer
from weightsync.planners.rules import VllmLayout
from weightsync.planners.rules.layout import Block

MODELS = Path(__file__).parents[2] / "configs" / "model"
SMALL = {
    "num_hidden_layers": 5,
    "n_routed_experts": 8,
    "num_experts": 8,
    "first_k_dense_replace": 2,
}


def config_of(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((MODELS / f"{name}.json").read_text())["config"]
    return {**config, **{key: value for key, value in SMALL.items() if key in config}}


@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        ("kimi-k2", {"tp": 2, "dp": 2, "ep": True, "encoding": "fp8_block"}),
        ("deepseek-v3", {"tp": 2, "pp": 2, "quantized": True}),
        ("glm-4.5", {"tp": 4, "ep": True, "num_redundant_experts": 3}),
        ("qwen3-30b-a3b", {"tp": 8, "pp": 3}),
    ],
)
def test_layers_that_are_alike_are_those_that_were_built_one_by_one(
    name: str, degrees: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = rules.vllm(config_of(name), **degrees)
    found = [tuple(layout.parameters(rank)) for rank in range(layout.world_size)]
    stamped = [layout.manifest(rank) for rank in range(layout.world_size)]
    monkeypatch.setattr(VllmLayout, "blocks", lambda self, rank: [Block(found[rank])])
    assert [layout.manifest(rank) for rank in range(layout.world_size)] == stamped


def test_experts_that_were_moved_are_not_alike() -> None:
    config = config_of("qwen3-30b-a3b")
    moved = [[(slot + layer) % 8 for slot in range(8)] for layer in range(5)]
    layout = rules.vllm(config, tp=2, ep=True, expert_map=moved)
    held = layout.manifest(0)
    of_layer = [
        {n.split(".")[5] for n in held.tensors.names if f"layers.{layer}.mlp.experts." in n}
        for layer in range(5)
    ]
    assert of_layer == [{str(e) for e in moved[layer][:4]} for layer in range(5)]


@pytest.mark.parametrize("encoding", [None, "fp8_block"])
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_a_plan_for_repeated_replicas_is_that_of_the_merged_ones(
    replicas: int, encoding: str | None
) -> None:
    config = TINY_MODELS["qwen3_moe"] if encoding is None else config_of("qwen3-30b-a3b")
    layout = rules.vllm(config, tp=2, encoding=encoding)
    trainer = rules.fsdp2(config, fsdp=3, replicate=2, dtype="BF16")
    source = Manifest.merge("source", [trainer.manifest(rank) for rank in range(6)])
    ranks = [layout.manifest(rank) for rank in range(2)]
    labels = [[f"sink {replica}/{rank}" for rank in range(2)] for replica in range(replicas)]
    merged = Manifest.merge(
        "sink",
        [
            dataclasses.replace(manifest, ranks=(label,))
            for of_replica in labels
            for manifest, label in zip(ranks, of_replica, strict=True)
        ],
    )
    repeated = repeat_ranks(Manifest.merge("sink", ranks), labels)
    assert (repeated.digest, repeated.repeats is None) == (merged.digest, False)
    assert Manifest.from_bytes(repeated.to_bytes()) == merged
    assert dataclasses.replace(repeated, ranks=repeated.ranks).repeats is None
    options = PlanOptions(bucket_bytes=1 << 16, chunk_bytes=1 << 14, slot_bytes=1 << 16)
    if encoding is not None:
        options = PlanOptions()
    assert plan_transfer(source, repeated, options).digest == (
        plan_transfer(source, merged, options).digest
    )


def test_a_replica_that_is_written_otherwise_is_found() -> None:
    config = TINY_MODELS["qwen3_moe"]
    trainer, layout = rules.fsdp2(config, fsdp=2, dtype="BF16"), rules.vllm(config, tp=1)
    source = Manifest.merge("source", [trainer.manifest(rank) for rank in range(2)])
    plan = plan_transfer(source, repeat_ranks(layout.manifest(0), [["sink 0"], ["sink 1"]]))
    plan.validate()
    rows, sent = plan.rows, np.arange(plan.num_sent)
    half = len(layout.manifest(0).buffers)
    second = next(r for r in sent if rows.dst_buffer[r] >= half and rows.src_offset[r] > 0)
    like = rows.dst_buffer[sent] == rows.dst_buffer[second] - half
    twin = np.flatnonzero(like & (rows.dst_offset[sent] == rows.dst_offset[second]))
    for taken, words in (
        (second, "otherwise than replica 0"),
        ([second, *twin], r"sink 0\) reads"),
    ):
        offset = rows.src_offset.copy()
        offset[taken] -= 1
        wrong = dataclasses.replace(plan, rows=dataclasses.replace(rows, src_offset=offset))
        with pytest.raises(PlanError, match=words):
            wrong.validate()


def test_labels_are_one_for_each_rank() -> None:
    one = rules.vllm(TINY_MODELS["qwen3"], tp=1).manifest(0)
    for labels in ([["a"], ["a"]], [["a", "b"]], [["a"], []]):
        with pytest.raises(LayoutError, match="need as many labels"):
            repeat_ranks(one, labels)


def _layer(builder: ManifestBuilder, tensor: str, buffer: str) -> None:
    builder.tensor(f"{tensor}w", (6, 4))
    builder.buffer(f"{buffer}w", "BF16", 30)
    box = {"lo": (1, 0), "n": (5, 2), "step": (1, 2)}
    builder.piece(f"{tensor}w", f"{buffer}w", **box, offset=3, stride=(5, 1))


def test_a_repeated_block_is_as_if_declared_each_time() -> None:
    block, apart = (ManifestBuilder("source", "source 0") for _ in range(2))
    _layer(block, "layers.3.", "local.0.")
    _layer(block, "layers.4.", "local.1.")
    copies = [(f"layers.{number}.", f"l{number}.") for number in (3, 11)]
    for prefixes in [*copies, ("layers.4.", "local.1.")]:
        _layer(apart, *prefixes)
    stamped = repeat_blocks(block.build(), [(("layers.3.", "local.0."), copies)])
    assert stamped == apart.build()


def test_constants_of_a_block_are_repeated() -> None:
    block = ManifestBuilder("sink", "sink 0")
    block.tensor("a.w", (4,))
    block.buffer("a.w", "BF16", 6)
    block.place("a.w", "a.w", (4,))
    block.constant("a.w", 4, (2,), (1,), 0.5)
    pieces = repeat_blocks(block.build(), [(("a.", "a."), [("a.", "a."), ("b.", "b.")])]).pieces
    assert list(zip(pieces.tensor.tolist(), pieces.buffer.tolist(), strict=True)) == [
        (-1, 0),
        (-1, 1),
        (0, 0),
        (1, 1),
    ]


def test_a_block_is_refused_where_names_do_not_fit() -> None:
    block = ManifestBuilder("source", "source 0")
    _layer(block, "a.", "b.")
    with pytest.raises(LayoutError, match="holds a tensor that is not of the part"):
        repeat_blocks(block.build(), [(("x.", "b."), [("x.", "b."), ("y.", "c.")])])
    with pytest.raises(LayoutError, match=r"y\.w occurs twice"):
        repeat_blocks(block.build(), [(("a.", "b."), [("y.", "y."), ("z.", "y.")])])


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "glm4_moe"])
def test_layers_that_are_repeated_are_as_valid_as_those_that_are_not(name: str) -> None:
    config = {**TINY_MODELS[name], **SMALL, "num_hidden_layers": 6}
    for layout in (rules.fsdp2(config, fsdp=2, ep=2), rules.vllm(config, tp=2, ep=True)):
        assert any(block.copies for block in layout.blocks(0))
        for rank in range(layout.world_size):
            manifest = layout.manifest(rank)
            # Validates all of it.
            assert Manifest.from_bytes(manifest.to_bytes(), ranks=manifest.ranks) == manifest
