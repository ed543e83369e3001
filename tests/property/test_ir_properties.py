"""The algebra of pieces against sets, masks and plain indexing; bytes against fuzzing."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support import scaled
from support.encode_fleets import Fp8Fleet, Mxfp4Fleet
from support.scenarios import random_scenario
from weightsync.errors import ConfigError, LayoutError
from weightsync.ir import Manifest, cover, locate_rows
from weightsync.ir.cover import covers_once
from weightsync.ir.encoded import Encoded
from weightsync.ir.pieces import PieceTable, intersect_progressions, is_nested, sorted_pieces
from weightsync.ir.tables import (
    distinct,
    expand,
    front_pad,
    owners,
    ranges,
    unique_rows,
    unique_runs,
)

progressions = st.tuples(st.integers(0, 40), st.integers(1, 12), st.integers(1, 9))
rows = st.tuples(
    st.integers(0, 12),
    st.lists(st.integers(1, 4), min_size=4, max_size=4),
    st.lists(st.integers(0, 12), min_size=4, max_size=4),
)


def _progression(lo: int, n: int, step: int) -> set[int]:
    return {lo + step * i for i in range(n)}


def _addresses(offset: int, n: list[int], stride: list[int]) -> list[int]:
    return [
        offset + sum(i * s for i, s in zip(index, stride, strict=True))
        for index in itertools.product(*(range(k) for k in n))
    ]


@settings(max_examples=scaled(60, 2000))
@given(st.lists(st.tuples(progressions, progressions), min_size=1, max_size=40))
def test_progressions_intersect_like_sets(pairs: list[tuple[tuple[int, ...], ...]]) -> None:
    a, b = (np.array(side, np.int64).T for side in zip(*pairs, strict=True))
    lo, n, step = intersect_progressions(*a, *b)
    for i, (left, right) in enumerate(pairs):
        expected = _progression(*left) & _progression(*right)
        assert _progression(int(lo[i]), int(n[i]), int(step[i])) == expected


def test_progressions_with_large_steps_do_not_overflow() -> None:
    big = (1 << 31) - 1
    lo, n, step = intersect_progressions(
        *(np.array([v]) for v in (0, 1 << 20, big)), *(np.array([v]) for v in (0, 1 << 20, big - 1))
    )
    assert (lo[0], n[0], step[0]) == (0, 1, 1)  # the next common multiple is big * (big - 1)


@settings(max_examples=scaled(100, 3000))
@given(st.lists(st.tuples(st.integers(0, 1), rows), min_size=1, max_size=6), st.integers(1, 40))
def test_cover_agrees_with_a_mask(
    items: list[tuple[int, tuple[int, list[int], list[int]]]], numel: int
) -> None:
    columns = list(zip(*(row for _, row in items), strict=True))
    buffer = np.array([b for b, _ in items])
    with mock.patch.object(cover, "_BLOCK", 2):
        good = covers_once(
            buffer,
            np.array(columns[0], np.int64),
            np.array(columns[1], np.int64),
            np.array(columns[2], np.int64),
            np.array([numel, numel], np.int64),
        )
    for b in range(2):
        hits = sorted(a for i, row in items if i == b for a in _addresses(*row))
        assert good[b] == (hits == list(range(numel)))


@settings(max_examples=scaled(60, 2000))
@given(st.integers(0, 2**32 - 1))
def test_cover_accepts_random_tilings_and_refuses_any_change(seed: int) -> None:
    rng = random.Random(seed)
    shape = [rng.randint(1, 5) for _ in range(4)]
    order = list(range(4))
    rng.shuffle(order)
    dense = [0] * 4
    size = 1
    for dim in order:  # the first is the innermost
        dense[dim], size = size, size * shape[dim]
    offset, n, stride = [], [], []
    dim, parts = rng.randrange(4), rng.randint(1, 3)
    for part in range(parts):  # interleaved along one dim
        count = len(range(part, shape[dim], parts))
        if count:
            offset.append(part * dense[dim])
            n.append([count if d == dim else shape[d] for d in range(4)])
            stride.append([dense[d] * (parts if d == dim else 1) for d in range(4)])
    args = [np.zeros(len(n), np.int64), np.array(offset), np.array(n), np.array(stride)]
    assert covers_once(*args, np.array([size])).all()
    row = rng.randrange(len(n))
    changed = args[1].copy()
    changed[row] += 1
    assert not covers_once(args[0], changed, *args[2:], np.array([size])).any()
    assert not covers_once(*args, np.array([size + 1])).any()
    twice = [np.concatenate([a, a[row : row + 1]]) for a in args]
    assert not covers_once(*twice, np.array([size])).any()


@settings(max_examples=scaled(40, 1000))
@given(st.lists(rows, min_size=1, max_size=10))
def test_nested_rows_never_repeat_an_address(
    items: list[tuple[int, list[int], list[int]]],
) -> None:
    n, stride = np.array([r[1] for r in items]), np.array([r[2] for r in items])
    for good, row in zip(is_nested(n, stride), items, strict=True):
        addresses = _addresses(*row)
        assert not good or len(set(addresses)) == len(addresses)


@settings(max_examples=scaled(40, 1000))
@given(st.integers(0, 2**32 - 1))
def test_rows_are_located_where_their_pieces_say(seed: int) -> None:
    rng = random.Random(seed)
    manifest = random_scenario(rng).manifests()[1]
    pieces = manifest.pieces
    if not len(pieces):
        return
    chosen = [rng.randrange(len(pieces)) for _ in range(8)]
    offset, n, stride, lo, step = [], [], [], [], []
    for piece in chosen:  # a random stepped part of the piece
        first = [rng.randrange(k) for k in pieces.n[piece].tolist()]
        factor = [rng.randint(1, 2) for _ in first]
        space = zip(pieces.n[piece].tolist(), first, factor, strict=True)
        count = [rng.randint(1, (k - 1 - a) // f + 1) for k, a, f in space]
        offset.append(int(pieces.offset[piece] + (first * pieces.stride[piece]).sum()))
        n.append(count)
        stride.append(np.where(np.array(count) > 1, pieces.stride[piece] * factor, 0))
        lo.append((pieces.lo[piece] + pieces.step[piece] * first).tolist())
        step.append(np.where(np.array(count) > 1, pieces.step[piece] * factor, 1).tolist())
    args = (pieces.buffer[chosen], np.array(offset), np.array(n), np.array(stride))
    for tensor in (None, pieces.tensor[chosen]):
        found = locate_rows(manifest, *args, tensor)
        assert [c.tolist() for c in found] == [chosen, lo, step]
    none, _, _ = locate_rows(manifest, *args, pieces.tensor[chosen] + 1000)
    assert (none == -1).all()
    empty = np.array(n)
    empty[:, rng.randrange(4)] = rng.randint(-1, 0)
    none, _, _ = locate_rows(manifest, args[0], args[1], empty, args[3])
    assert (none == -1).all()


@settings(max_examples=scaled(40, 1000))
@given(st.integers(0, 2**32 - 1))
def test_what_is_made_of_valid_manifests_is_valid(seed: int) -> None:
    """Merging trusts what it merges, encoding what it encodes; reading checks everything."""
    rng = random.Random(seed)
    made = [*random_scenario(rng).manifests()]
    for fleet in (Fp8Fleet(rng), Mxfp4Fleet(rng)):
        source, sink = fleet.manifests()
        made += [source, sink, Encoded.of(source, sink).source]
    for manifest in made:
        assert Manifest.from_bytes(manifest.to_bytes()) == manifest


@settings(max_examples=scaled(40, 500))
@given(st.lists(st.lists(st.integers(0, 2), max_size=3), min_size=1, max_size=30))
def test_unique_runs_finds_equal_lists(lists: list[list[int]]) -> None:
    flat = np.array([v for values in lists for v in values], np.int64)
    counts = np.array([len(values) for values in lists])
    first, inverse = unique_runs(counts, [flat])
    assert [lists[i] for i in first[inverse]] == lists
    assert len(first) == len({tuple(values) for values in lists})
    assert first.tolist() == sorted(first.tolist())
    padded = front_pad(lists, 9)
    rows_first, rows_inverse = unique_rows([counts, padded])
    assert (rows_first.tolist(), rows_inverse.tolist()) == (first.tolist(), inverse.tolist())
    owner, local = expand(counts)
    assert [(o, i) for o, values in enumerate(lists) for i in range(len(values))] == list(
        zip(owner.tolist(), local.tolist(), strict=True)
    )
    assert owners(counts).tolist() == owner.tolist()
    start = np.arange(len(lists)) * 10
    assert ranges(start, counts).tolist() == [10 * o + i for o, i in zip(owner, local, strict=True)]


@settings(max_examples=scaled(40, 500))
@given(st.lists(st.integers(0, 9)))
def test_distinct_values_are_numbered_in_order(values: list[int]) -> None:
    found, number = distinct(np.array(values, np.int64), 10)
    assert found.tolist() == sorted(set(values))
    assert found[number].tolist() == values


@settings(max_examples=scaled(40, 1000))
@given(st.integers(0, 2**32 - 1))
def test_pieces_of_several_tables_are_sorted_by_all_that_tells_them_apart(seed: int) -> None:
    rng = random.Random(seed)
    rows = [[rng.randint(-1, 1), *(rng.randint(0, 1) for _ in range(18))]]
    for _ in range(rng.randint(0, 11)):  # most differ from another in one number only
        row = list(rng.choice(rows))
        row[rng.randrange(19)] ^= 1
        rows.append(row)
    made = sorted_pieces(*(_pieces(rows[first : first + 3]) for first in range(0, len(rows), 3)))
    names = ("tensor", "buffer", "lo", "offset", "n", "step", "stride")
    columns = [getattr(made, name).reshape(len(rows), -1) for name in names]
    assert np.concatenate(columns, axis=1).tolist() == sorted(rows)


@pytest.mark.parametrize("length", [0, 2, 4])
def test_a_mask_of_another_length_selects_nothing(length: int) -> None:
    pieces = _pieces([[0] * 19] * 3)
    with pytest.raises(IndexError, match=f"mask of {length} rows for a table of 3"):
        pieces.take(np.zeros(length, np.bool_))
    assert len(pieces.take(np.array([True, False, True]))) == 2


def _pieces(rows: list[list[int]]) -> PieceTable:
    """Make pieces of numbers in the order of their significance."""
    columns = np.array(rows, np.int64)
    return PieceTable(
        tensor=columns[:, 0].astype(np.int32),
        buffer=columns[:, 1].astype(np.int32),
        lo=columns[:, 2:6],
        offset=columns[:, 6],
        n=columns[:, 7:11],
        step=columns[:, 11:15],
        stride=columns[:, 15:19],
        fill=np.zeros(len(rows)),
    )


@settings(max_examples=scaled(60, 5000))
@given(st.integers(0, 2**32 - 1))
def test_bytes_of_a_stranger_never_do_worse_than_a_typed_error(seed: int) -> None:
    rng = random.Random(seed)
    data = bytearray(random_scenario(rng).manifests()[rng.randrange(2)].to_bytes())
    for _ in range(rng.randint(1, 3)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    if rng.random() < 0.2:
        del data[rng.randrange(len(data)) :]
    try:
        manifest = Manifest.from_bytes(bytes(data))
    except (ConfigError, LayoutError):
        return
    assert manifest.to_bytes() == bytes(data)  # whatever is accepted is canonical


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b",", b", ", 1),
        lambda text: b"{" + text[1:-1].replace(b'"side"', b'"side":"sink","side"', 1) + b"}",
        lambda text: b'{"side":"source",' + text[1:],
        lambda text: text + b" ",
    ],
    ids=["a space", "a key twice", "another order", "a space behind"],
)
def test_a_header_in_another_form_is_refused(change: Callable[[bytes], bytes]) -> None:
    data = random_scenario(random.Random(1)).manifests()[0].to_bytes()
    size = int.from_bytes(data[8:12], "little")
    text = change(data[12 : 12 + size])
    with pytest.raises(ConfigError, match="canonical"):
        Manifest.from_bytes(data[:8] + len(text).to_bytes(4, "little") + text + data[12 + size :])
