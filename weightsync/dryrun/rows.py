"""`--out`: every row of a plan as a Parquet file that can be carried out without anything else.

docs/plan.md defines the columns and the metadata. Rows are made and written block by block, as
columns; no row is ever a Python object.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from weightsync.errors import ConfigError, PlanError
from weightsync.ir import ITEMSIZE, MAX_DIMS, Dtype, Manifest, Plan, RowKind, fill_code
from weightsync.ir.locate import Locator
from weightsync.ir.manifest import ARENA_ALIGN_BYTES
from weightsync.ir.pieces import CONSTANT
from weightsync.ir.tables import BoolArray, IntArray, starts_of, volume_of
from weightsync.outputs import check_output

if TYPE_CHECKING:
    from weightsync.planners.cluster import Cluster

__all__ = ["METADATA_KEY", "check_target", "write_rows"]

METADATA_KEY: Final = b"weightsync.plan"

_BLOCK: Final = 1 << 17  # rows of a row group: some tens of MiB of columns
_MAX_BYTES: Final = 4  # a partial maximum is one F32

_INTS: Final = ("source_rank", "sink_rank", "rail", "bucket", "round")
_BOX: Final = ("box_start", "box_stop", "box_step")
_STRIDES: Final = ("counts", "source_strides", "sink_strides")


def check_target(path: Path) -> None:
    """Check that a file can be written there, before anything is planned.

    Raises:
        ConfigError: pyarrow is not installed, or as `check_output`.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(
            "--out writes Parquet and needs pyarrow, which is not installed: "
            "pip install 'weightsync[plan]'"
        )
    check_output("--out", path, "plan.parquet")


def write_rows(plan: Plan, cluster: Cluster, path: Path, facts: Mapping[str, Any]) -> None:
    """Write the rows of a plan: the maxima, what is sent, what is passed on, then constants.

    The file appears under its name when it is complete.

    Args:
        plan: The plan.
        cluster: Whose rails the senders write over.
        path: Takes the file.
        facts: JSON values for the metadata, besides what the rows leave open.

    Raises:
        ConfigError: pyarrow is not installed, or the file cannot be written.
        PlanError: A side stores one tensor in two dtypes.

    Cost: some microseconds a row, and memory for one block of rows.
    """
    check_target(path)
    import pyarrow.parquet as pq

    table = _Rows(plan, cluster)
    metadata = {"schema": "weightsync.plan_rows/1", **facts, **_metadata(plan, table)}
    schema = _schema().with_metadata({METADATA_KEY: json.dumps(metadata).encode()})
    partial = path.with_name(f".{path.name}.partial")
    try:
        with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            for columns in table.blocks():
                writer.write_table(_arrow(columns, schema))
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be written: {error}", path=path) from error
    finally:
        partial.unlink(missing_ok=True)


def _schema() -> Any:
    """The fixed columns, in their order."""
    import pyarrow as pa

    ints = pa.list_(pa.int64())
    text = pa.dictionary(pa.int32(), pa.string())
    kinds: dict[str, Any] = {"kind": text, "tensor": text, "part": text}
    kinds |= {name: pa.int32() for name in _INTS}
    kinds |= {name: ints for name in _BOX}
    kinds |= {"inner_bytes": pa.int64()} | {name: ints for name in _STRIDES}
    kinds |= {name: pa.int64() for name in ("source_offset_bytes", "sink_offset_bytes", "nbytes")}
    return pa.schema([pa.field(name, kind) for name, kind in kinds.items()])


