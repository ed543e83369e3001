"""The layout matrix without vLLM: the rule still says what was checked against vLLM itself."""

from __future__ import annotations

import pytest

from support.layout_page import read_results
from support.vllm_cells import CELLS, Cell
from support.vllm_matrix import sink_layout
from support.vllm_page import PAGE, RESULTS, render
from support.vllm_refused import REFUSED, Refused
from weightsync.errors import ConfigError
from weightsync.ir import Manifest
from weightsync.planners import rules


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_the_rule_is_the_one_that_was_compared_with_vllm(cell: Cell) -> None:
    layout = sink_layout(cell)
    merged = Manifest.merge("sink", [layout.manifest(rank) for rank in range(layout.world_size)])
    assert merged.digest[:16] == read_results(RESULTS)[cell.name].digest


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


def test_the_page_is_what_the_results_say() -> None:
    results = read_results(RESULTS)
    assert list(results) == [cell.name for cell in CELLS]
    assert PAGE.read_text(encoding="utf-8") == render(results), (
        "docs/vllm-layouts.md is stale: run tests/vllm/test_layouts.py with "
        "WEIGHTSYNC_TEST_TIER=long UPDATE_GOLDEN=1"
    )


@pytest.mark.parametrize(
    ("backend", "tp", "dp", "is_whole"),
    [
        ("allgather_reducescatter", 2, 2, True),
        ("flashinfer_all2allv", 2, 2, False),
        ("allgather_reducescatter", 4, 1, False),
    ],
)
def test_backends_decide_whether_shared_experts_are_whole(
    backend: str, tp: int, dp: int, is_whole: bool
) -> None:
    [cell] = [cell for cell in CELLS if cell.name == "deepseek redundant"]
    layout = rules.vllm(cell.config, tp=tp, dp=dp, ep=True, all2all_backend=backend)
    shapes = {parameter.name: parameter.shape for parameter in layout.parameters(0)}
    rows = shapes["model.layers.1.mlp.shared_experts.gate_up_proj.weight"][0]
    assert rows == (2 * 2048 if is_whole else 2 * 2048 // tp)


def test_round_robin_falls_back_where_vllm_does() -> None:
    [cell] = [cell for cell in CELLS if cell.name == "deepseek round-robin"]

    def held(rank: int, **degrees: object) -> tuple[int, ...]:
        config = {**cell.config, "n_group": degrees.pop("n_group", 8)}
        layout = rules.vllm(config, ep=True, expert_placement="round_robin", **degrees)  # type: ignore[arg-type]
        return layout.degrees.experts(layout.config, rank)

    assert held(1, tp=4) == (1, 5, 9, 13)
    assert held(1, tp=4, n_group=1) == (4, 5, 6, 7)
    assert held(1, tp=4, num_redundant_experts=4) == (5, 6, 7, 8, 9)
    assert held(1, tp=2, dp=2) == (4, 5, 6, 7)
    assert held(1, tp=2, dp=2, all2all_backend="deepep_low_latency") == (1, 5, 9, 13)


def test_quantization_can_be_left_out_of_the_engine() -> None:
    [cell] = [cell for cell in CELLS if cell.name == "kimi fp8 dp4 tp2 ep"]
    plain = rules.vllm(cell.config, tp=8, quantized=False)
    assert not any("scale" in name for name in plain.manifest(0).buffers.names)
    assert plain.tensors() == rules.canonical_tensors(cell.config)
    assert any("scale" in name for name in rules.vllm(cell.config, tp=8).manifest(0).buffers.names)
