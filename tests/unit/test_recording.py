"""Recording what a loader copies where: random loaders, run on real tensors as the oracle."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st
from torch import Tensor

from weightsync.errors import LayoutError
from weightsync.integrations.recording import Recorded, Recorder

Shape = tuple[int, ...]
Op = Callable[[Tensor], Tensor]
# A loader takes canonical tensors and makes the parameter; the same one runs on both kinds.
Loader = Callable[[list[Tensor], str], Tensor]

FILL = 7.0
SPLITS = {2: (1, 2), 3: (1, 3), 4: (2, 2), 6: (2, 3), 8: (2, 4), 9: (3, 3), 12: (3, 4)}


@st.composite
def views(draw: st.DrawFn, shape: Shape) -> tuple[str, Op]:
    """A view or a copy of a tensor of some shape, with its name for the failure's message."""
    ndim = len(shape)
    dim = draw(st.integers(0, ndim - 1))
    size = shape[dim]
    kinds = ["narrow", "permute", "every", "unsqueeze", "clone", "contiguous", "flat", "repeat"]
    kind = draw(st.sampled_from([*kinds, "select", "split", "join", "doubled", "rolled"]))
    if kind == "narrow":
        start = draw(st.integers(0, size - 1))
        count = draw(st.integers(1, size - start))
        return f"narrow({dim}, {start}, {count})", lambda t: t.narrow(dim, start, count)
    if kind == "permute":
        order = draw(st.permutations(range(ndim)))
        return f"permute({order})", lambda t: t.permute(*order)
    if kind == "every":
        start, step = draw(st.integers(0, size - 1)), draw(st.integers(1, 3))
        box = (slice(None),) * dim + (slice(start, None, step),)
        return f"[{dim}: {start}::{step}]", lambda t: t[box]
    if kind == "unsqueeze" and ndim < 4:
        return f"unsqueeze({dim})", lambda t: t.unsqueeze(dim)
    if kind == "clone":
        return "clone()", lambda t: t.clone()
    if kind == "contiguous":
        return "contiguous()", lambda t: t.contiguous()
    if kind == "flat":
        return "reshape(-1)", lambda t: t.reshape(-1)
    if kind == "repeat":
        times = draw(st.integers(2, 3))
        return f"repeat_interleave({times}, {dim})", lambda t: t.repeat_interleave(times, dim)
    if kind == "select" and ndim > 1:
        at = draw(st.integers(0, size - 1))
        return f"select({dim}, {at})", lambda t: t.select(dim, at)
    if kind == "split" and size in SPLITS and ndim < 4:
        split = SPLITS[size]
        made = (*shape[:dim], *split, *shape[dim + 1 :])
        return f"reshape({made})", lambda t: t.reshape(made)
    if kind == "join" and ndim > 1 and dim < ndim - 1:
        joined = (*shape[:dim], shape[dim] * shape[dim + 1], *shape[dim + 2 :])
        return f"reshape({joined})", lambda t: t.reshape(joined)
    if kind == "doubled":
        return f"cat({dim})", lambda t: torch.cat([t, t], dim)
    if kind == "rolled" and size > 1:
        # What a loader does that puts one half before the other.
        at = draw(st.integers(1, size - 1))
        return f"swapped({dim}, {at})", lambda t: torch.cat(
            [t.narrow(dim, at, size - at), t.narrow(dim, 0, at)], dim
        )
    return "view", lambda t: t


@st.composite
def loaders(draw: st.DrawFn) -> tuple[list[Shape], str, Loader]:
    """Canonical shapes, what the loader does, and the loader."""
    sides = st.integers(1, 6)
    shapes = draw(
        st.lists(st.lists(sides, min_size=1, max_size=3).map(tuple), min_size=1, max_size=2)
    )
    chains: list[list[Op]] = []
    names: list[str] = []
    ends: list[Tensor] = []
    for shape in shapes:
        chain: list[Op] = []
        now = torch.empty(shape)
        for _ in range(draw(st.integers(0, 4))):
            name, op = draw(views(tuple(now.shape)))
            if op(now).numel() > 300 or op(now).ndim > 4:
                continue
            now = op(now)
            chain.append(op)
            names.append(name)
        names.append(";")
        chains.append(chain)
        ends.append(now)
    margin = draw(st.integers(0, 2))
    is_stacked = len(ends) == 2 and ends[0].shape == ends[1].shape and draw(st.booleans())
    whole = draw(st.booleans())

    def load(tensors: list[Tensor], device: str) -> Tensor:
        found = []
        for chain, tensor in zip(chains, tensors, strict=True):
            for op in chain:
                tensor = op(tensor)
            found.append(tensor)
        if is_stacked:
            found = [torch.stack(found)]
        if whole:
            # Every result behind the other in one flat parameter, with a margin behind.
            flat = [tensor.reshape(-1) for tensor in found]
            made = torch.full((sum(t.numel() for t in flat) + margin,), FILL, device=device)
            start = 0
            for tensor in flat:
                made[start : start + tensor.numel()].copy_(tensor)
                start += tensor.numel()
            return made
        shape = tuple(size + margin for size in found[0].shape)
        made = torch.full(shape, FILL, device=device)
        made[tuple(slice(0, size) for size in found[0].shape)].copy_(found[0])
        return made

    return shapes, " ".join(names), load