class _Rows:
    """The rows of a plan as blocks of columns; `constants` is what rows of kind const copy from.

    A column is an int array in which -1 is null (texts are numbers of names), or the pair of a
    table `(R, 4)` and a mask of what belongs to a row's list.
    """

    def __init__(self, plan: Plan, cluster: Cluster) -> None:
        self._plan, self._cluster = plan, cluster
        # Each bucket's place among those of its sender.
        sender = plan.sender
        self._round = np.arange(len(sender)) - np.searchsorted(sender, sender)
        # Codes and scales go by the name of the values they are made of.
        self.name_of = np.arange(len(plan.sink.tensors))
        self.is_scale = np.zeros(len(plan.sink.tensors), np.bool_)
        table = plan.sink.encodings
        self.name_of[table.codes] = table.values
        self.name_of[table.scales] = table.values
        self.is_scale[table.scales] = True
        self.constants, self._fill_at = _constant_pool(plan.sink)
        self._locator = Locator(plan.sink, with_tensor=True)

    def blocks(self) -> Iterator[dict[str, Any]]:
        """Yield the columns of up to `_BLOCK` rows of one kind."""
        plan = self._plan
        for first in range(0, len(plan.maxima), _BLOCK):
            yield self._maxima(slice(first, first + _BLOCK)) | {"names": plan.sink.tensors.names}
        own, sent, num = plan.num_direct_rows, plan.num_sent, len(plan.rows)
        for first in range(0, own, _BLOCK):
            rows = np.arange(first, min(first + _BLOCK, own))
            yield self._sent(rows, plan.source) | {"names": plan.sink.tensors.names}
        for hops in self._hops_in_order():
            for first in range(0, len(hops), _BLOCK):
                rows = hops[first : first + _BLOCK]
                yield self._sent(rows, plan.sink) | {"names": plan.sink.tensors.names}
        for first in range(sent, num, _BLOCK):
            yield self._constants(slice(first, first + _BLOCK)) | {"names": ()}

    def _hops_in_order(self) -> Iterator[IntArray]:
        """Yield the rows that are passed on, those that read others of them behind these."""
        plan = self._plan
        before, after = plan.edges.T
        level = np.zeros(len(plan.buckets), np.int64)
        while True:
            found = level.copy()
            np.maximum.at(found, after, level[before] + 1)
            if np.array_equal(found, level):
                break
            level = found
        first, end = plan.num_direct_rows, plan.num_sent
        of_row = level[plan.chunks.bucket[plan.rows.chunk[first:end]]]
        for number in np.unique(of_row).tolist():
            yield first + np.flatnonzero(of_row == number)

    def _sent(self, block: IntArray, source: Manifest) -> dict[str, Any]:
        plan = self._plan
        rows, sink = plan.rows, plan.sink
        tensor, nest = rows.tensor[block], plan.nest_of(block)
        src, dst = rows.src_buffer[block], rows.dst_buffer[block]
        n, src_stride, dst_stride = nest.n, nest.src_stride, nest.dst_stride
        chunk = rows.chunk[block]
        bucket = plan.chunks.bucket[chunk]
        rank = plan.buckets.src_rank[bucket]
        src_size, dst_size = source.buffers.itemsize[src], sink.buffers.itemsize[dst]
        _, lo, step = self._locator.locate(dst, tensor, rows.dst_offset[block], n, dst_stride)
        run, outer = _inner_runs(n, src_stride, dst_stride)
        start = source.arena_offset_bytes[src] + rows.src_offset[block] * src_size
        return {
            "kind": rows.kind[block],
            "tensor": self.name_of[tensor],
            "part": self.is_scale[tensor].astype(np.int64),
            "source_rank": rank,
            "sink_rank": plan.buckets.dst_rank[bucket],
            "rail": self._rail(source, rank, plan.chunks.number[chunk]),
            "bucket": bucket,
            "round": self._round[bucket],
            **self._box(tensor, lo, n, step),
            "inner_bytes": run * dst_size,
            "counts": (n, outer),
            "source_strides": (src_stride, outer),
            "sink_strides": (dst_stride, outer),
            "source_offset_bytes": start,
            "sink_offset_bytes": sink.arena_offset_bytes[dst] + rows.dst_offset[block] * dst_size,
            "nbytes": volume_of(n) * dst_size,
        }

    def _constants(self, block: slice) -> dict[str, Any]:
        rows, sink = self._plan.rows, self._plan.sink
        dst, nest = rows.dst_buffer[block], self._plan.nest_of(block)
        n = nest.n
        size = sink.buffers.itemsize[dst]
        none, outer = np.full(len(dst), -1), n > 1
        empty = n, np.zeros_like(outer)
        return {
            "kind": rows.kind[block],
            **dict.fromkeys(("tensor", "part", *_INTS), none),
            "sink_rank": sink.buffers.rank[dst],
            **dict.fromkeys(_BOX, empty),
            "inner_bytes": size,
            "counts": (n, outer),
            "source_strides": (np.zeros_like(n), outer),
            "sink_strides": (nest.dst_stride, outer),
            "source_offset_bytes": self._fill_at[rows.src_offset[block]],
            "sink_offset_bytes": sink.arena_offset_bytes[dst] + rows.dst_offset[block] * size,
            "nbytes": volume_of(n) * size,
        }

    def _maxima(self, block: slice) -> dict[str, Any]:
        table = self._plan.maxima.take(block)
        none = np.full(len(table), -1)
        empty = table.n, np.zeros(table.n.shape, np.bool_)
        nbytes = volume_of(table.n) * _MAX_BYTES
        return {
            "kind": np.full(len(table), RowKind.MAX),
            "tensor": self.name_of[table.tensor],
            "part": np.ones(len(table), np.int64),
            **dict.fromkeys(_INTS, none),
            "source_rank": table.src_rank,
            "sink_rank": table.dst_rank,
            "rail": self._rail(self._plan.source, table.src_rank, np.zeros(len(table), np.int64)),
            **self._box(table.tensor, table.lo, table.n, table.step),
            "inner_bytes": nbytes,
            **dict.fromkeys(_STRIDES, empty),
            "source_offset_bytes": none,
            "sink_offset_bytes": none,
            "nbytes": nbytes,
        }

    def _box(
        self, tensor: NDArray[Any], lo: IntArray, n: IntArray, step: IntArray
    ) -> dict[str, Any]:
        ndim = self._plan.sink.tensors.ndim[tensor]
        dims = np.arange(MAX_DIMS) >= MAX_DIMS - ndim[:, None]
        return {
            "box_start": (lo, dims),
            "box_stop": (lo + (n - 1) * step + 1, dims),
            "box_step": (step, dims),
        }

    def _rail(self, sender: Manifest, rank: NDArray[Any], number: NDArray[Any]) -> IntArray:
        """NIC of the sender's node: a rank's own in turn, or the one it shares."""
        cluster = self._cluster
        port = cluster.port_of(len(sender.ranks))[rank] % cluster.ports_per_node
        rails = cluster.rails_per_port
        return np.asarray(port * rails + number % rails)


