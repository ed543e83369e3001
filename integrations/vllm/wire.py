"""Errors on their way through vLLM, which passes the text of a worker's error on, not its class."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from weightsync import errors
from weightsync.errors import WeightSyncError

__all__ = ["decoded", "encodes_errors"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_MARKED = re.compile(r"weightsync\.(\w+): (.*?) \[weightsync\]", re.DOTALL)


def encodes_errors(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorates what vLLM calls: our errors are raised as texts that name their class."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except WeightSyncError as error:
            text = f"weightsync.{type(error).__name__}: {error} [weightsync]"
            raise RuntimeError(text) from error

    return call


def decoded(text: str) -> WeightSyncError | None:
    """The error of ours that a text of vLLM quotes, or None."""
    match = _MARKED.search(text)
    if match is None:
        return None
    kind = getattr(errors, match[1], None)
    if not (isinstance(kind, type) and issubclass(kind, WeightSyncError)):
        return None
    return kind(match[2])
