"""Parts: where boxes of canonical tensors lie inside a parameter.

A layout is a chain of affine maps: canonical tensor -> parameter -> shard of the parameter ->
memory. A `Part` is the first link. Cutting it by a shard's box gives a `Part` again, relative to
the shard, and strides take it to memory; so one small algebra serves every trainer and engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from weightsync.ir.builder import ManifestBuilder
from weightsync.ir.dtypes import Dtype

__all__ = [
    "Box",
    "Parameter",
    "Part",
    "columns",
    "dense_strides",
    "flat_boxes",
    "rows",
    "stacked",
    "whole",
    "write",
]

Index = tuple[int, ...]
Shape = tuple[int, ...]


class Box(NamedTuple):
    """A box of a parameter, and where it lies in a local tensor.

    Args:
        lo: First element of the box, in the parameter.
        n: Elements along each dimension.
        at: Where the first element lies in the local tensor.
    """

    lo: Index
    n: Index
    at: Index


@dataclass(frozen=True, slots=True)
class Part:
    """A box of one canonical tensor inside the index space of a parameter.

    Element `lo + step * i` of the tensor is the parameter's element `at`, moved by `jump[k] * i[k]`
    along dimension `axes[k]` for every dimension k of the tensor.

    Args:
        tensor: Canonical name.
        lo: First element of the box, in the tensor.
        n: Elements of the box along each dimension of the tensor.
        step: Distance of two neighbours of the box, in the tensor.
        at: First element of the box, in the parameter; as many numbers as the parameter has dims.
        axes: The parameter's dimension that each dimension of the tensor runs along; all different.
        jump: Distance of two neighbours of the box, in the parameter.
    """

    tensor: str
    lo: Index
    n: Index
    step: Index
    at: Index
    axes: Index
    jump: Index
    end_row: int = field(init=False, repr=False, compare=False)
    """First row of the parameter below the part; most shards are told apart by this alone."""

    def __post_init__(self) -> None:
        end_row = self.at[0] + 1
        if 0 in self.axes:
            k = self.axes.index(0)
            end_row += (self.n[k] - 1) * self.jump[k]
        object.__setattr__(self, "end_row", end_row)

    def cut(self, lo: Index, n: Index) -> Part | None:
        """Cuts the part by a box of the parameter.

        Args:
            lo: First element of the box.
            n: Elements of the box along each dimension.

        Returns:
            What of the part lies in the box, seen from the box (its corner is the origin); None if
            nothing does.
        """
        axis_of = dict(zip(self.axes, range(len(self.axes)), strict=True))
        new_lo, new_n = list(self.lo), list(self.n)
        at: list[int] = []
        for dim, (start, low, size) in enumerate(zip(self.at, lo, n, strict=True)):
            k = axis_of.get(dim)
            if k is None:
                if not low <= start < low + size:
                    return None
                at.append(start - low)
                continue
            # i with low <= start + jump * i < low + size, and 0 <= i < n
            jump = self.jump[k]
            first = max(0, -((start - low) // jump))
            stop = min(self.n[k], -((start - low - size) // jump))
            if first >= stop:
                return None
            new_lo[k] += self.step[k] * first
            new_n[k] = stop - first
            at.append(start - low + jump * first)
        return Part(
            self.tensor, tuple(new_lo), tuple(new_n), self.step, tuple(at), self.axes, self.jump
        )

    def moved(self, at: Index) -> Part:
        """Puts the part elsewhere.

        Args:
            at: Where its first element goes.

        Returns:
            The part, there.
        """
        return Part(self.tensor, self.lo, self.n, self.step, at, self.axes, self.jump)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter, or one rank's shard of it, as parts of canonical tensors.

    Args:
        name: Name of the buffer, as the framework spells it.
        shape: Its shape; 1 to 4 dimensions.
        parts: What it holds; disjoint.
        zeros: Boxes (first element, size) that hold zeros: padding that no checkpoint stores.
        dtype: Type of its elements; None: the layout's.
        window: What of it lies in memory, row-major: first element and number of elements, which
            may reach beyond the last one. None: all of it.
    """

    name: str
    shape: Shape
    parts: tuple[Part, ...]
    zeros: tuple[tuple[Index, Index], ...] = ()
    dtype: Dtype | None = None
    window: tuple[int, int] | None = None

    def shard(self, lo: Index, n: Index) -> Parameter:
        """Cuts the box that one rank holds out of an unpadded parameter.

        Args:
            lo: First element of the box.
            n: Elements of the box along each dimension; may be zero.

        Returns:
            The shard, with the shape of the box.
        """
        return self.collected(n, [Box(lo, n, (0,) * len(n))])

    def collected(self, shape: Shape, boxes: Iterable[Box]) -> Parameter:
        """Cuts several boxes out of an unpadded parameter and puts them into one local tensor.

        Args:
            shape: Shape of the local tensor.
            boxes: The boxes; together they fill it.

        Returns:
            The shard, with the shape of the local tensor.
        """
        found: list[Part] = []
        for box in boxes:
            first, end = box.lo[0], box.lo[0] + box.n[0]
            for part in self.parts:
                if part.at[0] >= end or part.end_row <= first:
                    continue
                cut = part.cut(box.lo, box.n)
                if cut is not None:
                    at = tuple(a + b for a, b in zip(cut.at, box.at, strict=True))
                    found.append(cut.moved(at) if any(box.at) else cut)
        return Parameter(self.name, shape, tuple(found), dtype=self.dtype)

    def flat(self, start: int, count: int) -> Parameter:
        """Cuts a range out of an unpadded parameter that was flattened, row-major.

        Args:
            start: First element of the range.
            count: Elements of the range; those beyond the parameter's last one are padding.

        Returns:
            The range, with the shape of the whole parameter; without parts if it is all padding.
        """
        stop = min(start + count, math.prod(self.shape))
        found: list[Part] = []
        for lo, n in flat_boxes(self.shape, start, stop):
            for part in self.collected(n, [Box(lo, n, (0,) * len(n))]).parts:
                at = tuple(a + b for a, b in zip(part.at, lo, strict=True))
                found.append(part.moved(at))
        return Parameter(
            self.name, self.shape, tuple(found), dtype=self.dtype, window=(start, count)
        )


