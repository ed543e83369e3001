"""When a trainer drop-in publishes, and what it does with errors."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from weightsync.client import Source
from weightsync.errors import (
    ConfigError,
    LayoutError,
    NoQuorumError,
    TransferTimeoutError,
    VersionAbortedError,
    WeightSyncError,
)
from weightsync.integrations.publisher import Publisher
from weightsync.integrations.torch import publish_after_step
from weightsync.integrations.transformers import WeightSyncCallback


class FakeSource(Source):
    """Records what is published; fails where it is told to."""

    def __init__(self) -> None:
        self.tags: list[str] = []
        self.failures: list[WeightSyncError] = []
        self.is_closed = False

    def publish(self, version: int | None = None, *, tag: str = "", **options: Any) -> Any:
        if self.failures:
            raise self.failures.pop(0)
        self.tags.append(tag)
        return f"report {tag}"

    def close(self) -> None:
        self.is_closed = True


def publisher(source: Source, **options: Any) -> Publisher:
    chosen: dict[str, Any] = {"every_steps": 1, "until": "committed", "on_abort": "raise"}
    return Publisher(source, job=None, timeout_s=1.0, **{**chosen, **options})


@pytest.mark.parametrize(
    ("every_steps", "skipped", "expected"),
    [
        (1, (), "1 2 3 4 5 6"),
        (1, (2, 3), "1 4 5 6"),
        (3, (), "3 6"),
        (3, (6,), "3 6"),  # steps 4 and 5 changed the weights
        (3, (4, 5, 6), "3"),
        (3, (1, 2, 3), "6"),
    ],
)
def test_steps_that_are_published(
    every_steps: int, skipped: tuple[int, ...], expected: str
) -> None:
    source = FakeSource()
    made = publisher(source, every_steps=every_steps)
    for step in range(1, 7):
        made.after_step(step, is_changed=step not in skipped)
    assert " ".join(source.tags) == expected


@pytest.mark.parametrize("error", [VersionAbortedError, NoQuorumError, TransferTimeoutError])
def test_an_abort_is_raised_or_said(
    error: type[WeightSyncError], caplog: pytest.LogCaptureFixture
) -> None:
    source = FakeSource()
    source.failures = [error("sink a/0 was lost")]
    with pytest.raises(error):
        publisher(source).after_step(1)
    source.failures = [error("sink a/0 was lost")]
    made = publisher(source, on_abort="warn")
    with caplog.at_level(logging.WARNING):
        made.after_step(1)
    assert "step 1 was not published, the old version serves: sink a/0 was lost" in caplog.text
    assert (made.num_aborted, made.report) == (1, None)
    made.after_step(2, is_changed=False)  # what step 1 changed is still to be published
    assert source.tags == ["2"]
    assert str(made.report) == "report 2"


def test_what_every_version_would_meet_is_raised() -> None:
    source = FakeSource()
    source.failures = [LayoutError("up has another shape")]
    with pytest.raises(LayoutError):
        publisher(source, on_abort="warn").after_step(1)


def test_a_source_of_the_caller_stays_open() -> None:
    source = FakeSource()
    publisher(source).close()
    assert not source.is_closed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_steps": 0}, "every_steps=0"),
        ({"until": "done"}, "until='done'"),
        ({"on_abort": "ignore"}, "on_abort='ignore'"),
    ],
)
def test_bad_arguments_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ConfigError, match=message):
        WeightSyncCallback(**options)
    with pytest.raises(ConfigError, match=message):
        publish_after_step(optimizer, FakeSource(), **options)
    with pytest.raises(ConfigError, match="a sequence of URLs"):
        WeightSyncCallback(vllm="http://127.0.0.1:8000")
