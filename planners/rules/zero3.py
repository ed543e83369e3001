"""DeepSpeed ZeRO-3: every parameter flattened and cut into equal ranges, the last ones padded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from weightsync.ir.dtypes import Dtype
from weightsync.planners.rules.config import ConfigLike, model_config
from weightsync.planners.rules.layout import Block, RuleLayout, checked_degree, named_dtype
from weightsync.planners.rules.transformers import transformers_blocks

__all__ = ["Zero3Layout", "zero3", "zero3_range"]


@dataclass(frozen=True, slots=True)
class Zero3Layout(RuleLayout):
    """A transformers model under ZeRO-3; made by `zero3`."""

    def blocks(self, rank: int) -> Iterator[Block]:
        """Cuts flattened parameters into ranges; see `RuleLayout.blocks`."""
        return transformers_blocks(
            self.config,
            lambda whole: whole.flat(*zero3_range(math.prod(whole.shape), self.world_size, rank)),
        )


def zero3_range(numel: int, dp: int, rank: int) -> tuple[int, int]:
    """Gives the range of a flattened parameter that one rank holds as its `ds_tensor`.

    `_partition_param` in deepspeed/runtime/zero/partition_parameters.py: the number of elements is
    rounded up to a multiple of the ranks. What lies beyond the last one is never written, so it is
    whatever was in that memory.

    Args:
        numel: Elements of the parameter.
        dp: Ranks that share it.
        rank: This one.

    Returns:
        First element and number of elements, padding included.
    """
    size = -(-numel // dp)
    return rank * size, size


def zero3(config: ConfigLike, *, dp: int, dtype: str | Dtype = "BF16") -> Zero3Layout:
    """Lays a transformers 5 model out as DeepSpeed ZeRO-3 holds it.

    A rank's buffer of a parameter is its `ds_tensor`, one-dimensional and padded. The padding is in
    no piece of the manifest, so it is never sent; a rank whose range is all padding has no buffer.
    Parameters that DeepSpeed keeps gathered because they are small have such a range as well.

    Args:
        config: The model.
        dp: Data-parallel ranks, all of which share the parameters.
        dtype: Type of the partitions: `BF16`, `F16`, or `F32` where the engine has neither on.
            Buffers are not partitioned and keep their own: `e_score_correction_bias` is F32 and
            whole on every rank.

    Returns:
        The layout of `dp` source ranks.

    Raises:
        ConfigError: The model is not supported, or a degree makes no sense.
    """
    return Zero3Layout("source", model_config(config), named_dtype(dtype), checked_degree("dp", dp))