def numbered(shapes: list[Shape]) -> list[Tensor]:
    """Real tensors whose elements all differ, from 1000 on."""
    start, made = 1000, []
    for shape in shapes:
        count = int(np.prod(shape))
        made.append(torch.arange(start, start + count, dtype=torch.float32).reshape(shape))
        start += count
    return made


def record(shapes: list[Shape], load: Loader) -> Recorded:
    with Recorder() as recorder:
        sources = [recorder.source(f"t{i}", s, torch.float32) for i, s in enumerate(shapes)]
        return recorder.recorded(load(sources, "meta"))


def replayed(recorded: Recorded, tensors: list[Tensor]) -> Tensor:
    """A parameter as a recording describes it; every element is described once."""
    numel = int(np.prod(recorded.shape))
    memory, times = torch.zeros(numel), torch.zeros(numel)
    for piece in recorded.pieces:
        box = tuple(
            slice(lo, lo + step * (n - 1) + 1, step)
            for lo, n, step in zip(piece.lo, piece.n, piece.step, strict=True)
        )
        source = tensors[int(piece.tensor.removeprefix("t"))][box]
        memory.as_strided(piece.n, piece.stride, piece.offset).copy_(source)
        times.as_strided(piece.n, piece.stride, piece.offset).add_(1)
    for fill in recorded.fills:
        memory.as_strided(fill.n, fill.stride, fill.offset).fill_(fill.value)
        times.as_strided(fill.n, fill.stride, fill.offset).add_(1)
    assert times.eq(1).all()
    return memory.reshape(recorded.shape)


@given(loaders())
def test_a_recording_is_what_the_loader_does(case: tuple[list[Shape], str, Loader]) -> None:
    shapes, _, load = case
    tensors = numbered(shapes)
    expected = load([tensor.clone() for tensor in tensors], "cpu")
    try:
        recorded = record(shapes, load)
    except LayoutError as error:
        if "leaves gaps" in str(error):
            reject()  # padding around what is interleaved: refused, never guessed
        raise
    assert recorded.is_loaded
    assert recorded.dtype == torch.float32
    torch.testing.assert_close(replayed(recorded, tensors), expected, rtol=0, atol=0)


def one(load: Callable[[Tensor], Tensor], shape: Shape = (4, 6)) -> Recorded:
    return record([shape], lambda tensors, device: load(tensors[0]))


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    "compute",
    [
        pytest.param(lambda t: t + 1, id="add"),
        pytest.param(lambda t: t * 2, id="mul"),
        pytest.param(lambda t: t.abs(), id="abs"),
        pytest.param(lambda t: t.clone().neg(), id="of a copy"),
        pytest.param(lambda t: t.flip(0), id="flip"),
        pytest.param(lambda t: t.view(-1)[torch.tensor([3, 1])], id="gather"),
        pytest.param(lambda t: torch.where(t > 0, t, 0.0), id="where"),
        pytest.param(lambda t: t.mul_(2), id="in place"),
        pytest.param(lambda t: t.clone().add_(1), id="in place, of a copy"),
        pytest.param(lambda t: t.narrow(0, 1, 2).div_(4), id="in place, of a view"),
    ],
)
def test_computing_on_weights_is_refused_by_name(compute: Op) -> None:
    def load(weight: Tensor) -> Tensor:
        made = empty(*compute(weight).shape)
        made.copy_(compute(weight))
        return made

    with pytest.raises(LayoutError, match=r"computes aten.* on t0") as caught:
        one(load)
    assert caught.value.tensor == "t0"


def test_a_weight_has_no_value_to_ask_for() -> None:
    with pytest.raises(LayoutError, match=r"_local_scalar_dense.* on t0"):
        one(lambda weight: empty(int(weight[0, 0])))


@pytest.mark.parametrize(
    ("first", "second"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)],
)
def test_two_roundings_are_refused(first: torch.dtype, second: torch.dtype) -> None:
    def load(weight: Tensor) -> Tensor:
        made = empty(4, 6, dtype=second)
        made.copy_(weight.to(first))
        return made

    with pytest.raises(LayoutError, match="only one rounding"):
        one(load)


