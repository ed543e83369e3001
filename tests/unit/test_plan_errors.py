"""What the planner refuses, by which error, and that the message names what is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from weightsync.errors import (
    ConfigError,
    CoverageError,
    DtypeMismatchError,
    LayoutError,
    PlanBudgetError,
    PlanError,
    UnknownTensorError,
)
from weightsync.ir import Manifest, ManifestBuilder, NestTable, Plan, PlanOptions, RowKind
from weightsync.ir.repeat import repeat_ranks
from weightsync.ir.validate import validate_content, validate_structure
from weightsync.planners.planner import plan_transfer

Box = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def _side(side: str, *ranks: dict[str, Any], dtype: str = "BF16") -> Manifest:
    """Build one manifest per dict: name -> shape, or (shape, boxes)."""
    manifests = []
    for number, tensors in enumerate(ranks):
        builder = ManifestBuilder(side, f"{side} {number}")  # type: ignore[arg-type]
        for name, spec in tensors.items():
            shape, boxes = spec if isinstance(spec[0], tuple) else (spec, None)
            ones = (1,) * len(shape)
            builder.tensor(name, shape)
            for i, (lo, n, step) in enumerate(boxes or [((0,) * len(shape), shape, ones)]):
                builder.buffer(f"{name}.{i}", dtype, int(np.prod(n)))
                builder.place(name, f"{name}.{i}", n, lo=lo, n=n, step=step)
        manifests.append(builder.build())
    return Manifest.merge(side, manifests)  # type: ignore[arg-type]


def _plan() -> Plan:
    source = _side("source", {"w": ((8, 4), [((0, 0), (5, 4), (1, 1))])}, {"w": (8, 4)})
    return plan_transfer(source, _side("sink", {"w": (8, 4)}, {"w": (8, 4)}))


def test_missing_and_extra_tensors_are_both_listed() -> None:
    source = _side("source", {"a": (2,), "both": (2,), "frozen": (3,)})
    sink = _side("sink", {"both": (2,), "z": (2,)})
    with pytest.raises(UnknownTensorError) as caught:
        plan_transfer(source, sink)
    assert (caught.value.missing, caught.value.extra) == (["z"], ["a", "frozen"])
    assert "z" in str(caught.value)
    assert "a, frozen" in str(caught.value)
    options = PlanOptions(ignore_extra=("a", "frozen"))
    with pytest.raises(UnknownTensorError) as caught:
        plan_transfer(source, sink, options)
    assert caught.value.extra == []
    plan = plan_transfer(source, _side("sink", {"both": (2,)}), options)
    assert plan.tensor_in_source[plan.rows.tensor].tolist() == [source.tensors.index["both"]]


def test_shapes_must_agree() -> None:
    with pytest.raises(LayoutError, match=r"w is \(4, 2\) on the source but \(2, 4\) on the sink"):
        plan_transfer(_side("source", {"w": (4, 2)}), _side("sink", {"w": (2, 4)}))
    with pytest.raises(LayoutError, match=r"\(4,\) on the source but \(1, 4\)"):
        plan_transfer(_side("source", {"w": (4,)}), _side("sink", {"w": (1, 4)}))
    with pytest.raises(LayoutError, match="not sink to source"):
        plan_transfer(_side("sink", {"w": (4,)}), _side("source", {"w": (4,)}))


def test_casts_that_do_not_exist_name_both_ranks_and_dtypes() -> None:
    source = _side("source", {"w": (4, 4)}, {"w": (4, 4)})
    sink = _side("sink", {"w": (4, 4)}, dtype="F16")
    with pytest.raises(DtypeMismatchError, match="source 0 holds BF16 but sink 0 needs F16") as e:
        plan_transfer(source, sink)
    facts = (e.value.tensor, e.value.source, e.value.sink, e.value.src_dtype, e.value.dst_dtype)
    assert facts == ("w", "source 0", "sink 0", "BF16", "F16")


@pytest.mark.parametrize(
    ("held", "uncovered", "missing"),
    [
        ([((0, 0), (5, 6), (1, 1))], "[5:8, 0:6]", 18),
        ([((0, 0), (8, 2), (1, 1)), ((0, 3), (8, 3), (1, 1))], "[0:8, 2:3]", 8),
        ([((0, 0), (4, 6), (2, 1))], "[1:2, 0:6]", 24),
        ([((0, 0), (4, 6), (1, 1)), ((4, 0), (4, 5), (1, 1))], "[4:8, 5:6]", 4),
    ],
)
def test_a_gap_is_named_with_its_box(held: list[Box], uncovered: str, missing: int) -> None:
    source = _side("source", {"w": ((8, 6), held)})
    sink = _side("sink", {"w": (8, 6)})
    with pytest.raises(CoverageError) as caught:
        plan_transfer(source, sink)
    error = caught.value
    assert (error.tensor, error.rank, error.side) == ("w", "sink 0", "sink")
    assert (error.box, error.uncovered) == ("[0:8, 0:6]", uncovered)
    assert f"({missing} elements in all)" in str(error)


def test_a_tensor_that_nobody_holds_is_a_gap() -> None:
    builder = ManifestBuilder("source", "source 0")
    builder.tensor("w", (3,))
    with pytest.raises(CoverageError, match=r"no source holds \[0:3\]"):
        plan_transfer(builder.build(), _side("sink", {"w": (3,)}))


def test_overlaps_with_different_steps_are_refused() -> None:
    even = ((0, 0), (4, 4), (2, 1))
    source = _side("source", {"w": (8, 4)}, {"w": ((8, 4), [even])})
    with pytest.raises(LayoutError, match="overlap with different steps") as caught:
        plan_transfer(source, _side("sink", {"w": (8, 4)}))
    assert caught.value.tensor == "w"
    assert "[0:7:2, 0:4] on source 1" in str(caught.value)
    assert "on source 0" in str(caught.value)


def test_the_row_budget_is_checked_before_rows_are_made() -> None:
    options = PlanOptions(max_rows=3)
    source = _side("source", *({"w": ((8, 4), [((2 * r, 0), (2, 4), (1, 1))])} for r in range(4)))
    with pytest.raises(PlanBudgetError, match=r"4 regions, more than max_rows \(3\)"):
        plan_transfer(source, _side("sink", {"w": (8, 4)}), options)
    columns = ((0, 0), (64, 2), (1, 1)), ((0, 2), (64, 2), (1, 1))
    source = _side("source", *({"w": ((64, 4), [box])} for box in columns))
    with pytest.raises(PlanBudgetError, match=r"w into 128 rows, more than max_rows \(50\)") as e:
        plan_transfer(source, _side("sink", {"w": (64, 4)}), PlanOptions(max_rows=50))
    assert (e.value.tensor, e.value.rows, e.value.budget) == ("w", 128, 50)


@pytest.mark.parametrize("name", ["bucket_bytes", "chunk_bytes", "slot_bytes", "max_rows"])
def test_options_that_fit_no_plan_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        PlanOptions(**{name: 0})


def _with(plan: Plan, table: str, **columns: Callable[[Any], None]) -> Plan:
    """Return a plan with columns of one table changed in place by functions."""
    old = getattr(plan, table)
    new = {}
    for name, change in columns.items():
        new[name] = np.array(getattr(old, name))
        change(new[name])
    return dataclasses.replace(plan, **{table: dataclasses.replace(old, **new)})


def _set(index: Any, value: Any) -> Callable[[Any], None]:
    return lambda column: column.__setitem__(index, value)


def test_rows_are_of_the_kinds_that_their_tensors_need() -> None:
    with pytest.raises(PlanError, match="encodes what is to be copied"):
        _with(_plan(), "rows", kind=_set(-1, RowKind.ENCODE)).validate()
    with pytest.raises(PlanError, match="kind MAX, which no row of a plan has"):
        _with(_plan(), "rows", kind=_set(-1, RowKind.MAX)).validate()
    with pytest.raises(PlanError, match="rows of a source and rows that a sink passes on"):
        _with(_plan(), "rows", kind=_set(-1, RowKind.HOP)).validate()
    with pytest.raises(PlanError, match="must come after those that sources send"):
        _with(_plan(), "rows", kind=_set(0, RowKind.HOP)).validate()


@pytest.mark.parametrize(
    ("table", "columns", "words"),
    [
        ("nests", {"n": _set((0, 2), 0)}, "has no elements"),
        ("rows", {"dst_buffer": _set(0, 9)}, "has no sink buffer"),
        ("rows", {"src_buffer": _set(0, -1)}, "has no source buffer"),
        ("rows", {"tensor": _set(0, 5)}, "has no tensor"),
        ("rows", {"src_offset": _set(0, 1 << 40)}, "leaves the buffer that it reads"),
        ("rows", {"dst_offset": _set(0, 1 << 40)}, "leaves its sink buffer"),
        ("nests", {"src_stride": _set((0, 0), 3)}, "strides that are not canonical"),
        ("rows", {"nest": _set(0, 99)}, "has no counts and strides"),
        ("rows", {"nest": _set(0, -1)}, "has no counts and strides"),
        ("chunks", {"is_packed": _set(slice(None), False)}, "shares a chunk that is not packed"),
        ("rows", {"chunk": _set(0, 1)}, "another chunk"),
        ("rows", {"src_offset": _set(0, 4)}, "reads other elements"),
        ("chunks", {"nbytes": _set(0, 8)}, "leaves its chunk"),
        ("chunks", {"number": _set(0, 7)}, "another bucket or place"),
        ("chunks", {"row_lo": _set(0, 1)}, "without gaps"),
        ("buckets", {"src_rank": _set(0, 7)}, "unknown rank"),
        ("buckets", {"dst_rank": _set(slice(None), 1)}, "bucket of other ranks"),
        ("buckets", {"nbytes": _set(0, 1)}, "not the sum of its chunks"),
    ],
)
def test_each_contradiction_is_named(table: str, columns: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        _with(_plan(), table, **columns).validate()


def test_what_lies_apart_is_packed() -> None:
    left = ((0, 0), (4, 2), (1, 1))
    plan = plan_transfer(_side("source", {"w": (4, 4)}), _side("sink", {"w": ((4, 4), [left])}))
    assert (len(plan.rows), plan.chunks.is_packed.tolist()) == (1, [True])
    with pytest.raises(PlanError, match="not contiguous on both sides, yet not packed"):
        _with(plan, "chunks", is_packed=_set(0, False)).validate()


def test_counts_and_strides_are_listed_once_and_used() -> None:
    plan = _plan()
    nests = plan.nests
    for table in (NestTable.concat([nests, nests]), NestTable.concat([nests, _nest(7)])):
        with pytest.raises(PlanError, match="listed twice, or such that no row has"):
            dataclasses.replace(plan, nests=table).validate()
    with pytest.raises(PlanError, match="has no counts and strides"):
        dataclasses.replace(plan, nests=NestTable.empty()).validate()


@pytest.mark.parametrize("replicas", [1, 2])
def test_constants_are_those_of_the_manifest(replicas: int) -> None:
    builder = ManifestBuilder("sink", "sink 0")
    builder.tensor("w", (3,))
    builder.buffer("w", "F32", 8)
    builder.place("w", "w", (3,))
    builder.constant("w", 3, (5,), (1,), 0.0)
    sink = builder.build()
    if replicas > 1:
        sink = repeat_ranks(sink, [[f"sink {number}"] for number in range(replicas)])
    plan = plan_transfer(_side("source", {"w": (3,)}), sink)
    for changed in (
        _with(plan, "rows", dst_offset=_set(-1, 2)),
        _with(plan, "nests", n=_set((-1, 3), 4)),
    ):
        with pytest.raises(PlanError, match="a constant row differs from its piece"):
            changed.validate()
    with pytest.raises(PlanError, match="has no counts and strides"):
        _with(plan, "rows", nest=_set(-1, 9)).validate()


def _nest(n: int) -> NestTable:
    """Return counts and strides of `n` elements side by side."""
    stride = np.array([[0, 0, 0, 1]])
    return NestTable(n=np.array([[1, 1, 1, n]]), src_stride=stride, dst_stride=stride)


def test_structure_and_content_are_proved_apart() -> None:
    plan = _plan()
    rows = plan.rows
    # Swap what two rows read: every byte is still written once, but with the wrong elements.
    same = np.flatnonzero(rows.src_buffer == rows.src_buffer[0])
    moved = _with(plan, "rows", src_offset=_set(same[0], rows.src_offset[same[0]] + 4))
    validate_structure(moved)
    with pytest.raises(PlanError, match="reads other elements of the tensor") as caught:
        validate_content(moved)
    assert (caught.value.tensor, caught.value.rank) == ("w", "sink 0")
    # Write the second row of a packed chunk over its first: the right elements, but a byte twice.
    doubled = _with(plan, "rows", dst_offset=_set(slice(None), 0), src_offset=_set(slice(None), 0))
    with pytest.raises((CoverageError, PlanError)):
        validate_structure(doubled)


def _hop_plan() -> Plan:
    """Return a plan in which one source serves three sinks of one node, alike."""
    tensors = {"v": (6,), "w": (9, 4)}
    sink = _side("sink", tensors, tensors, tensors)
    options = PlanOptions(ranks_per_node=3, node_dedup="on", bucket_bytes=64)
    return plan_transfer(_side("source", tensors), sink, options)


def test_edges_are_the_buckets_that_hops_read() -> None:
    plan = _plan()
    for edges, words in (
        ([[0, 0]], "joins a bucket to itself"),
        ([[0, 99]], "unknown bucket"),
        ([[0, 1]], "a bucket wait that is no hop"),
    ):
        with pytest.raises(PlanError, match=words):
            dataclasses.replace(plan, edges=np.array(edges, np.int32)).validate()
    plan = _hop_plan()
    assert plan.num_direct < len(plan.buckets)
    for edges, words in (
        (plan.edges[1:], "does not wait for it"),
        (np.concatenate([plan.edges, [[0, 1]]]), "a bucket wait that is no hop"),
        (
            np.concatenate([plan.edges, [[len(plan.buckets) - 1, plan.num_direct]]]),
            "others receive",
        ),
    ):
        with pytest.raises(PlanError, match=words):
            dataclasses.replace(plan, edges=edges.astype(np.int32)).validate()
    assert Plan.from_bytes(plan.to_bytes()) == plan
    fewer = dataclasses.replace(plan, edges=plan.edges[1:])
    assert fewer.digest != plan.digest


def test_hops_that_wait_for_each_other_are_refused() -> None:
    plan = _hop_plan()
    # Of two neighbours each is told to get from the other what both got from the source.
    buckets, edges = plan.buckets, plan.edges
    first = plan.num_direct
    back = next(
        b
        for b in range(first + 1, len(buckets))
        if (buckets.src_rank[b], buckets.dst_rank[b])
        == (buckets.dst_rank[first], buckets.src_rank[first])
    )
    loop = np.array([[first, back], [back, first]], np.int32)
    with pytest.raises(PlanError, match="form a cycle"):
        dataclasses.replace(plan, edges=np.concatenate([edges, loop])).validate()


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"src_offset": _set(-1, 0), "dst_offset": _set(-1, 0)}, "leaves its chunk"),
        ({"src_offset": lambda column: column.__setitem__(-1, column[-1] - 1)}, "not wait for it"),
        ({"src_buffer": _set(-1, 99)}, "has no sink to read from"),
        ({"src_buffer": lambda column: column.__setitem__(-1, column[-1] - 2)}, "of other ranks"),
        ({"src_offset": _set(-1, 1 << 40)}, "leaves the buffer that it reads"),
    ],
)
def test_hops_that_pass_on_something_else_are_refused(columns: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        _with(_hop_plan(), "rows", **columns).validate()


def test_hops_read_as_they_write() -> None:
    plan = _hop_plan()
    last = plan.nest_of(slice(len(plan.rows) - 1, None))
    apart = dataclasses.replace(last, src_stride=np.zeros_like(last.src_stride))
    plan = dataclasses.replace(plan, nests=NestTable.concat([plan.nests, apart]))
    with pytest.raises(PlanError, match="something else than a range of memory"):
        _with(plan, "rows", nest=_set(-1, len(plan.nests) - 1)).validate()


def test_hops_are_not_packed_and_go_to_others() -> None:
    plan = _hop_plan()
    packed = _with(plan, "chunks", is_packed=_set(-1, True))
    nbytes = int(plan.chunks.nbytes[-1])
    packed = _with(packed, "buckets", staging_bytes=_set(-1, nbytes))
    with pytest.raises(PlanError, match="range of memory"):
        validate_structure(packed)
    with pytest.raises(PlanError, match="not sorted by sender"):
        _with(plan, "buckets", src_rank=_set(-1, 0)).validate()


def test_a_plan_over_its_own_budgets_is_refused() -> None:
    plan = _plan()
    for options, words in (
        (PlanOptions(chunk_bytes=8), "bytes of a chunk"),
        (PlanOptions(bucket_bytes=8), "bytes of a chunk"),
        (PlanOptions(max_rows=1), "rows"),
    ):
        with pytest.raises(PlanBudgetError, match=words):
            dataclasses.replace(plan, options=options).validate()