def flat_boxes(shape: Shape, start: int, stop: int) -> Iterator[tuple[Index, Index]]:
    """Cuts a range of a row-major flattened array into boxes.

    A range begins and ends inside rows of every dimension but the first: what is left of the rows
    it begins in, whole rows, and what it holds of the rows it ends in.

    Args:
        shape: Shape of the array.
        start: First element of the range.
        stop: The element after its last one.

    Yields:
        First element and size of each box, in the order of the elements; at most
        `2 * len(shape) - 1` of them.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    rest = shape[1:]
    size = math.prod(rest)
    first, last = -(-start // size), stop // size
    if first > last:  # inside one row
        for lo, n in flat_boxes(rest, start - last * size, stop - last * size):
            yield (last, *lo), (1, *n)
        return
    if start < first * size:
        for lo, n in flat_boxes(rest, start - (first - 1) * size, size):
            yield (first - 1, *lo), (1, *n)
    if first < last:
        yield (first, *(0 for _ in rest)), (last - first, *rest)
    for lo, n in flat_boxes(rest, 0, stop - last * size):
        yield (last, *lo), (1, *n)


def whole(name: str, tensor: str, shape: Shape, dtype: Dtype | None = None) -> Parameter:
    """Makes a parameter that is one canonical tensor, unchanged.

    Args:
        name: Name of the parameter.
        tensor: Canonical name.
        shape: Shape of both.
        dtype: Type of its elements; None: the layout's.

    Returns:
        The parameter.
    """
    return Parameter(name, shape, (rows(tensor, shape, 0, shape[0]),), dtype=dtype)


def rows(tensor: str, shape: Shape, start: int, count: int, at: Index | None = None) -> Part:
    """Makes a part of rows `start ... start + count - 1` of a tensor.

    Args:
        tensor: Canonical name.
        shape: Shape of the tensor.
        start: First row.
        count: Number of rows.
        at: Where the first row goes in the parameter; its last dims are the tensor's. None: to the
            origin of a parameter with as many dims as the tensor.

    Returns:
        The part.
    """
    return _box(tensor, (start, *(0,) * (len(shape) - 1)), (count, *shape[1:]), at)


def columns(tensor: str, shape: Shape, start: int, count: int, at: Index | None = None) -> Part:
    """Makes a part of columns `start ... start + count - 1` of a matrix; see `rows`.

    Args:
        tensor: Canonical name.
        shape: Shape of the matrix.
        start: First column.
        count: Number of columns.
        at: Where the first column goes in the parameter.

    Returns:
        The part.
    """
    return _box(tensor, (0, start), (shape[0], count), at)


def _box(tensor: str, lo: Index, n: Index, at: Index | None) -> Part:
    dims = len(n)
    at = (0,) * dims if at is None else at
    axes = tuple(range(len(at) - dims, len(at)))
    return Part(tensor, lo, n, (1,) * dims, at, axes, (1,) * dims)


def stacked(name: str, parts: Sequence[Part]) -> Parameter:
    """Stacks parts of equal width on top of each other, as engines fuse projections.

    Args:
        name: Name of the fused parameter.
        parts: The parts, top first, each with as many dims as the parameter.

    Returns:
        The parameter; its rows are the sum of the parts' rows.
    """
    moved: list[Part] = []
    row = 0
    for part in parts:
        moved.append(part.moved((row, *part.at[1:])))
        row += part.n[0]
    return Parameter(name, (row, *parts[0].n[1:]), tuple(moved))


def dense_strides(shape: Shape) -> Index:
    """Gives the row-major strides of a shape, in elements.

    Args:
        shape: The shape.

    Returns:
        One stride a dimension.
    """
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def write(
    builder: ManifestBuilder,
    parameters: Iterable[Parameter],
    shapes: Mapping[str, Shape],
    dtype: Dtype,
    strides: Index | None = None,
) -> None:
    """Writes parameters into a manifest: a buffer each, and a piece for every part.

    An empty shard leaves no trace, nor does one that is all padding of a flattened parameter.

    Args:
        builder: The manifest in the making.
        parameters: What this rank holds.
        shapes: Shapes of the canonical tensors by name.
        dtype: Type of the elements in memory, where a parameter has none of its own.
        strides: Strides of the memory in elements; None: dense, row-major.
    """
    for parameter in parameters:
        window = parameter.window
        if 0 in parameter.shape or (window is not None and not parameter.parts):
            continue
        stride = dense_strides(parameter.shape) if strides is None else strides
        # The buffer starts at the first element and ends with the last one, whatever lies between.
        start, numel = 0, 1 + sum((n - 1) * s for n, s in zip(parameter.shape, stride, strict=True))
        if window is not None:
            start, numel = window
        own = parameter.dtype
        builder.buffer(parameter.name, dtype if own is None else own, numel)
        for part in parameter.parts:
            builder.tensor(part.tensor, shapes[part.tensor])
            builder.piece(
                part.tensor,
                parameter.name,
                lo=part.lo,
                n=part.n,
                step=part.step,
                offset=_offset(part.at, stride) - start,
                stride=tuple(j * stride[a] for j, a in zip(part.jump, part.axes, strict=True)),
            )
        for lo, n in parameter.zeros:
            builder.constant(parameter.name, offset=_offset(lo, stride), n=n, stride=stride, fill=0)


def _offset(at: Index, stride: Index) -> int:
    return sum(a * s for a, s in zip(at, stride, strict=True))