def test_one_rounding_and_exact_casts_are_recorded() -> None:
    def load(weight: Tensor) -> Tensor:
        made = empty(4, 6, dtype=torch.bfloat16)
        made.copy_(weight.to(torch.float64).clone())
        return made

    recorded = one(load)
    assert recorded.dtype == torch.bfloat16
    assert [piece.n for piece in recorded.pieces] == [(4, 6)]


def test_a_view_as_wider_elements_is_refused() -> None:
    def load(weight: Tensor) -> Tensor:
        made = empty(4, 12, dtype=torch.float16)
        made.copy_(weight.view(torch.float16))
        return made

    with pytest.raises(LayoutError, match="elements have another size"):
        one(load)


def test_a_view_as_other_elements_of_the_same_size_is_not() -> None:
    def load(tensors: list[Tensor], device: str) -> Tensor:
        made = torch.zeros(4, 6, dtype=torch.uint8, device=device)
        made.copy_(tensors[0].view(torch.uint8))
        return made

    with Recorder() as recorder:
        source = recorder.source("t0", (4, 6), torch.float8_e4m3fn)
        recorded = recorder.recorded(load([source], "meta"))
    assert [piece.n for piece in recorded.pieces] == [(4, 6)]


def test_a_loader_may_zero_what_it_was_given() -> None:
    """A bias that only the first tensor-parallel rank adds."""

    def load(weight: Tensor) -> Tensor:
        made = empty(4, 6)
        weight.zero_()
        made.copy_(weight)
        return made

    recorded = one(load)
    assert recorded.is_loaded
    assert recorded.pieces == ()
    assert [(fill.n, fill.value) for fill in recorded.fills] == [((4, 6), 0.0)]


def test_zeroing_travels_through_copies() -> None:
    def load(weight: Tensor) -> Tensor:
        made = empty(5, 6)
        made.fill_(3)
        weight.zero_()
        made[:4].copy_(weight.clone())
        return made

    recorded = one(load)
    assert recorded.is_loaded
    assert recorded.pieces == ()
    values = replayed(recorded, [])
    assert values[:4].eq(0).all()
    assert values[4].eq(3).all()


def test_zeroing_a_part_of_what_was_given_is_refused() -> None:
    def load(weight: Tensor) -> Tensor:
        made = empty(4, 6)
        weight[1:].zero_()
        made.copy_(weight)
        return made

    with pytest.raises(LayoutError, match="a part of t0 with a constant"):
        one(load)


def test_a_rank_without_a_share_is_loaded_all_the_same() -> None:
    """The last ranks of padded shards get nothing: their parameter is what it was made as."""

    def load(weight: Tensor) -> Tensor:
        made = torch.zeros(4, 6, device="meta")
        made[:, :0].copy_(weight[:, 6:])
        return made

    recorded = one(load)
    assert recorded.is_loaded
    assert recorded.pieces == ()
    assert [fill.value for fill in recorded.fills] == [0.0]


def test_a_buffer_that_is_used_again_is_what_it_was_when_it_was_read() -> None:
    with Recorder() as recorder, torch.device("meta"):
        weights = [recorder.source(name, (4, 3), torch.float32) for name in "ab"]
        buffer = torch.empty(4, 3)
        parameters = [torch.empty(4, 3), torch.empty(4, 3)]
        for weight, parameter in zip(weights, parameters, strict=True):
            buffer.copy_(weight)
            parameter.copy_(buffer)
    found = [recorder.recorded(parameter) for parameter in parameters]
    assert [[piece.tensor for piece in one.pieces] for one in found] == [["a"], ["b"]]


def test_a_weight_that_is_zeroed_after_it_was_read_was_a_weight() -> None:
    with Recorder() as recorder, torch.device("meta"):
        weight = recorder.source("w", (4, 3), torch.float32)
        before, after = torch.empty(4, 3), torch.empty(4, 3)
        before.copy_(weight)
        weight.zero_()
        after.copy_(weight)
    assert [piece.tensor for piece in recorder.recorded(before).pieces] == ["w"]
    assert [fill.value for fill in recorder.recorded(after).fills] == [0.0]


def test_constants_of_a_buffer_travel_with_its_weights() -> None:
    with Recorder() as recorder, torch.device("meta"):
        weight = recorder.source("w", (4, 3), torch.float32)
        buffer = torch.full((6, 3), 2.0)
        buffer[1:5].copy_(weight)
        parameter = torch.empty(3, 6)
        parameter.copy_(buffer.t())
    found = recorder.recorded(parameter)
    assert [(piece.lo, piece.n, piece.offset) for piece in found.pieces] == [((0, 0), (4, 3), 1)]
    assert sorted((fill.offset, fill.n, fill.value) for fill in found.fills) == [
        (0, (3, 1), 2.0),
        (5, (3, 1), 2.0),
    ]


