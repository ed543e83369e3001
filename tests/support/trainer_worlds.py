"""Trainers of the layout matrix other than FSDP2: their layouts, and what their ranks hold.

What they hold is cut out of a checkpoint by plain tensor operations that share no code with rules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from support.megatron_oracle import MegatronCut
from weightsync.planners import rules

__all__ = ["MegatronWorld", "Zero3World", "flat_partition", "transformers_tensors"]

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


@dataclass(frozen=True)
class MegatronWorld:
    """Ranks of Megatron-Core: degrees for the rule, the same for the oracle."""

    degrees: Mapping[str, Any]
    cut: MegatronCut

    def __str__(self) -> str:
        shown = [f"{key.upper()} {self.degrees[key]}" for key in self.degrees if len(key) < 4]
        return f"Megatron {' '.join(shown)}"

    def layout(self, config: Mapping[str, Any], dtype: str) -> rules.MegatronLayout:
        return rules.megatron(config, dtype=dtype, **self.degrees)

    def held(
        self, named: Mapping[str, Tensor], config: Mapping[str, Any], rank: int
    ) -> dict[str, Tensor]:
        """Tensors of a rank by buffer; padding is NaN."""
        return self.cut.tensors(named, config, rank)


@dataclass(frozen=True)
class Zero3World:
    """Ranks of DeepSpeed ZeRO-3."""

    dp: int

    def __str__(self) -> str:
        return f"ZeRO-3 {self.dp}"

    def layout(self, config: Mapping[str, Any], dtype: str) -> rules.Zero3Layout:
        return rules.zero3(config, dp=self.dp, dtype=dtype)

    def held(
        self, named: Mapping[str, Tensor], config: Mapping[str, Any], rank: int
    ) -> dict[str, Tensor]:
        """Flat tensors of a rank by buffer; padding is NaN."""
        return {
            name: tensor.flatten()
            if name.endswith("e_score_correction_bias")
            else flat_partition(tensor, self.dp, rank)
            for name, tensor in transformers_tensors(named).items()
        }


def transformers_tensors(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint as transformers 5 holds it: the experts of a layer in two tensors."""
    found: dict[str, Tensor] = {}
    experts: dict[str, dict[str, list[Tensor]]] = {}
    for name, tensor in named.items():
        match = _EXPERT.fullmatch(name)
        if match is None:
            found[name] = tensor
        else:  # in the order of the experts
            experts.setdefault(match[1], {}).setdefault(match[3], []).append(tensor)
    for prefix, held in experts.items():
        halves = [torch.stack(held["gate"]), torch.stack(held["up"])]
        found[f"{prefix}.gate_up_proj"] = torch.cat(halves, 1)
        found[f"{prefix}.down_proj"] = torch.stack(held["down"])
    return found


def flat_partition(tensor: Tensor, dp: int, rank: int) -> Tensor:
    """A rank's share of a flattened tensor, padded with NaN to equal shares."""
    flat = tensor.flatten()
    size = -(-len(flat) // dp)
    part = flat[rank * size : (rank + 1) * size]
    return torch.nn.functional.pad(part, (0, size - len(part)), value=float("nan"))
