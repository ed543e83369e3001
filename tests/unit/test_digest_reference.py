"""The reference digest against its definition in plain integers, and the properties it promises."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightsync.encodings.digest import (
    digest_add,
    digest_rows,
    digest_sub,
    digest_sum,
    pack_keys,
    reference_digest,
    short_keys,
    tensor_seed,
)
from weightsync.errors import ConfigError

Codes = npt.NDArray[np.generic]
Box = tuple[slice, ...]

M32 = 2**32
M64 = 2**64
GAMMA = 0x9E3779B97F4A7C15
CODE_TYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % M64
    return z ^ (z >> 31)


def key(seed: int, family: int, index: int, lane: int) -> int:
    base = mix((seed + (family + 1) * GAMMA) % M64)
    return mix((base + (index + 1) * GAMMA) % M64) >> 32 * lane & 0xFFFFFFFF | 1


def short_key_list(lane: int) -> list[int]:
    state, keys, taken = mix(lane + 1), [], {0}
    while len(keys) < 4096:
        state = (state + GAMMA) % M64
        value = mix(state) & 0xFFFF
        if value not in taken:
            taken.add(value)
            keys.append(value - 65536 if value >= 32768 else value)
    return keys


SHORT_KEYS = [short_key_list(lane) for lane in range(2)]


def plain_digest(codes: Codes, lo: list[int], step: list[int], seed: int) -> int:
    """The definition, one unit at a time, in Python's integers."""
    pad = 4 - codes.ndim
    lo, step = [0] * pad + lo, [1] * pad + step
    box = codes.reshape((1,) * pad + codes.shape)
    size = codes.dtype.itemsize
    lanes = [0, 0]
    for at in np.ndindex(*box.shape):
        i = [first + distance * k for first, distance, k in zip(lo, step, at, strict=True)]
        raw = box[at].tobytes()
        units = [raw[0]] if size == 1 else np.frombuffer(raw, "<i2").tolist()
        for h, unit in enumerate(units):
            u = i[3] * len(units) + h
            for lane in range(2):
                product = unit * key(seed, 0, 0, lane) * SHORT_KEYS[lane][u % 4096]
                for dim in range(3):
                    product *= key(seed, 1 + dim, i[dim], lane)
                lanes[lane] += product * key(seed, 4, u // 4096, lane)
    return (lanes[1] % M32) << 32 | lanes[0] % M32


@st.composite
def code_arrays(draw: st.DrawFn, max_side: int = 5) -> Codes:
    shape = draw(st.lists(st.integers(1, max_side), min_size=1, max_size=4))
    item = draw(st.sampled_from([1, 2, 4, 8]))
    seed = draw(st.integers(0, 2**32 - 1))
    raw = np.random.default_rng(seed).integers(0, 256, (*shape, item), dtype=np.uint8)
    return raw.view(CODE_TYPES[item])[..., 0]


@st.composite
def partitions(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """Cuts a box again and again along random dims, into up to about ten boxes."""
    whole: Box = tuple(slice(0, n) for n in shape)
    done, todo = [], [whole]
    while todo:
        box = todo.pop()
        wide = [d for d, s in enumerate(box) if s.stop - s.start > 1]
        if not wide or len(done) + len(todo) > 8 or draw(st.booleans()):
            done.append(box)
            continue
        d = draw(st.sampled_from(wide))
        cut = draw(st.integers(box[d].start + 1, box[d].stop - 1))
        for part in (slice(box[d].start, cut), slice(cut, box[d].stop)):
            todo.append((*box[:d], part, *box[d + 1 :]))
    return done


def whole_digest(codes: Codes, name: str = "w") -> int:
    return reference_digest(codes, [0] * codes.ndim, [1] * codes.ndim, tensor_seed(name))


def test_short_keys_are_distinct_and_not_zero() -> None:
    assert short_keys().tolist() == SHORT_KEYS
    for lane in SHORT_KEYS:
        assert len(set(lane)) == 4096
        assert 0 not in lane


def test_tensor_seed_is_the_start_of_sha256() -> None:
    first = hashlib.sha256(b"model.embed_tokens.weight").digest()[:8]
    expected = int.from_bytes(first, "little")
    assert tensor_seed("model.embed_tokens.weight") % M64 == expected
    assert -(2**63) <= tensor_seed("x") < 2**63


@given(code_arrays(), st.data())
def test_reference_equals_the_definition(codes: Codes, data: st.DataObject) -> None:
    lo = data.draw(st.lists(st.integers(0, 10_000), min_size=codes.ndim, max_size=codes.ndim))
    step = data.draw(st.lists(st.integers(1, 3000), min_size=codes.ndim, max_size=codes.ndim))
    seed = data.draw(st.integers(-(2**63), 2**63 - 1))
    assert reference_digest(codes, lo, step, seed) == plain_digest(codes, lo, step, seed)


def test_digests_never_change() -> None:
    # Both ends of a transfer may run different releases: these numbers are part of the protocol.
    codes = np.arange(6000, dtype=np.uint16).reshape(2, 3000)
    assert whole_digest(codes) == 0xF773C1880142476C
    assert whole_digest(codes.view(np.uint8)) == 0x67CD44C0EAFA8BF2
    assert whole_digest(np.arange(5000, dtype=np.uint32)) == 0x7D286B42B7E5582E


@given(code_arrays(), st.data())
def test_any_partition_adds_up(codes: Codes, data: st.DataObject) -> None:
    seed = tensor_seed("w")
    parts = [
        reference_digest(codes[box], [s.start for s in box], [1] * codes.ndim, seed)
        for box in data.draw(partitions(codes.shape))
    ]
    assert int(digest_sum(parts)) == whole_digest(codes)


@given(code_arrays(), st.integers(1, 4), st.data())
def test_interleaved_parts_add_up(codes: Codes, step: int, data: st.DataObject) -> None:
    dim = data.draw(st.integers(0, codes.ndim - 1))
    total = np.uint64(0)
    for first in range(min(step, codes.shape[dim])):
        part = np.moveaxis(np.moveaxis(codes, dim, 0)[first::step], 0, dim)
        lo, steps = [0] * codes.ndim, [1] * codes.ndim
        lo[dim], steps[dim] = first, step
        total = digest_add(total, reference_digest(part, lo, steps, tensor_seed("w")))
    assert int(total) == whole_digest(codes)


@given(code_arrays(), st.data())
def test_every_change_of_one_element_shows(codes: Codes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, codes.size - 1))
    limit = 2 ** (8 * codes.dtype.itemsize)
    other = data.draw(st.integers(0, limit - 1).filter(lambda v: v != int(codes.flat[at])))
    changed = codes.copy()
    changed.flat[at] = other
    assert whole_digest(changed) != whole_digest(codes)


@given(st.integers(0, 2**32 - 1), st.integers(0, 63), st.integers(0, 63))
def test_every_swap_of_two_elements_of_a_row_shows(seed: int, i: int, j: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 65536, 64, dtype=np.uint16)
    swapped = codes.copy()
    swapped[[i, j]] = swapped[[j, i]]
    assert (whole_digest(swapped) == whole_digest(codes)) == (codes[i] == codes[j])


@pytest.mark.parametrize(
    "move",
    [
        pytest.param(lambda w: w[:, [1, 0, 2, 3]], id="two rows swapped"),
        pytest.param(lambda w: np.roll(w, 1, axis=1), id="rows shifted by one"),
        pytest.param(lambda w: np.roll(w, 1, axis=2), id="columns shifted by one"),
        pytest.param(lambda w: w[[1, 0, 2]], id="two experts swapped"),
        pytest.param(lambda w: w[:, [2, 3, 0, 1]], id="gate and up swapped"),
        pytest.param(lambda w: w[:, [0, 2, 1, 3]], id="interleaved"),
        pytest.param(lambda w: w.swapaxes(1, 2).reshape(w.shape), id="transposed"),
        pytest.param(lambda w: np.where(w == w.max(), 0, w), id="one element lost"),
    ],
)
def test_elements_in_the_wrong_place_show(move: object) -> None:
    assert callable(move)
    weights = np.random.default_rng(0).integers(0, 65536, (3, 4, 4), dtype=np.uint16)
    assert whole_digest(move(weights)) != whole_digest(weights)


def test_swapped_tensors_show() -> None:
    k, v = np.random.default_rng(1).integers(0, 65536, (2, 8, 16), dtype=np.uint16)
    right = digest_add(whole_digest(k, "k_proj.weight"), whole_digest(v, "v_proj.weight"))
    wrong = digest_add(whole_digest(v, "k_proj.weight"), whole_digest(k, "v_proj.weight"))
    assert right != wrong


@given(st.lists(st.integers(0, M64 - 1), max_size=6), st.integers(0, M64 - 1))
def test_lanes_add_separately(values: list[int], more: int) -> None:
    low = sum(v % M32 for v in values) % M32
    high = sum(v >> 32 for v in values) % M32
    total = digest_sum(np.array(values, np.uint64))
    assert int(total) == high << 32 | low
    assert int(digest_sub(digest_add(total, more), more)) == int(total)
    assert int(digest_add(more, digest_sub(total, more))) == int(total)


def test_sums_work_on_arrays() -> None:
    a = np.array([[1, 2**32 - 1], [2**63, 7]], np.uint64)
    assert digest_add(a, 1).tolist() == [[2, 0], [2**63 + 1, 8]]
    assert digest_sum(a, axis=1).tolist() == [0, 2**63 + 7]
    assert digest_sum(np.zeros((0, 3), np.uint64)).tolist() == [0, 0, 0]


def test_tables_put_every_column_in_its_place() -> None:
    lo, step, n, stride = (np.arange(8).reshape(2, 4) + 10 * k for k in (1, 2, 3, 4))
    table = digest_rows([100, 200], 2, [-5, 6], lo, step, n, stride)
    assert table.dtype == np.int64
    assert table.flags.c_contiguous
    assert table[1].tolist() == [200, 2, 6, *lo[1], *step[1], *n[1], *stride[1]]
    assert pack_keys([-5, 6], lo, step)[0].tolist() == [-5, *lo[0], *step[0]]
    with pytest.raises(ConfigError, match="dims columns"):
        digest_rows([100, 200], 2, [-5, 6], lo, step, n[:1], stride)


def test_what_cannot_be_digested_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot digest"):
        whole_digest(np.zeros(3, np.complex128))
