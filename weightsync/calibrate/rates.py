"""Rates of the kernels and of the journal on this host, measured in this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np
import numpy.typing as npt

from weightsync.encodings import kernels
from weightsync.encodings.rows import digest_rows, pack_rows
from weightsync.ir.dtypes import Dtype
from weightsync.planners.cluster import Rate
from weightsync.service.journal import Journal
from weightsync.units import GB, MIB

__all__ = ["copy_rate", "digest_rate", "journal_s", "pack_rate"]

_BYTES: Final = 64 * MIB  # no cache holds source and target
_REPEATS: Final = 7
_RUN: Final = 1024  # elements of a row that is packed: as a slice of columns of a large matrix
_ITEM: Final = 2
_DECISIONS: Final = 20


def copy_rate() -> Rate:
    """Return bytes read plus bytes written a second by a plain copy, one thread."""
    source, target = _memory(), _memory()
    n, stride = np.ones((1, 4), np.int64), np.zeros((1, 4), np.int64)
    n[0, 3], stride[0, 3] = _BYTES, 1
    table = pack_rows([_at(source)], [_at(target)], int(Dtype.U8), int(Dtype.U8), n, stride, stride)
    return _rate(2 * _BYTES, lambda: kernels.pack(table, 1))


def pack_rate() -> Rate:
    """Return bytes read plus bytes written a second where runs are short, one thread."""
    source, target = _memory(), _memory()
    half = _BYTES // 2
    rows = half // (_RUN * _ITEM)
    n, stride = np.ones((1, 4), np.int64), np.zeros((1, 4), np.int64)
    n[0, 2:], stride[0, 3] = (rows, _RUN), _ITEM
    apart, together = stride.copy(), stride.copy()
    apart[0, 2], together[0, 2] = 2 * _RUN * _ITEM, _RUN * _ITEM
    bf16 = int(Dtype.BF16)
    table = pack_rows([_at(source)], [_at(target)], bf16, bf16, n, apart, together)
    return _rate(2 * half, lambda: kernels.pack(table, 1))


def digest_rate() -> Rate:
    """Return bytes digested a second by one thread."""
    memory = _memory()
    n, stride = np.ones((1, 4), np.int64), np.zeros((1, 4), np.int64)
    width = 4096
    n[0, 2:] = _BYTES // _ITEM // width, width
    stride[0, 2:] = width * _ITEM, _ITEM
    table = digest_rows([_at(memory)], _ITEM, 1, np.zeros((1, 4)), np.ones((1, 4)), n, stride)
    group = np.zeros(1, np.int32)
    return _rate(_BYTES, lambda: kernels.digest(table, group, 1, 1))


def journal_s(folder: Path) -> float:
    """Return how long a decision takes to be on the disk that holds `folder`."""
    journal = Journal(folder / "calibrate.journal")
    try:
        took = []
        for version in range(1, _DECISIONS + 1):
            start = time.perf_counter()
            journal.record(version, commit=True, reason="")
            took.append(time.perf_counter() - start)
    finally:
        journal.close()
    return median(took)


def _rate(nbytes: int, work: Callable[[], object]) -> Rate:
    work()
    rates = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        rates.append(nbytes / (time.perf_counter() - start) / GB)
    return Rate(nominal=max(rates), attainable=median(rates))


def _memory() -> npt.NDArray[np.uint8]:
    memory = np.empty(_BYTES, np.uint8)
    memory.fill(1)
    return memory


def _at(memory: npt.NDArray[np.uint8]) -> int:
    return int(memory.ctypes.data)
