"""Real GPT models of Megatron-Core on ranks of their own, over gloo, against rule and oracles.

The models are filled by megatron-bridge, by its own conversion: what lies where is its word alone.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from support.gloo import run_ranks
from support.layout_oracle import (
    TINY_QWEN3,
    assert_holds,
    build_model,
    checkpoint,
    piece_rows,
)
from support.megatron_oracle import MegatronCut
from support.megatron_ranks import load, megatron_model
from support.trainer_cells import LIVE_CELLS, LOCAL, QWEN3_MOE, MegatronCell
from support.trainer_matrix import assert_delivers
from weightsync.client import Job, Sink, Source
from weightsync.errors import ConfigError, LayoutError, UnknownTensorError
from weightsync.integrations import readback
from weightsync.integrations.megatron import gather_parameters, megatron_layout
from weightsync.planners import rules
from weightsync.planners.rules.megatron_parts.degrees import Degrees, Stages

DEADLINE_S = 180.0
TIMEOUT_S = 60.0


def cells(world_size: int) -> list[MegatronCell]:
    return [cell for cell in LIVE_CELLS if cell.cut.world_size == world_size]


def check_cell(cell: MegatronCell, rank: int) -> None:
    named = checkpoint(build_model(cell.config), cell.config)
    with megatron_model(cell) as chunks:
        load(chunks, named, cell.config)
        live = megatron_layout(chunks if len(chunks) > 1 else chunks[0], config=cell.config)
        expected = cell.layout().manifest(rank)
        assert piece_rows(live.manifest()) == piece_rows(expected), cell.name
        assert live.manifest() == expected, cell.name
        tensors = live.tensors()
        assert_holds(tensors, live.manifest(), named)
        # Padding is the only thing that is in no piece.
        held = sum(int(tensor.isfinite().sum()) for tensor in tensors.values())
        assert int(live.manifest().pieces.volume.sum()) == held
        everyone: list[Any] = [None] * dist.get_world_size()
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        dist.all_gather_object(everyone, (live.manifest(), copies))
        if rank == 0:
            manifests, held_by = zip(*everyone, strict=True)
            for degrees in cell.engines:
                assert_delivers(manifests, held_by, named, cell.config, degrees)
        dist.barrier()


def check_cells(rank: int) -> None:
    for cell in cells(dist.get_world_size()):
        check_cell(cell, rank)


@pytest.mark.parametrize("world_size", [2, 4])
def test_live_models_are_those_of_the_rule_and_are_delivered(
    world_size: int, tmp_path: Path
) -> None:
    run_ranks(check_cells, world_size, tmp_path, DEADLINE_S)


def check_logits_of(cell: MegatronCell) -> None:
    """The real model, filled through the live manifest alone, computes what Hugging Face's does."""
    hf = build_model(cell.config).eval()
    named = checkpoint(hf, cell.config)
    size = cell.config["vocab_size"]
    ids = torch.randint(0, size, (2, 7), generator=torch.Generator().manual_seed(3))
    with megatron_model(cell) as [chunk], torch.no_grad():
        live = megatron_layout(chunk, config=cell.config)
        tensors = live.tensors()
        for tensor in tensors.values():
            tensor.zero_()
        for row in piece_rows(live.manifest()):
            box = tuple(slice(a, a + k) for a, k in zip(row.lo, row.n, strict=True))
            memory = tensors[row.buffer]
            memory.as_strided(row.n, row.stride, row.offset).copy_(named[row.tensor][box])
        is_later = torch.ones(7, 7, dtype=torch.bool).triu(1)
        part = chunk.eval()(ids, torch.arange(7).expand(2, 7), attention_mask=is_later[None, None])
        group = chunk.pg_collection.tp
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        torch.testing.assert_close(
            torch.cat(parts, -1)[..., :size], hf(ids).logits, rtol=1e-4, atol=1e-4
        )


def check_logits(rank: int) -> None:
    """Experts and all: Llama, Qwen3 and Qwen3-MoE need nothing that only GPUs have."""
    for cell in cells(dist.get_world_size()):
        kind = cell.config["model_type"]
        if cell.degrees.get("pp", 1) == 1 and kind in ("llama", "qwen3", "qwen3_moe"):
            check_logits_of(cell)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_model_filled_by_its_manifest_computes_the_same(world_size: int, tmp_path: Path) -> None:
    run_ranks(check_logits, world_size, tmp_path, DEADLINE_S)


