"""Placements: which elements of a DTensor this process holds, and where in its local tensor.

Each axis of a mesh cuts one dimension, so what a process holds is a product: along every dimension
some ranges of the whole tensor, one after the other in the local tensor. `Shard` cuts what the axes
before it left into chunks. `_StridedShard` with split factor f first cuts it into f parts, then
each part into chunks, and takes one chunk of every part: several ranges.

FSDP2 over tensor or expert parallelism of the same dimension writes `_StridedShard` too, but means
another order: the axes to its right have cut before (`FSDPParam._init_sharding_spec_tp` in torch
2.13). For sizes that divide evenly both readings are the same. For others torch itself uses now
one, now the other (`compute_local_shape_and_global_offset` and `DTensor.full_tensor`); here the
size of the local tensor tells which is meant, and where it cannot, the tensor is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from weightsync.errors import LayoutError
from weightsync.planners.rules.parts import Box

__all__ = ["Cut", "local_boxes", "readings"]

Range = tuple[int, int]
Ranges = tuple[Range, ...]


class Cut(NamedTuple):
    """One axis of a mesh that cuts a dimension.

    Args:
        num_chunks: Size of the axis.
        coordinate: This process's, on it.
        factor: Split factor; 1 for a plain `Shard`.
    """

    num_chunks: int
    coordinate: int
    factor: int = 1


def local_boxes(name: str, tensor: DTensor, local: Tensor) -> tuple[Box, ...]:
    """Finds the boxes of a DTensor that this process holds. Nothing is communicated.

    Args:
        name: Name of the tensor, for messages.
        tensor: The DTensor.
        local: Its local tensor.

    Returns:
        The boxes, together the local tensor; none if it is empty or this process is not in the
        mesh. A scalar is a tensor of shape (1,).

    Raises:
        LayoutError: A placement is not understood, or does not go with the local tensor.
    """
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return ()
    if local.ndim != tensor.ndim:
        raise _unclear(name, tensor, local, "it has another number of dimensions")
    cuts = _cuts(name, tensor, coordinate)
    dims = []
    for dim, size in enumerate(tensor.shape):
        held = local.shape[dim]
        found = {ranges for ranges in readings(size, cuts[dim]) if _count(ranges) == held}
        if not found:
            raise _unclear(name, tensor, local, f"placements give dimension {dim} another size")
        if len(found) > 1:
            raise _unclear(name, tensor, local, f"which elements of dimension {dim} is not said")
        dims.append(found.pop())
    return _product(dims)


def _unclear(name: str, tensor: DTensor, local: Tensor, problem: str) -> LayoutError:
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate() or ()
    return LayoutError(
        f"{name} of shape {tuple(tensor.shape)} has placements {tensor.placements} on a mesh of "
        f"shape {tuple(mesh.shape)} and, at {tuple(coordinate)}, a local tensor of shape "
        f"{tuple(local.shape)}: {problem}",
        tensor=name,
    )


def readings(size: int, cuts: Sequence[Cut]) -> list[Ranges]:
    """Lists what the cuts of one dimension can mean.

    Args:
        size: Elements of the dimension.
        cuts: The axes that cut it, in the order of the mesh.

    Returns:
        Ranges (start, stop) of the whole dimension in the order of the local tensor: as the
        placements say literally, and, where it may be meant, as FSDP2 cuts.
    """
    reordered = _reordered(cuts)
    found = [_apply(size, cuts)]
    if reordered is not None:
        found.append(_apply(size, reordered))
    return found


def _cuts(name: str, tensor: DTensor, coordinate: Sequence[int]) -> list[list[Cut]]:
    """The cuts of every dimension."""
    cuts: list[list[Cut]] = [[] for _ in tensor.shape]
    for axis in _axes(tensor):
        placement = tensor.placements[axis]
        # Exact types: older torch makes _StridedShard a Shard, which it is not for us.
        if type(placement) not in (Shard, _StridedShard, Replicate):
            raise LayoutError(
                f"{name} has placements {tensor.placements}; supported are Shard(dim), "
                "_StridedShard(dim) and Replicate()",
                tensor=name,
            )
        if isinstance(placement, Replicate):
            continue
        assert isinstance(placement, Shard | _StridedShard)
        factor = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
        cut = Cut(tensor.device_mesh.size(axis), coordinate[axis], factor)
        cuts[placement.dim % tensor.ndim].append(cut)
    return cuts


def _axes(tensor: DTensor) -> list[int]:
    """The axes of the mesh in the order in which they cut."""
    # Newer torch can cut one dimension along several axes in another order than the mesh's; None
    # where strided placements say it.
    order = getattr(tensor._spec, "shard_order", None)
    axes = [axis for entry in order or () for axis in entry.mesh_dims]
    return axes + [axis for axis in range(tensor.device_mesh.ndim) if axis not in axes]


def _reordered(cuts: Sequence[Cut]) -> list[Cut] | None:
    """The cuts in the order in which FSDP2 makes them, or None if it writes no such placements.

    From right to left, each axis comes after as many others as its split factor multiplies up to.
    """
    order: list[Cut] = []
    for cut in reversed(cuts):
        if not order:
            order.append(cut)  # nothing to its right: a split factor here is meant literally
            continue
        before, place = 1, 0
        while before != cut.factor and place < len(order):
            before *= order[place].num_chunks
            place += 1
        if before != cut.factor:
            return None
        order.insert(place, cut._replace(factor=1))
    return order


def _apply(size: int, cuts: Sequence[Cut]) -> Ranges:
    ranges: list[Range] = [(0, size)] if size else []
    for cut in cuts:
        parts = [_chunk(ranges, cut.factor, part) for part in range(cut.factor)]
        chunks = (_chunk(part, cut.num_chunks, cut.coordinate) for part in parts)
        ranges = _joined(itertools.chain.from_iterable(chunks))
    return tuple(ranges)


def _count(ranges: Sequence[Range]) -> int:
    return sum(stop - start for start, stop in ranges)


def _chunk(ranges: Sequence[Range], num_chunks: int, index: int) -> list[Range]:
    """What `torch.chunk` gives: ceil(n / chunks) elements each, the last chunks short or empty."""
    size = -(-_count(ranges) // num_chunks)
    first, end = index * size, (index + 1) * size
    found = []
    seen = 0
    for start, stop in ranges:
        low, high = max(start, start + first - seen), min(stop, start + end - seen)
        if low < high:
            found.append((low, high))
        seen += stop - start
    return found


def _joined(ranges: itertools.chain[Range]) -> list[Range]:
    found: list[Range] = []
    for start, stop in ranges:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found


def _product(dims: Sequence[Ranges]) -> tuple[Box, ...]:
    """Every combination of ranges is a box; none if a dimension has no range."""
    if not dims:
        return (Box((0,), (1,), (0,)),)
    if not all(dims):
        return ()
    placed = []
    for ranges in dims:
        sizes = [stop - start for start, stop in ranges]
        starts = [start for start, _ in ranges]
        placed.append(zip(starts, sizes, itertools.accumulate(sizes[:-1], initial=0), strict=True))
    return tuple(
        Box(*(tuple(column) for column in zip(*combination, strict=True)))
        for combination in itertools.product(*placed)
    )
