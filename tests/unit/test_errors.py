from __future__ import annotations

import copy
import pickle

import pytest

from weightsync import errors
from weightsync.errors import TransferTimeoutError, WeightSyncError

CLASSES = [getattr(errors, name) for name in errors.__all__]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_class_keeps_its_facts_between_processes(cls: type[WeightSyncError]) -> None:
    error = cls("what, where, next step", tensor="lm_head.weight", rank=0)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301 - our own bytes
        assert type(twin) is cls
        assert str(twin) == "what, where, next step"
        assert (twin.tensor, twin.rank, twin.rail) == ("lm_head.weight", 0, None)


def test_tree_in_the_docstring_is_the_tree() -> None:
    documented = {}
    parents: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        before, mark, after = line.partition("+-- ")
        if mark:
            name = after.split()[0]
            level = len(before) // 4 - 1
            documented[name] = parents[level - 1] if level else "WeightSyncError"
            parents[level:] = [name]
    actual = {cls.__name__: cls.__bases__[0].__name__ for cls in CLASSES}
    assert actual.pop("WeightSyncError") == "Exception"
    assert documented == actual


def test_standard_classes_catch_too() -> None:
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.NativeUnavailableError, ImportError)
    assert issubclass(TransferTimeoutError, TimeoutError)


def test_unstated_facts_are_none_but_protocols_are_not_faked() -> None:
    error = WeightSyncError("x", peer="sink a/1")
    assert error.peer == "sink a/1"
    assert error.version is None
    assert not hasattr(error, "__array__")
    assert not hasattr(error, "_private")
