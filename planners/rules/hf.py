"""A Hugging Face checkpoint in memory: every canonical tensor, whole, on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from weightsync.ir.dtypes import Dtype
from weightsync.ir.manifest import Side
from weightsync.planners.rules.canonical import canonical_dtypes, canonical_tensors
from weightsync.planners.rules.config import ConfigLike, model_config
from weightsync.planners.rules.layout import RuleLayout, checked_degree, named_dtype
from weightsync.planners.rules.parts import Parameter, whole

__all__ = ["HfLayout", "hf"]


@dataclass(frozen=True, slots=True)
class HfLayout(RuleLayout):
    """Every rank holds the whole checkpoint, tensor by tensor; made by `hf`.

    Args:
        quantized: Whether it is the quantized checkpoint.
    """

    quantized: bool

    def parameters(self, rank: int) -> Iterator[Parameter]:
        """Lists the canonical tensors; see `RuleLayout.parameters`."""
        dtypes = canonical_dtypes(self.config, quantized=self.quantized)
        for name, shape in self.tensors().items():
            yield whole(name, name, shape, dtypes.get(name))

    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Gives their shapes; see `RuleLayout.tensors`."""
        return canonical_tensors(self.config, quantized=self.quantized)


def hf(
    config: ConfigLike,
    *,
    world: int = 1,
    dtype: str | Dtype = "BF16",
    side: Side = "source",
    quantized: bool = False,
) -> HfLayout:
    """Lays a model out as its checkpoint, replicated.

    Args:
        config: The model.
        world: Number of ranks.
        dtype: Type of the tensors that have none of their own (`canonical_dtypes`).
        side: Which side these ranks are on.
        quantized: Hold the checkpoint that `quantization_config` describes, not the BF16 one.

    Returns:
        The layout.

    Raises:
        ConfigError: The model is not supported, or an argument makes no sense.
    """
    model = model_config(config)
    canonical_tensors(model, quantized=quantized)  # refuses what it does not know
    world_size = checked_degree("world", world)
    return HfLayout(side, model, named_dtype(dtype), world_size, quantized)
