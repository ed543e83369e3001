"""Recipes: how a sink stores the codes and scales of a tensor, as maps between element numbers.

An encoded tensor is three canonical tensors: the `values` of the BF16 checkpoint, the `codes` that
stand in their place and the `scales` of their cells. Element `i` of a dim of codes or scales begins
at element `per * i` of one dim of the values, so what a source holds of the values says which codes
it can make and which cells begin in its memory: again pieces. A source that holds codes and scales
itself is not encoded; its bytes are copied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from weightsync.errors import ConfigError, LayoutError
from weightsync.ir.dtypes import Dtype
from weightsync.ir.pieces import PieceTable, intersect_progressions
from weightsync.ir.tables import (
    MAX_DIMS,
    BoolArray,
    IntArray,
    Table,
    all_dims,
    front_pad,
    unique_rows,
)

if TYPE_CHECKING:
    from weightsync.ir.manifest import TensorTable

__all__ = ["RECIPES", "EncodingTable", "Recipe", "check_encodings", "coarsened", "recipe_named"]

Map = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One way to store a tensor.

    Attributes:
        name: As users write it.
        codes, scales: For each of their dims the dim of the values that it follows, and how many
            values lie between two of its elements. A dim of values that two dims of codes follow is
            cut into whole cells by the first, which the second counts inside.
        codes_dtype, scales_dtype: As the sink stores them.
        cell: Values that share a scale, per dim of the values.
    """

    name: str
    codes: Map
    scales: Map
    codes_dtype: Dtype
    scales_dtype: Dtype
    cell: tuple[int, ...]

    @property
    def codes_cell(self) -> tuple[int, ...]:
        """Elements of codes that share a scale, per dim of the codes."""
        first: dict[int, int] = {}
        cell = []
        for dim, per in self.codes:
            # A second dim of the same values counts inside the cell that the first has cut.
            cell.append(first[dim] // per if dim in first else max(self.cell[dim] // per, 1))
            first.setdefault(dim, per)
        return tuple(cell)

    def shapes(self, values: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of codes and scales for a shape of values.

        Raises:
            LayoutError: The values have another number of dims, or do not fill whole cells where
                codes need them.
        """
        if len(values) != len(self.cell):
            raise LayoutError(
                f"recipe {self.name} is for tensors of {len(self.cell)} dims, not of shape "
                f"{tuple(values)}"
            )
        found = []
        for dims in (self.codes, self.scales):
            followed: dict[int, int] = {}
            shape = []
            for dim, per in dims:
                if dim in followed:
                    shape.append(followed[dim] // per)
                    continue
                if sum(d == dim for d, _ in dims) > 1 and values[dim] % per:
                    raise LayoutError(
                        f"recipe {self.name} needs a multiple of {per} along dim {dim}, not "
                        f"{values[dim]} of shape {tuple(values)}"
                    )
                followed[dim] = per
                shape.append(-(-values[dim] // per))
            found.append(tuple(shape))
        return found[0], found[1]


RECIPES: Final = (
    # DeepSeek-V3 (arXiv 2412.19437, section 3.3.2): one scale for each block of 128 x 128.
    Recipe(
        "fp8_block", ((0, 1), (1, 1)), ((0, 128), (1, 128)), Dtype.F8_E4M3, Dtype.F32, (128, 128)
    ),
    # OCP Microscaling Formats 1.0 as gpt-oss stores experts: 32 values along the depth share a
    # scale, two codes lie in a byte, and codes are transposed against the values.
    Recipe(
        "mxfp4",
        ((0, 1), (2, 1), (1, 32), (1, 2)),
        ((0, 1), (2, 1), (1, 32)),
        Dtype.U8,
        Dtype.U8,
        (1, 32, 1),
    ),
)


def recipe_named(name: str) -> Recipe:
    """Return a recipe by its name.

    Raises:
        ConfigError: There is none.
    """
    for recipe in RECIPES:
        if recipe.name == name:
            return recipe
    known = ", ".join(recipe.name for recipe in RECIPES)
    raise ConfigError(f"no encoding is named {name!r}; known: {known}", encoding=name)


@dataclasses.dataclass(frozen=True, eq=False)
class EncodingTable(Table):
    """Encoded tensors of a sink, sorted by codes.

    Attributes:
        recipe: Index into `RECIPES`.
        values, codes, scales: Indices into the manifest's tensors; `values` may equal `codes`.
    """

    recipe: NDArray[np.uint8]
    values: NDArray[np.int32]
    codes: NDArray[np.int32]
    scales: NDArray[np.int32]

    COLUMNS: ClassVar[dict[str, tuple[Any, int]]] = {
        "recipe": (np.uint8, 0),
        "values": (np.int32, 0),
        "codes": (np.int32, 0),
        "scales": (np.int32, 0),
    }


def check_encodings(table: EncodingTable, tensors: TensorTable) -> None:
    """Check that encodings are sorted, known, and of tensors whose shapes fit.

    Raises:
        LayoutError: They are not.
    """
    if not len(table):
        return
    numbers = np.stack([table.values, table.codes, table.scales])
    if (
        (table.recipe >= len(RECIPES)).any()
        or (numbers < 0).any()
        or (numbers >= len(tensors)).any()
        or (np.diff(table.codes) <= 0).any()
        or len(np.unique(table.scales)) != len(table)
        or np.isin(table.scales, table.codes).any()
    ):
        raise LayoutError("encodings are of unknown recipes or tensors, not sorted, or overlap")
    # Tensors alike are checked once.
    columns: list[NDArray[Any]] = [table.recipe, tensors.ndim[table.values]]
    columns += [tensors.shape[number] for number in numbers]
    first, _ = unique_rows(columns)
    for row in first.tolist():
        values, codes, scales = numbers[:, row].tolist()
        recipe = RECIPES[int(table.recipe[row])]
        shape = tensors.shape[values, MAX_DIMS - int(tensors.ndim[values]) :].tolist()
        wanted = front_pad(recipe.shapes(shape), 1)
        for number, made in zip((codes, scales), wanted, strict=True):
            if not np.array_equal(tensors.shape[number], made):
                raise LayoutError(
                    f"tensor {tensors.names[number]} has shape {tensors.shape[number].tolist()}, "
                    f"but {recipe.name} of {tensors.names[values]} makes {made.tolist()} (shapes "
                    "padded with 1 in front)",
                    tensor=tensors.names[number],
                )


def coarsened(
    pieces: PieceTable, dims: Map, shape: IntArray, tensor: IntArray
) -> tuple[PieceTable, BoolArray]:
    """Map pieces of values to pieces of the codes or scales whose cells begin inside them.

    Args:
        pieces: Pieces of values of one number of dims, `(P,)`.
        dims: `Recipe.codes` or `Recipe.scales`.
        shape: Shape of the tensor that the result is of, per piece, `(P, 4)`.
        tensor: Its number, per piece, `(P,)`.

    Returns:
        The pieces (where one of the result's elements begins in each), and which of `pieces` have
        whole cells only: others can not make codes of which several lie in an element.
    """
    num_values = max(d for d, _ in dims) + 1
    front = MAX_DIMS - num_values
    rows = len(pieces)
    lo, stride = np.zeros((rows, MAX_DIMS), np.int64), np.zeros((rows, MAX_DIMS), np.int64)
    n, step = np.ones((rows, MAX_DIMS), np.int64), np.ones((rows, MAX_DIMS), np.int64)
    offset = pieces.offset.copy()
    whole = np.ones(rows, np.bool_)
    per_of: dict[int, int] = {}
    for position, (dim, per) in enumerate(dims, MAX_DIMS - len(dims)):
        source = front + dim
        if dim in per_of:  # counts inside the cells that an earlier dim has cut
            outer = per_of[dim]
            n[:, position] = outer // per
            stride[:, position] = per * pieces.stride[:, source]
            held = (pieces.lo[:, source] % outer == 0) & (pieces.n[:, source] % outer == 0)
            whole &= held & ((pieces.step[:, source] == 1) | (pieces.n[:, source] == 1))
            continue
        per_of[dim] = per
        starts = np.zeros(rows, np.int64)
        held_lo, held_step = pieces.lo[:, source], pieces.step[:, source]
        at, count, jump = intersect_progressions(
            held_lo,
            pieces.n[:, source],
            held_step,
            starts,
            np.maximum(shape[:, position], 1),
            np.full(rows, per),
        )
        lo[:, position] = at // per
        n[:, position] = count
        step[:, position] = np.where(count > 1, jump // per, 1)
        offset += np.where(count > 0, (at - held_lo) // held_step * pieces.stride[:, source], 0)
        stride[:, position] = np.where(count > 1, jump // held_step * pieces.stride[:, source], 0)
    stride = np.where(n > 1, stride, 0)
    made = PieceTable(
        tensor=tensor.astype(np.int32),
        buffer=pieces.buffer,
        lo=lo,
        n=n,
        step=step,
        offset=offset,
        stride=stride,
        fill=np.zeros(rows),
    )
    return made.take(all_dims(n > 0)), whole