def _inner_runs(n: IntArray, src: IntArray, dst: IntArray) -> tuple[IntArray, BoolArray]:
    """Find how many elements follow one another on both sides, and which dims are outside of that.

    Returns:
        Elements of each run, `(R,)`, and the dims that step from run to run, `(R, 4)`.
    """
    run = np.ones(len(n), np.int64)
    is_inside = np.ones(len(n), np.bool_)
    outer = n > 1
    for dim in range(MAX_DIMS - 1, -1, -1):
        many = n[:, dim] > 1
        is_inside &= ~many | ((src[:, dim] == run) & (dst[:, dim] == run))
        grows = is_inside & many
        run = np.where(grows, run * n[:, dim], run)
        outer[:, dim] &= ~grows
    return run, outer


def _constant_pool(sink: Manifest) -> tuple[bytes, IntArray]:
    """Lay the distinct constants of a sink one after the other; where each piece's constant is."""
    pieces = sink.pieces
    pool = bytearray()
    places: dict[tuple[int, int], int] = {}
    at = np.full(len(pieces), -1)
    for piece in np.flatnonzero(pieces.tensor == CONSTANT).tolist():
        dtype = Dtype(sink.buffers.dtype[pieces.buffer[piece]])
        code = fill_code(dtype, float(pieces.fill[piece]))
        key = (code, dtype.itemsize)
        if key not in places:
            places[key] = len(pool)
            pool += code.to_bytes(dtype.itemsize, "little")
        at[piece] = places[key]
    return bytes(pool), at


