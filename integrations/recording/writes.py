"""Values of a recording: what was written where, and what a parameter holds in the end."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from weightsync.errors import LayoutError

__all__ = [
    "Copy",
    "Dim",
    "Fill",
    "Index",
    "Recorded",
    "RecordedPiece",
    "Region",
    "Storage",
    "dense",
    "digits_of",
    "whole_piece",
]

Index = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RecordedPiece:
    """A box of a canonical tensor and where the loader puts it.

    Args:
        tensor: Canonical name.
        lo: First element, one number per dim of the tensor.
        n: Elements per dim.
        step: Distance of neighbours per dim, in the tensor.
        offset: Element of the memory where the first one goes.
        stride: Distance of neighbours per dim, in elements of the memory; 0 where n is 1.
    """

    tensor: str
    lo: Index
    n: Index
    step: Index
    offset: int
    stride: Index

    @property
    def volume(self) -> int:
        """Elements of the box."""
        return math.prod(self.n)


@dataclass(frozen=True, slots=True)
class Fill:
    """A box of memory that holds a constant: `offset + stride . i`, in elements.

    A value of NaN stands for values that nobody knows; a `Recorded` has none of these.
    """

    offset: int
    n: Index
    stride: Index
    value: float


@dataclass(frozen=True, slots=True)
class Recorded:
    """What one parameter holds after loading.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        pieces: Boxes of canonical tensors, disjoint.
        fills: The other elements: what the loader or the constructor set them to. Elements that
            nobody sets, which hold whatever was in memory, count as zeros. Of a parameter that is
            not loaded only its one value, if it has one.
        is_loaded: Whether the loader wrote anything of it.
    """

    shape: Index
    dtype: torch.dtype
    pieces: tuple[RecordedPiece, ...]
    fills: tuple[Fill, ...]
    is_loaded: bool


@dataclass(frozen=True, slots=True)
class Dim:
    """One dim of a strided copy: so many elements, so far apart on either side."""

    n: int
    src: int
    dst: int


@dataclass(frozen=True, slots=True)
class Copy:
    """A strided copy from one storage into another."""

    dims: tuple[Dim, ...]
    src_offset: int
    dst_offset: int

    @property
    def region(self) -> Region:
        """What it writes."""
        return self.dst_offset, tuple((dim.n, dim.dst) for dim in self.dims)


Region = tuple[int, tuple[tuple[int, int], ...]]  # first element; elements and distance per dim


@dataclass(eq=False)
class Storage:
    """A storage that was made while recording, and what it holds so far.

    Args:
        shape: Of the tensor it was made for, in the order of memory.
        dtype: Of that tensor.
        keep: The real one, so that its identity is not given to another.
        is_loaded: It is a canonical tensor, or something of one was copied here.
        is_converted: Something that was copied here lost bits in a cast on its way, or was seen as
            another type.
        pieces: Boxes of canonical tensors, by the region that a write brought them to.
        fills: Constants, oldest first; weights lie over them.
    """

    shape: Index
    dtype: torch.dtype
    keep: Any
    is_loaded: bool = False
    is_converted: bool = False
    pieces: dict[Region, tuple[RecordedPiece, ...]] = field(default_factory=dict)
    fills: list[Fill] = field(default_factory=list)

    @property
    def numel(self) -> int:
        """Elements of it."""
        return math.prod(self.shape)

    @property
    def all_pieces(self) -> list[RecordedPiece]:
        """The canonical content. Pieces that overlap are found when the plan is proven."""
        return [piece for pieces in self.pieces.values() for piece in pieces]

    @property
    def is_whole(self) -> bool:
        """Whether it is one canonical tensor, as it was given to the loader."""
        pieces = self.all_pieces
        return len(pieces) == 1 and pieces[0] == whole_piece(pieces[0].tensor, self.shape)

    def put(
        self, region: Region, pieces: tuple[RecordedPiece, ...], fills: Iterable[Fill] = ()
    ) -> None:
        """Take in a write of a region; it hides earlier ones of the same region, or within it all.

        Raises:
            LayoutError: A constant falls on a part of what holds weights.
        """
        region = (region[0], tuple(sorted(region[1], key=lambda dim: dim[1])))
        self.pieces.pop(region, None)
        if math.prod(n for n, _ in region[1]) == self.numel:
            self.pieces.clear()
            self.fills.clear()
        for fill in fills:
            spot = (fill.offset, tuple(zip(fill.n, fill.stride, strict=True)))
            for other, hidden in self.pieces.items():
                if _meet(spot, other):
                    raise LayoutError(
                        f"the engine's loader overwrites a part of {hidden[0].tensor} with a "
                        "constant; this cannot be recorded",
                        tensor=hidden[0].tensor,
                    )
            self.fills.append(fill)
        if pieces:
            self.pieces[region] = pieces


def _meet(one: Region, other: Region) -> bool:
    """Whether two strided regions of a storage have an element in common."""
    start, end = max(one[0], other[0]), min(_last(one), _last(other))
    if start > end:
        return False
    one, other = (_clipped(region, start, end) for region in (one, other))
    first = min(one[0], other[0])
    taken = torch.zeros(max(_last(one), _last(other)) - first + 1, dtype=torch.bool, device="cpu")
    views = [
        taken.as_strided([n for n, _ in dims], [stride for _, stride in dims], offset - first)
        for offset, dims in (one, other)
    ]
    views[0].fill_(True)
    return bool(views[1].any())


def _last(region: Region) -> int:
    return region[0] + sum((n - 1) * stride for n, stride in region[1])


def _clipped(region: Region, start: int, end: int) -> Region:
    """What of a region may lie between two elements: fewer steps of its widest dim."""
    offset, dims = region
    if not dims:
        return region
    (n, stride), *inner = sorted(dims, key=lambda dim: -dim[1])
    if not stride:
        return region
    reach = sum((count - 1) * step for count, step in inner)
    first = min(n - 1, max(0, -(-(start - offset - reach) // stride)))
    last = max(first, min(n - 1, (end - offset) // stride))
    return offset + first * stride, ((last - first + 1, stride), *inner)


def whole_piece(tensor: str, shape: Index) -> RecordedPiece:
    """A canonical tensor in memory of its own."""
    ones = (1,) * len(shape)
    return RecordedPiece(tensor, (0,) * len(shape), shape, ones, 0, dense(shape))


def dense(shape: Index) -> Index:
    """Row-major strides of a shape, in elements."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def digits_of(offset: int, shape: Index) -> Index:
    """The index along each dim of an element that is so far from the first one."""
    found = []
    for stride in dense(shape):
        found.append(offset // stride)
        offset %= stride
    return tuple(found)
