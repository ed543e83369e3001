"""Sites: where live PyTorch weights lie in this process's memory, each place once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from weightsync.errors import LayoutError
from weightsync.ir.dtypes import Dtype
from weightsync.live.placements import local_boxes
from weightsync.live.zero3 import is_partitioned, partition_of
from weightsync.planners.rules.parts import Box

__all__ = [
    "KINDS",
    "TORCH_DTYPES",
    "Site",
    "Weights",
    "live_sites",
    "named_tensors",
    "skipped_buffers",
    "unwrapped",
]

Weights = nn.Module | Mapping[str, Tensor]
Index = tuple[int, ...]

_MAX_DIMS = 4
KINDS = {
    torch.bool: Dtype.BOOL,
    torch.uint8: Dtype.U8,
    torch.int8: Dtype.I8,
    torch.float8_e4m3fn: Dtype.F8_E4M3,
    torch.float8_e5m2: Dtype.F8_E5M2,
    torch.uint16: Dtype.U16,
    torch.int16: Dtype.I16,
    torch.float16: Dtype.F16,
    torch.bfloat16: Dtype.BF16,
    torch.uint32: Dtype.U32,
    torch.int32: Dtype.I32,
    torch.float32: Dtype.F32,
    torch.uint64: Dtype.U64,
    torch.int64: Dtype.I64,
    torch.float64: Dtype.F64,
}
TORCH_DTYPES = {kind: dtype for dtype, kind in KINDS.items()}
# Wrappers that put a word into every name below them without changing the weights.
_WRAPPER_NAMES = ("_orig_mod.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True, slots=True)
class Site:
    """Local memory that holds boxes of a parameter, and every name that leads to it.

    Args:
        names: Names of the parameter; more than one if weights are tied.
        shape: Shape of the whole parameter; a scalar has shape (1,).
        n: Elements held here along each dimension; none is zero.
        boxes: Boxes of the parameter that they are, with their places in the memory.
        stride: Strides of the memory, in elements.
        local: The memory, from its first element on; detached.
        dtype: Type of the elements.
        window: Instead of boxes: first element and number of elements of the flattened parameter,
            which may reach beyond its last one.
    """

    names: tuple[str, ...]
    shape: Index
    n: Index
    boxes: tuple[Box, ...]
    stride: Index
    local: Tensor
    dtype: Dtype
    window: tuple[int, int] | None = None


def live_sites(weights: Weights) -> list[Site]:
    """Lists the memory of this process that holds weights a checkpoint would store.

    FSDP modules that are unsharded at this moment are resharded first. Nothing is copied or
    communicated.

    Args:
        weights: The module, or tensors by parameter name.

    Returns:
        One site for every piece of memory, empty shards left out, in the order of the names.

    Raises:
        LayoutError: A tensor cannot be described; the message names it and says what can.
    """
    found: dict[Any, Site] = {}
    for name, tensor in named_tensors(weights):
        site = _site(name, tensor)
        if site is None:
            continue
        # Tensors on the meta device have no address; only the same object is the same memory.
        is_meta = site.local.device.type == "meta"
        address = id(tensor) if is_meta else site.local.data_ptr()
        place = site.boxes, site.stride, site.window
        key = (address, site.local.device, site.shape, place, site.dtype)
        if key in found:
            site = replace(found[key], names=(*found[key].names, name))
        found[key] = site
    return list(found.values())


def named_tensors(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Lists what a checkpoint would store, without looking at it; tied weights under every name.

    FSDP modules that are unsharded at this moment are resharded first.

    Args:
        weights: The module, or tensors by parameter name.

    Yields:
        Name and tensor, always in the same order.

    Raises:
        LayoutError: The module is under FSDP1.
    """
    if not isinstance(weights, nn.Module):
        yield from weights.items()
        return
    module = unwrapped(weights)
    for child in module.modules():
        if isinstance(child, FullyShardedDataParallel):
            raise LayoutError(
                "FSDP1 (FullyShardedDataParallel) flattens parameters and is not supported; use "
                "torch.distributed.fsdp.fully_shard"
            )
        if isinstance(child, FSDPModule):
            child.reshard()  # a no-op where it is sharded
    for name, parameter in module.named_parameters(remove_duplicate=False):
        yield _clean(name), parameter
    for name, buffer, is_persistent in _named_buffers(module):
        if is_persistent:
            yield name, buffer


