"""Digests in columns: packed by sources, sorted by the coordinator, read by sinks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightsync.service import weightsync_pb2 as pb
from weightsync.service.digests import by_sink, digests_fault, pack_digests, unpack_digests

NUMBERS = st.lists(st.integers(0, 2**64 - 1), max_size=3)
SAID = st.dictionaries(st.integers(0, 5), st.dictionaries(st.integers(0, 7), NUMBERS), max_size=5)


@given(SAID)
def test_each_sink_gets_what_each_source_said_of_it(said: dict[int, dict[int, list[int]]]) -> None:
    messages = {
        source: pack_digests({sink: np.array(v, np.uint64) for sink, v in of_sink.items()})
        for source, of_sink in said.items()
    }
    for message in messages.values():
        assert not digests_fault(message)
    found = {
        (source, sink): values.tolist()
        for sink, message in by_sink(messages).items()
        for source, values in unpack_digests(message).items()
    }
    expected = {(s, k): values for s, of_sink in said.items() for k, values in of_sink.items()}
    assert found == expected


@pytest.mark.parametrize(
    "message",
    [
        pb.Digests(peers=bytes(3), counts=bytes(3)),
        pb.Digests(peers=bytes(8), counts=bytes(4)),
        pb.Digests(peers=bytes(4), counts=bytes(4), values=bytes(8)),
        pb.Digests(peers=bytes(4), counts=b"\x01\0\0\0", values=bytes(7)),
        pb.Digests(peers=bytes(4), counts=b"\xff\xff\xff\xff", values=bytes(8)),
    ],
)
def test_columns_that_do_not_fit_are_refused(message: pb.Digests) -> None:
    assert "do not fit" in digests_fault(message)
