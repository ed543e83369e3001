"""The layout matrix: plans executed against SGLang's own `load_weights`, rules against recordings.

The default tier runs a few cells, WEIGHTSYNC_TEST_TIER=long all of them. UPDATE_GOLDEN=1 writes
what was found to tests/golden/sglang_layouts.json and renders docs/sglang-layouts.md from it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from support import IS_LONG
from support.layout_compare import (
    SimulatedRank,
    compare_ranks,
    compare_with_engine,
    load_engine,
    same_map,
)
from support.layout_matrix import Sources, canonical_of, source_layout, transferred
from support.layout_page import Result, read_results, write_results
from support.sglang_cells import CELLS, Cell
from support.sglang_matrix import recorded, sink_layout
from support.sglang_page import PAGE, RESULTS, render
from support.sglang_ranks import built, fake_rank
from support.sglang_refused import DROPS, REFUSED, Refused
from weightsync.errors import ConfigError, LayoutError
from weightsync.ir import Manifest
from weightsync.planners import rules
from weightsync.planners.planner import plan_transfer
from weightsync.planners.rules.sglang_parts.degrees import A2A_BACKENDS

UPDATES = IS_LONG and os.environ.get("UPDATE_GOLDEN") == "1"
TIER = [cell for cell in CELLS if IS_LONG or not cell.is_long]
EXECUTED = [cell for cell in CELLS if not cell.is_planned]


@pytest.fixture(scope="module")
def results() -> Iterator[dict[str, Result]]:
    known = read_results(RESULTS)
    found: dict[str, Result] = {}
    yield found
    if UPDATES:
        merged = {**known, **found}
        names = [cell.name for cell in CELLS]
        write_results(RESULTS, {name: merged[name] for name in names if name in merged})
        PAGE.write_text(render(read_results(RESULTS)), encoding="utf-8")


def cell_named(name: str) -> Cell:
    [cell] = [cell for cell in CELLS if cell.name == name]
    return cell


@pytest.mark.parametrize("cell", TIER, ids=lambda cell: cell.name)
def test_a_plan_gives_what_sglang_loads(cell: Cell, results: dict[str, Result]) -> None:
    canonical, layout = canonical_of(cell), sink_layout(cell)

    @contextmanager
    def simulate(rank: int) -> Iterator[SimulatedRank]:
        with fake_rank(cell.config, cell.degrees, rank) as model_config:
            yield SimulatedRank(
                lambda: recorded(model_config, canonical), lambda: built(model_config)
            )

    executed = cell.ranks if IS_LONG else (cell.ranks[0], cell.ranks[-1])
    found = compare_ranks(
        cell,
        layout,
        canonical,
        recorded=range(layout.world_size) if IS_LONG else executed,
        executed=() if cell.is_planned else executed,
        simulate=simulate,
    )
    results[cell.name] = Result(found.nbytes, found.rule, found.digest[:16])
    if not UPDATES:
        # Fewer ranks are compared in the default tier, so fewer bytes.
        known = read_results(RESULTS)[cell.name]
        assert known.digest == results[cell.name].digest
        assert known == results[cell.name] or not IS_LONG


@pytest.mark.parametrize(
    "cell", [cell for cell in TIER if cell.is_transferred], ids=lambda cell: cell.name
)
def test_a_real_transfer_gives_what_sglang_loads(cell: Cell, tmp_path: Any) -> None:
    canonical, layout = canonical_of(cell), sink_layout(cell)
    server = transferred(cell, layout, canonical, f"unix://{tmp_path}/job.sock")
    for rank in (cell.ranks[0], cell.ranks[-1]):
        with fake_rank(cell.config, cell.degrees, rank) as model_config:
            engine = load_engine(built(model_config), canonical, layout.manifest(rank))
        assert engine.differences(server[rank]) == []


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.name)
def test_what_sglang_cannot_do_is_refused(refused: Refused) -> None:
    with pytest.raises(ConfigError, match=refused.message):
        rules.sglang(refused.config, **refused.degrees.flags)
    if not refused.engine_says:
        return
    canonical = canonical_of(refused)
    if refused.engine_says == DROPS:
        left_out: list[str] = []
        loaded: set[str] = set()
        for rank in range(refused.degrees.world_size):
            with fake_rank(refused.config, refused.degrees, rank) as model_config:
                recording = recorded(model_config, canonical)
            for parameter in recording.parameters.values():
                loaded |= {piece.tensor for piece in parameter.pieces}
            left_out += [name for name in recording.ignored if name.endswith(".weight")]
        assert left_out or canonical.shapes.keys() - loaded
        return
    rank = refused.degrees.world_size - 1
    with (
        pytest.raises(Exception) as caught,  # noqa: PT011 - whatever SGLang raises
        fake_rank(refused.config, refused.degrees, rank) as model_config,
    ):
        recorded(model_config, canonical)
    assert refused.engine_says in f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("backend", [backend for backend in A2A_BACKENDS if backend != "none"])
@pytest.mark.parametrize("model", ["deepseek ep8 dp8", "glm deepep", "qwen3-moe deepep"])
def test_every_backend_places_experts_as_the_rule_says(model: str, backend: str) -> None:
    cell = cell_named(model)
    # FlashInfer's wants attention on every rank, and not Triton; the others do not mind.
    flags = {**cell.degrees.flags, "moe_a2a_backend": backend, "enable_dp_attention": True}
    flags["dp"] = flags["tp"]
    if backend == "flashinfer":
        flags["moe_runner_backend"] = "deep_gemm"
    layout = rules.sglang(cell.config, **flags)
    rank = layout.world_size // 2
    with fake_rank(cell.config, type(cell.degrees)(flags), rank) as model_config:
        recording = recorded(model_config, canonical_of(cell))
    assert same_map(layout.manifest(rank), recording.manifest(rank)) == "digest"


@pytest.mark.parametrize(
    ("name", "degrees", "is_fused"),
    [
        ("deepseek all experts", {"tp": 8}, True),
        ("deepseek all experts", {"tp": 8, "fuse_shared_experts": False}, False),
        ("deepseek all experts", {"tp": 8, "ep": 8}, False),
        ("deepseek tp8", {"tp": 8}, False),
        ("glm pp2", {"tp": 4}, True),
        ("glm pp2", {"tp": 4, "ep": 2}, False),
        ("kimi tp8", {"tp": 8}, False),
    ],
)
def test_shared_experts_are_fused_where_sglang_does(
    name: str, degrees: dict[str, Any], is_fused: bool
) -> None:
    cell = cell_named(name)
    layout = rules.sglang(cell.config, **degrees)
    assert layout.is_shared_fused == is_fused
    with fake_rank(cell.config, type(cell.degrees)(degrees), 3) as model_config:
        recording = recorded(model_config, canonical_of(cell))
    assert same_map(layout.manifest(3), recording.manifest(3)) == "digest"


def test_a_rank_is_where_sglang_says() -> None:
    from sglang.srt.distributed.utils import get_pp_indices
    from sglang.srt.runtime_context import get_parallel

    cell = cell_named("qwen3-moe ep4")
    config = {**cell.config, "num_hidden_layers": 5}
    for ep, dp in itertools.product((1, 2, 4), repeat=2):
        degrees = {"tp": 4, "pp": 3, "ep": ep, "dp": dp, "enable_dp_attention": True}
        layout = rules.sglang(config, **degrees)
        for rank in (0, 5, 6, 11):
            place = layout.degrees.place(layout.config, rank)
            with fake_rank(config, type(cell.degrees)(degrees), rank):
                here = get_parallel()
                assert place.tp == (here.tp_size, here.tp_rank)
                assert place.attention == (here.attn_tp_size, here.attn_tp_rank)
                assert place.expert == (here.moe_tp_size, here.moe_tp_rank)
                assert place.ep_rank == here.moe_ep_rank
                assert place.is_first == here.pp_group.is_first_rank
                assert place.is_last == here.pp_group.is_last_rank
                assert place.layers == range(*get_pp_indices(5, here.pp_rank, 3))
    for layers in range(1, 20):
        for stages in range(1, layers + 1):
            cut = rules.sglang({**config, "num_hidden_layers": layers}, pp=stages)
            for stage in range(stages):
                expected = range(*get_pp_indices(layers, stage, stages))
                assert cut.degrees.place(cut.config, stage).layers == expected


def test_redundant_experts_lie_where_sglang_places_them() -> None:
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    cell = cell_named("qwen3-moe redundant")
    for num_experts, ep, num_redundant in ((16, 4, 8), (16, 8, 8), (18, 2, 4), (16, 4, 20)):
        config = {**cell.config, "num_experts": num_experts}
        degrees = {"tp": 8, "ep": ep, "num_redundant_experts": num_redundant}
        layout = rules.sglang(config, **degrees)
        with fake_rank(config, type(cell.degrees)(degrees), 0):
            metadata = get_global_expert_location_metadata()
            rows = metadata.physical_to_logical_map_cpu.tolist()
        for layer, row in enumerate(rows):
            placed = [layout.degrees.experts(layout.config, group, layer) for group in range(ep)]
            assert [expert for group in placed for expert in group] == row


def test_a_planted_mistake_is_noticed() -> None:
    cell = cell_named("qwen3 vocabulary")
    canonical, layout = canonical_of(cell), sink_layout(cell)
    assert same_map(layout.manifest(1), layout.manifest(2)).startswith("elements of")
    trainer = source_layout(cell, 3)
    held = Manifest.merge("source", [trainer.manifest(rank) for rank in range(3)])
    swapped = Manifest.merge("sink", [layout.manifest(rank) for rank in (1, 0, 2, 3, 4, 5)])
    plan = plan_transfer(held, swapped)
    with fake_rank(cell.config, cell.degrees, 0) as model_config:
        engine = load_engine(built(model_config), canonical, layout.manifest(0))
    _, faults = compare_with_engine(plan, 0, Sources(held, canonical), engine)
    assert any("qkv_proj" in fault for fault in faults)
    assert any("embed_tokens" in fault for fault in faults)


def test_a_tensor_of_the_wrong_shape_is_named() -> None:
    cell = cell_named("qwen3 vocabulary")
    canonical = canonical_of(cell)
    # A projection that is too short would be filled up with zeros, and compared with the rule.
    name = "model.layers.1.input_layernorm.weight"
    canonical.shapes = {**canonical.shapes, name: (512,)}
    with (
        fake_rank(cell.config, cell.degrees, 5) as model_config,
        pytest.raises(LayoutError, match=f"SGLang's Qwen3ForCausalLM cannot take {name}"),
    ):
        recorded(model_config, canonical)


def test_every_family_and_every_degree_is_in_the_default_tier() -> None:
    short = [cell for cell in EXECUTED if not cell.is_long]
    flags = {flag for cell in short for flag in cell.degrees.flags}
    assert flags >= {"tp", "pp", "ep", "dp", "enable_dp_attention", "expert_map"}
    assert any(cell.quantized for cell in short)
    families = {cell.family for cell in CELLS}
    assert families == {
        "Llama", "Qwen3", "Qwen3-MoE", "DeepSeek-V3", "Kimi-K2", "GLM-4.5", "gpt-oss",
    }  # fmt: skip
    assert {cell.family for cell in short} == families
    for family in families:
        assert sum(cell.family == family for cell in EXECUTED) >= 4, family
    assert len({cell.name for cell in CELLS}) == len(CELLS)
