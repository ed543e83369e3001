"""Whole loaders against the recorder: random programs, and tricks that real loaders play.

Every loader runs on real tensors as well. The recording must say what these hold in the end, or
refuse; a wrong one would put wrong weights into an engine without a sound.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weightsync.errors import LayoutError
from weightsync.integrations.recording import Recorded, Recorder

Loader = Callable[[dict[str, Tensor], str], Tensor]


def numbers(*shape: int, start: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(start, start + math.prod(shape)).reshape(shape).to(dtype)


def record(load: Loader, sources: dict[str, Tensor]) -> Recorded:
    with Recorder() as recorder, torch.device("meta"):
        given = {name: recorder.source(name, t.shape, t.dtype) for name, t in sources.items()}
        return recorder.recorded(load(given, "meta"))


def outcome(load: Loader, sources: dict[str, Tensor]) -> str:
    """`same`, `refused`, `twice` (some element, which a plan's proof refuses), or what is wrong."""
    want = load({name: t.clone() for name, t in sources.items()}, "cpu").contiguous()
    try:
        recorded = record(load, sources)
    except LayoutError:
        return "refused"
    if not recorded.is_loaded:
        return "not loaded"
    got = torch.full((want.numel(),), math.nan, dtype=torch.float64)
    count = torch.zeros(want.numel(), dtype=torch.int64)
    for fill in recorded.fills:
        got.as_strided(fill.n, fill.stride, fill.offset).fill_(fill.value)
        count.as_strided(fill.n, fill.stride, fill.offset).add_(1)
    for piece in recorded.pieces:
        ends = [
            lo + (n - 1) * s + 1 for lo, n, s in zip(piece.lo, piece.n, piece.step, strict=True)
        ]
        box = tuple(slice(a, b, s) for a, b, s in zip(piece.lo, ends, piece.step, strict=True))
        source = sources[piece.tensor].reshape(-1) if len(box) == 1 else sources[piece.tensor]
        got.as_strided(piece.n, piece.stride, piece.offset).copy_(source[box])
        count.as_strided(piece.n, piece.stride, piece.offset).add_(1)
    if bool((count > 1).any()):
        return "twice"
    # Elements that nobody set are NaN on the real side: whatever was in memory.
    right = (got.to(want.dtype) == want.flatten()) | want.flatten().isnan()
    return "same" if bool(right.all()) else f"wrong: {got.tolist()} instead of {want.tolist()}"


# ---- random programs ----

SHAPES = [(12,), (4, 6), (2, 3, 4), (8, 2), (24,), (1, 6), (6, 1)]


def some_view(rng: random.Random, tensor: Tensor) -> Tensor:
    for _ in range(rng.randint(0, 3)):
        if tensor.ndim == 0:
            break
        dim = rng.randrange(tensor.ndim)
        size = tensor.shape[dim]
        match rng.choice(["narrow", "narrow", "every", "permute", "select", "flat", "unsqueeze"]):
            case "narrow":
                start = rng.randrange(size)
                tensor = tensor.narrow(dim, start, rng.randint(1, size - start))
            case "every":
                box = (slice(None),) * dim + (slice(rng.randrange(size), None, rng.randint(1, 3)),)
                tensor = tensor[box]
            case "permute":
                tensor = tensor.permute(*rng.sample(range(tensor.ndim), tensor.ndim))
            case "select":
                tensor = tensor.select(dim, rng.randrange(size))
            case "flat" if tensor.is_contiguous():
                tensor = tensor.view(-1)
            case "unsqueeze" if tensor.ndim < 4:
                tensor = tensor.unsqueeze(dim)
    return tensor


def program(seed: int) -> Loader:
    """Makes buffers, copies parts of everything to parts of everything, in any order."""

    def load(sources: dict[str, Tensor], device: str) -> Tensor:
        rng = random.Random(seed)

        def new(value: float | None) -> Tensor:
            shape = rng.choice(SHAPES)
            if value is None and device == "meta":
                return torch.empty(shape, device=device)
            return torch.full(shape, math.nan if value is None else value, device=device)

        made = [new(rng.choice([None, 0.0, 7.0]))]
        for _ in range(rng.randint(2, 9)):
            everything = [*sources.values(), *made]
            match rng.choice(
                ["copy", "copy", "copy", "load", "load", "new", "clone", "cat", "fill"]
            ):
                case "copy" | "load" as step:
                    into = some_view(rng, made[0] if step == "load" else rng.choice(made))
                    for _ in range(25):
                        value = some_view(rng, rng.choice(everything))
                        is_other = value.untyped_storage()._cdata != into.untyped_storage()._cdata
                        if is_other and value.numel() == into.numel() and value.is_contiguous():
                            into.copy_(value.view(into.shape))
                            break
                        if is_other and value.shape == into.shape:
                            into.copy_(value)
                            break
                case "new":
                    made.append(new(rng.choice([None, 0.0, 5.0])))
                case "clone":
                    made.append(some_view(rng, rng.choice(everything)).clone())
                case "cat":
                    parts = [some_view(rng, rng.choice(everything)).reshape(-1) for _ in range(2)]
                    made.append(torch.cat(parts))
                case "fill":
                    some_view(rng, rng.choice(made)).fill_(rng.choice([0.0, 3.0]))
        return made[0]

    return load


@given(st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_a_recording_is_never_wrong(seed: int) -> None:
    sources = {"w": numbers(4, 6, start=100), "v": numbers(2, 3, 4, start=200)}
    assert not outcome(program(seed), sources).startswith("wrong")


# ---- one trick each ----

TRICKS: dict[str, Loader] = {}


def trick(load: Callable[[Tensor, Tensor, Tensor], Tensor | None]) -> None:
    """A loader of two weights of 8 elements that fills a parameter of 16, here made of zeros."""

    def whole(given: dict[str, Tensor], device: str) -> Tensor:
        with torch.device(device):
            parameter = torch.zeros(16, dtype=given["w"].dtype)
            made = load(parameter, given["w"], given["v"])
        return parameter if made is None else made

    TRICKS[load.__name__] = whole


@trick
def same_weights_and_constants_over_weights(p: Tensor, w: Tensor, v: Tensor) -> None:
    p[:8].copy_(w)
    p[:8].copy_(torch.cat([v[:4], torch.zeros(4)]))


@trick
def refused_weights_and_constants_over_other_weights(p: Tensor, w: Tensor, v: Tensor) -> None:
    p[4:8].copy_(v[:4])
    p[:8].copy_(torch.cat([w[:4], torch.zeros(4)]))


@trick
def same_adopted(p: Tensor, w: Tensor, v: Tensor) -> Tensor:
    made = torch.nn.Parameter(torch.empty(8))
    made.data = w
    return made


@trick
def same_several_constants_travel(p: Tensor, w: Tensor, v: Tensor) -> None:
    part = w.clone()
    part.fill_(9)
    part[:2].fill_(7)
    p[:8].copy_(v)
    p[8:].copy_(part.clone())


@trick
def same_written_as_a_number(p: Tensor, w: Tensor, v: Tensor) -> None:
    p[8:] = 3.0
    p[:8].copy_(w)


@trick
def same_filled_by_a_tensor(p: Tensor, w: Tensor, v: Tensor) -> None:
    p.fill_(torch.tensor(3.0, device="cpu"))
    p[:8].copy_(w)


@trick
def same_rounded_constant(p: Tensor, w: Tensor, v: Tensor) -> None:
    p.copy_(torch.full((16,), 0.1, dtype=torch.bfloat16))
    p[:8].copy_(w)


@trick
def same_negative_zeros(p: Tensor, w: Tensor, v: Tensor) -> Tensor:
    p.fill_(-0.0)
    p[:8].copy_(w)
    return p


@trick
def same_every_fifth_of_a_copy(p: Tensor, w: Tensor, v: Tensor) -> None:
    p[8:].copy_(v)
    p[:2].copy_(w[::5].clone())
    p[2:8].copy_(w[::5].clone()[1:].expand(6))


@trick
def refused_multiplied_in_place(p: Tensor, w: Tensor, v: Tensor) -> None:
    p.fill_(1.0)
    p.mul_(3)
    p[:8].copy_(w)


@trick
def refused_masked(p: Tensor, w: Tensor, v: Tensor) -> None:
    p.masked_fill_(torch.ones(16, dtype=torch.bool), 3.0)
    p[:8].copy_(w)


@trick
def refused_foreach(p: Tensor, w: Tensor, v: Tensor) -> None:
    torch._foreach_add_([p], 2.0)
    p[:8].copy_(w)


@trick
def refused_out(p: Tensor, w: Tensor, v: Tensor) -> None:
    torch.ones(16, out=p)
    p[:8].copy_(w)


@trick
def refused_random(p: Tensor, w: Tensor, v: Tensor) -> None:
    p.normal_()
    p[:8].copy_(w)


@trick
def refused_computed_parameter(p: Tensor, w: Tensor, v: Tensor) -> Tensor:
    made = torch.ones(16) * 2
    made[:8].copy_(w)
    return made


@trick
def refused_counted_parameter(p: Tensor, w: Tensor, v: Tensor) -> Tensor:
    made = torch.arange(16.0)
    made[:8].copy_(w)
    return made


@trick
def refused_wider_view_of_weights(p: Tensor, w: Tensor, v: Tensor) -> None:
    p[:8].copy_(w)
    p.view(torch.int64)[2:].zero_()


@trick
def refused_bits_of_a_constant(p: Tensor, w: Tensor, v: Tensor) -> None:
    p.view(torch.int32).fill_(1065353216)
    p[:8].copy_(w)


@trick
def refused_negated(p: Tensor, w: Tensor, v: Tensor) -> None:
    p[8:].copy_(v)
    p[:8].copy_(torch._neg_view(w))


@pytest.mark.parametrize("name", TRICKS)
def test_a_trick(name: str) -> None:
    sources = {"w": numbers(8, start=100), "v": numbers(8, start=200)}
    assert outcome(TRICKS[name], sources) == name.split("_")[0]


def test_a_zeroed_weight_that_travels_was_loaded() -> None:
    def load(given: dict[str, Tensor], device: str) -> Tensor:
        part = given["w"].clone()
        part.zero_()
        return torch.full((8,), 2.0, device=device).copy_(part)

    assert outcome(load, {"w": numbers(8, start=1)}) == "same"


def test_a_scalar_weight() -> None:
    recorded = record(lambda given, device: given["w"].clone(), {"w": torch.tensor(5.0)})
    assert [(piece.lo, piece.n) for piece in recorded.pieces] == [((0,), (1,))]


def test_a_resized_buffer() -> None:
    def load(given: dict[str, Tensor], device: str) -> Tensor:
        part = torch.empty(0, device=device).resize_(8)
        part.copy_(given["w"])
        return torch.zeros(8, device=device).copy_(part)

    assert outcome(load, {"w": numbers(8, start=1)}) == "same"
