"""The two sides of a dry run: from the keys of a group to a layout, from a layout to a manifest."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from weightsync.errors import ConfigError
from weightsync.ir import Manifest, Side
from weightsync.ir.repeat import repeat_ranks
from weightsync.planners import rules
from weightsync.planners.rules import ModelConfig, RuleLayout

__all__ = ["KINDS", "SizedLayout", "describe", "is_neutral", "make_layout", "manifest_of"]

KINDS: Final = {"trainer": ("fsdp2", "megatron", "zero3"), "rollout": ("vllm", "sglang")}
"""Kinds of each group. A kind is the name of a function in `weightsync.planners.rules`."""

# Keys of a group that are no arguments of a rule.
_OWN_KEYS: Final = {
    "trainer": ("offloaded",),
    "rollout": ("replicas", "mode", "node_dedup", "relays"),
}


class SizedLayout(Protocol):
    """A layout that knows how many ranks it is for, as all rules make."""

    @property
    def world_size(self) -> int:
        """Ranks of a trainer, or of one replica."""

    def manifest(self, rank: int) -> Manifest:
        """The manifest of one rank; see `weightsync.ir.layout.Layout`."""


def make_layout(group: str, values: Mapping[str, Any], model: ModelConfig) -> RuleLayout:
    """Call the rule that a group names.

    Args:
        group: "trainer" or "rollout".
        values: Its keys: `kind`, arguments of that rule, and what is not about layouts.
        model: The model.

    Raises:
        ConfigError: A kind or key that there is not, or what the rule refuses; names the override.
    """
    kind = values.get("kind")
    if kind not in KINDS[group]:
        raise ConfigError(f"{group}.kind={kind}: it is one of {', '.join(KINDS[group])}")
    rule: Callable[..., RuleLayout] | None = getattr(rules, str(kind), None)
    if rule is None:
        built = ", ".join(name for name in KINDS[group] if hasattr(rules, name))
        raise ConfigError(f"{group}={kind}: there are no layouts of it yet; there are of {built}")
    parameters = dict(list(inspect.signature(rule).parameters.items())[1:])
    arguments = {}
    for key, value in values.items():
        if key in parameters:
            arguments[key] = tuple(value) if isinstance(value, list) else value
        elif key not in ("kind", *_OWN_KEYS[group]) and not is_neutral(value):
            raise ConfigError(
                f"{group}.{key}={value}: layouts of {kind} have no {key} yet; they take "
                f"{', '.join(parameters)}"
            )
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in arguments:
            raise ConfigError(f"{group}={kind} needs {group}.{key}")
    try:
        return rule(model, **arguments)
    except ConfigError as error:
        named = [name for name in (error.key, *error.context) if name in values]
        if not named:
            raise
        raise ConfigError(f"{error}; change {group}.{named[0]}", **error.context) from error


def is_neutral(value: Any) -> bool:
    """Whether a value asks for nothing: no degree beyond 1, no flag, no name."""
    return value is not True and value in (None, False, 1)


def manifest_of(
    layout: SizedLayout,
    side: Side,
    *,
    replicas: int = 1,
    on_rank: Callable[[int], None] = lambda rank: None,
) -> Manifest:
    """Join the manifests of all ranks of one side.

    Args:
        layout: Of the trainer, or of one replica.
        side: Which side it is.
        replicas: Equal ones; each rank's manifest is made once.
        on_rank: Called with each rank before its manifest is made.

    Returns:
        The merged manifest; rank `r` of replica `i` has number `i * world_size + r`.

    Raises:
        LayoutError: The layout is one of the other side, or contradicts itself.
    """
    made = []
    for rank in range(layout.world_size):
        on_rank(rank)
        made.append(layout.manifest(rank))
    merged = Manifest.merge(side, made)
    if side == "source":
        return merged
    ranks = range(layout.world_size)
    return repeat_ranks(merged, [[f"sink {i}/{rank}" for rank in ranks] for i in range(replicas)])


def describe(layout: SizedLayout) -> dict[str, Any]:
    """Say what a layout is: its kind, its ranks and its degrees, as plain values."""
    kind = type(layout).__name__.removesuffix("Layout").lower()
    found: dict[str, Any] = {"kind": kind, "ranks": layout.world_size}
    found |= _scalars(layout)
    if isinstance(ep := getattr(layout, "ep", None), int):
        found["ep"] = ep
    return found


def _scalars(value: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
        inner = getattr(value, field.name)
        if field.name == "dtype":
            found["dtype"] = inner.name
        elif isinstance(inner, ModelConfig) or field.name in ("side", "world_size"):
            continue
        elif dataclasses.is_dataclass(inner):
            found |= _scalars(inner)
        elif inner is None or isinstance(inner, str | int | float):
            found[field.name] = inner
    return found
