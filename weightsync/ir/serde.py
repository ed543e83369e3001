"""Canonical bytes of tables: a JSON header and raw little-endian columns. Never pickle.

Layout: 8 bytes magic, uint32 header length, header (JSON, sorted keys, ASCII), then the columns of
each table in declaration order. The header states the schema and the rows of each table, so the
length of the whole is known before anything is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from weightsync.errors import ConfigError
from weightsync.ir.tables import Table

__all__ = ["MAX_HEADER_BYTES", "MAX_TOTAL_BYTES", "chunks", "is_of", "names", "pack", "unpack"]

_MAGIC: Final = b"WSYNCTB1"
MAX_HEADER_BYTES: Final = 256 << 20  # names of a million tensors on a thousand ranks stay below
MAX_TOTAL_BYTES: Final = 32 << 30

_RESERVED = ("rows", "schema")


def chunks(schema: str, header: dict[str, Any], tables: Sequence[Table]) -> Iterable[Any]:
    """Yield the canonical bytes part by part, without copying columns (for hashing)."""
    text = _canonical({**header, "schema": schema, "rows": [len(t) for t in tables]})
    yield _MAGIC + len(text).to_bytes(4, "little") + text
    for table in tables:
        for name, (dtype, _) in table.COLUMNS.items():
            column = np.ascontiguousarray(getattr(table, name), np.dtype(dtype).newbyteorder("<"))
            yield column.reshape(-1).view(np.uint8).data


def _canonical(header: dict[str, Any]) -> bytes:
    return json.dumps(header, sort_keys=True, separators=(",", ":")).encode("ascii")


def pack(schema: str, header: dict[str, Any], tables: Sequence[Table]) -> bytes:
    """Return the canonical bytes of a header and its tables."""
    return b"".join(chunks(schema, header, tables))


def unpack(
    schema: str, data: bytes | memoryview, tables: Sequence[type[Table]]
) -> tuple[dict[str, Any], list[dict[str, NDArray[Any]]]]:
    """Read what `pack` wrote.

    Returns:
        The header without its schema and rows, and the columns of each table. Columns are copies.

    Raises:
        ConfigError: Wrong magic, schema or length, or over a limit.
    """
    view = memoryview(data)
    if len(view) < 12 or len(view) > MAX_TOTAL_BYTES or bytes(view[:8]) != _MAGIC:
        raise ConfigError(f"not {schema}: wrong magic or size ({len(view)} bytes)")
    size = int.from_bytes(view[8:12], "little")
    if size > min(MAX_HEADER_BYTES, len(view) - 12):
        raise ConfigError(f"not {schema}: header of {size} bytes in {len(view)}")
    try:
        header = json.loads(bytes(view[12 : 12 + size]))
        # Other spaces, order, or a key twice: it would have another digest than its own bytes.
        is_canonical = _canonical(header) == view[12 : 12 + size]
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not {schema}: the header is not JSON ({error})") from None
    if not isinstance(header, dict) or header.get("schema") != schema:
        found = header.get("schema") if isinstance(header, dict) else type(header).__name__
        raise ConfigError(f"expected {schema}, found {found!r}; both sides need the same release")
    if not is_canonical:
        raise ConfigError(f"{schema}: the header is not in canonical form; it is damaged")
    rows = header.get("rows")
    if (
        not isinstance(rows, list)
        or len(rows) != len(tables)
        or not all(type(r) is int and 0 <= r < 1 << 40 for r in rows)
    ):
        raise ConfigError(f"{schema}: bad row counts {rows!r}")
    position = 12 + size
    expected = position + sum(
        count * max(width, 1) * np.dtype(dtype).itemsize
        for count, table in zip(rows, tables, strict=True)
        for dtype, width in table.COLUMNS.values()
    )
    if expected != len(view):
        raise ConfigError(f"{schema}: {len(view)} bytes, but the header announces {expected}")
    result = []
    for count, table in zip(rows, tables, strict=True):
        columns: dict[str, NDArray[Any]] = {}
        for name, (dtype, width) in table.COLUMNS.items():
            kind = np.dtype(dtype).newbyteorder("<")
            nbytes = count * max(width, 1) * kind.itemsize
            flat = np.frombuffer(view[position : position + nbytes], kind)
            if kind.kind == "b" and (flat.view(np.uint8) > 1).any():
                raise ConfigError(f"{schema}: column {name} holds a boolean other than 0 and 1")
            columns[name] = (flat.reshape(count, width) if width else flat).astype(dtype)
            position += nbytes
        result.append(columns)
    return {key: header[key] for key in header if key not in _RESERVED}, result


def is_of(schema: str, data: bytes | memoryview) -> bool:
    """Whether bytes seem to be of a schema; `unpack` then decides."""
    size = int.from_bytes(data[8:12], "little")
    return f'"schema":"{schema}"'.encode() in bytes(data[12 : 12 + min(size, MAX_HEADER_BYTES)])


def names(header: dict[str, Any], key: str) -> tuple[str, ...]:
    """Return a list of strings from a header as a tuple.

    Raises:
        ConfigError: Not a list of strings.
    """
    value = header.get(key)
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ConfigError(f"header entry {key!r} is not a list of strings")
    return tuple(value)
