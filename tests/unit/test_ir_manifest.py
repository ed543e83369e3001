"""Manifests: what is accepted, what is refused by which message, canonical bytes, arenas."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from weightsync.errors import ConfigError, CoverageError, EncodingError, LayoutError
from weightsync.ir import Arena, Dtype, Manifest, ManifestBuilder, PieceTable


def _builder(side: str = "source") -> ManifestBuilder:
    builder = ManifestBuilder(side, f"{side} 0")  # type: ignore[arg-type]
    builder.tensor("w", (6, 4))
    builder.buffer("w", "BF16", 24)
    return builder


def _one(lo: tuple[int, int], n: tuple[int, int], **changes: object) -> Manifest:
    builder = _builder()
    piece: dict[str, object] = {"offset": 0, "stride": (4, 1), "step": (1, 1)} | changes
    builder.piece("w", "w", lo=lo, n=n, **piece)  # type: ignore[arg-type]
    return builder.build()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: _one((0, 0), (7, 4)), "leaves its tensor"),
        (lambda: _one((5, 0), (2, 4)), "leaves its tensor"),
        (lambda: _one((0, 0), (3, 4), step=(3, 1)), "leaves its tensor"),
        (lambda: _one((0, 0), (6, 4), offset=1), "leaves its buffer"),
        (lambda: _one((0, 0), (6, 4), offset=-1), "leaves its buffer"),
        (lambda: _one((0, 0), (6, 4), stride=(1 << 60, 1)), "leaves its buffer"),
        (lambda: _one((0, 0), (2, 4), stride=(-4, 1), offset=8), "negative stride"),
        (lambda: _one((0, 0), (2, 4), stride=(3, 1)), "strides that do not nest"),
        (lambda: _one((0, 0), (2, 4), stride=(0, 1)), "strides that do not nest"),
        (lambda: _one((0, 0), (2, 2), step=(1, 0)), "step outside"),
    ],
)
def test_a_bad_piece_is_refused_with_names(make: Callable[[], Manifest], words: str) -> None:
    with pytest.raises(LayoutError, match=words) as caught:
        make()
    assert (caught.value.tensor, caught.value.rank, caught.value.side) == (
        "w",
        "source 0",
        "source",
    )
    assert "source 0" in str(caught.value)


def test_sinks_are_covered_exactly_once() -> None:
    gap = _builder("sink")
    gap.piece("w", "w", lo=(0, 0), n=(5, 4), offset=0, stride=(4, 1))
    with pytest.raises(CoverageError, match="20 elements of 24") as caught:
        gap.build()
    assert (caught.value.tensor, caught.value.rank, caught.value.side) == ("w", "sink 0", "sink")
    twice = _builder("sink")
    twice.piece("w", "w", lo=(0, 0), n=(4, 4), offset=0, stride=(4, 1))
    twice.piece("w", "w", lo=(4, 0), n=(2, 4), offset=8, stride=(4, 1))
    with pytest.raises(CoverageError, match="some twice and some never"):
        twice.build()
    twice.constant("w", 20, (4,), (1,), 0)
    with pytest.raises(CoverageError, match="28 elements of 24"):
        twice.build()


def test_a_source_may_have_gaps_replicas_and_aliases() -> None:
    builder = _builder()
    builder.tensor("tied", (6, 4))
    for name in ("w", "tied"):
        builder.place(name, "w", (6, 4))
    builder.buffer("flat", "BF16", 100)
    builder.place("w", "flat", (6, 4), offset=3)
    assert len(builder.build().pieces) == 3


def test_the_builder_refuses_contradictions() -> None:
    builder = _builder()
    with pytest.raises(LayoutError, match=r"\(6, 4\) and \(4, 6\)"):
        builder.tensor("w", (4, 6))
    with pytest.raises(LayoutError, match="declared twice"):
        builder.buffer("w", "F32", 24)
    with pytest.raises(ConfigError, match="unknown dtype 'FP7'"):
        builder.buffer("v", "FP7", 1)
    with pytest.raises(LayoutError, match=r"1\.\.4 dims"):
        builder.tensor("five", (1, 1, 1, 1, 1))
    with pytest.raises(LayoutError, match="tensor x is used but not declared"):
        builder.place("x", "w", (6, 4))
    with pytest.raises(LayoutError, match="buffer x is used but not declared"):
        builder.place("w", "x", (6, 4))
    with pytest.raises(LayoutError, match="need 2 dims"):
        builder.piece("w", "w", lo=(0,), n=(6,), offset=0, stride=(1,))
    with pytest.raises(LayoutError, match="do not map"):
        builder.place("w", "w", (2, 3, 4))
    with pytest.raises(LayoutError, match="do not map"):
        builder.place("w", "w", (6, 4), axes=(0, 0))
    with pytest.raises(LayoutError, match="leave the view"):
        builder.place("w", "w", (6, 4), at=(1, 0))
    with pytest.raises(LayoutError, match="only sinks declare padding"):
        builder.constant("w", 0, (24,), (1,), 0)
    with pytest.raises(EncodingError, match=r"BF16 cannot hold the constant 0\.1"):
        _builder("sink").constant("w", 0, (24,), (1,), 0.1)
    with pytest.raises(LayoutError, match="unknown, or n and stride differ"):
        _builder("sink").constant("w", 0, (24,), (1, 1), 0)


def test_place_puts_boxes_where_numpy_would() -> None:
    view = np.arange(2 * 3 * 5).reshape(2, 3, 5)
    builder = ManifestBuilder("source", "source 0")
    builder.tensor("w", (10, 7))
    builder.buffer("b", "F32", view.size)
    # Rows 1, 4, 7 of w go down dim 1, columns 2..5 of w go across dim 2, in slice 1 of dim 0.
    builder.place("w", "b", view.shape, at=(1, 0, 1), lo=(1, 2), n=(3, 4), step=(3, 1), axes=(1, 2))
    builder.place("w", "b", view.shape, at=(0, 0, 0), lo=(0, 0), n=(5, 2), axes=(2, 0))
    pieces = builder.build().pieces
    for row, expected in ((0, view[0:2, 0, 0:5].T), (1, view[1, 0:3, 1:5])):
        i, j = np.indices(expected.shape)
        address = pieces.offset[row] + i * pieces.stride[row, 2] + j * pieces.stride[row, 3]
        assert np.array_equal(address, expected)
    assert pieces.step[1].tolist() == [1, 1, 3, 1]


def test_scalars_and_empty_shards() -> None:
    builder = ManifestBuilder("sink", "sink 0")
    builder.tensor("scale", ())
    builder.tensor("elsewhere", (8, 8))
    builder.buffer("scale", Dtype.F32, 1)
    builder.buffer("nothing", "U8", 0)
    builder.place("scale", "scale", (1,))
    builder.place("elsewhere", "nothing", (0, 8), lo=(8, 0), n=(0, 8))
    manifest = builder.build()
    assert len(manifest.pieces) == 1
    assert manifest.tensors.shape.tolist() == [[1, 1, 8, 8], [1, 1, 1, 1]]
    assert manifest.tensors.ndim.tolist() == [2, 1]


def test_arenas_are_aligned_and_start_at_zero_for_every_rank() -> None:
    manifests = []
    for rank in range(2):
        builder = ManifestBuilder("source", f"source {rank}")
        for number, numel in enumerate((1, 200, 3)):
            builder.buffer(f"b{number}", "F32", numel)
        manifests.append(builder.build())
    merged = Manifest.merge("source", manifests)
    for rank in range(2):
        arena = Arena(merged, rank)
        assert arena.buffers.tolist() == [3 * rank, 3 * rank + 1, 3 * rank + 2]
        assert arena.offset_bytes.tolist() == [0, 256, 1280]
        assert arena.nbytes == 1292
    assert Arena(Manifest.merge("sink", []), 0).nbytes == 0


def test_merge_names_both_ranks_of_a_conflict() -> None:
    other = ManifestBuilder("source", "source 1")
    other.tensor("w", (4, 6))
    with pytest.raises(LayoutError, match=r"\(6, 4\) on source 0 but \(4, 6\) on source 1"):
        Manifest.merge("source", [_builder().build(), other.build()])
    with pytest.raises(LayoutError, match="source 0 is a source, not a sink"):
        Manifest.merge("sink", [_builder().build()])
    with pytest.raises(LayoutError, match="unique"):
        Manifest.merge("source", [_builder().build(), _builder().build()])


def test_merge_refuses_encodings_that_do_not_go_together() -> None:
    def sink(rank: int, values: str, codes: str, scales: str) -> Manifest:
        builder = ManifestBuilder("sink", f"sink {rank}")
        for name in (values, codes):
            builder.tensor(name, (128, 128))
        builder.tensor(scales, (1, 1))
        builder.encode("fp8_block", values, codes, scales)
        return builder.build()

    Manifest.merge("sink", [sink(0, "w", "w", "s"), sink(1, "v", "v", "t")])
    with pytest.raises(LayoutError, match="two sinks encode it by different recipes or from"):
        Manifest.merge("sink", [sink(0, "w", "w", "s"), sink(1, "v", "w", "s")])
    with pytest.raises(LayoutError, match="overlap"):
        Manifest.merge("sink", [sink(0, "w", "w", "s"), sink(1, "v", "v", "s")])


def test_tables_out_of_canonical_order_are_refused() -> None:
    builder = _builder()
    builder.piece("w", "w", lo=(0, 0), n=(3, 4), offset=0, stride=(4, 1))
    builder.piece("w", "w", lo=(3, 0), n=(3, 4), offset=12, stride=(4, 1))
    manifest = builder.build()
    with pytest.raises(LayoutError, match="canonical order"):
        dataclasses.replace(manifest, pieces=manifest.pieces.take(np.array([1, 0])))
    columns = {name: getattr(manifest.pieces, name) for name in PieceTable.COLUMNS}
    with pytest.raises(LayoutError, match="column lo of PieceTable has shape"):
        PieceTable(**columns | {"lo": np.zeros((2, 3), np.int64)})
    with pytest.raises(ValueError, match="read-only"):
        manifest.pieces.offset[0] = 1


def test_bytes_round_trip_and_bad_bytes_are_named() -> None:
    manifest = _one((0, 0), (6, 4))
    data = manifest.to_bytes()
    assert Manifest.from_bytes(data) == manifest
    for bad, words in (
        (b"", "wrong magic or size"),
        (b"x" + data[1:], "wrong magic or size"),
        (data[:-1], "header announces"),
        (data + b"\0", "header announces"),
        (data.replace(b"manifest/1", b"manifest/3"), "both sides need the same release"),
        (data.replace(b'"side":"source"', b'"side":"middle"'), "unknown side"),
        (data[:8] + b"\xff\xff\xff\x7f" + data[12:], "header of"),
        (data[:12] + b"\xff" + data[13:], "not JSON"),
    ):
        with pytest.raises(ConfigError, match=words):
            Manifest.from_bytes(bad)
