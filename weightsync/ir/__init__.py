"""Values that all parts share: dtypes, pieces, manifests, arenas and plans. No torch, no I/O."""

from weightsync.ir.builder import ManifestBuilder
from weightsync.ir.dtypes import CASTS, ITEMSIZE, Dtype, fill_code
from weightsync.ir.locate import locate_rows
from weightsync.ir.manifest import (
    ARENA_ALIGN_BYTES,
    Arena,
    BufferTable,
    Manifest,
    Side,
    TensorTable,
)
from weightsync.ir.pieces import CONSTANT, PieceTable
from weightsync.ir.plan import (
    BucketTable,
    ChunkTable,
    NestTable,
    Plan,
    PlanOptions,
    RowKind,
    RowTable,
    Shares,
)
from weightsync.ir.tables import MAX_DIMS, Table

__all__ = [
    "ARENA_ALIGN_BYTES",
    "CASTS",
    "CONSTANT",
    "ITEMSIZE",
    "MAX_DIMS",
    "Arena",
    "BucketTable",
    "BufferTable",
    "ChunkTable",
    "Dtype",
    "Manifest",
    "ManifestBuilder",
    "NestTable",
    "PieceTable",
    "Plan",
    "PlanOptions",
    "RowKind",
    "RowTable",
    "Shares",
    "Side",
    "Table",
    "TensorTable",
    "fill_code",
    "locate_rows",
]
