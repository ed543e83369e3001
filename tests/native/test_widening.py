"""BF16 to F32 on every instruction set: exact, in place, from and to any strides."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightsync import _native
from weightsync.encodings.casts import reference_cast
from weightsync.encodings.digest import reference_digest
from weightsync.encodings.rows import pack_keys, pack_rows
from weightsync.ir.dtypes import Dtype

ISAS: list[str] = _native.kernel_info()["isas"]

Array = npt.NDArray[np.generic]


def row(src: Array, dst: Array) -> npt.NDArray[np.int64]:
    """The row that copies one view into another of the same shape."""
    zeros = (0,) * (4 - src.ndim)
    return pack_rows(
        [src.__array_interface__["data"][0]],
        [dst.__array_interface__["data"][0]],
        Dtype.BF16,
        Dtype.F32,
        np.array([(1,) * (4 - src.ndim) + src.shape]),
        np.array([zeros + src.strides]),  # in bytes
        np.array([zeros + dst.strides]),
    )


def codes_of(*shape: int) -> npt.NDArray[np.uint16]:
    return np.random.default_rng(0).integers(0, 1 << 16, shape, np.uint16)


def test_every_code() -> None:
    codes = np.arange(65536, dtype=np.uint16)
    exact = torch.from_numpy(codes.view(np.int16)).view(torch.bfloat16).float()
    for isa in ISAS:
        found = np.zeros(65536, np.uint32)
        _native.pack(row(codes, found), isa=isa)
        np.testing.assert_array_equal(found, reference_cast(codes, Dtype.BF16, Dtype.F32))
        np.testing.assert_array_equal(found, exact.numpy().view(np.uint32))


def test_exactly_its_elements_are_written_at_any_alignment() -> None:
    raw = codes_of(64).view(np.uint8)
    for isa in ISAS:
        for n in range(1, 40):
            for shift in (0, 1, 2, 5):
                src = raw[shift : shift + 2 * n].view(np.uint16)
                memory = np.full(4 * n + 16, 0xA5, np.uint8)
                dst = memory[shift : shift + 4 * n].view(np.uint32)
                _native.pack(row(src, dst), isa=isa)
                np.testing.assert_array_equal(dst, np.array(src).astype(np.uint32) << 16)
                assert (memory[:shift] == 0xA5).all()
                assert (memory[shift + 4 * n :] == 0xA5).all()


@given(st.data())
def test_any_order_of_dims_on_either_side(data: st.DataObject) -> None:
    sides = st.sampled_from([1, 2, 3, 16, 17, 33])
    shape = tuple(data.draw(st.lists(sides, min_size=1, max_size=4)))
    orders = [data.draw(st.permutations(range(len(shape)))) for _ in range(2)]
    gap = data.draw(st.integers(1, 2))
    # Memory in some order of dims, seen in canonical order; the innermost may have gaps.
    views = []
    for order, dtype in zip(orders, (np.uint16, np.uint32), strict=True):
        memory = np.zeros((*(shape[d] for d in order[:-1]), shape[order[-1]] * gap), dtype)
        views.append(memory[..., ::gap].transpose(np.argsort(order)))
    src, dst = views
    src[...] = codes_of(*shape)
    threads = data.draw(st.integers(1, 2))
    for isa in ISAS:
        dst[...] = 0
        _native.pack(row(src, dst), threads, isa=isa)
        np.testing.assert_array_equal(dst, np.array(src).astype(np.uint32) << 16)


@pytest.mark.parametrize("shape", [(300, 200), (70, 1000)])
def test_large_transposes(shape: tuple[int, int]) -> None:
    codes, out = codes_of(*shape), np.zeros(shape[::-1], np.uint32)
    for isa in ISAS:
        out[...] = 0
        _native.pack(row(codes.T, out), isa=isa)
        np.testing.assert_array_equal(out, codes.T.astype(np.uint32) << 16)


def test_the_digest_is_of_what_the_sink_stores() -> None:
    codes, out = codes_of(50, 3000), np.zeros((50, 3000), np.uint32)
    keys = pack_keys([17], [[0, 0, 4, 9]], [[1, 1, 1, 2]])
    found = _native.pack_digest(row(codes, out), keys, np.zeros(1, np.int32), 1, 1)
    np.testing.assert_array_equal(out, codes.astype(np.uint32) << 16)
    assert int(found[0]) == reference_digest(out, (4, 9), (1, 2), 17)
