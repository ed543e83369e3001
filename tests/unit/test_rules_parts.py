from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from weightsync.planners.rules.parts import Part, columns, rows, stacked


def sites(part: Part) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Canonical index of every parameter index that a part reaches, element by element."""
    found = {}
    for index in itertools.product(*(range(n) for n in part.n)):
        canonical = tuple(
            lo + step * i for lo, step, i in zip(part.lo, part.step, index, strict=True)
        )
        place = list(part.at)
        for k, i in enumerate(index):
            place[part.axes[k]] += part.jump[k] * i
        found[tuple(place)] = canonical
    return found


@st.composite
def parts_and_boxes(draw: st.DrawFn) -> tuple[Part, tuple[int, ...], tuple[int, ...]]:
    dims = draw(st.integers(1, 3))
    parameter_dims = draw(st.integers(dims, 3))

    def numbers(count: int, low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(count))

    axes = tuple(draw(st.permutations(range(parameter_dims)))[:dims])
    part = Part(
        "t",
        lo=numbers(dims, 0, 3),
        n=numbers(dims, 1, 5),
        step=numbers(dims, 1, 3),
        at=numbers(parameter_dims, 0, 4),
        axes=axes,
        jump=numbers(dims, 1, 3),
    )
    return part, numbers(parameter_dims, 0, 6), numbers(parameter_dims, 0, 9)


@given(parts_and_boxes())
@settings(max_examples=300, deadline=None)
def test_cutting_equals_filtering_elements(
    case: tuple[Part, tuple[int, ...], tuple[int, ...]],
) -> None:
    part, lo, n = case
    expected = {
        tuple(p - low for p, low in zip(place, lo, strict=True)): canonical
        for place, canonical in sites(part).items()
        if all(low <= p < low + size for p, low, size in zip(place, lo, n, strict=True))
    }
    cut = part.cut(lo, n)
    assert ({} if cut is None else sites(cut)) == expected


def test_stacking_moves_parts_below_each_other() -> None:
    fused = stacked("qkv", [rows("q", (8, 3), 4, 2), columns("k", (5, 6), 1, 3)])
    assert fused.shape == (7, 3)
    assert sites(fused.parts[0])[1, 2] == (5, 2)
    assert sites(fused.parts[1])[2, 0] == (0, 1)
