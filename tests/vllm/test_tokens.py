"""Real vLLM generates from what FSDP2 trainers publish: token by token what transformers says.

Four trainer ranks over gloo take real AdamW steps. After every step the engine adopts the version
through the plugin, and its greedy tokens are judged by transformers on the trainers' own weights,
gathered for that purpose alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.vllm_fleet import Fleet, is_long

STEPS = 5
PROMPTS = [[3, 14, 15, 92, 65], [84, 104, 101, 32], list(range(40, 72))]
NUM_TOKENS = 24
# In bf16 both sides round, each in its own order. Where the probabilities of the two best tokens
# are closer than this nobody can say who is right; nor where the rounding error that transformers
# itself makes there, measured against float32, turns them round. The second kind is counted.
MARGIN = 1e-3

CELLS = [
    ("in-process", "qwen3", 1, "float32"),
    ("in-process", "qwen3_moe", 2, "float32"),
    ("http", "qwen3", 2, "float32"),
    ("http", "qwen3_moe", 1, "bfloat16"),
]
if is_long():
    CELLS = [
        (how, model, tp, dtype)
        for how in ("in-process", "http")
        for model in ("qwen3", "qwen3_moe")
        for tp in (1, 2)
        for dtype in ("float32", "bfloat16")
    ]


@pytest.fixture
def fleet(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    how, model, tp, dtype = request.param
    with Fleet(tmp_path, model=model, dtype=dtype) as made:
        made.start_trainers(4)
        if how == "http":
            made.start_server("server", tp=tp)
        else:
            made.start_engine("engine", tp=tp)
        made.wait_ready()
        made.attach()
        yield made


@pytest.mark.parametrize("fleet", CELLS, indirect=True, ids=lambda c: "-".join(map(str, c)))
def test_tokens_are_those_of_transformers(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    before: list[list[int]] | None = None
    margins: list[float] = []
    num_turned = 0
    for step in range(1, STEPS + 1):
        fleet.train()
        report = fleet.publish()
        assert report["version"] == step
        assert fleet.shown_version() == str(step)
        tokens = fleet.generate(PROMPTS, NUM_TOKENS)
        assert [len(made) for made in tokens] == [NUM_TOKENS] * len(PROMPTS)
        best, lead, sure = fleet.judge(PROMPTS, tokens)
        margins += [value for row in lead for value in row]
        differs = [
            entry
            for rows in zip(tokens, best, lead, sure, strict=True)
            for entry in zip(*rows, strict=True)
            if entry[0] != entry[1]
        ]
        if fleet.dtype == "float32":
            assert differs == []
        assert [entry for entry in differs if min(entry[2:]) > MARGIN] == []
        num_turned += sum(entry[2] > MARGIN for entry in differs)
        assert tokens != before, "the step was too small to see anything"
        before = tokens
        stages = report["stages_s"]
        # Told apart: bytes arriving while it serves, checking them, and the pause.
        assert 0 < stages["sink_verify"] <= stages["sink_fill"]
        assert stages["sink_pause"] > 0
    assert num_turned <= len(margins) // 50  # wrong weights would turn far more
    wide = sum(margin > MARGIN for margin in margins)
    with capsys.disabled():
        text = f"least margin {min(margins):.4g}; {wide} of {len(margins)} above {MARGIN}"
        text += f", {num_turned} of these turned round by rounding"
        print(f" {text}", end=" ")  # noqa: T201 - the reader wants to see how sure it was
    if num_turned:  # wanted: none at all
        pytest.xfail(f"{num_turned} tokens differ where the margin exceeds {MARGIN}, by rounding")
