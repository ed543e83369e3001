"""Checks that engines have in common: what must divide what, and placements of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from weightsync.errors import ConfigError
from weightsync.planners.rules.config import ModelConfig

__all__ = ["check_divides", "check_expert_map", "check_kv_heads", "check_redundant"]


def check_divides(rule: str, key: str, degree: int, sizes: Mapping[str, int]) -> None:
    """Checks that a degree divides sizes.

    Args:
        rule: Name of the rule, for messages.
        key: Name of the degree.
        degree: Its value.
        sizes: Size by what it is called.

    Raises:
        ConfigError: It does not divide one of them.
    """
    for what, size in sizes.items():
        if size % degree:
            raise ConfigError(f"{rule}: {key}={degree} does not divide {what}, {size}", key=key)


def check_kv_heads(rule: str, key: str, tp: int, kv_heads: int) -> None:
    """Checks that kv heads can be cut over ranks, or be replicated on them.

    Args:
        rule: Name of the rule, for messages.
        key: Name of the degree.
        tp: Ranks that share the heads of a layer.
        kv_heads: Key and value heads.

    Raises:
        ConfigError: Neither is possible.
    """
    if kv_heads < tp and tp % kv_heads:
        raise ConfigError(
            f"{rule}: {key}={tp} is no multiple of the {kv_heads} kv heads, so they cannot be "
            "replicated evenly",
            key=key,
        )
    if kv_heads >= tp:
        check_divides(rule, key, tp, {"num_key_value_heads": kv_heads})


def check_redundant(rule: str, num_redundant: int) -> None:
    """Checks a number of redundant experts.

    Args:
        rule: Name of the rule, for messages.
        num_redundant: Copies of experts beyond the first.

    Raises:
        ConfigError: It is no integer from 0 on.
    """
    if isinstance(num_redundant, bool) or not isinstance(num_redundant, int) or num_redundant < 0:
        raise ConfigError(
            f"{rule}: num_redundant_experts must be an integer from 0 on, not {num_redundant!r}",
            key="num_redundant_experts",
        )


def check_expert_map(
    rule: str,
    model: ModelConfig,
    rows: Sequence[Sequence[int]],
    num_slots: int,
    num_rows: int,
    what: str,
) -> None:
    """Checks where a balancer has put experts.

    Args:
        rule: Name of the rule, for messages.
        model: The model.
        rows: The logical expert in each slot of all ranks, a row for each layer.
        num_slots: Slots of a layer.
        num_rows: Layers that need a row.
        what: What those layers are.

    Raises:
        ConfigError: There are too few or too many rows, or one does not place every expert.
    """
    everyone = set(range(model.num_experts))
    bad = [n for n, row in enumerate(rows) if len(row) != num_slots or set(row) != everyone]
    if len(rows) != num_rows:
        problem = f"{len(rows)} rows for {num_rows} {what}"
    elif bad:
        problem = (
            f"row {bad[0]} does not place all {model.num_experts} experts in {num_slots} slots"
        )
    else:
        return
    raise ConfigError(f"{rule}: expert_map: {problem}", key="expert_map")
