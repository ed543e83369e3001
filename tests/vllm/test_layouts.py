"""The layout matrix: plans executed against vLLM's own `load_weights`, rules against recordings.

The default tier runs a few cells, WEIGHTSYNC_TEST_TIER=long all of them. UPDATE_GOLDEN=1 writes
what was found to tests/golden/vllm_layouts.json and renders docs/vllm-layouts.md from it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from support import IS_LONG
from support.gloo import run_ranks
from support.layout_compare import (
    SimulatedRank,
    compare_ranks,
    compare_with_engine,
    load_engine,
    same_map,
)
from support.layout_matrix import Sources, canonical_of, source_layout, transferred
from support.layout_page import Result, read_results, write_results
from support.vllm_cells import CELLS, Cell
from support.vllm_matrix import recorded, sink_layout
from support.vllm_page import PAGE, RESULTS, render
from support.vllm_ranks import Degrees, built, fake_rank
from support.vllm_refused import REFUSED, Refused
from weightsync.errors import ConfigError, LayoutError
from weightsync.ir import Manifest
from weightsync.planners import rules
from weightsync.planners.planner import plan_transfer

UPDATES = IS_LONG and os.environ.get("UPDATE_GOLDEN") == "1"
EXECUTED = [cell for cell in CELLS if not cell.is_planned]
# Specials that are in the long tier only, for their size.
SLOW = {"redundant experts", "ranks without any block", "all biases", "direct queries", "tied head"}
# Small enough for a whole replica and all its sources in one process.
TRANSFERRED = [cell for cell in CELLS if cell.is_transferred]


@pytest.fixture(scope="module")
def results() -> Iterator[dict[str, Result]]:
    known = read_results(RESULTS)
    found: dict[str, Result] = {}
    yield found
    if UPDATES:
        names = [cell.name for cell in CELLS]
        merged = {**known, **found}
        write_results(RESULTS, {name: merged[name] for name in names if name in merged})
        PAGE.write_text(render(read_results(RESULTS)), encoding="utf-8")


@pytest.mark.parametrize(
    "cell", [cell for cell in CELLS if IS_LONG or not cell.is_long], ids=lambda cell: cell.name
)
def test_a_plan_gives_what_vllm_loads(cell: Cell, results: dict[str, Result]) -> None:
    canonical, layout = canonical_of(cell), sink_layout(cell)

    @contextmanager
    def simulate(rank: int) -> Iterator[SimulatedRank]:
        with fake_rank(cell.config, cell.degrees, rank) as vllm_config:
            yield SimulatedRank(
                lambda: recorded(vllm_config, canonical), lambda: built(vllm_config)
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
    "cell",
    [cell for cell in TRANSFERRED if IS_LONG or not cell.is_long],
    ids=lambda cell: cell.name,
)
def test_a_real_transfer_gives_what_vllm_loads(cell: Cell, tmp_path: Any) -> None:
    canonical, layout = canonical_of(cell), sink_layout(cell)
    replica = transferred(cell, layout, canonical, f"unix://{tmp_path}/job.sock")
    for rank in (cell.ranks[0], cell.ranks[-1]):
        with fake_rank(cell.config, cell.degrees, rank) as vllm_config:
            engine = load_engine(built(vllm_config), canonical, layout.manifest(rank))
        assert engine.differences(replica[rank]) == []


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.name)
def test_what_vllm_cannot_do_is_refused(refused: Refused) -> None:
    degrees = refused.degrees
    with pytest.raises(ConfigError, match=refused.message):
        rules.vllm(
            refused.config,
            tp=degrees.tp,
            dp=degrees.dp,
            pp=degrees.pp,
            ep=degrees.ep,
            num_redundant_experts=degrees.num_redundant,
        )
    if not refused.engine_says:
        return
    canonical = canonical_of(refused)
    rank = degrees.world_size - 1 if refused.rank is None else refused.rank
    with (
        pytest.raises(Exception) as caught,  # noqa: PT011 - whatever vLLM raises
        fake_rank(refused.config, degrees, rank) as vllm_config,
    ):
        recorded(vllm_config, canonical)
    assert refused.engine_says in f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("num_redundant", [1, 2, 7, 16, 33])
@pytest.mark.parametrize(("num_experts", "ranks"), [(16, 4), (18, 4), (8, 8), (32, 16)])
def test_redundant_experts_lie_as_vllm_places_them(
    num_experts: int, ranks: int, num_redundant: int
) -> None:
    from vllm.distributed.eplb.eplb_state import EplbState
    from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

    [cell] = [cell for cell in CELLS if cell.name == "deepseek tp8 ep"]
    config = {**cell.config, "n_routed_experts": num_experts}
    layout = rules.vllm(config, tp=ranks, ep=True, num_redundant_experts=num_redundant)
    logical = EplbState.build_initial_global_physical_to_logical_map(num_experts, num_redundant)
    for rank in range(ranks):
        count, placed, _ = determine_expert_map(ranks, rank, num_experts + num_redundant)
        assert placed is not None
        physical = sorted((placed >= 0).nonzero().flatten().tolist(), key=lambda p: int(placed[p]))
        expected = tuple(logical[slot] for slot in physical)
        assert layout.degrees.experts(layout.config, rank) == expected
        shapes = {parameter.name: parameter.shape for parameter in layout.parameters(rank)}
        assert shapes["model.layers.1.mlp.experts.routed_experts.w13_weight"][0] == count


EPLB_RANKS = 4 if IS_LONG else 2
EPLB_EXPERTS, EPLB_REDUNDANT, EPLB_LAYERS = 16, 8, 3


def eplb_maps() -> tuple[torch.Tensor, torch.Tensor]:
    """vLLM's first placement, and the one that its own policy finds for an uneven load."""
    from vllm.distributed.eplb.eplb_state import EplbState
    from vllm.distributed.eplb.policy.default import DefaultEplbPolicy

    first = EplbState.build_initial_global_physical_to_logical_map(EPLB_EXPERTS, EPLB_REDUNDANT)
    load = torch.rand(EPLB_LAYERS, EPLB_EXPERTS, generator=torch.Generator().manual_seed(5)) ** 4
    moved = DefaultEplbPolicy.rebalance_experts(
        load, EPLB_EXPERTS + EPLB_REDUNDANT, 1, 1, EPLB_RANKS
    )
    return torch.tensor([first] * EPLB_LAYERS), moved.cpu()


