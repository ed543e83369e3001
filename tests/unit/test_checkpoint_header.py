"""Headers of safetensors files: what is true is read, what lies is named, judged by safetensors."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from weightsync.checkpoint.header import MAX_HEADER_BYTES, format_header, parse_header, read_header
from weightsync.errors import CheckpointError
from weightsync.ir.dtypes import Dtype

PATH = Path("model.safetensors")
NUMPY = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "U8": np.uint8, "BOOL": np.bool_}


def entry(dtype: str = "F32", shape: Any = (2,), start: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def parse(content: Any, data_bytes: int) -> Any:
    header = content if isinstance(content, bytes) else json.dumps(content).encode()
    return parse_header(header, PATH, 8 + len(header) + data_bytes)


def library_reads(blob: bytes) -> dict[str, Any] | None:
    """What the safetensors library makes of a file; None where it refuses."""
    try:
        return dict(safetensors.deserialize(blob))
    except safetensors.SafetensorError:
        return None


LIES: dict[str, tuple[Any, int, str]] = {
    "no object": (b"[1, 2]   ", 0, "does not begin with an object"),
    "no JSON": (b'{"a": ', 0, "no JSON"),
    "no UTF-8": (b'{"\xff": 1}', 0, "no JSON"),
    "deep": (b'{"a": ' + b"[" * 200_000, 0, "no JSON"),
    "long number": (b'{"a": ' + b"9" * 5000 + b"}", 0, "no JSON"),
    "twice": (b'{"a": {"dtype": "U8"}, "a": {"dtype": "U8"}}', 0, "has 'a' twice"),
    "metadata": ({"__metadata__": {"format": 1}}, 0, "__metadata__"),
    "no entry": ({"a": 7}, 0, "tensor a: dtype, shape and data_offsets"),
    "missing key": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "tensor a"),
    "more keys": ({"a": {**entry(), "code": "x"}}, 8, "nothing else"),
    "dtype": ({"a": entry("F31")}, 8, "tensor a: its dtype 'F31'"),
    "dtype no string": ({"a": entry(["F32"])}, 8, "its dtype"),  # type: ignore[arg-type]
    "negative": ({"a": entry(shape=(-2,))}, 8, "its shape"),
    "bool": ({"a": entry(shape=(True, 2))}, 8, "its shape"),
    "float": ({"a": entry(shape=(2.0,))}, 8, "its shape"),
    "huge": ({"a": entry(shape=(1 << 63,))}, 8, "its shape"),
    "offsets": ({"a": entry(start=-8, end=0)}, 8, "its data_offsets"),
    "one offset": ({"a": {**entry(), "data_offsets": [0]}}, 8, "no pair"),
    "backwards": ({"a": entry(start=8, end=0)}, 8, "has 8 bytes, its data_offsets span -8"),
    "size": ({"a": entry(shape=(3,))}, 8, r"F32 of shape \[3\] has 12 bytes"),
    "outside": ({"a": entry(shape=(4,), end=16)}, 8, "tensor a: it ends at"),
    "overlap": ({"a": entry(), "b": entry(start=4, end=12)}, 12, "tensor b: .* overlaps"),
    "same bytes": ({"a": entry(), "b": entry()}, 8, "tensor b: .* overlaps"),
    "gap": ({"a": entry(), "b": entry(start=12, end=20)}, 20, "tensor b: .* gap"),
    "begins late": ({"a": entry(start=4, end=12)}, 12, "tensor a: .* gap"),
    "hidden": ({"a": entry()}, 9, "1 bytes after the last tensor"),
    "surrogate": (b'{"\\ud800": {}}', 0, "no name of a tensor"),
    "surrogate twice": (b'{"\\ud800": {}, "\\ud800": {}}', 0, "twice"),
    "empty name": ({"": entry()}, 8, "no name of a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", LIES)
def test_lies_are_named(case: str) -> None:
    content, data_bytes, message = LIES[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        parse(content, data_bytes)
    assert caught.value.path == PATH
    assert str(PATH) in str(caught.value)
    assert str(caught.value).encode()  # can be printed


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "0 bytes are no safetensors file"),
        (b"\x02\0\0\0", "4 bytes are no safetensors file"),
        (struct.pack("<Q", 100) + b"{}", "truncated"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "beyond 100000000"),
        (struct.pack("<Q", (1 << 64) - 1) + b"{}", "beyond 100000000"),
    ],
)
def test_files_that_are_none(tmp_path: Path, blob: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(blob)
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_header(tmp_path / "model.safetensors")


names = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=8).filter(
    lambda name: name != "__metadata__"
)
tensors = st.dictionaries(
    names,
    st.tuples(
        st.sampled_from(sorted(NUMPY)),
        st.lists(st.integers(0, 3), max_size=4).map(tuple),
    ),
    max_size=5,
)


def saved(described: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    rng = np.random.default_rng(len(described))
    arrays = {
        name: rng.integers(0, 2, shape).astype(NUMPY[dtype])
        for name, (dtype, shape) in described.items()
    }
    return safetensors.numpy.save(arrays, metadata={"format": "pt"})


@given(tensors)
def test_what_safetensors_writes_is_read(described: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    blob = saved(described)
    length = int.from_bytes(blob[:8], "little")
    found = {t.name: t for t in parse_header(blob[8 : 8 + length], PATH, len(blob))}
    expected = library_reads(blob)
    assert expected is not None
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype.name == expected[name]["dtype"]
        assert list(tensor.shape) == expected[name]["shape"]
        held = blob[tensor.offset_bytes : tensor.offset_bytes + tensor.nbytes]
        assert held == bytes(expected[name]["data"])


@given(tensors)
def test_what_is_written_safetensors_reads(
    described: dict[str, tuple[str, tuple[int, ...]]],
) -> None:
    rows = [(name, Dtype[dtype], shape) for name, (dtype, shape) in described.items()]
    head, offsets = format_header(rows)
    assert len(head) == offsets[0]
    assert len(head) % 64 == 0
    data = bytes(i % 251 for i in range(offsets[-1] - offsets[0]))
    found = library_reads(head + data)
    assert found is not None
    assert found.keys() == described.keys()
    for (name, dtype, shape), start, end in zip(rows, offsets, offsets[1:], strict=False):
        assert (found[name]["dtype"], found[name]["shape"]) == (dtype.name, list(shape))
        assert bytes(found[name]["data"]) == (head + data)[start:end]


@given(tensors, st.data())
def test_a_damaged_file_is_refused_or_read_as_safetensors_reads_it(
    described: dict[str, tuple[str, tuple[int, ...]]], data: st.DataObject
) -> None:
    blob = bytearray(saved(described))
    length = int.from_bytes(blob[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["flip", "digit", "cut"]))
        at = data.draw(st.integers(8, max(8, 7 + length)))
        if kind == "flip" and at < len(blob):
            blob[at] = data.draw(st.integers(0, 255))
        elif kind == "digit":
            digits = [i for i in range(8, 8 + length) if i < len(blob) and chr(blob[i]).isdigit()]
            if digits:
                blob[data.draw(st.sampled_from(digits))] = ord(data.draw(st.sampled_from("0189")))
        elif kind == "cut" and len(blob) > 8 + length:
            del blob[data.draw(st.integers(8 + length, len(blob) - 1)) :]
    try:
        found = parse_header(bytes(blob[8 : 8 + length]), PATH, len(blob))
    except CheckpointError:
        return
    expected = library_reads(bytes(blob))
    assert expected is not None, "the library refuses it"
    assert {(t.name, t.dtype.name, t.shape) for t in found} == {
        (name, value["dtype"], tuple(value["shape"])) for name, value in expected.items()
    }


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    try:
        found = parse_header(noise, PATH, 8 + len(noise))
    except CheckpointError:
        return
    assert all(tensor.nbytes == 0 for tensor in found)
