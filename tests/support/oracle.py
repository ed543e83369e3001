"""Oracle of plans: executes one on byte arrays and says what every sink must hold afterwards.

Nothing here calls planner code. Contents come from global canonical indices and the definition of a
piece; the plan is interpreted row by row, as an executor and a sink would.
"""

from __future__ import annotations

import hashlib
import heapq

import numpy as np
from numpy.typing import NDArray

from weightsync.ir import Arena, Dtype, Manifest, Plan, RowKind

Codes = NDArray[np.unsignedinteger]
Bytes = NDArray[np.uint8]

_CODE = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def bf16_codes(values: NDArray[np.float32]) -> Codes:
    """Round float32 to bfloat16, ties to even, by comparing distances to both neighbours."""
    bits = values.view(np.uint32)
    below = bits & np.uint32(0xFFFF0000)  # towards zero
    above = below + np.uint32(0x10000)
    exact = values.astype(np.float64)
    to_below = np.abs(exact - below.view(np.float32).astype(np.float64))
    to_above = np.abs(above.view(np.float32).astype(np.float64) - exact)
    is_odd = (below >> np.uint32(16)) & np.uint32(1) == 1
    up = (to_above < to_below) | ((to_above == to_below) & is_odd)
    return (np.where(up, above, below) >> np.uint32(16)).astype(np.uint16)


