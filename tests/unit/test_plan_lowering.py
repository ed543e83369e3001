"""How copies become rows, chunks and buckets: direct or packed, joined or cut, in which order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from support.oracle import moves_exactly
from weightsync.ir import Manifest, ManifestBuilder, Plan, PlanOptions
from weightsync.planners import rules
from weightsync.planners.planner import plan_transfer

TINY_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "tie_word_embeddings": True,
}


def _whole(
    side: str, rank: int, tensors: dict[str, tuple[int, ...]], dtype: str = "BF16"
) -> ManifestBuilder:
    builder = ManifestBuilder(side, f"{side} {rank}")  # type: ignore[arg-type]
    for name, shape in tensors.items():
        builder.tensor(name, shape)
        builder.buffer(name, dtype, math.prod(shape))
        builder.place(name, name, shape)
    return builder


def _planned(source: Manifest, sink: Manifest, options: PlanOptions | None = None) -> Plan:
    plan = plan_transfer(source, sink, options)
    assert moves_exactly(plan)
    return plan


def _chunks(plan: Plan) -> list[tuple[int, int, bool, int]]:
    """Return `(dst_offset, nbytes, is_packed, num_rows)` of all chunks."""
    chunks = plan.chunks
    columns = (chunks.dst_offset, chunks.nbytes, chunks.is_packed, chunks.row_hi - chunks.row_lo)
    return list(zip(*(c.tolist() for c in columns), strict=True))


def test_equal_layouts_are_written_straight_in_even_chunks() -> None:
    tensors = {"w": (10, 64)}
    options = PlanOptions(chunk_bytes=512, direct_run_bytes=64)
    plan = _planned(
        _whole("source", 0, tensors).build(), _whole("sink", 0, tensors).build(), options
    )
    assert _chunks(plan) == [(0, 512, False, 1), (512, 512, False, 1), (1024, 256, False, 1)]
    nine = {"w": (9, 64)}
    plan = _planned(_whole("source", 0, nine).build(), _whole("sink", 0, nine).build(), options)
    # Rather than 4, 4 and a short rest.
    assert plan.nest_of(slice(None)).n[:, 2].tolist() == [3, 3, 3]


def test_one_row_above_the_chunk_limit_is_cut_inside() -> None:
    tensors = {"w": (2, 1000)}
    plan = _planned(
        _whole("source", 0, tensors).build(),
        _whole("sink", 0, tensors).build(),
        PlanOptions(chunk_bytes=1024, direct_run_bytes=64),
    )
    assert [nbytes for _, nbytes, _, _ in _chunks(plan)] == [1000, 1000, 1000, 1000]


def _gate_up(shards: Sequence[tuple[int, int]], options: PlanOptions) -> Plan:
    """Plan gate and up, sharded by rows over sources, into one buffer of interleaved rows."""
    sources = []
    for rank, (begin, end) in enumerate(shards):
        builder = ManifestBuilder("source", f"source {rank}")
        for name in ("gate", "up"):
            n = (end - begin, 4)
            builder.tensor(name, (12, 4))
            builder.buffer(name, "BF16", n[0] * n[1])
            builder.place(name, name, n, lo=(begin, 0), n=n)
        sources.append(builder.build())
    sink = ManifestBuilder("sink", "sink 0")
    sink.buffer("gate_up", "BF16", 96)
    for slot, name in enumerate(("gate", "up")):
        sink.tensor(name, (12, 4))
        sink.place(name, "gate_up", (12, 2, 4), at=(0, slot, 0), axes=(0, 2))
    return _planned(Manifest.merge("source", sources), sink.build(), options)


def test_interleaved_rows_of_gate_and_up_fill_packed_chunks_together() -> None:
    plan = _gate_up([(0, 7), (7, 12)], PlanOptions())
    assert _chunks(plan) == [(0, 112, True, 2), (112, 80, True, 2)]
    # Limited to 48 bytes, three row pairs of 16 bytes fit.
    plan = _gate_up([(0, 7), (7, 12)], PlanOptions(chunk_bytes=48))
    sizes = [(nbytes, rows) for _, nbytes, _, rows in _chunks(plan)]
    assert sizes == [(48, 2), (48, 2), (16, 2), (48, 2), (32, 2)]
    # Not even one pair fits: every row is a run by itself.
    plan = _gate_up([(0, 12)], PlanOptions(chunk_bytes=8))
    assert _chunks(plan) == [(i * 8, 8, False, 1) for i in range(24)]


def test_column_slices_are_packed_at_the_source() -> None:
    """Row-parallel weights: the source's rows are long, the sink's short and contiguous."""
    source = _whole("source", 0, {"w": (64, 32)}).build()
    sinks = []
    for rank in range(2):
        builder = ManifestBuilder("sink", f"sink {rank}")
        builder.tensor("w", (64, 32))
        builder.buffer("w", "BF16", 64 * 16)
        builder.place("w", "w", (64, 16), lo=(0, 16 * rank), n=(64, 16))
        sinks.append(builder.build())
    sink = Manifest.merge("sink", sinks)
    assert _chunks(_planned(source, sink)) == [(0, 2048, True, 1)] * 2
    # Runs of 32 bytes that count as long are written one by one.
    plan = _planned(source, sink, PlanOptions(direct_run_bytes=32))
    assert _chunks(plan) == [(i * 32, 32, False, 1) for i in range(64)] * 2


def test_shards_of_columns_become_one_chunk_per_destination_run() -> None:
    sources = []
    for rank in range(2):
        builder = ManifestBuilder("source", f"source {rank}")
        builder.tensor("w", (5, 8))
        builder.buffer("w", "BF16", 20)
        builder.place("w", "w", (5, 4), lo=(0, 4 * rank), n=(5, 4))
        sources.append(builder.build())
    plan = _planned(Manifest.merge("source", sources), _whole("sink", 0, {"w": (5, 8)}).build())
    assert _chunks(plan) == [(16 * i, 8, False, 1) for i in range(5)] + [
        (16 * i + 8, 8, False, 1) for i in range(5)
    ]


def test_a_transposed_source_and_a_cast_are_packed() -> None:
    source = ManifestBuilder("source", "source 0")
    source.tensor("t", (6, 4))
    source.buffer("t", "F32", 24)
    source.place("t", "t", (4, 6), axes=(1, 0))
    sink = _whole("sink", 0, {"t": (6, 4)}).build()
    plan = _planned(source.build(), sink)
    assert _chunks(plan) == [(0, 48, True, 1)]
    assert plan.nest_of(slice(1)).src_stride[0].tolist() == [0, 0, 1, 6]
    plan = _planned(source.build(), sink, PlanOptions(slot_bytes=16))
    assert [nbytes for _, nbytes, _, _ in _chunks(plan)] == [16, 16, 16]
    assert plan.buckets.staging_bytes.tolist() == [16, 16, 16]


def test_both_sides_transposed_alike_need_no_packing() -> None:
    builders = [ManifestBuilder("source", "source 0"), ManifestBuilder("sink", "sink 0")]
    for builder in builders:
        builder.tensor("t", (6, 4))
        builder.buffer("t", "BF16", 24)
        builder.place("t", "t", (4, 6), axes=(1, 0))
    plan = _planned(builders[0].build(), builders[1].build())
    assert _chunks(plan) == [(0, 48, False, 1)]


def test_short_neighbours_are_joined_and_tensors_in_other_buffers_are_not() -> None:
    source = _whole("source", 0, {"k": (2, 4), "q": (3, 4), "v": (2, 4)})
    sink = ManifestBuilder("sink", "sink 0")
    sink.buffer("qkv", "BF16", 28)
    for name, rows, at in (("q", 3, 0), ("k", 2, 3), ("v", 2, 5)):
        sink.tensor(name, (rows, 4))
        sink.place(name, "qkv", (7, 4), at=(at, 0))
    plan = _planned(source.build(), sink.build())
    assert _chunks(plan) == [(0, 56, True, 3)]
    plan = _planned(source.build(), sink.build(), PlanOptions(chunk_bytes=40))
    assert _chunks(plan) == [(0, 40, True, 2), (40, 16, False, 1)]
    apart = _whole("sink", 0, {"k": (2, 4), "q": (3, 4), "v": (2, 4)})
    assert [rows for *_, rows in _chunks(_planned(source.build(), apart.build()))] == [1, 1, 1]


def test_megatron_groups_of_unequal_heads_reach_a_fused_qkv() -> None:
    """Per kv group [2 q heads | k | v] on each source; [all q | all k | all v] on the sink."""
    groups, hidden, head = 4, 6, 2
    sources = []
    for rank in range(2):
        builder = ManifestBuilder("source", f"source {rank}")
        local = groups // 2
        builder.buffer("linear_qkv", "BF16", local * 4 * head * hidden)
        for name, heads, first in (("q", 2, 0), ("k", 1, 2), ("v", 1, 3)):
            rows = heads * head
            builder.tensor(name, (groups * rows, hidden))
            for group in range(local):
                builder.place(
                    name,
                    "linear_qkv",
                    (local, 4 * head, hidden),
                    at=(group, first * head, 0),
                    lo=((rank * local + group) * rows, 0),
                    n=(rows, hidden),
                    axes=(1, 2),
                )
        sources.append(builder.build())
    sink = ManifestBuilder("sink", "sink 0")
    sink.buffer("qkv", "BF16", 16 * head * hidden)
    at = 0
    for name, heads in (("q", 8), ("k", 4), ("v", 4)):
        sink.tensor(name, (heads * head, hidden))
        sink.place(name, "qkv", (16 * head, hidden), at=(at, 0))
        at += heads * head
    plan = _planned(Manifest.merge("source", sources), sink.build())
    assert plan.bytes_per_source().tolist() == [192, 192]


def test_padding_is_filled_by_the_sink() -> None:
    source = _whole("source", 0, {"embed": (10, 4)}).build()
    sink = ManifestBuilder("sink", "sink 0")
    sink.tensor("embed", (10, 4))
    sink.buffer("embed", "BF16", 48)
    sink.place("embed", "embed", (12, 4))
    sink.constant("embed", 40, (2, 4), (4, 1), 0)
    plan = _planned(source, sink.build())
    assert plan.constants(0).tolist() == [len(plan.rows) - 1]
    assert plan.rows.chunk[plan.constants(0)].tolist() == [-1]
    assert plan.buckets.nbytes.tolist() == [80]


def test_sources_start_with_different_sinks_and_take_turns() -> None:
    tensors = {f"w{i}": (4, 64) for i in range(6)}
    sources, sinks = [], []
    for rank in range(3):
        builder = ManifestBuilder("source", f"source {rank}")
        for i, (name, shape) in enumerate(tensors.items()):
            builder.tensor(name, shape)
            if i % 3 == rank:
                builder.buffer(name, "BF16", math.prod(shape))
                builder.place(name, name, shape)
        sources.append(builder.build())
        sinks.append(_whole("sink", rank, tensors).build())
    options = PlanOptions(bucket_bytes=512, direct_run_bytes=1)
    plan = _planned(Manifest.merge("source", sources), Manifest.merge("sink", sinks), options)
    for rank in range(3):
        order = plan.buckets.dst_rank[plan.program(rank)].tolist()
        assert order == [(rank + i) % 3 for i in range(3)] * 2
    firsts = [int(plan.buckets.dst_rank[plan.program(r)[0]]) for r in range(3)]
    assert firsts == [0, 1, 2]


def test_buckets_keep_all_three_limits() -> None:
    tensors = {"w": (64, 8)}
    source = _whole("source", 0, tensors, "F32").build()
    sink = _whole("sink", 0, tensors).build()
    base = {"chunk_bytes": 64}
    for options, sizes in (
        (PlanOptions(**base, max_chunks_per_bucket=7), [448, 448, 128]),
        (PlanOptions(**base, bucket_bytes=600), [576, 448]),
        (PlanOptions(**base, slot_bytes=300), [256, 256, 256, 256]),
    ):
        assert _planned(source, sink, options).buckets.nbytes.tolist() == sizes


@pytest.mark.parametrize("replicate", [1, 2])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_tiny_model_from_rules_moves_exactly(replicate: int, tp: int) -> None:
    trainer = rules.fsdp2(TINY_QWEN3, fsdp=4 // replicate, replicate=replicate)
    rollout = rules.vllm(TINY_QWEN3, tp=tp)
    source = Manifest.merge("source", [trainer.manifest(r) for r in range(4)])
    sink = Manifest.merge("sink", [rollout.manifest(r) for r in range(tp)])
    plan = _planned(source, sink)
    assert plan.max_load_bytes <= plan.shares.bound_bytes * 1.05
    assert int(plan.bytes_per_sink().sum()) == int(plan.bytes_per_source().sum())


def test_alike_tensors_are_planned_once() -> None:
    """Layers of one shape and placement form one class; others do not."""
    from weightsync.ir.recipes import EncodingTable
    from weightsync.planners.classes import classify

    trainer, rollout = rules.fsdp2(TINY_QWEN3, fsdp=4), rules.vllm(TINY_QWEN3, tp=2)
    source = Manifest.merge("source", [trainer.manifest(r) for r in range(4)])
    sink = Manifest.merge("sink", [rollout.manifest(r) for r in range(2)])
    index = source.tensors.index
    numbers = np.array([index[name] for name in sink.tensors.names])
    classes = classify(source, sink, numbers, EncodingTable.empty())
    names = [sink.tensors.names[t] for t in classes.tensor]
    of = dict(zip(names, classes.of.tolist(), strict=True))
    layers = "model.layers.{}.self_attn.q_proj.weight"
    assert of[layers.format(0)] == of[layers.format(1)]
    assert len(set(of.values())) < len(of)
    assert of[layers.format(0)] != of["model.layers.0.mlp.down_proj.weight"]