def _metadata(plan: Plan, table: _Rows) -> dict[str, Any]:
    """What the rows leave open: memory sizes, element types and constants."""
    names = plan.sink.tensors.names
    no_scales = np.zeros(len(plan.source.tensors), np.bool_)
    return {
        "digest": plan.digest,
        "arena_align_bytes": ARENA_ALIGN_BYTES,
        "source_bytes": [plan.source.arena_nbytes(r) for r in range(len(plan.source.ranks))],
        "sink_bytes": [plan.sink.arena_nbytes(r) for r in range(len(plan.sink.ranks))],
        "constants": table.constants.hex(),
        "source_dtypes": _dtypes(plan.source, plan.source.tensors.names, no_scales),
        "sink_dtypes": _dtypes(
            plan.sink, [names[number] for number in table.name_of.tolist()], table.is_scale
        ),
    }


def _dtypes(side: Manifest, names: Sequence[str], is_scale: BoolArray) -> dict[str, Any]:
    """Say what the elements of each part are stored as: what most are, and who differs."""
    pieces = side.pieces
    used = pieces.tensor != CONSTANT
    tensor, dtype = pieces.tensor[used], side.buffers.dtype[pieces.buffer[used]]
    least, most = np.full((2, len(side.tensors)), -1)
    least[tensor] = len(ITEMSIZE)
    np.minimum.at(least, tensor, dtype)
    np.maximum.at(most, tensor, dtype)
    for bad in np.flatnonzero(least != most)[:1]:
        raise PlanError(
            f"--out: the {side.side}s store tensor {side.tensors.names[bad]} in two dtypes, and "
            "the file has room for one",
            tensor=side.tensors.names[bad],
        )
    found = {}
    for part, mask in (("weight", ~is_scale), ("scale", is_scale)):
        mine = np.flatnonzero(mask & (most >= 0))
        if not len(mine):
            continue
        usual = int(np.bincount(most[mine]).argmax())
        other: dict[str, list[str]] = {}
        for number in mine[most[mine] != usual].tolist():
            other.setdefault(Dtype(most[number]).name, []).append(names[number])
        found[part] = {"default": Dtype(usual).name, "other": other}
    return found


def _arrow(columns: dict[str, Any], schema: Any) -> Any:
    """Turn a block of columns into an Arrow table without copying what need not be."""
    import pyarrow as pa

    texts = {
        "kind": [kind.name.lower() for kind in RowKind],
        "tensor": columns["names"],
        "part": ["weight", "scale"],
    }
    arrays = []
    for field in schema:
        column = columns[field.name]
        if field.name in texts:
            arrays.append(_texts(column, texts[field.name]))
        elif isinstance(column, tuple):
            values, mask = column
            offsets = starts_of(np.count_nonzero(mask, axis=1)).astype(np.int32)
            arrays.append(pa.ListArray.from_arrays(offsets, values[mask]))
        else:
            arrays.append(pa.array(column, field.type, mask=column < 0))
    return pa.Table.from_arrays(arrays, schema=schema)


def _texts(number: NDArray[Any], names: Any) -> Any:
    """Texts by number, with a dictionary of those that occur; -1 is null."""
    import pyarrow as pa

    used, inverse = np.unique(number, return_inverse=True)
    is_null = number < 0
    shift = int(len(used) > 0 and used[0] < 0)
    words = pa.array([names[u] for u in used[shift:].tolist()], pa.string())
    index = pa.array((inverse - shift).astype(np.int32), mask=is_null)
    return pa.DictionaryArray.from_arrays(index, words)
