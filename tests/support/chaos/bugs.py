"""Bugs planted into the real classes, to show that the fault runs would find them."""

from __future__ import annotations

from typing import Any

__all__ = ["BUGS", "plant"]

BUGS = ("no_fence", "dropped_tail", "commit_before_vote", "digest_skipped")


def plant(name: str) -> None:
    """Break this process in one way."""
    {
        "no_fence": _no_fence,
        "dropped_tail": _dropped_tail,
        "commit_before_vote": _commit_before_vote,
        "digest_skipped": _digest_skipped,
    }[name]()


def flip_one_byte(version: int) -> None:
    """Not a bug but a fault: one byte of `version` changes between its arrival and its check."""
    import ctypes

    from weightsync.runtime.receiver import Receiver

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


def _no_fence() -> None:
    """Memory of an aborted version is used again while a frozen writer still has it mapped."""
    from weightsync.runtime.receiver import Receiver

    def fence(self: Receiver) -> None:
        self._close_target()

    Receiver.fence = fence  # type: ignore[method-assign]


def _dropped_tail() -> None:
    """The last row of every bucket is announced but never written."""
    import dataclasses

    from weightsync.service import source

    program = source.source_program

    def short(plan: Any, rank: int) -> Any:
        cut = []
        for bucket in program(plan, rank):
            fields = {
                name: getattr(bucket, name)[:-1]
                for name in ("copy", "buffer", "keys", "packed", "staged_at")
            }
            cut.append(dataclasses.replace(bucket, **fields))
        return cut

    source.source_program = short


def _commit_before_vote() -> None:
    """The coordinator decides as soon as the sources have written."""
    from weightsync.service.core import CoordinatorCore

    decide = CoordinatorCore._maybe_decide

    def hasty(self: CoordinatorCore) -> None:
        version = self._open
        if version is not None:
            version.voted |= {i for ranks in version.replicas.values() for i in ranks}
        decide(self)

    CoordinatorCore._maybe_decide = hasty  # type: ignore[method-assign]


def _digest_skipped() -> None:
    """Sinks accept whatever arrived."""
    from weightsync.runtime.receiver import Receiver

    Receiver._compare = lambda *_: True  # type: ignore[method-assign]
