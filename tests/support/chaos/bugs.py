"""Bugs planted into the real classes, to show that the fault runs would find them."""

from __future__ import annotations

import ctypes
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from weightsync.runtime import program
from weightsync.runtime.receiver import Receiver
from weightsync.service import source
from weightsync.service.core import CoordinatorCore

__all__ = ["BUGS", "plant"]

BUGS = ("no_fence", "double_count", "dropped_tail", "commit_before_vote", "digest_skipped")
Patch = Callable[[Any, str, Any], None]


def plant(name: str, patch: Patch = setattr) -> None:
    """Break this process in one way; `patch` sets an attribute (and may remember the old one)."""
    {
        "no_fence": _no_fence,
        "double_count": _double_count,
        "dropped_tail": _dropped_tail,
        "commit_before_vote": _commit_before_vote,
        "digest_skipped": _digest_skipped,
    }[name](patch)


def flip_one_byte(version: int) -> None:
    """Not a bug but a fault: one byte of `version` changes between its arrival and its check."""
    digest, fill = Receiver._digest, Receiver.fill
    due = {"now": False}

    def flipping_fill(self: Receiver, number: int, *args: Any, **kwargs: Any) -> Any:
        due["now"] = number == version
        return fill(self, number, *args, **kwargs)

    def flipping_digest(self: Receiver, bucket: Any) -> int:
        if due["now"]:
            due["now"] = False
            address = int(self._bases(bucket.digest)[0])
            byte = ctypes.c_uint8.from_address(address)
            byte.value ^= 0x40
        return digest(self, bucket)

    Receiver.fill, Receiver._digest = flipping_fill, flipping_digest  # type: ignore[method-assign]


def _no_fence(patch: Patch) -> None:
    """Memory of an aborted version is opened again while a frozen writer still has it mapped.

    Closing and exporting anew would not do as a bug: the fabric gives every export fresh pages.
    """
    bind = Receiver.bind

    def bind_again(self: Receiver, plan: Any, sink: int) -> bytes:
        if self._target is None:
            return bind(self, plan, sink)
        self._target.reset(np.arange(self._target.num_slots))
        self._used_parities = set()
        return self._target.descriptor

    patch(Receiver, "bind", bind_again)
    patch(Receiver, "fence", lambda self: None)


class _CountingTarget:
    """Takes a version for complete when enough arrivals were counted, whichever they were."""

    def __init__(self, target: Any) -> None:
        self._target = target
        self._seen = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def count(self) -> int:
        counters = self._target.counters()
        return int(counters["arrivals"] + counters["duplicates"])

    def begin(self, slots: list[int], num_chunks: int) -> None:
        self._slots, self._due = slots, self._seen + num_chunks

    def poll(self, timeout_s: float | None = 0.0) -> list[int]:
        if self.count() < self._due:
            time.sleep(0.0005)
            return []
        self._seen = self.count()
        return self._slots


def _double_count(patch: Patch) -> None:
    """Arrivals are counted instead of marked, so that a repeated one counts twice."""
    fill = Receiver.fill

    def counting_fill(self: Receiver, version: int, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self._target, _CountingTarget):
            self._target = _CountingTarget(self._target)  # type: ignore[assignment]
        first = version % 2 * self.num_slots
        chunks = sum(bucket.num_chunks for bucket in self.buckets)
        self._target.begin([first + b.slot for b in self.buckets], chunks)  # type: ignore[union-attr]
        return fill(self, version, *args, **kwargs)

    patch(Receiver, "fill", counting_fill)


def _dropped_tail(patch: Patch) -> None:
    """The last row of every bucket is announced, but not all of it is written."""
    make = program.source_program

    def short(plan: Any, rank: int) -> Any:
        cut = []
        for bucket in make(plan, rank):
            fields = {
                name: getattr(bucket, name)[:-1]
                for name in ("copy", "buffer", "keys", "packed", "staged_at")
            }
            chunks = bucket.chunks.copy()
            chunks[-1, 3] -= 4
            cut.append(dataclasses.replace(bucket, chunks=chunks, **fields))
        return cut

    patch(program, "source_program", short)
    patch(source, "source_program", short)


def _commit_before_vote(patch: Patch) -> None:
    """The coordinator decides as soon as the sources have written."""
    decide = CoordinatorCore._maybe_decide

    def hasty(self: CoordinatorCore) -> None:
        version = self._open
        if version is not None:
            version.voted |= {i for ranks in version.replicas.values() for i in ranks}
        decide(self)

    patch(CoordinatorCore, "_maybe_decide", hasty)


def _digest_skipped(patch: Patch) -> None:
    """Sinks accept whatever arrived."""
    patch(Receiver, "_compare", lambda *_: True)