def test_two_roundings_are_refused_across_copies() -> None:
    with Recorder() as recorder, torch.device("meta"):
        weight = recorder.source("w", (4,), torch.bfloat16)
        again = weight.to(torch.float16).clone()
        same, wider = torch.empty(4, dtype=torch.float16), torch.empty(4)
        same.copy_(again)
        with pytest.raises(LayoutError, match="one rounding"):
            wider.copy_(again)
    assert recorder.recorded(same).is_loaded


def test_a_cast_of_a_view_is_refused() -> None:
    def load(weight: Tensor) -> Tensor:
        made = empty(4, 6)
        made.view(torch.int32).copy_(weight)
        return made

    with pytest.raises(LayoutError, match="a view, to"):
        one(load)


def test_a_copy_of_bits_and_back_is_refused() -> None:
    def load(weight: Tensor) -> Tensor:
        bits = empty(4, 6, dtype=torch.int32)
        bits.copy_(weight.view(torch.int32))
        made = empty(4, 6)
        made.copy_(bits)
        return made

    with pytest.raises(LayoutError, match="only one rounding"):
        one(load)


def test_the_second_result_of_an_operation_on_weights_is_refused() -> None:
    def load(weight: Tensor) -> Tensor:
        made = empty(4, 6)
        made.copy_(torch.frexp(weight).mantissa)
        return made

    with pytest.raises(LayoutError, match="frexp"):
        one(load)


def test_a_later_write_of_the_same_region_hides_an_earlier_one() -> None:
    def load(tensors: list[Tensor], device: str) -> Tensor:
        made = torch.zeros(4, 6, device=device)
        made[1:3].copy_(tensors[0])
        made[1:3].copy_(tensors[1])
        return made

    recorded = record([(2, 6), (2, 6)], load)
    assert {piece.tensor for piece in recorded.pieces} == {"t1"}


def test_a_constant_over_all_of_it_hides_what_was_copied() -> None:
    def load(weight: Tensor) -> Tensor:
        made = empty(4, 6)
        made[1:].copy_(weight[1:])
        made.zero_()
        made[:2].copy_(weight[:2])
        return made

    recorded = one(load)
    assert [(piece.lo, piece.n) for piece in recorded.pieces] == [((0, 0), (2, 6))]
    assert [(fill.offset, fill.n) for fill in recorded.fills] == [(12, (2, 6))]


def test_a_constant_over_a_part_of_what_was_copied_is_refused() -> None:
    def load(weight: Tensor) -> Tensor:
        made = empty(4, 6)
        made.copy_(weight)
        made[:, 5:].zero_()
        return made

    with pytest.raises(LayoutError, match="overwrites a part of t0"):
        one(load)


def test_constants_beside_each_other_are_told_apart() -> None:
    def load(tensors: list[Tensor], device: str) -> Tensor:
        made = torch.zeros(6, 8, device=device)
        made[:, 6:].fill_(1)
        made[4:, :6].fill_(2)
        made[:3, :6].copy_(tensors[0])
        return made

    tensors = numbered([(3, 6)])
    recorded = record([(3, 6)], load)
    torch.testing.assert_close(replayed(recorded, tensors), load(tensors, "cpu"))


def test_what_no_weight_reaches_is_told() -> None:
    with Recorder() as recorder:
        recorder.source("t0", (4,), torch.float32)
        scale = recorder.recorded(torch.ones(3, device="meta"))
        garbage = recorder.recorded(empty(3))
    assert (scale.is_loaded, [fill.value for fill in scale.fills]) == (False, [1.0])
    assert (garbage.is_loaded, garbage.fills) == (False, ())


def test_a_parameter_from_outside_is_refused() -> None:
    outside = empty(4, 6)
    with Recorder() as recorder:
        source = recorder.source("t0", (4, 6), torch.float32)
        with pytest.raises(LayoutError, match="copies t0 into memory that was not made"):
            outside.copy_(source)


def test_scattering_without_end_is_refused() -> None:
    def load(weight: Tensor) -> Tensor:
        made = empty(100, 100)
        made.copy_(weight.expand(100, 100))
        made.view(-1)[:5000].copy_(weight.view(1).expand(5000))
        return made

    with pytest.raises(LayoutError, match="more than 4096 pieces"):
        one(load, (1, 1))