def check_publish(rank: int) -> None:
    """What a data-parallel rank has of a step is completed, published, and adopted by vLLM's."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
    )
    from megatron.core.distributed.param_and_grad_buffer import shard_buffer

    cell = MegatronCell(
        "qwen3 dp2", TINY_QWEN3, {"dp": 2, **LOCAL}, MegatronCut([[[0, 1]]], copies=2, te=False)
    )
    named = checkpoint(build_model(cell.config), cell.config)
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, src=0)
    url = f"unix://{folder[0]}/job.sock"
    with megatron_model(cell) as [chunk]:
        load([chunk], named, cell.config)
        settings = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            bucket_size=500,
        )
        wrapped = DistributedDataParallel(chunk.config, settings, chunk)
        # A step of the distributed optimizer: each rank has its part of every bucket.
        for buffer in wrapped.buffers:
            for bucket in buffer.buckets:
                shard_buffer(bucket.param_data, 2)[rank].mul_(2)
        layout = megatron_layout(wrapped, config=cell.config)
        doubled = {name: 2 * tensor for name, tensor in named.items()}
        with pytest.raises(AssertionError):
            assert_holds(layout.tensors(), layout.manifest(), doubled)
        gather_parameters(wrapped)
        assert_holds(layout.tensors(), layout.manifest(), doubled)

        job = Job.start(url) if rank == 0 else None
        dist.barrier()
        engine = rules.vllm(cell.config, tp=2, dtype="F32")
        sinks, memories = [], []
        for tp_rank in range(2 if rank == 0 else 0):
            buffers = engine.manifest(tp_rank).buffers
            sizes = zip(buffers.names, buffers.numel.tolist(), strict=True)
            memories.append({name: torch.zeros(numel) for name, numel in sizes})
            sinks.append(
                Sink(
                    memories[-1], layout=engine, replica="a", rank=tp_rank, world_size=2, job=url,
                    timeout_s=TIMEOUT_S,
                )
            )  # fmt: skip
        with (
            Source(layout.tensors(), layout=layout, job=url, timeout_s=TIMEOUT_S) as source,
            ThreadPoolExecutor() as pool,
        ):
            adopted = [pool.submit(sink.refit, timeout_s=TIMEOUT_S) for sink in sinks]
            source.publish()
            for tp_rank, future in enumerate(adopted):
                future.result(TIMEOUT_S)
                expected = readback.shard(doubled, cell.config, tp=2, rank=tp_rank)
                for name, tensor in expected.items():
                    assert torch.equal(memories[tp_rank][name], tensor.flatten()), name
            dist.barrier()
        for sink in sinks:
            sink.close()
        if job is not None:
            job.close()


def test_a_model_is_published(tmp_path: Path) -> None:
    run_ranks(check_publish, 2, tmp_path, DEADLINE_S)


def check_refusals(rank: int) -> None:
    cut = MegatronCut([[[0, 1, 2, 3]]], te=False, experts="sequential")
    cell = MegatronCell("qwen3 moe", QWEN3_MOE, LOCAL, cut)
    with megatron_model(cell) as [chunk]:
        layout = megatron_layout(chunk, config=cell.config)
        assert layout.tensors().keys() == set(layout.manifest(0).buffers.names)
        with pytest.raises(ConfigError, match="cannot describe rank 3"):
            layout.manifest(3)
        for changes, words in (
            ({"intermediate_size": 25}, r"linear_fc1.weight has shape \(48, 16\)"),
            ({"vocab_size": 129}, r"word_embeddings.weight has shape \(128, 16\)"),
            ({"num_hidden_layers": 3}, "is layer 3 of the model, but the config has 3"),
            ({"hidden_size": 8}, "has shape"),
        ):
            with pytest.raises(LayoutError, match=words):
                megatron_layout(chunk, config={**cell.config, **changes})
        chunk.decoder.register_parameter("adapter", nn.Parameter(torch.zeros(2)))
        with pytest.raises(UnknownTensorError, match=r"decoder\.adapter"):
            megatron_layout(chunk, config=cell.config)
        del chunk.decoder.adapter
        chunk.register_module("mtp", nn.Linear(2, 2))  # has no place in a checkpoint
        # A balancing bias where the checkpoint has none.
        router = chunk.decoder.layers[0].mlp.router
        del router.expert_bias
        router.register_buffer("expert_bias", torch.zeros(6))
        skipped = megatron_layout(chunk, config=cell.config).skipped
        assert {"mtp.weight", "mtp.bias", "decoder.layers.0.mlp.router.expert_bias"} <= set(skipped)
        with pytest.raises(LayoutError, match="Linear is no GPTModel"):
            megatron_layout(nn.Linear(2, 2), config=cell.config)
        chunk.config.moe_mlp_glu_interleave_size = 32
        with pytest.raises(LayoutError, match="moe_mlp_glu_interleave_size"):
            megatron_layout(chunk, config=cell.config)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    run_ranks(check_refusals, 1, tmp_path, DEADLINE_S)


@pytest.mark.parametrize(
    ("tp", "cp", "dp", "pp", "ep", "etp"),
    [
        (2, 1, 1, 1, 2, 1),
        (4, 2, 3, 2, 6, 2),
        (1, 1, 8, 3, 4, 2),
        (2, 2, 2, 2, 1, 2),
        (8, 1, 4, 2, 32, 1),
    ],
)
def test_ranks_are_where_megatron_numbers_them(
    tp: int, cp: int, dp: int, pp: int, ep: int, etp: int
) -> None:
    from megatron.core.parallel_state import RankGenerator

    order = "tp-cp-ep-dp-pp"
    world_size = tp * cp * dp * pp
    edp = world_size // (ep * etp * pp)
    attention = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order=order)
    experts = RankGenerator(tp=etp, ep=ep, dp=edp, pp=pp, cp=1, order=order)
    degrees = Degrees(tp=tp, cp=cp, dp=dp, pp=pp, ep=ep, etp=etp)
    for rank in range(world_size):
        place = degrees.place(rank)
        found = [
            next(group for group in ranks.get_ranks(axis) if rank in group).index(rank)
            for ranks, axis in (
                (attention, "tp"),
                (attention, "pp"),
                (experts, "ep"),
                (experts, "tp"),
            )
        ]
        assert found == [place.tp_rank, place.pp_rank, place.ep_rank, place.etp_rank]


def megatron_stages(num_layers: int, pp: int, vpp: int, **how: Any) -> list[list[list[int]]]:
    """The layers of every chunk of every stage, as Megatron-Core itself deals them out."""
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    config = TransformerConfig(
        num_layers=num_layers,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        num_layers_in_first_pipeline_stage=how.get("first"),
        num_layers_in_last_pipeline_stage=how.get("last"),
        account_for_embedding_in_pipeline_split=how.get("embedding", False),
        account_for_loss_in_pipeline_split=how.get("loss", False),
    )
    stages = []
    for stage in range(pp):
        chunks = []
        for number in range(vpp):
            chunk = number if vpp > 1 else None
            first = get_transformer_layer_offset(config, chunk, stage)
            count = get_num_layers_to_build(config, chunk, stage)
            chunks.append(list(range(first, first + count)))
        stages.append(chunks)
    return stages


@pytest.mark.parametrize(
    "how",
    [
        {"first": first, "last": last, "embedding": embedding, "loss": loss}
        for first, last in itertools.product((None, 0, 1, 2, 4), repeat=2)
        for embedding, loss in itertools.product((False, True), repeat=2)
    ],
    ids=str,
)
def test_layers_are_dealt_out_as_megatron_does(how: dict[str, Any]) -> None:
    """Also what it refuses, or builds another number of layers for than the model has."""
    is_uneven = how["first"] is not None or how["last"] is not None
    for layers, pp, vpp in itertools.product(range(1, 11), range(1, 5), (1, 2, 3)):
        if pp == 1 and (vpp > 1 or is_uneven):
            continue  # more than one chunk, or a first and a last stage, need more than one stage
        expected = None
        with contextlib.suppress(AssertionError, ValueError, ZeroDivisionError):
            expected = megatron_stages(layers, pp, vpp, **how)
        if expected is not None:
            around = zip(*expected, strict=True)
            built = [n for chunks in around for chunk in chunks for n in chunk]
            expected = expected if built == list(range(layers)) else None
        found = None
        with contextlib.suppress(ConfigError):
            made = Stages(**how).chunks(layers, pp, vpp)
            found = [[list(chunk.layers) for chunk in chunks] for chunks in made]
        assert found == expected, (layers, pp, vpp)


@pytest.mark.parametrize(
    ("layout", "pp", "vpp"),
    [
        ("Ett|tt|L", 3, 1),
        ("Et*3|(tt|)*2t|L", 5, 1),
        ("Et|tt|tt|t|t|L", 3, 2),
        ("Ettt|(tt|)*3,m|L", 2, 3),
        ("E|t*4|tL", 3, 1),
    ],
)
def test_drawn_stages_are_read_as_megatron_reads_them(layout: str, pp: int, vpp: int) -> None:
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import (
        PipelineParallelLayerLayout,
    )

    drawn = PipelineParallelLayerLayout(layout, pp)
    num_layers = drawn.flatten_layout.count(LayerType.decoder)
    drawn.validate_layer_layout(num_layers, drawn.flatten_layout.count(LayerType.mtp) or None)
    made = Stages(layout=layout).chunks(num_layers, pp, vpp)
    for stage, number in itertools.product(range(pp), range(vpp)):
        chunk, theirs = made[stage][number], drawn.layout[stage][number]
        assert len(chunk.layers) == theirs.count(LayerType.decoder)
        assert chunk.has_head == (LayerType.loss in theirs)
        assert chunk.has_embedding == (LayerType.embedding in theirs or LayerType.mtp in theirs)