def check_eplb_rank(rank: int) -> None:
    """vLLM itself moves experts between ranks; afterwards they lie as a new layout says."""
    from vllm.distributed.eplb.eplb_communicator import TorchDistGlooStagedEplbCommunicator
    from vllm.distributed.eplb.rebalance_execute import rearrange_expert_weights_inplace

    [cell] = [cell for cell in CELLS if cell.name == "deepseek tp8 ep"]
    config = {
        **cell.config, "n_routed_experts": EPLB_EXPERTS,
        "num_hidden_layers": EPLB_LAYERS + 1, "first_k_dense_replace": 1,
    }  # fmt: skip
    first, moved = eplb_maps()
    assert not torch.equal(first, moved)

    def held(expert_map: torch.Tensor | None) -> list[torch.Tensor]:
        """The checkpoint's number of every expert held here, by layer, as the rule says."""
        layout = rules.vllm(
            config, tp=EPLB_RANKS, ep=True, num_redundant_experts=EPLB_REDUNDANT,
            expert_map=expert_map.tolist() if expert_map is not None else None,
        )  # fmt: skip
        found: dict[int, torch.Tensor] = {}
        for parameter in layout.parameters(rank):
            if parameter.name.endswith("routed_experts.w2_weight"):
                layer = int(parameter.name.split(".")[2])
                names = [part.tensor.split(".") for part in parameter.parts]
                assert [name[2] for name in names] == [str(layer)] * len(names)
                experts = [float(name[5]) for name in names]
                found[layer] = torch.tensor(experts)[:, None] + 100 * layer
        return [found[layer] for layer in sorted(found)]

    weights = held(None)
    assert [len(layer) for layer in weights] == [24 // EPLB_RANKS] * EPLB_LAYERS
    group = torch.distributed.new_group(backend="gloo")
    torch.accelerator.current_stream = mock.Mock()  # CPUs have no streams to wait for
    rearrange_expert_weights_inplace(
        first,
        moved,
        [[layer] for layer in weights],
        [torch.empty_like(weights[0])],
        group,
        TorchDistGlooStagedEplbCommunicator(group),
    )
    assert [t.tolist() for t in weights] == [t.tolist() for t in held(moved)]


def test_experts_that_vllm_moved_lie_as_its_map_says(tmp_path: Path) -> None:
    run_ranks(check_eplb_rank, EPLB_RANKS, tmp_path)


def test_a_planted_mistake_is_noticed() -> None:
    [cell] = [cell for cell in CELLS if cell.name == "qwen3 vocabulary"]
    canonical, layout = canonical_of(cell), sink_layout(cell)
    wrong = rules.vllm({**cell.config, "num_key_value_heads": 8}, tp=4)
    assert same_map(layout.manifest(1), wrong.manifest(1)) == "digest"
    assert same_map(layout.manifest(1), layout.manifest(2)).startswith("elements of")
    trainer = source_layout(cell, 3)
    held = Manifest.merge("source", [trainer.manifest(rank) for rank in range(3)])
    plan = plan_transfer(
        held, Manifest.merge("sink", [layout.manifest(rank) for rank in (1, 0, 2, 3)])
    )
    with fake_rank(cell.config, cell.degrees, 0) as vllm_config:
        engine = load_engine(built(vllm_config), canonical, layout.manifest(0))
    _, faults = compare_with_engine(plan, 0, Sources(held, canonical), engine)
    assert any("qkv_proj" in fault for fault in faults)
    assert any("embed_tokens" in fault for fault in faults)


def test_a_recording_leaves_vllm_as_it_was() -> None:
    from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager

    [cell] = [cell for cell in CELLS if cell.name == "deepseek round-robin uneven"]
    before = ExpertMapManager.__init__
    with fake_rank(cell.config, cell.degrees, 1) as vllm_config:
        first = recorded(vllm_config, canonical_of(cell))
        second = recorded(vllm_config, canonical_of(cell))
    assert ExpertMapManager.__init__ is before
    assert first.manifest(1) == second.manifest(1)


def test_a_tensor_of_the_wrong_shape_is_named() -> None:
    [cell] = [cell for cell in CELLS if cell.name == "qwen3 vocabulary"]
    canonical = canonical_of(cell)
    name = "model.layers.1.mlp.up_proj.weight"
    canonical.shapes = {**canonical.shapes, name: (canonical.shapes[name][0] // 2, 1024)}
    with (
        fake_rank(cell.config, cell.degrees, 3) as vllm_config,
        pytest.raises(LayoutError, match=f"cannot take {name}"),
    ):
        recorded(vllm_config, canonical)


def test_the_experts_of_a_bias_that_is_not_ours_are_zero() -> None:
    """The loader of gpt-oss zeroes the bias on all tensor-parallel ranks but the first."""
    [cell] = [cell for cell in CELLS if cell.name == "gpt-oss tp8"]
    with fake_rank(cell.config, cell.degrees, 3) as vllm_config:
        recording = recorded(vllm_config, canonical_of(cell))
    bias = recording.parameters["model.layers.0.mlp.experts.routed_experts.w2_bias"]
    assert bias.is_loaded
    assert bias.pieces == ()
    assert [fill.value for fill in bias.fills] == [0.0]
    assert torch.Size(bias.fills[0].n) == torch.Size(bias.shape)


def test_every_family_and_every_special_is_in_the_default_tier() -> None:
    short = [cell for cell in CELLS if not cell.is_long]
    families = {cell.family for cell in CELLS}
    assert {cell.family for cell in short} == families
    specials = {special for cell in EXECUTED for special in cell.specials}
    assert {special for cell in short for special in cell.specials} >= specials - SLOW
    assert len(EXECUTED) >= 30
    for family in families:
        assert sum(cell.family == family for cell in EXECUTED) >= 4, family
    for special in (
        "kv heads replicated",
        "padded vocabulary",
        "uneven experts",
        "round-robin experts",
    ):
        assert sum(special in cell.specials for cell in EXECUTED) >= 2, special
        assert any(special in cell.specials for cell in short), special
    assert len({cell.name for cell in CELLS}) == len(CELLS)


def test_a_rank_is_where_vllm_says() -> None:
    from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
    from vllm.distributed.utils import get_pp_indices

    [cell] = [cell for cell in CELLS if cell.name == "qwen3 pp3"]
    degrees = Degrees(tp=2, pp=3, dp=2)
    layout = rules.vllm(cell.config, tp=2, pp=3, dp=2)
    model = rules.model_config(cell.config)
    for rank in range(12):
        place = layout.degrees.place(model, rank)
        with fake_rank(cell.config, degrees, rank):
            group = get_pp_group()
            assert place.tp_rank == get_tensor_model_parallel_rank()
            assert (place.is_first, place.is_last) == (group.is_first_rank, group.is_last_rank)
            assert place.layers == range(*get_pp_indices(5, group.rank_in_group, 3))
    for layers in range(1, 20):
        for stages in range(1, layers + 1):
            model = dataclasses.replace(model, num_layers=layers)
            cut = rules.vllm(model, pp=stages).degrees
            for stage in range(stages):
                expected = range(*get_pp_indices(layers, stage, stages))
                assert cut.place(model, stage).layers == expected
