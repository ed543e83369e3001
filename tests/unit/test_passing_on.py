"""A sink that passes on waits until it is told that those it writes to are armed."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from weightsync.errors import TransferTimeoutError
from weightsync.runtime.executor import Outcome
from weightsync.service.passing_on import PassingOn

SOON_S = 10.0


class _Forwarder:
    """Says when it begins to write."""

    def __init__(self) -> None:
        self.began = threading.Event()

    def run(self, *args: Any, **kwargs: Any) -> Outcome:
        self.began.set()
        return Outcome(digests={1: np.array([7], np.uint64)}, lost_sinks=set(), nbytes=8, times={})


@pytest.fixture
def parts() -> tuple[PassingOn, _Forwarder]:
    hops = PassingOn(SimpleNamespace(bases=lambda: np.zeros(1, np.int64)), "sink a/0")  # type: ignore[arg-type]
    forwarder = _Forwarder()
    hops._forwarder = forwarder  # type: ignore[assignment]
    return hops, forwarder


def test_it_begins_when_it_is_told_to_write_this_version(
    parts: tuple[PassingOn, _Forwarder],
) -> None:
    hops, forwarder = parts
    sent: list[dict[str, Any]] = []
    hops.begin(2)  # before it is armed: of no use
    deadline = time.monotonic() + SOON_S
    with hops.during(2, deadline, threading.Event(), lambda **kind: sent.append(kind)):
        hops.begin(1)
        assert not forwarder.began.wait(0.2)
        hops.begin(2)
        assert forwarder.began.wait(SOON_S)
    assert [message["writes_done"].version for message in sent] == [2]


def test_a_cancel_ends_the_wait(parts: tuple[PassingOn, _Forwarder]) -> None:
    hops, forwarder = parts
    cancel = threading.Event()
    with hops.during(1, time.monotonic() + SOON_S, cancel, lambda **_: None):
        cancel.set()
    assert not forwarder.began.is_set()


def test_the_deadline_ends_the_wait(parts: tuple[PassingOn, _Forwarder]) -> None:
    hops, forwarder = parts
    with (
        pytest.raises(TransferTimeoutError, match="writing may begin"),
        hops.during(1, time.monotonic() + 0.1, threading.Event(), lambda **_: None),
    ):
        pass
    assert not forwarder.began.is_set()
