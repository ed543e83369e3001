"""Cells of layout matrices: published configurations of true widths, times degrees."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from support.trainer_worlds import MegatronWorld, Zero3World

__all__ = ["LayoutCell", "LayoutRefused", "World", "config_of"]

World = int | tuple[int, int] | MegatronWorld | Zero3World

_MODELS = Path(__file__).resolve().parents[2] / "configs" / "model"
_BLOCK_FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
}


def config_of(model: str, changes: Mapping[str, Any], *, quantized: bool) -> dict[str, Any]:
    """A published configuration with two layers, and changes."""
    content = json.loads((_MODELS / f"{model}.json").read_text())
    config: dict[str, Any] = {**content.get("config", content)}
    config.pop("num_nextn_predict_layers", None)  # engines skip what they do not speculate with
    config["num_hidden_layers"] = 2
    if "first_k_dense_replace" in config:
        config["first_k_dense_replace"] = 1
    if not quantized:
        config.pop("quantization_config", None)
    elif "quantization_config" not in config:
        config["quantization_config"] = dict(_BLOCK_FP8)
    config |= changes
    if (
        quantized
        and "modules_to_not_convert" not in changes
        and model.startswith("qwen3-")
        and "num_experts" in config
    ):
        layers = range(config["num_hidden_layers"])
        routers = [f"model.layers.{layer}.mlp.gate" for layer in layers]
        config["quantization_config"]["modules_to_not_convert"] = ["lm_head", *routers]
    return config


class Degrees(Protocol):
    """How one replica of an engine is cut."""

    @property
    def world_size(self) -> int:
        """Ranks of the replica."""

    @property
    def shown(self) -> str:
        """The degrees in words."""


D = TypeVar("D", bound=Degrees)


@dataclass(frozen=True)
class LayoutCell(Generic[D]):
    """One combination.

    Args:
        name: Unique.
        family: As the matrix counts them.
        model: File of configs/model.
        degrees: How the replica is cut.
        sources: Worlds of FSDP2; a pair is HSDP, (replicate, shard). Or other trainers.
        changes: Keys of the configuration that are not the published ones.
        quantized: Whether tensors come quantized.
        dtype: Dtype of the trainer's parameters.
        specials: What is special here.
        is_long: Run in the long tier only.
        is_planned: Full counts on the meta device: rules, recording and plan only.
        is_transferred: Small enough to go through the real executor, too.
    """

    name: str
    family: str
    model: str
    degrees: D
    sources: tuple[World, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)
    quantized: bool = False
    dtype: str = "BF16"
    specials: tuple[str, ...] = ()
    is_long: bool = True
    is_planned: bool = False
    is_transferred: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """The configuration that both sides are given."""
        return config_of(self.model, self.changes, quantized=self.quantized)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks that are executed: the first, one in the middle, the last."""
        last = self.degrees.world_size - 1
        return tuple(sorted({0, (last + 1) // 2, last}))


@dataclass(frozen=True)
class LayoutRefused(Generic[D]):
    """A combination that cannot run.

    Args:
        name: Unique.
        model: File of configs/model.
        degrees: How the replica would be cut.
        reason: Why, for the page.
        message: What the rule says.
        engine_says: What the engine says when it builds or loads a rank; empty: it says nothing.
        changes: Keys of the configuration that are not the published ones.
        quantized: Whether tensors come quantized.
        rank: The rank; None: the last.
    """

    name: str
    model: str
    degrees: D
    reason: str
    message: str
    engine_says: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    quantized: bool = False
    dtype: str = "BF16"
    rank: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The configuration that both sides are given."""
        return config_of(self.model, self.changes, quantized=self.quantized)
