"""Manifests on the wire: the same afterwards, each content once, nothing that is not one."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightsync.errors import ConfigError
from weightsync.service import manifests
from weightsync.service import weightsync_pb2 as pb
from weightsync.service.manifests import deflate, fill_bind, inflate, members_of, place_of

contents = st.lists(st.binary(max_size=6), min_size=1, max_size=8)


@given(contents, contents)
def test_members_get_what_members_sent(of_sources: list[bytes], of_sinks: list[bytes]) -> None:
    sides = [
        [(f"{side} {number}", content) for number, content in enumerate(held)]
        for side, held in (("source", of_sources), ("sink", of_sinks))
    ]
    bind = pb.Bind()
    fill_bind(bind, *([(label, deflate(held)) for label, held in side] for side in sides))
    found = pb.Bind.FromString(bind.SerializeToString())
    assert [inflate(side) for side in members_of(found)] == sides
    assert len(found.manifests) == len({*of_sources, *of_sinks})
    for number, (label, _) in enumerate(sides[1]):
        assert place_of(found.sinks, label) == number


def test_equal_manifests_are_one_object() -> None:
    one, other = inflate([("a", deflate(b"x" * 1000)), ("b", deflate(b"x" * 1000))])
    assert one[1] is other[1]


@pytest.mark.parametrize(
    "data",
    [b"", b"no deflated bytes", deflate(b"y" * 100)[:-3], deflate(b"y") + b"more", b"\x78"],
    ids=["nothing", "another format", "cut off", "too long", "a header"],
)
def test_what_is_no_deflated_manifest_is_named(data: bytes) -> None:
    with pytest.raises(ConfigError, match="manifest of sink b/3"):
        inflate([("sink a/0", deflate(b"fine")), ("sink b/3", data)])


def test_a_few_bytes_do_not_become_more_memory_than_a_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(manifests, "_MOST", 1000)
    assert inflate([("a", deflate(bytes(1000)))]) == [("a", bytes(1000))]
    with pytest.raises(ConfigError, match="larger than 1000 bytes"):
        inflate([("a", zlib.compress(bytes(100_000)))])
