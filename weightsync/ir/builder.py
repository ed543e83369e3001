"""ManifestBuilder: declare one rank's tensors, buffers and pieces, get a Manifest."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from weightsync.errors import LayoutError
from weightsync.ir.dtypes import Dtype, fill_code
from weightsync.ir.manifest import BufferTable, Manifest, Side, TensorTable
from weightsync.ir.pieces import CONSTANT, PieceTable, sorted_pieces
from weightsync.ir.recipes import RECIPES, EncodingTable, recipe_named
from weightsync.ir.tables import MAX_DIMS, front_pad

__all__ = ["ManifestBuilder"]

_Ints = Sequence[int]


class ManifestBuilder:
    """Collects one rank's manifest; the order of the calls does not matter to the result.

    Args:
        side: "source" or "sink".
        label: Name of the rank in messages, e.g. "source 3".

    Cost: a few microseconds a call; `build` is vectorised.
    """

    def __init__(self, side: Side, label: str) -> None:
        self._side: Side = side
        self._label = label
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._buffers: dict[str, tuple[Dtype, int]] = {}
        self._encodings: dict[str, tuple[int, str, str]] = {}
        # (tensor or "", buffer, lo, n, step, offset, stride, fill); tuples not yet padded
        self._pieces: list[
            tuple[
                str,
                str,
                tuple[int, ...],
                tuple[int, ...],
                tuple[int, ...],
                int,
                tuple[int, ...],
                float,
            ]
        ] = []

    def tensor(self, name: str, shape: _Ints) -> None:
        """Declare a canonical tensor by its unsharded shape; () counts as (1,).

        A rank that holds nothing of a tensor (an empty shard) may declare it without pieces.

        Raises:
            LayoutError: Declared before with another shape, or over four dims.
        """
        dims = tuple(int(s) for s in shape) or (1,)
        if not name or len(dims) > MAX_DIMS:
            raise self._error(
                f"tensor {name!r} of shape {dims}: 1..{MAX_DIMS} dims and a name needed"
            )
        if self._shapes.setdefault(name, dims) != dims:
            raise self._error(f"tensor {name} declared with {self._shapes[name]} and {dims}", name)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that were declared."""
        return tuple(self._shapes)

    def buffer(self, name: str, dtype: Dtype | str, numel: int) -> None:
        """Declare one block of memory of this rank.

        Raises:
            LayoutError: A buffer of that name exists.
            ConfigError: No such dtype.
        """
        if not name or name in self._buffers:
            raise self._error(f"buffer {name!r} is declared twice or has no name")
        self._buffers[name] = (Dtype.parse(dtype), int(numel))

    def piece(
        self,
        tensor: str,
        buffer: str,
        *,
        lo: _Ints,
        n: _Ints,
        step: _Ints | None = None,
        offset: int,
        stride: _Ints,
    ) -> None:
        """Declare that tensor element `lo + step*i` lives at buffer element `offset + stride.i`.

        Args:
            tensor: Declared name.
            buffer: Declared name.
            lo: First element, one int per tensor dim.
            n: Elements per tensor dim; a piece with an n of 0 is ignored.
            step: Tensor elements from one to the next, per tensor dim; None: 1.
            offset: Buffer element of `lo`.
            stride: Buffer elements from one to the next, per tensor dim.

        Raises:
            LayoutError: Unknown name or wrong number of dims.
        """
        dims = self._dims(tensor, buffer)
        step = (1,) * len(dims) if step is None else step
        if not len(lo) == len(n) == len(step) == len(stride) == len(dims):
            raise self._error(
                f"piece of {tensor}: lo, n, step, stride need {len(dims)} dims", tensor
            )
        if 0 in n:
            return
        step = tuple(1 if k == 1 else int(s) for k, s in zip(n, step, strict=True))
        stride = tuple(0 if k == 1 else int(s) for k, s in zip(n, stride, strict=True))
        self._pieces.append(
            (
                tensor,
                buffer,
                tuple(map(int, lo)),
                tuple(map(int, n)),
                step,
                int(offset),
                stride,
                0.0,
            )
        )

    def place(
        self,
        tensor: str,
        buffer: str,
        shape: _Ints,
        *,
        at: _Ints | None = None,
        lo: _Ints | None = None,
        n: _Ints | None = None,
        step: _Ints | None = None,
        axes: _Ints | None = None,
        offset: int = 0,
    ) -> None:
        """Place a box of a tensor into a dense row-major view of a buffer.

        Args:
            tensor: Declared name.
            buffer: Declared name.
            shape: Shape of the view; may have more dims than the tensor if `axes` says where
                the tensor's dims go.
            at: Index in the view where the box begins; None: at its origin.
            lo: First element of the box; None: 0.
            n: Elements of the box per tensor dim; None: up to the end.
            step: Tensor elements from one to the next; None: 1.
            axes: For each tensor dim its dim of the view; None: in order.
            offset: Buffer element where the view begins.

        Raises:
            LayoutError: Unknown name, the box leaves the tensor or the view, or bad `axes`.
        """
        dims = self._dims(tensor, buffer)
        lo = (0,) * len(dims) if lo is None else lo
        step = (1,) * len(dims) if step is None else step
        if n is None:
            n = [-(-(d - a) // s) for d, a, s in zip(dims, lo, step, strict=True)]
        axes = range(len(dims)) if axes is None else axes
        at = (0,) * len(shape) if at is None else at
        if (
            len(set(axes)) != len(dims)
            or len(at) != len(shape)
            or not all(0 <= a < len(shape) for a in axes)
            or (len(axes) == len(dims) and len(shape) > len(dims) and axes == range(len(dims)))
        ):
            raise self._error(
                f"place of {tensor}: {len(dims)} tensor dims do not map onto a view of shape "
                f"{tuple(shape)} with at {tuple(at)} and axes {tuple(axes)}",
                tensor,
            )
        if any(not 0 <= a < max(s, 1) for a, s in zip(at, shape, strict=True)) or any(
            at[axis] + k > shape[axis] for axis, k in zip(axes, n, strict=True)
        ):
            raise self._error(
                f"place of {tensor}: {tuple(n)} elements at {tuple(at)} leave the view of "
                f"shape {tuple(shape)}",
                tensor,
            )
        strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
        start = offset + sum(a * s for a, s in zip(at, strides, strict=True))
        self.piece(
            tensor, buffer, lo=lo, n=n, step=step, offset=start, stride=[strides[a] for a in axes]
        )

    def encode(self, recipe: str, values: str, codes: str, scales: str) -> None:
        """Declare that two tensors are codes and scales of a third; all must be declared.

        Args:
            recipe: Name of the recipe.
            values: Canonical tensor of the BF16 checkpoint; a sink needs no piece of it.
            codes: Tensor that stands in its place; may have the same name.
            scales: Tensor of the cells' scales.

        Raises:
            LayoutError: Codes that were declared before, or a source.
            ConfigError: No such recipe.
        """
        if self._side != "sink" or codes in self._encodings:
            raise self._error(f"encoding of {codes}: declared twice, or on a source", codes)
        self._encodings[codes] = (RECIPES.index(recipe_named(recipe)), values, scales)

    def constant(self, buffer: str, offset: int, n: _Ints, stride: _Ints, fill: float) -> None:
        """Declare buffer elements `offset + stride.i` that hold a constant (padding).

        Raises:
            LayoutError: Unknown buffer, a source, or wrong number of dims.
            EncodingError: The buffer's dtype cannot hold `fill` exactly.
        """
        if buffer not in self._buffers or len(n) != len(stride) or len(n) > MAX_DIMS:
            raise self._error(f"constant in buffer {buffer!r}: unknown, or n and stride differ")
        if self._side != "sink":
            raise self._error(f"constant in buffer {buffer!r}: only sinks declare padding")
        fill_code(self._buffers[buffer][0], fill)
        if 0 not in n:
            strides = tuple(0 if k == 1 else int(s) for k, s in zip(n, stride, strict=True))
            ones = (1,) * len(n)
            zeros = (0,) * len(n)
            piece = ("", buffer, zeros, tuple(map(int, n)), ones, int(offset), strides, float(fill))
            self._pieces.append(piece)

    def build(self) -> Manifest:
        """Return the manifest; validates everything.

        Raises:
            LayoutError: See `Manifest`.
        """
        tensors = sorted(self._shapes)
        buffers = sorted(self._buffers)
        tensor_index = {name: i for i, name in enumerate(tensors)}
        tensor_index[""] = CONSTANT
        buffer_index = {name: i for i, name in enumerate(buffers)}
        columns = list(zip(*self._pieces, strict=True)) or [()] * 8
        pieces = PieceTable(
            tensor=np.array([tensor_index[t] for t in columns[0]], np.int32),
            buffer=np.array([buffer_index[b] for b in columns[1]], np.int32),
            lo=front_pad(columns[2], 0),
            n=front_pad(columns[3], 1),
            step=front_pad(columns[4], 1),
            offset=np.array(columns[5], np.int64),
            stride=front_pad(columns[6], 0),
            fill=np.array(columns[7], np.float64),
        )
        shapes = [self._shapes[name] for name in tensors]
        facts = [self._buffers[name] for name in buffers]
        return Manifest(
            side=self._side,
            ranks=(self._label,),
            tensors=TensorTable(
                tuple(tensors), front_pad(shapes, 1), np.array([len(s) for s in shapes], np.uint8)
            ),
            buffers=BufferTable(
                tuple(buffers),
                np.zeros(len(buffers), np.int32),
                np.array([dtype for dtype, _ in facts], np.uint8),
                np.array([numel for _, numel in facts], np.int64),
            ),
            pieces=sorted_pieces(pieces),
            encodings=self._encoding_table(tensor_index),
        )

    def _encoding_table(self, index: dict[str, int]) -> EncodingTable:
        rows = []
        for codes, (recipe, values, scales) in sorted(self._encodings.items()):
            for name in (values, codes, scales):
                if name not in self._shapes:
                    raise self._error(f"tensor {name} is encoded but not declared", name)
            rows.append((recipe, index[values], index[codes], index[scales]))
        columns = np.array(rows, np.int64).reshape(-1, 4).T
        names = EncodingTable.COLUMNS
        return EncodingTable(
            **{
                name: column.astype(dtype)
                for (name, (dtype, _)), column in zip(names.items(), columns, strict=True)
            }
        )

    def _dims(self, tensor: str, buffer: str) -> tuple[int, ...]:
        """Return the shape of a declared tensor; both names must be declared."""
        if tensor not in self._shapes or buffer not in self._buffers:
            missing = f"tensor {tensor}" if tensor not in self._shapes else f"buffer {buffer}"
            raise self._error(f"{missing} is used but not declared", tensor)
        return self._shapes[tensor]

    def _error(self, message: str, tensor: str | None = None) -> LayoutError:
        return LayoutError(
            f"{self._label}: {message}", tensor=tensor, rank=self._label, side=self._side
        )
