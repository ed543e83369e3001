"""DeepSpeed ZeRO-3: which range of a flattened parameter this process holds."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from weightsync.errors import LayoutError
from weightsync.planners.rules.zero3 import zero3_range

__all__ = ["Partition", "is_partitioned", "partition_of"]


class Partition(NamedTuple):
    """What a process holds of a partitioned parameter.

    Args:
        local: The range; one-dimensional, padding included.
        shape: Shape of the whole parameter.
        window: First element of the range, and the number of its elements.
    """

    local: Tensor
    shape: tuple[int, ...]
    window: tuple[int, int]


def is_partitioned(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter that DeepSpeed has partitioned.

    Its own memory is then that of the gathered parameter, or none; `ds_tensor` is what lasts.
    """
    return hasattr(tensor, "ds_tensor")


def partition_of(name: str, parameter: Tensor) -> Partition:
    """Finds the range of a partitioned parameter. Nothing is gathered.

    Args:
        name: Name of the parameter, for messages.
        parameter: The parameter.

    Returns:
        The range.

    Raises:
        LayoutError: It is not in memory, is quantized, or cut otherwise than ZeRO-3 cuts.
    """
    held: Any = parameter
    local: Tensor = held.ds_tensor
    shape = tuple(held.ds_shape) or (1,)
    ranks, rank = dist.get_world_size(held.ds_process_group), dist.get_rank(held.ds_process_group)
    start, size = zero3_range(math.prod(shape), ranks, rank)
    problem = None
    if getattr(local, "ds_quant_scale", None) is not None:
        problem = "is quantized; set zero_quantized_nontrainable_weights to false"
    elif local.numel() == 0:
        problem = "is swapped out; parameters must be in memory, not offloaded to NVMe"
    elif local.ndim != 1 or local.numel() != size:
        problem = (
            f"has a partition of shape {tuple(local.shape)}, but an equal share of "
            f"{math.prod(shape)} elements among {ranks} ranks is {size}"
        )
    if problem is not None:
        raise LayoutError(f"{name}, partitioned by DeepSpeed ZeRO-3, {problem}", tensor=name)
    return Partition(local.detach(), shape, (start, size))
