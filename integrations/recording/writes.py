"""Values of a recording: what was written where, and what a parameter holds in the end."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = [
    "Copy",
    "Dim",
    "Fill",
    "Index",
    "Recorded",
    "RecordedPiece",
    "Storage",
    "Write",
    "dense",
    "digits_of",
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
    """A box of memory that holds a constant: `offset + stride . i`, in elements."""

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


@dataclass(frozen=True, slots=True)
class Write:
    """A region of a storage that was written, and what came there at that time.

    Args:
        offset: First element.
        dims: Elements and distance of neighbours, per dim of the region.
        pieces: Boxes of canonical tensors in it.
        fills: Constants in it. Neither these nor pieces: values that nobody knows.
    """

    offset: int
    dims: tuple[tuple[int, int], ...]
    pieces: tuple[RecordedPiece, ...] = ()
    fills: tuple[Fill, ...] = ()

    @property
    def volume(self) -> int:
        """Elements of the region."""
        return math.prod(n for n, _ in self.dims)


@dataclass(eq=False)
class Storage:
    """A storage that was made while recording; `tensor` is set for canonical ones.

    `keep` holds the real one, so that its identity is not given to another. `is_loaded`: something
    was copied here that had been a weight before the loader overwrote it with a constant.
    `is_converted`: something that was copied here lost bits in a cast on its way, or was seen as
    another type.
    """

    shape: Index
    dtype: torch.dtype
    keep: Any
    tensor: str = ""
    background: float | None = None
    is_loaded: bool = False
    is_converted: bool = False
    writes: list[Write] = field(default_factory=list)

    @property
    def numel(self) -> int:
        """Elements of it."""
        return math.prod(self.shape)

    @property
    def holds_weights(self) -> bool:
        """Whether it is a canonical tensor, or something of one was copied here."""
        return bool(self.tensor) or any(write.pieces for write in self.writes)


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
