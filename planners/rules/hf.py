"""A Hugging Face checkpoint in memory: every canonical tensor, whole, on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from weightsync.ir.dtypes import Dtype
from weightsync.ir.manifest import Side
from weightsync.planners.rules.canonical import canonical_tensors
from weightsync.planners.rules.config import ConfigLike, model_config
from weightsync.planners.rules.layout import RuleLayout, checked_degree, named_dtype
from weightsync.planners.rules.parts import Parameter, whole

__all__ = ["HfLayout", "hf"]


@dataclass(frozen=True, slots=True)
class HfLayout(RuleLayout):
    """Every rank holds the whole checkpoint, tensor by tensor; made by `hf`."""

    def parameters(self, rank: int) -> Iterator[Parameter]:
        """Lists the canonical tensors; see `RuleLayout.parameters`."""
        for name, shape in canonical_tensors(self.config).items():
            yield whole(name, name, shape)


def hf(
    config: ConfigLike, *, world: int = 1, dtype: str | Dtype = "BF16", side: Side = "source"
) -> HfLayout:
    """Lays a model out as its checkpoint, replicated.

    Args:
        config: The model.
        world: Number of ranks.
        dtype: Type of the tensors.
        side: Which side these ranks are on.

    Returns:
        The layout.

    Raises:
        ConfigError: The model is not supported, or an argument makes no sense.
    """
    return HfLayout(side, model_config(config), named_dtype(dtype), checked_degree("world", world))
