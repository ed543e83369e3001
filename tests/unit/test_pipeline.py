from __future__ import annotations

import threading
import time

import pytest

from weightsync.errors import RailError, TransferTimeoutError
from weightsync.runtime.pipeline import Pipeline, Stage


def _soon() -> float:
    return time.monotonic() + 5.0


def _run(stages: list[Stage[int]], items: list[int], **kwargs: object) -> list[int]:
    abandoned: list[int] = []
    pipeline = Pipeline(stages, depth=1, abandon=abandoned.append)
    cancel = kwargs.get("cancel", threading.Event())
    assert isinstance(cancel, threading.Event)
    pipeline.run(items, deadline=_soon(), cancel=cancel)
    return abandoned


def test_items_pass_all_stages_in_order_and_stages_overlap() -> None:
    seen: list[tuple[str, int]] = []
    both = threading.Barrier(2, timeout=5)

    def first(item: int) -> None:
        if item == 1:
            both.wait()  # only returns when the second stage works at the same time
        seen.append(("a", item))

    def second(item: int) -> None:
        if item == 0:
            both.wait()
        seen.append(("b", item))

    assert _run([Stage("a", first), Stage("b", second)], [0, 1, 2]) == []
    assert [i for s, i in seen if s == "a"] == [0, 1, 2]
    assert [i for s, i in seen if s == "b"] == [0, 1, 2]


def test_a_failing_stage_ends_the_run_and_every_item_is_given_back_once() -> None:
    done: list[int] = []

    def fail(item: int) -> None:
        if item == 2:
            raise RailError("planted")
        done.append(item)

    abandoned: list[int] = []
    pipeline = Pipeline(
        [Stage("a", lambda _: None), Stage("b", fail)], depth=1, abandon=abandoned.append
    )
    produced: list[int] = []

    def items() -> object:
        for item in range(100):
            produced.append(item)
            yield item

    with pytest.raises(RailError, match="planted"):
        pipeline.run(items(), deadline=_soon(), cancel=threading.Event())  # type: ignore[arg-type]
    assert sorted([*done, *abandoned]) == produced
    assert len(produced) < 100


def test_a_cancel_from_outside_returns_false_with_all_stages_stopped() -> None:
    cancel = threading.Event()
    pipeline = Pipeline([Stage("a", lambda _: cancel.set())], depth=1, abandon=lambda _: None)
    assert pipeline.run(range(1000), deadline=_soon(), cancel=cancel) is False
    assert not [t for t in threading.enumerate() if t.name == "weightsync-a"]


def test_a_stuck_stage_is_named_at_the_deadline() -> None:
    release = threading.Event()
    pipeline = Pipeline(
        [Stage("slow", lambda _: release.wait(0.3) and None)], depth=1, abandon=lambda _: None
    )
    with pytest.raises(TransferTimeoutError, match="'slow'"):
        pipeline.run(range(10), deadline=time.monotonic() + 0.05, cancel=threading.Event())
