"""The tables of the pages about layout matrices, rendered from results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from support.layout_cells import LayoutCell, LayoutRefused

__all__ = ["Result", "read_results", "refused_table", "table", "write_results"]


@dataclass(frozen=True)
class Result:
    """What a cell found.

    Args:
        nbytes: Bytes that were compared.
        rule: How the rule equals the recording.
        digest: Beginning of the digest of what the rule says of all ranks.
    """

    nbytes: int
    rule: str
    digest: str


def read_results(path: Path) -> dict[str, Result]:
    """The results on disk, by cell."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return {name: Result(**found) for name, found in content.items()}


def write_results(path: Path, results: Mapping[str, Result]) -> None:
    """Write them to disk."""
    content = {name: asdict(result) for name, result in results.items()}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def table(cells: Sequence[LayoutCell[Any]], results: Mapping[str, Result]) -> str:
    """What was found, a row for each cell; above it how much."""
    executed = sum(not cell.is_planned and cell.name in results for cell in cells)
    total = sum(result.nbytes for result in results.values())
    lines = [
        f"{executed} rows executed, {len(results) - executed} planned only; "
        f"{total / 1e9:.0f} GB compared, no difference.",
        "",
        "| family | layers, experts, vocabulary | degrees | what is special | sources | ranks "
        "| compared | bits | rule |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(cell, results[cell.name]) for cell in cells if cell.name in results),
    ]
    return "\n".join(lines) + "\n"


def refused_table(refused: Sequence[LayoutRefused[Any]]) -> str:
    """What cannot run, a row for each."""
    lines = [
        "| model | degrees | why |",
        "|---|---|---|",
        *(
            f"| {cell.model}{_changed(cell.changes)} | {cell.degrees.shown} | {cell.reason} |"
            for cell in refused
        ),
    ]
    return "\n".join(lines) + "\n"


def _row(cell: LayoutCell[Any], result: Result) -> str:
    config = cell.config
    experts = next(
        (
            config[k]
            for k in ("n_routed_experts", "num_experts", "num_local_experts")
            if k in config
        ),
        None,
    )
    counts = (config["num_hidden_layers"], experts, config["vocab_size"])
    size = ", ".join(str(count) for count in counts if count is not None)
    special = [*cell.specials]
    if cell.quantized:
        special.insert(0, "MXFP4" if "gpt" in cell.model else "block FP8")
    if cell.dtype != "BF16":
        special.insert(0, f"{cell.dtype} masters")
    sources = ", ".join(
        "x".join(map(str, w)) if isinstance(w, tuple) else str(w) for w in cell.sources
    )
    ranks = "planned" if cell.is_planned else ", ".join(map(str, cell.ranks))
    return (
        f"| {cell.family}{' *' if cell.is_transferred else ''} | {size} | {cell.degrees.shown} "
        f"| {', '.join(special)} | {sources} | {ranks} of {cell.degrees.world_size} "
        f"| {_size(result.nbytes)} | {'' if cell.is_planned else 'equal'} | {result.rule} |"
    )


def _changed(changes: Mapping[str, object]) -> str:
    shown = [f"`{key}` {value}" for key, value in changes.items() if not isinstance(value, dict)]
    return f", {', '.join(shown)}" if shown else ""


def _size(nbytes: int) -> str:
    return (
        "" if not nbytes else f"{nbytes / 1e6:.0f} MB" if nbytes < 1e9 else f"{nbytes / 1e9:.1f} GB"
    )