def tensor_codes(name: str, shape: tuple[int, ...], dtype: Dtype) -> Codes:
    """Return the stored bits of a whole canonical tensor in some dtype.

    Floats are one float32 value per element, rounded to the dtype; other dtypes are plain random
    bits. Both depend on the name alone.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape).astype(np.float32)
    if dtype is Dtype.F32:
        return values.view(np.uint32)
    if dtype is Dtype.BF16:
        return bf16_codes(values)
    if dtype is Dtype.F16:
        return values.astype(np.float16).view(np.uint16)
    kind = _CODE[dtype.itemsize]
    return rng.integers(0, np.iinfo(kind).max, shape, kind, endpoint=True)


def cast_codes(codes: Codes, source: Dtype, sink: Dtype) -> Codes:
    """Return stored bits of one dtype as stored bits of another."""
    if source is sink:
        return codes
    if (source, sink) == (Dtype.BF16, Dtype.F32):
        return codes.astype(np.uint32) << np.uint32(16)  # the same bits above zeros
    assert source is Dtype.F32
    values = codes.view(np.float32)
    return values.astype(np.float16).view(np.uint16) if sink is Dtype.F16 else bf16_codes(values)


def constant_code(value: float, dtype: Dtype) -> int:
    """Return the stored bits of a constant in the dtypes that tests use."""
    exact = np.array([value], np.float32)
    if dtype is Dtype.F64:
        return int(np.array([value], np.float64).view(np.uint64)[0])
    if dtype in (Dtype.F32, Dtype.BF16, Dtype.F16):
        return int(cast_codes(exact.view(np.uint32), Dtype.F32, dtype)[0])
    return int(value)


def _addresses(offset: int, n: list[int], stride: list[int]) -> NDArray[np.int64]:
    """Return the element addresses of a strided row, as an array of shape n."""
    address = np.full(n, offset, np.int64)
    for dim, (count, step) in enumerate(zip(n, stride, strict=True)):
        shape = [1] * len(n)
        shape[dim] = count
        address += (np.arange(count) * step).reshape(shape)
    return address


def memory_of(manifest: Manifest) -> list[Codes]:
    """Return the contents of every buffer, straight from the definition of pieces.

    What no piece holds (gaps of a source) is 0xA5.
    """
    memory = [
        np.full(int(numel) * Dtype(dtype).itemsize, 0xA5, np.uint8).view(
            _CODE[Dtype(dtype).itemsize]
        )
        for numel, dtype in zip(manifest.buffers.numel, manifest.buffers.dtype, strict=True)
    ]
    pieces = manifest.pieces
    for row in range(len(pieces)):
        buffer = int(pieces.buffer[row])
        dtype = Dtype(manifest.buffers.dtype[buffer])
        n = pieces.n[row].tolist()
        address = _addresses(int(pieces.offset[row]), n, pieces.stride[row].tolist())
        tensor = int(pieces.tensor[row])
        if tensor < 0:
            memory[buffer][address] = constant_code(float(pieces.fill[row]), dtype)
            continue
        shape = tuple(manifest.tensors.shape[tensor].tolist())
        codes = tensor_codes(manifest.tensors.names[tensor], shape, dtype)
        index = [
            lo + step * np.arange(k)
            for lo, step, k in zip(pieces.lo[row], pieces.step[row], n, strict=True)
        ]
        memory[buffer][address] = codes[np.ix_(*index)]
    return memory


def execute(
    plan: Plan, memory: list[Codes] | None = None
) -> tuple[list[Bytes], list[NDArray[np.int64]]]:
    """Carry out a plan.

    Args:
        plan: The plan.
        memory: Contents of every source buffer; None: what its pieces say.

    Returns:
        The arena of every sink rank, and how often each of its bytes was written.
    """
    memory = memory_of(plan.source) if memory is None else memory
    arenas = [np.zeros(Arena(plan.sink, r).nbytes, np.uint8) for r in range(len(plan.sink.ranks))]
    counts = [np.zeros(len(arena), np.int64) for arena in arenas]
    rows, chunks, buckets = plan.rows, plan.chunks, plan.buckets
    for bucket in _in_order(plan):
        sink = int(buckets.dst_rank[bucket])
        for chunk in range(int(buckets.chunk_lo[bucket]), int(buckets.chunk_hi[bucket])):
            start, nbytes = int(chunks.dst_offset[chunk]), int(chunks.nbytes[chunk])
            first, last = int(chunks.row_lo[chunk]), int(chunks.row_hi[chunk])
            if rows.kind[first] == RowKind.HOP:
                _pass_on(plan, range(first, last), arenas, counts)
                continue
            if chunks.is_packed[chunk]:
                payload = np.full(nbytes, 0x5A, np.uint8)
                for row in range(first, last):
                    _gather(plan, row, memory, payload, start)
            else:
                (row,) = range(first, last)
                source = memory[int(rows.src_buffer[row])]
                begin = int(rows.src_offset[row]) * source.itemsize
                payload = source.view(np.uint8)[begin : begin + nbytes]
            assert len(payload) == nbytes
            arenas[sink][start : start + nbytes] = payload
            counts[sink][start : start + nbytes] += 1
    for row in np.flatnonzero(rows.kind == RowKind.CONST).tolist():
        buffer = int(rows.dst_buffer[row])
        sink = int(plan.sink.buffers.rank[buffer])
        dtype = Dtype(plan.sink.buffers.dtype[buffer])
        fill = float(plan.sink.pieces.fill[int(rows.src_offset[row])])
        code = np.array([constant_code(fill, dtype)], _CODE[dtype.itemsize]).view(np.uint8)
        for byte in range(dtype.itemsize):
            at = _sink_bytes(plan, row) + byte
            arenas[sink][at] = code[byte]
            np.add.at(counts[sink], at, 1)
    return arenas, counts


def _in_order(plan: Plan) -> list[int]:
    """Return all buckets, each after those that it waits for, and otherwise backwards."""
    missing = [0] * len(plan.buckets)
    followers: dict[int, list[int]] = {}
    for before, after in {(int(a), int(b)) for a, b in plan.edges}:
        missing[after] += 1
        followers.setdefault(before, []).append(after)
    free = [-bucket for bucket, count in enumerate(missing) if count == 0]
    heapq.heapify(free)
    order: list[int] = []
    while free:
        order.append(-heapq.heappop(free))
        for after in followers.get(order[-1], ()):
            missing[after] -= 1
            if missing[after] == 0:
                heapq.heappush(free, -after)
    assert len(order) == len(plan.buckets), "the buckets wait for each other"
    return order


def _pass_on(plan: Plan, rows: range, arenas: list[Bytes], counts: list[NDArray[np.int64]]) -> None:
    """Copy from sink to sink, element by element, only what the sender has received."""
    table, buffers = plan.rows, plan.sink.buffers
    for row in rows:
        src, dst, nest = (int(c[row]) for c in (table.src_buffer, table.dst_buffer, table.nest))
        assert buffers.dtype[src] == buffers.dtype[dst]
        ends = []
        for buffer, offset, stride in (
            (src, table.src_offset[row], plan.nests.src_stride[nest]),
            (dst, table.dst_offset[row], plan.nests.dst_stride[nest]),
        ):
            rank = int(buffers.rank[buffer])
            arena = Arena(plan.sink, rank)
            base = int(arena.offset_bytes[arena.buffers.tolist().index(buffer)])
            item = Dtype(buffers.dtype[buffer]).itemsize
            at = base + item * _addresses(int(offset), plan.nests.n[nest].tolist(), stride.tolist())
            ends.append((rank, at[..., None] + np.arange(item)))
        (sender, read), (sink, written) = ends
        assert sender != sink
        assert (counts[sender][read] == 1).all(), "passed on before it was there"
        arenas[sink][written] = arenas[sender][read]
        np.add.at(counts[sink], written, 1)


def _sink_bytes(plan: Plan, row: int) -> NDArray[np.int64]:
    """Return the arena address of the first byte of every element of a row."""
    rows, buffer = plan.rows, int(plan.rows.dst_buffer[row])
    rank = int(plan.sink.buffers.rank[buffer])
    arena = Arena(plan.sink, rank)
    base = int(arena.offset_bytes[arena.buffers.tolist().index(buffer)])
    itemsize = Dtype(plan.sink.buffers.dtype[buffer]).itemsize
    nest = int(rows.nest[row])
    n, stride = plan.nests.n[nest].tolist(), plan.nests.dst_stride[nest].tolist()
    return base + itemsize * _addresses(int(rows.dst_offset[row]), n, stride)


def _gather(plan: Plan, row: int, memory: list[Codes], staging: Bytes, start: int) -> None:
    """Copy one row into staging that is laid out like the arena from `start`."""
    rows = plan.rows
    src, dst, nest = (int(c[row]) for c in (rows.src_buffer, rows.dst_buffer, rows.nest))
    n, stride = plan.nests.n[nest].tolist(), plan.nests.src_stride[nest].tolist()
    codes = memory[src][_addresses(int(rows.src_offset[row]), n, stride)]
    dtypes = Dtype(plan.source.buffers.dtype[src]), Dtype(plan.sink.buffers.dtype[dst])
    codes = np.ascontiguousarray(cast_codes(codes, *dtypes))
    at = _sink_bytes(plan, row) - start
    for byte in range(dtypes[1].itemsize):
        staging[at + byte] = codes.view(np.uint8).reshape(*n, -1)[..., byte]


def moves_exactly(plan: Plan) -> bool:
    """Whether a plan gives every sink its weights and writes each byte exactly once."""
    arenas, counts = execute(plan)
    expected = memory_of(plan.sink)
    for rank in range(len(plan.sink.ranks)):
        arena = Arena(plan.sink, rank)
        written = np.zeros(arena.nbytes, np.int64)
        for buffer, offset in zip(arena.buffers.tolist(), arena.offset_bytes.tolist(), strict=True):
            content = expected[buffer].view(np.uint8)
            written[offset : offset + len(content)] = 1
            if not np.array_equal(arenas[rank][offset : offset + len(content)], content):
                return False
        if not np.array_equal(counts[rank], written):
            return False
    return True
