"""The layout matrix without SGLang: the rule still says what was checked against SGLang itself."""

from __future__ import annotations

import pytest

from support.layout_page import read_results
from support.sglang_cells import CELLS, Cell
from support.sglang_matrix import sink_layout
from support.sglang_page import PAGE, RESULTS, render
from support.sglang_refused import REFUSED, Refused
from weightsync.errors import ConfigError
from weightsync.ir import Manifest
from weightsync.planners import rules


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_the_rule_is_the_one_that_was_compared_with_sglang(cell: Cell) -> None:
    layout = sink_layout(cell)
    merged = Manifest.merge("sink", [layout.manifest(rank) for rank in range(layout.world_size)])
    assert merged.digest[:16] == read_results(RESULTS)[cell.name].digest


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.name)
def test_what_sglang_cannot_do_is_refused(refused: Refused) -> None:
    with pytest.raises(ConfigError, match=refused.message):
        rules.sglang(refused.config, **refused.degrees.flags)


def test_the_page_is_what_the_results_say() -> None:
    results = read_results(RESULTS)
    assert list(results) == [cell.name for cell in CELLS]
    assert PAGE.read_text(encoding="utf-8") == render(results), (
        "docs/sglang-layouts.md is stale: run tests/engines/sglang with "
        "WEIGHTSYNC_TEST_TIER=long UPDATE_GOLDEN=1"
    )
