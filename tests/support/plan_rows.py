"""Carries out the file of `weightsync plan --out` with nothing but the file and the weights.

Written from docs/plan.md; calls no code of the package but names and sizes of dtypes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from support.oracle import cast_codes, tensor_codes
from weightsync.ir import Dtype

__all__ = ["COLUMNS", "Carried", "carry_out", "metadata_of"]

Bytes = NDArray[np.uint8]

COLUMNS = [
    "kind", "tensor", "part", "source_rank", "sink_rank", "rail", "bucket", "round",
    "box_start", "box_stop", "box_step", "inner_bytes", "counts", "source_strides",
    "sink_strides", "source_offset_bytes", "sink_offset_bytes", "nbytes",
]  # fmt: skip


class Carried:
    """Memory of every rank afterwards, and how often each byte of a sink was written."""

    def __init__(self, metadata: dict[str, Any]) -> None:
        self.sources = [np.zeros(size, np.uint8) for size in metadata["source_bytes"]]
        self.is_known = [np.zeros(size, np.bool_) for size in metadata["source_bytes"]]
        self.sinks = [np.zeros(size, np.uint8) for size in metadata["sink_bytes"]]
        self.written = [np.zeros(size, np.int64) for size in metadata["sink_bytes"]]


def metadata_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(pq.read_schema(path).metadata[b"weightsync.plan"])
    return found


def carry_out(path: Path, shapes: dict[str, tuple[int, ...]]) -> Carried:
    """Lay the tensors into the sources' memory, then copy row by row to the sinks."""
    metadata = metadata_of(path)
    carried = Carried(metadata)
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        if row["kind"] == "copy":
            dtype = _dtype(metadata["source_dtypes"], row)
            codes = tensor_codes(row["tensor"], shapes[row["tensor"]], dtype)
            box = zip(row["box_start"], row["box_stop"], row["box_step"], strict=True)
            values = np.ascontiguousarray(codes[tuple(slice(*dim) for dim in box)])
            at = _places(row, "source", dtype.itemsize, values.size)
            rank = row["source_rank"]
            carried.sources[rank][at] = values.view(np.uint8).reshape(-1, dtype.itemsize)
            carried.is_known[rank][at] = True
    pool = np.frombuffer(bytes.fromhex(metadata["constants"]), np.uint8)
    for row in rows:
        size = row["inner_bytes"]
        if row["kind"] == "copy":
            dtype, stored = (_dtype(metadata[f"{s}_dtypes"], row) for s in ("source", "sink"))
            num = row["nbytes"] // stored.itemsize
            codes = carried.sources[row["source_rank"]][_places(row, "source", dtype.itemsize, num)]
            cast = cast_codes(codes.view(f"u{dtype.itemsize}").reshape(-1), dtype, stored)
            content = np.ascontiguousarray(cast).view(np.uint8).reshape(num, stored.itemsize)
        elif row["kind"] == "hop":
            size = _dtype(metadata["sink_dtypes"], row).itemsize
            at = _places(row, "source", size, row["nbytes"] // size)
            num = len(at)
            assert (carried.written[row["source_rank"]][at] == 1).all(), "passed on too early"
            content = carried.sinks[row["source_rank"]][at]
        else:
            assert row["kind"] == "const"
            num = row["nbytes"] // size
            content = pool[_places(row, "source", size, num)]
        at = _places(row, "sink", content.shape[1], num)
        carried.sinks[row["sink_rank"]][at] = content
        np.add.at(carried.written[row["sink_rank"]], at, 1)
    return carried


def _dtype(dtypes: dict[str, Any], row: dict[str, Any]) -> Dtype:
    part = dtypes[row["part"]]
    other = [name for name, tensors in part["other"].items() if row["tensor"] in tensors]
    return Dtype.parse([*other, part["default"]][0])


def _places(row: dict[str, Any], side: str, itemsize: int, num: int) -> NDArray[np.int64]:
    """Byte addresses of a row's elements on one side, `(elements, itemsize)`."""
    runs = np.zeros(1, np.int64)
    for count, stride in zip(row["counts"], row[f"{side}_strides"], strict=True):
        runs = (runs[:, None] + np.arange(count) * stride).reshape(-1)
    inside = num // len(runs)
    elements = (runs[:, None] + np.arange(inside)).reshape(-1)
    start = row[f"{side}_offset_bytes"]
    return start + elements[:, None] * itemsize + np.arange(itemsize)
