"""PyTorch's FSDP2: every parameter cut along dimension 0, optionally in several copies (HSDP)."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

from weightsync.ir.dtypes import Dtype
from weightsync.planners.rules.config import ConfigLike, model_config
from weightsync.planners.rules.layout import RuleLayout, checked_degree, named_dtype
from weightsync.planners.rules.parts import Parameter
from weightsync.planners.rules.transformers import transformers_buffers, transformers_parameters

__all__ = ["Fsdp2Layout", "fsdp2"]


@dataclass(frozen=True, slots=True)
class Fsdp2Layout(RuleLayout):
    """A transformers model under `fully_shard`; made by `fsdp2`.

    Args:
        fsdp: Ranks that share one copy of the parameters.
    """

    fsdp: int

    def parameters(self, rank: int, without: Container[int] = ()) -> Iterator[Parameter]:
        """Cuts parameters into chunks of ceil(n / fsdp) rows; see `RuleLayout.parameters`."""
        # The mesh is (replicate, shard), row-major: neighbours share a copy.
        index = rank % self.fsdp
        for parameter in transformers_parameters(self.config).values():
            num_rows, *rest = parameter.shape
            chunk = -(-num_rows // self.fsdp)
            start = min(index * chunk, num_rows)
            stop = min(start + chunk, num_rows)
            yield parameter.shard((start, *(0 for _ in rest)), (stop - start, *rest))
        yield from transformers_buffers(self.config).values()  # fully_shard leaves them whole


def fsdp2(
    config: ConfigLike, *, fsdp: int, replicate: int = 1, dtype: str | Dtype = "F32"
) -> Fsdp2Layout:
    """Lays a transformers 5 model out as FSDP2 trainers hold it.

    Args:
        config: The model.
        fsdp: Ranks that share one copy of the parameters.
        replicate: Number of copies; more than one is HSDP, a mesh (replicate, fsdp).
        dtype: Type of the sharded parameters: `F32`, or `BF16` where the trainer keeps no masters.
            Buffers keep their own: `e_score_correction_bias` is F32 and whole on every rank.

    Returns:
        The layout of `fsdp * replicate` source ranks.

    Raises:
        ConfigError: The model is not supported, or a degree makes no sense.
    """
    world_size = checked_degree("fsdp", fsdp) * checked_degree("replicate", replicate)
    return Fsdp2Layout("source", model_config(config), named_dtype(dtype), world_size, fsdp)