def skipped_buffers(weights: Weights) -> tuple[str, ...]:
    """Lists buffers that no checkpoint stores and that therefore are not moved.

    Args:
        weights: The module, or tensors by parameter name.

    Returns:
        Names of the non-persistent buffers; none for a mapping.
    """
    if not isinstance(weights, nn.Module):
        return ()
    buffers = _named_buffers(unwrapped(weights))
    return tuple(name for name, _, is_persistent in buffers if not is_persistent)


def unwrapped(module: nn.Module) -> nn.Module:
    """Looks through DistributedDataParallel, DeepSpeed's engine and torch.compile, in any order.

    Args:
        module: Any module.

    Returns:
        The module that holds the weights under their own names.
    """
    while True:
        inner: Any = module._modules.get("module")
        is_engine = type(module).__module__.startswith("deepspeed.") and inner is not None
        if isinstance(module, DistributedDataParallel) or is_engine:
            module = inner
        elif isinstance(compiled := module._modules.get("_orig_mod"), nn.Module):
            module = compiled
        else:
            return module


def _named_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    for prefix, child in module.named_modules(remove_duplicate=False):
        for name, buffer in child.named_buffers(recurse=False, remove_duplicate=False):
            is_persistent = name not in child._non_persistent_buffers_set
            yield _clean(f"{prefix}.{name}" if prefix else name), buffer, is_persistent


def _clean(name: str) -> str:
    for word in _WRAPPER_NAMES:
        name = name.replace(word, "")
    return name


def _site(name: str, tensor: Tensor) -> Site | None:
    """Describes the local memory of one tensor; None if nothing of it is here."""
    if is_partitioned(tensor):
        local, shape, window = partition_of(name, tensor)
        _check(name, local)
        if window[0] >= math.prod(shape):
            return None  # all padding
        return Site((name,), shape, shape, (), (1,), local, KINDS[local.dtype], window)
    shape = tuple(tensor.shape) or (1,)
    local = tensor.detach()
    if isinstance(tensor, DTensor):
        with torch.no_grad():  # with gradients on, to_local() puts a node into the graph
            local = tensor.to_local().detach()
    _check(name, local)
    n = tuple(local.shape) or (1,)
    boxes: tuple[Box, ...] = (Box((0,) * len(n), n, (0,) * len(n)),)
    if isinstance(tensor, DTensor):
        boxes = local_boxes(name, tensor, local)
    if not boxes or 0 in n:
        return None
    stride = tuple(local.stride()) or (1,)
    return Site((name,), shape, n, boxes, stride, local, KINDS[local.dtype])


def _check(name: str, local: Tensor) -> None:
    """Refuses tensors whose elements are not plainly in strided memory."""
    if local.ndim > _MAX_DIMS:
        raise LayoutError(
            f"{name} has {local.ndim} dimensions; at most {_MAX_DIMS} are supported", tensor=name
        )
    if local.dtype not in KINDS:
        raise LayoutError(f"{name} has dtype {local.dtype}, which is not supported", tensor=name)
    is_wrapper = is_traceable_wrapper_subclass(local)
    if is_wrapper or local.layout != torch.strided:
        raise LayoutError(
            f"{name} is a {type(local).__name__} with layout {local.layout}; only plain strided "
            "tensors and DTensors of them are supported",
            tensor=name,
        )
    if local.is_neg() or local.is_conj():
        raise LayoutError(f"{name} is a negated view; call resolve_neg() on it", tensor=name)
    expanded = [n for n, stride in zip(local.shape, local.stride(), strict=True) if not stride]
    if any(n > 1 for n in expanded):
        raise LayoutError(
            f"{name} is expanded: several of its elements share memory; make it contiguous",
            tensor=name,
        )
