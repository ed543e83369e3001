"""Kernels against numpy and torch, on every instruction set of this machine."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support import scaled
from weightsync import _native
from weightsync.encodings.casts import reference_cast
from weightsync.encodings.digest import digest_sum, reference_digest, tensor_seed
from weightsync.encodings.rows import digest_rows, fill_rows, pack_keys, pack_rows
from weightsync.errors import ConfigError, DtypeMismatchError
from weightsync.ir.dtypes import Dtype

Array = npt.NDArray[np.generic]
I64 = npt.NDArray[np.int64]

ISAS: list[str] = _native.kernel_info()["isas"]
CODE_TYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
CODE_DTYPES = {1: Dtype.U8, 2: Dtype.U16, 4: Dtype.U32, 8: Dtype.U64}


def random_codes(shape: tuple[int, ...], item: int, seed: int = 0) -> Array:
    raw = np.random.default_rng(seed).integers(0, 256, (*shape, item), dtype=np.uint8)
    return raw.view(CODE_TYPES[item])[..., 0]


def address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def padded(values: tuple[int, ...], fill: int) -> list[list[int]]:
    return [[fill] * (4 - len(values)) + list(values)]


def digest_row(view: Array, lo: tuple[int, ...], step: tuple[int, ...], seed: int) -> I64:
    """A row for a view of any strides, its dims in canonical order."""
    return digest_rows(
        [address(view)],
        view.dtype.itemsize,
        [seed],
        padded(lo, 0),
        padded(step, 1),
        padded(view.shape, 1),
        padded(view.strides, 0),
    )


def digest_of(view: Array, seed: int = 1, threads: int = 1, isa: str = "auto") -> int:
    zero, one = (0,) * view.ndim, (1,) * view.ndim
    row = digest_row(view, zero, one, seed)
    return int(_native.digest(row, np.zeros(1, np.int32), 1, threads, isa=isa)[0])


def pack_row(src: Array, dst: Array, src_dtype: Dtype, dst_dtype: Dtype) -> I64:
    return pack_rows(
        [address(src)],
        [address(dst)],
        src_dtype,
        dst_dtype,
        padded(src.shape, 1),
        padded(src.strides, 0),
        padded(dst.strides, 0),
    )


@st.composite
def scattered_views(draw: st.DrawFn, sides: st.SearchStrategy[int], dims: int = 4) -> Array:
    """A view with canonical dims in any memory order, with gaps, at any byte alignment."""
    item = draw(st.sampled_from([1, 2, 4, 8]))
    shape = draw(st.lists(sides, min_size=1, max_size=dims))
    order = draw(st.permutations(range(len(shape))))
    gaps = draw(st.lists(st.integers(1, 5), min_size=len(shape), max_size=len(shape)))
    big = [shape[d] * gap for d, gap in zip(order, gaps, strict=True)]
    shift = draw(st.sampled_from([0, 0, 1, 2, 16]))
    seed = draw(st.integers(0, 2**32 - 1))
    raw = np.random.default_rng(seed).integers(0, 256, int(np.prod(big)) * item + 64, np.uint8)
    raw = raw[shift : shift + int(np.prod(big)) * item]
    memory = raw.view(CODE_TYPES[item]).reshape(big)
    picked = memory[tuple(slice(None, None, gap) for gap in gaps)]
    return picked.transpose(np.argsort(order))


small_sides = st.sampled_from([1, 1, 2, 3, 5, 16, 17, 33])
digest_sides = st.sampled_from([1, 1, 2, 3, 16, 20, 31, 64, 100])


# ---- digest ----


@given(scattered_views(digest_sides, dims=3), st.data())
def test_digest_equals_the_reference(view: Array, data: st.DataObject) -> None:
    lo = tuple(data.draw(st.integers(0, 9000)) for _ in view.shape)
    step = tuple(data.draw(st.sampled_from([1, 1, 1, 2, 3, 5000])) for _ in view.shape)
    seed = data.draw(st.integers(-(2**63), 2**63 - 1))
    row = digest_row(view, lo, step, seed)
    expected = reference_digest(view, lo, step, seed)
    for isa in ISAS:
        assert int(_native.digest(row, np.zeros(1, np.int32), 1, isa=isa)[0]) == expected


@pytest.mark.parametrize("item", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("shape", "lo"),
    [
        pytest.param((600_000,), (0,), id="flat"),
        pytest.param((600_001,), (4095,), id="flat from inside a run"),
        pytest.param((40, 7168), (3, 0), id="rows"),
        pytest.param((40, 4097), (0, 8191), id="rows across two runs"),
        pytest.param((5000, 3), (0, 0), id="short rows"),
        pytest.param((3, 300, 128), (7, 0, 128), id="experts"),
    ],
)
def test_digest_of_long_boxes(item: int, shape: tuple[int, ...], lo: tuple[int, ...]) -> None:
    codes = random_codes(shape, item)
    expected = reference_digest(codes, lo, (1,) * len(shape), 5)
    row = digest_row(codes, lo, (1,) * len(shape), 5)
    for isa in ISAS:
        for threads in (1, 3):
            found = _native.digest(row, np.zeros(1, np.int32), 1, threads, isa=isa)
            assert int(found[0]) == expected


@pytest.mark.parametrize("value", [0x8000, 0x7FFF, 0xFFFF])
def test_digest_of_extreme_units(value: int) -> None:
    # Pairs of -32768 * -32768 overflow the sum inside one multiply-add instruction.
    codes = np.full((9, 5000), value, np.uint16)
    assert {digest_of(codes, isa=isa) for isa in ISAS} == {
        reference_digest(codes, (0, 0), (1, 1), 1)
    }


@given(scattered_views(small_sides), st.integers(0, 2**32 - 1))
def test_digest_does_not_depend_on_the_layout_of_memory(view: Array, seed: int) -> None:
    dense = np.ascontiguousarray(view)
    assert {digest_of(a, seed) for a in (view, dense, np.asfortranarray(view))} == {
        reference_digest(dense, (0,) * view.ndim, (1,) * view.ndim, seed)
    }


def test_digest_of_interleaved_and_transposed_weights() -> None:
    gate, up = random_codes((2, 96, 64), 2)
    gate_up = np.stack([gate, up], axis=1)  # rows g0 u0 g1 u1 ...
    assert digest_of(gate_up[:, 0]) == digest_of(gate)
    assert digest_of(gate_up[:, 1]) == digest_of(up)
    assert digest_of(np.stack([gate, up], axis=2)[..., 1]) == digest_of(up)
    assert digest_of(np.ascontiguousarray(gate.T).T) == digest_of(gate)


@given(st.data())
def test_any_partition_adds_up(data: st.DataObject) -> None:
    codes = random_codes((6, 20, 200), data.draw(st.sampled_from([1, 2, 4, 8])))
    rows = []
    todo = [((0, 0, 0), codes)]
    while todo:
        lo, part = todo.pop()
        wide = [d for d, n in enumerate(part.shape) if n > 1]
        if not wide or len(rows) + len(todo) > 20 or data.draw(st.integers(0, 3)) == 0:
            rows.append(digest_row(part, lo, (1, 1, 1), 3))
            continue
        d = data.draw(st.sampled_from(wide))
        cut = data.draw(st.integers(1, part.shape[d] - 1))
        first, second = np.split(part, [cut], axis=d)
        moved = tuple(lo[e] + cut * (e == d) for e in range(3))
        todo += [(lo, first), (moved, second)]
    table = np.concatenate(rows)
    group = np.arange(len(table), dtype=np.int32) % 3
    by_group = _native.digest(table, group, 3, data.draw(st.integers(1, 3)))
    assert int(digest_sum(by_group)) == digest_of(codes, 3)


@given(st.data())
def test_every_change_of_one_element_shows(data: st.DataObject) -> None:
    item = data.draw(st.sampled_from([1, 2, 4, 8]))
    codes = random_codes((3, 50, 70), item)
    before = digest_of(codes)
    at = data.draw(st.integers(0, codes.size - 1))
    codes.flat[at] ^= data.draw(st.integers(1, 2 ** (8 * item) - 1))
    assert digest_of(codes) != before


@pytest.mark.parametrize(
    "move",
    [
        pytest.param(lambda w: w[:, [0, 2, 1, *range(3, 48)]], id="two rows swapped"),
        pytest.param(lambda w: np.roll(w, 1, axis=1), id="rows shifted by one"),
        pytest.param(lambda w: np.roll(w, 1, axis=2), id="columns shifted by one"),
        pytest.param(lambda w: w[[0, 3, 2, 1]], id="two experts swapped"),
        pytest.param(lambda w: np.roll(w, 24, axis=1), id="gate and up swapped"),
    ],
)
def test_elements_in_the_wrong_place_show(move: Callable[[Array], Array]) -> None:
    weights = random_codes((4, 48, 64), 2)
    assert digest_of(np.ascontiguousarray(move(weights))) != digest_of(weights)


def test_swapped_tensors_show() -> None:
    k, v = random_codes((2, 8, 64), 2)
    seeds = [tensor_seed("k_proj.weight"), tensor_seed("v_proj.weight")]
    right = digest_sum([digest_of(k, seeds[0]), digest_of(v, seeds[1])])
    assert right != digest_sum([digest_of(v, seeds[0]), digest_of(k, seeds[1])])


def test_digest_by_group() -> None:
    codes = random_codes((40, 1000), 2)
    rows = [digest_row(codes[i : i + 1], (i, 0), (1, 1), 9) for i in range(40)]
    group = np.arange(40, dtype=np.int32) % 7
    expected = [
        int(
            digest_sum(
                [reference_digest(codes[i : i + 1], (i, 0), (1, 1), 9) for i in range(g, 40, 7)]
            )
        )
        for g in range(7)
    ]
    assert _native.digest(np.concatenate(rows), group, 8, 2).tolist() == [*expected, 0]
    assert _native.digest(np.zeros((0, 19), np.int64), np.zeros(0, np.int32), 2).tolist() == [0, 0]


def test_empty_boxes_count_nothing() -> None:
    assert digest_of(np.zeros((3, 0, 4), np.uint16)) == 0


# ---- pack ----


def guarded(view: Array) -> tuple[Array, Array]:
    """A destination like `view` (same strides pattern, fresh memory) and all bytes around it."""
    order = np.argsort([-s for s in view.strides], kind="stable")
    gaps = np.random.default_rng(view.size).integers(1, 4, view.ndim)
    big = [view.shape[d] * g for d, g in zip(order, gaps, strict=True)]
    memory = np.full((int(np.prod(big)) + 64,), 0xA5, view.dtype)
    inner = memory[32:-32].reshape(big)[tuple(slice(None, None, g) for g in gaps)]
    return inner.transpose(np.argsort(order)), memory


@given(scattered_views(small_sides), st.data())
def test_pack_equals_numpy_and_writes_nothing_else(view: Array, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(view.ndim)))
    dst, memory = guarded(np.empty(view.shape, view.dtype).transpose(order))
    dst = dst.transpose(np.argsort(order))
    expected = memory.copy()
    alias = np.ndarray(dst.shape, dst.dtype, expected, address(dst) - address(memory), dst.strides)
    alias[...] = view
    dtype = CODE_DTYPES[view.dtype.itemsize]
    _native.pack(pack_row(view, dst, dtype, dtype), data.draw(st.integers(1, 3)))
    np.testing.assert_array_equal(memory, expected)


@given(st.data())
def test_pack_equals_torch(data: st.DataObject) -> None:
    dtype, ours = data.draw(
        st.sampled_from([(torch.bfloat16, Dtype.BF16), (torch.float16, Dtype.F16)])
    )
    shape = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    order = data.draw(st.permutations(range(len(shape))))
    source = torch.randn([shape[d] for d in order], generator=torch.Generator().manual_seed(0))
    source = source.permute(np.argsort(order).tolist())
    gap = data.draw(st.integers(1, 3))
    target = torch.zeros([*shape[:-1], shape[-1] * gap], dtype=dtype)[..., ::gap]
    row = pack_rows(
        [source.data_ptr()],
        [target.data_ptr()],
        Dtype.F32,
        ours,
        padded(tuple(shape), 1),
        padded(tuple(4 * s for s in source.stride()), 0),
        padded(tuple(2 * s for s in target.stride()), 0),
    )
    for isa in ISAS:
        target.zero_()
        _native.pack(row, isa=isa)
        assert torch.equal(target, torch.empty_like(target).copy_(source))


@pytest.mark.parametrize("item", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(64, 64), (1100, 1100), (129, 67), (2, 3000), (3000, 2)])
def test_pack_transposes(item: int, shape: tuple[int, int]) -> None:
    codes = random_codes(shape, item)
    out = np.zeros(shape[::-1], codes.dtype)
    dtype = CODE_DTYPES[item]
    _native.pack(pack_row(codes.T, out, dtype, dtype))
    np.testing.assert_array_equal(out, codes.T)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_pack_many_rows_of_all_sizes(threads: int) -> None:
    sizes = [1, 3, 64, 100, 5000, 300_000, 3_000_000, 7]
    codes = random_codes((sum(sizes),), 1)
    out = np.zeros_like(codes)
    rows, at = [], 0
    for size in sizes:
        rows.append(pack_row(codes[at : at + size], out[at : at + size], Dtype.U8, Dtype.U8))
        at += size
    _native.pack(np.concatenate(rows), threads)
    np.testing.assert_array_equal(out, codes)


# ---- casts ----

# Ties, their neighbours and the ends, below the upper half and below the mantissa of a half.
LOWER = [0x0000, 0x0001, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
CASTS = [(Dtype.BF16, torch.bfloat16), (Dtype.F16, torch.float16)]


def cast(codes: Array, sink: Dtype, isa: str) -> Array:
    out = np.zeros(codes.shape, np.uint16)
    _native.pack(pack_row(codes, out, Dtype.F32, sink), isa=isa)
    return out


@pytest.mark.parametrize(("sink", "torch_dtype"), CASTS)
@pytest.mark.parametrize("lower", LOWER)
def test_casts_of_every_upper_half(sink: Dtype, torch_dtype: torch.dtype, lower: int) -> None:
    codes = (np.arange(65536, dtype=np.uint32) << np.uint32(16)) | np.uint32(lower)
    expected = reference_cast(codes, Dtype.F32, sink)
    for isa in ISAS:
        np.testing.assert_array_equal(cast(codes, sink, isa), expected)
    values = codes.view(np.float32)
    found = torch.from_numpy(values).to(torch_dtype).view(torch.int16).numpy().view(np.uint16)
    # torch gives other NaNs where it does not vectorise.
    is_same = ~np.isnan(values) | (torch.backends.cpu.get_cpu_capability() in {"AVX2", "AVX512"})
    np.testing.assert_array_equal(found[is_same], expected[is_same])


@pytest.mark.parametrize(("sink", "torch_dtype"), CASTS)
def test_casts_of_random_codes(sink: Dtype, torch_dtype: torch.dtype) -> None:
    codes = random_codes((scaled(200_000, 20_000_000),), 4)
    expected = reference_cast(codes, Dtype.F32, sink)
    for isa in ISAS:
        np.testing.assert_array_equal(cast(codes, sink, isa), expected)


@pytest.mark.parametrize("sink", [Dtype.BF16, Dtype.F16])
def test_casts_write_exactly_their_elements_at_any_alignment(sink: Dtype) -> None:
    raw = random_codes((4 * 64,), 1)
    for isa in ISAS:
        for n in range(1, 40):
            for shift in (0, 1, 2, 5):
                src = raw[shift : shift + 4 * n].view(np.uint32)
                memory = np.full(2 * n + 16, 0xA5, np.uint8)
                dst = memory[shift : shift + 2 * n].view(np.uint16)
                _native.pack(pack_row(src, dst, Dtype.F32, sink), isa=isa)
                expected = reference_cast(np.array(src), Dtype.F32, sink)
                np.testing.assert_array_equal(dst, expected)
                assert (memory[:shift] == 0xA5).all()
                assert (memory[shift + 2 * n :] == 0xA5).all()


# ---- pack and digest in one pass ----


@given(scattered_views(small_sides), st.data())
def test_pack_digest_is_pack_then_digest(view: Array, data: st.DataObject) -> None:
    lo = tuple(data.draw(st.integers(0, 9000)) for _ in view.shape)
    step = tuple(data.draw(st.integers(1, 3)) for _ in view.shape)
    is_cast = view.dtype.itemsize == 4 and data.draw(st.booleans())
    dtype = CODE_DTYPES[view.dtype.itemsize]
    out = np.zeros(view.shape, np.uint16 if is_cast else view.dtype)
    row = (
        pack_row(view, out, Dtype.F32, Dtype.BF16) if is_cast else pack_row(view, out, dtype, dtype)
    )
    keys = pack_keys([17], padded(lo, 0), padded(step, 1))
    threads = data.draw(st.integers(1, 2))
    found = _native.pack_digest(row, keys, np.zeros(1, np.int32), 1, threads)
    expected = reference_cast(np.array(view), Dtype.F32, Dtype.BF16) if is_cast else view
    np.testing.assert_array_equal(out, expected)
    assert int(found[0]) == reference_digest(expected, lo, step, 17)


@pytest.mark.parametrize("threads", [1, 3])
def test_pack_digest_of_many_tiles(threads: int) -> None:
    codes = random_codes((300, 4000), 2)
    out, copied = np.zeros_like(codes.T, order="C"), np.zeros_like(codes)
    rows = np.concatenate(
        [
            pack_row(codes.T, out, Dtype.BF16, Dtype.BF16),
            pack_row(codes, copied, Dtype.BF16, Dtype.BF16),
        ]
    )
    keys = pack_keys([1, 1], [[0, 0, 0, 0]] * 2, [[1, 1, 1, 1]] * 2)
    found = _native.pack_digest(rows, keys, np.array([1, 0], np.int32), 2, threads)
    assert found.tolist() == [digest_of(codes), digest_of(out)]
    np.testing.assert_array_equal(out, codes.T)
    np.testing.assert_array_equal(copied, codes)


@pytest.mark.parametrize("item", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("shape", "lo", "step"),
    [
        pytest.param((200_064,), (0,), (1,), id="flat"),
        pytest.param((200_001,), (0,), (1,), id="flat, not in whole vectors"),
        pytest.param((200_064,), (4064,), (1,), id="flat, from a vector inside a run"),
        pytest.param((200_064,), (4095,), (1,), id="flat, from inside a run"),
        pytest.param((200_064,), (64,), (3,), id="every third element"),
        pytest.param((40, 7168), (3, 32), (2, 1), id="every other row"),
        pytest.param((3, 300, 128), (7, 0, 128), (1, 5, 1), id="experts"),
        pytest.param((70_000, 1), (0, 0), (1, 1), id="last dim of one"),
    ],
)
def test_pack_digest_of_a_long_run(
    item: int, shape: tuple[int, ...], lo: tuple[int, ...], step: tuple[int, ...]
) -> None:
    """Long plain copies go around the caches, in whole vectors: no head or tail may be lost."""
    count = int(np.prod(shape))
    raw = random_codes((count + 128,), item)
    guard = random_codes((count + 256,), item, seed=1)
    first = -(address(raw) // item) % (64 // item)  # of a line
    for from_line, to_line in [(0, 0), (1, 0), (16, 0), (0, 1), (1, 3)]:
        codes = raw[first + from_line :][:count].reshape(shape)
        expected = reference_digest(codes, lo, step, 17)
        for isa in ISAS:
            memory = guard.copy()
            start = -(address(memory) // item) % (64 // item) + to_line
            out = memory[start:][:count].reshape(shape)
            row = pack_row(codes, out, CODE_DTYPES[item], CODE_DTYPES[item])
            keys = pack_keys([17], padded(lo, 0), padded(step, 1))
            found = _native.pack_digest(row, keys, np.zeros(1, np.int32), 1, isa=isa)
            assert int(found[0]) == expected, (from_line, to_line, isa)
            np.testing.assert_array_equal(out, codes)
            np.testing.assert_array_equal(memory[:start], guard[:start])
            np.testing.assert_array_equal(memory[start + count :], guard[start + count :])


# ---- constants ----


@given(scattered_views(small_sides), st.integers(0, 2**64 - 1), st.data())
def test_fill_and_check_fill(view: Array, code: int, data: st.DataObject) -> None:
    item = view.dtype.itemsize
    code %= 2 ** (8 * item)
    other, _ = guarded(view)
    rows = np.concatenate(
        [
            fill_rows([address(a)], CODE_DTYPES[item], padded(a.shape, 1), padded(a.strides, 0))
            for a in (other, view)
        ]
    )
    codes = np.array([0, code], np.uint64)
    threads = data.draw(st.integers(1, 2))
    _native.fill(rows, codes, threads)
    assert (other == 0).all()
    assert (view == code).all()
    assert _native.check_fill(rows, codes, threads) == -1
    for bad, index in ((view, 1), (other, 0)):  # the later row first: the first bad one is named
        at = data.draw(st.integers(0, bad.size - 1))
        bad[np.unravel_index(at, bad.shape)] ^= bad.dtype.type(1)
        assert _native.check_fill(rows, codes, threads) == index


def test_fill_of_large_boxes_in_parallel() -> None:
    memory = np.zeros((3, 400_000), np.uint16)
    rows = fill_rows([address(memory)], Dtype.BF16, padded((2, 400_000), 1), [[0, 0, 800_000, 2]])
    codes = np.array([0x3F80], np.uint64)
    _native.fill(rows, codes, 2)
    assert (memory[:2] == 0x3F80).all()
    assert (memory[2] == 0).all()
    assert _native.check_fill(rows, codes, 2) == -1
    memory[1, 399_999] = 0
    assert _native.check_fill(rows, codes, 2) == 0


# ---- the boundary ----

ROW = np.ones((1, 16), np.int64)
NEGATIVE_SIZE = np.where(np.arange(16) == 6, -1, 1)
GROUP = np.zeros(1, np.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _native.pack(np.ones((1, 15), np.int64)), r"rows must be .* \(rows, 16\)"),
        (lambda: _native.pack(np.ones((1, 16), np.int32)), "rows must be .*int64.*not int32"),
        (lambda: _native.pack(np.ones((1, 32), np.int64)[:, ::2]), "C-contiguous"),
        (lambda: _native.pack(ROW * 99), "row 0: unknown dtype"),
        (lambda: _native.pack(ROW * NEGATIVE_SIZE), "row 0: negative size"),
        (lambda: _native.pack(ROW, 0), "threads must be at least 1"),
        (lambda: _native.pack(ROW, isa="sse9"), "isa 'sse9' is unknown"),
        (lambda: _native.digest(np.ones((2, 19), np.int64), GROUP, 1), r"group must be .* \(2,\)"),
        (lambda: _native.digest(np.ones((1, 19), np.int64), GROUP, 0), "group 0 is not in"),
        (lambda: _native.digest(np.ones((1, 19), np.int64), GROUP, -1), "num_groups is negative"),
        (lambda: _native.digest(np.ones((1, 19), np.int64) * 3, GROUP, 1), "row 0: itemsize"),
        (lambda: _native.digest(np.eye(1, 19, 1, np.int64), GROUP, 1), "row 0: step below 1"),
        (lambda: _native.fill(np.ones((1, 10), np.int64), np.zeros(2, np.uint64)), "codes must be"),
        (
            lambda: _native.check_fill(np.ones((1, 9), np.int64), np.zeros(1, np.uint64)),
            "rows must",
        ),
        (
            lambda: _native.pack_digest(ROW, np.zeros((1, 9), np.int64), GROUP, 1),
            "row 0: step below 1",
        ),
    ],
)
def test_wrong_tables_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_wrong_casts_are_refused() -> None:
    row = ROW.copy()
    row[0, 2:4] = Dtype.F64, Dtype.F32
    with pytest.raises(DtypeMismatchError, match="row 0: no cast"):
        _native.pack(row)


def test_kernel_info() -> None:
    info = _native.kernel_info()
    assert info["isas"][0] == "portable"
    assert info["isa"] == info["isas"][-1]
    assert info["num_processors"] >= 1


def test_calls_from_many_threads_share_the_pool() -> None:
    codes = random_codes((500, 2000), 2)
    expected = digest_of(codes)
    found: list[int] = []
    workers = [
        threading.Thread(
            target=lambda: found.extend(digest_of(codes, threads=2) for _ in range(20))
        )
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [expected] * 80


def test_the_gil_is_released() -> None:
    codes = random_codes((4_000_000,), 2)
    row = np.repeat(digest_row(codes, (0,), (1,), 1), 16, axis=0)
    for _ in range(50):
        started, done = threading.Event(), threading.Event()

        def work(started: threading.Event = started, done: threading.Event = done) -> None:
            started.set()
            _native.digest(row, np.zeros(16, np.int32), 1)
            done.set()

        worker = threading.Thread(target=work)
        worker.start()
        started.wait()
        was_running = not done.is_set()
        worker.join()
        if was_running:
            return
    pytest.fail("no other thread ran during 50 calls of digest")


FORK = """
import os
import numpy as np
from weightsync import _native

codes = np.ones(2_000_000, np.uint16)
row = np.array([[codes.ctypes.data, 2, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, codes.size, 0, 0, 0, 2]])
group = np.zeros(1, np.int32)
expected = _native.digest(row, group, 1, 2)
child = os.fork()
if child == 0:
    os._exit(0 if (_native.digest(row, group, 1, 2) == expected).all() else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_has_a_pool_of_its_own() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=50)
