"""What placements mean, against torch's own splitting of a tensor of element numbers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard

from weightsync.live.placements import Cut, readings


def elements(ranges: Sequence[tuple[int, int]]) -> list[int]:
    return [element for start, stop in ranges for element in range(start, stop)]


def split_by_torch(size: int, cuts: Sequence[Cut]) -> list[int]:
    """As `distribute_tensor` does it: axis by axis, in the order of the mesh."""
    found = torch.arange(size)
    for cut in cuts:
        placement = Shard(0) if cut.factor == 1 else _StridedShard(0, split_factor=cut.factor)
        parts, _ = placement._split_tensor(found, cut.num_chunks, with_padding=False)
        found = parts[cut.coordinate]
    return found.tolist()


def chunk(tensor: Tensor, num_chunks: int, index: int) -> Tensor:
    chunks = tensor.chunk(num_chunks)
    return chunks[index] if index < len(chunks) else tensor[:0]


@st.composite
def some_cuts(draw: st.DrawFn) -> list[Cut]:
    cuts = []
    for _ in range(draw(st.integers(0, 3))):
        num_chunks = draw(st.integers(1, 5))
        cuts.append(Cut(num_chunks, draw(st.integers(0, num_chunks - 1)), draw(st.integers(1, 6))))
    return cuts


@given(st.integers(0, 60), some_cuts())
@settings(max_examples=300, deadline=None)
def test_the_first_reading_is_what_distribute_tensor_does(size: int, cuts: list[Cut]) -> None:
    assert elements(readings(size, cuts)[0]) == split_by_torch(size, cuts)


@given(st.integers(0, 60), st.lists(st.integers(1, 4), min_size=1, max_size=2), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_fsdp_over_other_axes_is_told_apart_by_size(
    size: int, model_axes: list[int], fsdp: int
) -> None:
    # FSDP2 cuts what the axes of the model left, and says so by a split factor in front.
    factor = torch.Size(model_axes).numel()
    for place in itertools.product(*(range(n) for n in model_axes), range(fsdp)):
        left = torch.arange(size)
        for num_chunks, index in zip(model_axes, place, strict=False):
            left = chunk(left, num_chunks, index)
        truth = chunk(left, fsdp, place[-1]).tolist()
        inner = [Cut(n, i) for n, i in zip(model_axes, place, strict=False)]
        found = readings(size, [Cut(fsdp, place[-1], factor), *inner])
        fitting = {ranges for ranges in found if len(elements(ranges)) == len(truth)}
        assert truth in [elements(ranges) for ranges in fitting]
        if len(model_axes) == 1:
            assert len(fitting) == 1


def test_ranges_are_as_few_as_possible() -> None:
    # Even cuts of FSDP2 over tensor parallelism are one range, whichever way they are read.
    assert readings(16, [Cut(2, 1, 2), Cut(2, 0)]) == [((4, 8),), ((4, 8),)]
    # Gate and up of a fused projection are two.
    assert readings(16, [Cut(4, 1, 2)]) == [((2, 4), (10, 12)), ((2, 4), (10, 12))]
    assert readings(0, [Cut(2, 0)])[0] == ()
