"""Names of Transformer Engine's modules, which need GPUs, against megatron-bridge's registries.

The registries' modules import Transformer Engine, too, so they are read and not imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.layout_oracle import TINY_LLAMA, TINY_QWEN3
from support.trainer_cells import GLM_EVEN, GPT_OSS, KIMI_PLAIN, QWEN3_MOE, TINY_DEEPSEEK_V3
from weightsync.planners import rules

OWN = ("decoder.", "embedding.", "output_layer.")
DEEPSEEK = ("deepseek/common.py", "deepseek/deepseek_v3_bridge.py")
CASES: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    (("llama/llama_bridge.py",), {**TINY_LLAMA, "attention_bias": False, "mlp_bias": False}),
    (("qwen/qwen3_bridge.py",), {**TINY_QWEN3, "tie_word_embeddings": False}),
    (("qwen/qwen3_moe_bridge.py",), {**QWEN3_MOE, "mlp_only_layers": []}),
    (DEEPSEEK, TINY_DEEPSEEK_V3),
    (DEEPSEEK, KIMI_PLAIN),
    (("glm/glm45_bridge.py",), GLM_EVEN),
    (("gpt_oss/gpt_oss_bridge.py",), GPT_OSS),
]


def registered(files: tuple[str, ...]) -> set[tuple[str, str]]:
    """Pairs of Megatron's and Hugging Face's names; `*` is any number."""
    import megatron

    root = next(Path(p, "bridge") for p in megatron.__path__ if Path(p, "bridge").is_dir())
    trees = [ast.parse((root / "models" / file).read_text(encoding="utf-8")) for file in files]
    return {pair for tree in trees for node in ast.walk(tree) for pair in pairs(node)}


def pairs(node: ast.AST) -> Iterator[tuple[str, str]]:
    def text(value: ast.AST | None) -> str | None:
        return (
            value.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str)
            else None
        )

    if isinstance(node, ast.Dict):
        for one, other in zip(map(text, node.keys), map(text, node.values), strict=True):
            if one is not None and other is not None:
                yield (one, other) if one.startswith(OWN) else (other, one)
    if isinstance(node, ast.Call):
        named = {keyword.arg: text(keyword.value) for keyword in node.keywords}
        own = named.pop("megatron_param", None)
        if own is not None:
            yield from ((own, theirs) for theirs in named.values() if theirs is not None)


@pytest.mark.parametrize(("files", "config"), CASES)
def test_names_are_registered(files: tuple[str, ...], config: dict[str, Any]) -> None:
    known = registered(files)
    layout = rules.megatron(config)
    seen = set()
    for parameter in layout.parameters(0):
        own = re.sub(r"\d+(?=\.|$)(?<!fc1)(?<!fc2)", "*", parameter.name)
        for part in parameter.parts:
            seen.add((own, re.sub(r"(?<=\.)\d+(?=\.)", "*", part.tensor)))
    assert seen <= known, sorted(seen - known)
    assert len(seen) >= 11
