"""Measures the copy and digest kernels on one thread against the memory bandwidth of this machine.

    .venv/bin/python scripts/bench/kernels.py [--json] [--size-mib 112] [--repeats 9] [NAME ...]

Every case is timed in pairs, kernel and baseline in turn, and reports the median of both and of
their ratio. Baselines read or copy as many bytes: `read` sums 64-bit words in one run (torch, one
thread), `copy_` is torch's. Time is the thread's own CPU time, so that other work on the machine
disturbs less; GB/s are 10^9 bytes of the digested or written tensor per second. Results are checked
before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from weightsync import _native
from weightsync.encodings.digest import reference_digest
from weightsync.encodings.rows import digest_rows, pack_keys, pack_rows
from weightsync.ir.dtypes import Dtype

I64 = npt.NDArray[np.int64]
GROUP = np.zeros(1, np.int32)
COLUMNS = 7168  # hidden size of DeepSeek-V3
DTYPES = {
    torch.uint8: Dtype.U8,
    torch.bfloat16: Dtype.BF16,
    torch.float16: Dtype.F16,
    torch.float32: Dtype.F32,
}


@dataclass(frozen=True)
class Case:
    """A kernel and what it is compared with; both do the same work per call.

    Attributes:
        name: Says kernel, dtype and layout.
        nbytes: Bytes of the digested or written tensor.
        kernel: Our call.
        baseline_name: What `baseline` is.
        baseline: The call to compare with.
    """

    name: str
    nbytes: int
    kernel: Callable[[], object]
    baseline_name: str
    baseline: Callable[[], object]


def padded(values: list[int], fill: int) -> list[list[int]]:
    """One row of a (1, 4) column, dims padded in front."""
    return [[fill] * (4 - len(values)) + values]


def strides(tensor: torch.Tensor) -> list[list[int]]:
    """Strides of a tensor in bytes, as a (1, 4) column."""
    return padded([s * tensor.element_size() for s in tensor.stride()], 0)


def copy_row(src: torch.Tensor, dst: torch.Tensor) -> I64:
    """Row that packs `src` into `dst`."""
    n = padded(list(src.shape), 1)
    dtypes = DTYPES[src.dtype], DTYPES[dst.dtype]
    return pack_rows([src.data_ptr()], [dst.data_ptr()], *dtypes, n, strides(src), strides(dst))


def hash_row(tensor: torch.Tensor, step: int = 1) -> I64:
    """Row that digests `tensor`; `step` is that of its last dim."""
    item = tensor.element_size()
    shape, zero = padded(list(tensor.shape), 1), padded([], 0)
    return digest_rows(
        [tensor.data_ptr()], item, [1], zero, padded([step], 1), shape, strides(tensor)
    )


def digest_cases(weights: torch.Tensor) -> Iterator[Case]:
    """Yield digests of views of `weights`, against reading as many bytes."""
    rows = weights.shape[0]
    views = {
        "digest bf16 rows": weights,
        "digest bf16 flat": weights.view(-1),
        "digest fp8 rows": weights.view(torch.uint8).view(2 * rows, COLUMNS),
        "digest f32 rows": weights.view(-1).view(torch.float32).view(rows // 2, COLUMNS),
        "digest bf16 128 columns": weights[:, 128:256],
        "digest bf16 1024 columns": weights[:, 1024:2048],
        "digest bf16 runs of 128": weights.view(-1, 128),
        "digest bf16 off by one": weights.view(-1)[1:],
        "digest bf16 transposed": weights.T,
        "digest bf16 every other": weights[:, ::2],
        "digest bf16 64 rows in cache": weights[:64],
    }
    for name, view in views.items():
        row = hash_row(view)
        nbytes = view.numel() * view.element_size()
        sample = view[-2:]  # the reference is slow
        codes = sample.contiguous().view(torch.uint8).numpy().view(f"<u{view.element_size()}")
        expected = reference_digest(codes, [0] * view.ndim, [1] * view.ndim, 1)
        assert int(_native.digest(hash_row(sample), GROUP, 1)[0]) == expected, name
        # The same number of bytes, read in one run.
        words = weights.view(-1).view(torch.int64)[: nbytes // 8]
        yield Case(name, nbytes, lambda row=row: _native.digest(row, GROUP, 1), "read", words.sum)
    row = hash_row(weights, step=2)
    nbytes = 2 * weights.numel()
    words = weights.view(-1).view(torch.int64)
    yield Case(
        "digest bf16 rows, step 2", nbytes, lambda: _native.digest(row, GROUP, 1), "read", words.sum
    )


def pack_cases(weights: torch.Tensor, masters: torch.Tensor) -> Iterator[Case]:
    """Yield copies and casts, against torch's."""
    half = weights[: masters.shape[0]]
    pairs = {
        "pack bf16 contiguous": (weights, torch.bfloat16),
        "pack bf16 192 columns": (weights[:, :192], torch.bfloat16),
        "pack bf16 half the columns": (weights[:, : COLUMNS // 2], torch.bfloat16),
        "pack bf16 transposed": (half.T, torch.bfloat16),
        "pack f32 transposed": (masters.T, torch.float32),
        "pack f32 to bf16": (masters, torch.bfloat16),
        "pack f32 to f16": (masters, torch.float16),
        "pack f32 to bf16, 64 rows in cache": (masters[:64], torch.bfloat16),
        "pack f32 to bf16 transposed": (masters.T, torch.bfloat16),
    }
    for name, (src, dtype) in pairs.items():
        dst = torch.zeros(src.shape, dtype=dtype)
        row = copy_row(src, dst)
        _native.pack(row)
        assert torch.equal(dst, src.to(dtype)), name
        nbytes = dst.numel() * dst.element_size()
        yield Case(
            name,
            nbytes,
            lambda row=row: _native.pack(row),
            "copy_",
            lambda dst=dst, src=src: dst.copy_(src),
        )


def fused_cases(weights: torch.Tensor, masters: torch.Tensor) -> Iterator[Case]:
    """Yield pack_digest, against pack and then digest."""
    keys = pack_keys([1], padded([], 0), padded([], 1))
    for name, src in {
        "pack_digest bf16 contiguous": weights,
        "pack_digest bf16 4 MiB": weights[:292],
        "pack_digest f32 to bf16": masters,
        "pack_digest f32 to bf16 4 MiB": masters[:292],
        "pack_digest bf16 192 columns": weights[:, :192],
    }.items():
        dst = torch.zeros(src.shape, dtype=torch.bfloat16)
        pack, digest = copy_row(src, dst), hash_row(dst)

        def two_passes(pack: I64 = pack, digest: I64 = digest) -> object:
            _native.pack(pack)
            return _native.digest(digest, GROUP, 1)

        def one_pass(pack: I64 = pack) -> object:
            return _native.pack_digest(pack, keys, GROUP, 1)

        assert one_pass() == two_passes(), name
        yield Case(name, dst.numel() * 2, one_pass, "pack + digest", two_passes)


def seconds(call: Callable[[], object], count: int) -> float:
    """CPU seconds of one of `count` calls."""
    start = time.thread_time()
    for _ in range(count):
        call()
    return (time.thread_time() - start) / count


def measure(case: Case, repeats: int) -> dict[str, object]:
    """Time both calls of a case in turn; medians."""
    count = max(1, round(2e8 / case.nbytes))
    seconds(case.kernel, 1)
    seconds(case.baseline, 1)
    pairs = [(seconds(case.kernel, count), seconds(case.baseline, count)) for _ in range(repeats)]
    return {
        "name": case.name,
        "bytes": case.nbytes,
        "gb_per_s": round(case.nbytes / statistics.median(p[0] for p in pairs) / 1e9, 2),
        "baseline": case.baseline_name,
        "baseline_gb_per_s": round(case.nbytes / statistics.median(p[1] for p in pairs) / 1e9, 2),
        "ratio": round(statistics.median(p[1] / p[0] for p in pairs), 3),
    }


def tiny_rows(num_bytes: int) -> dict[str, object]:
    """Cost of a row of a large table whose rows are tiny."""
    count = 20_000
    src = np.zeros(count * num_bytes, np.uint8)
    dst = np.zeros_like(src)
    at = np.arange(count) * num_bytes
    n, stride = (np.broadcast_to(v, (count, 4)) for v in ([1, 1, 1, num_bytes // 2], [0, 0, 0, 2]))
    table = pack_rows(
        src.ctypes.data + at, dst.ctypes.data + at, Dtype.BF16, Dtype.BF16, n, stride, stride
    )
    best = min(seconds(lambda: _native.pack(table), 3) for _ in range(5))
    return {"name": f"pack rows of {num_bytes} bytes", "ns_per_row": round(best / count * 1e9, 1)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only cases whose name contains one of these")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--size-mib", type=int, default=112, help="size of the largest tensor")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = options.size_mib * 2**20 // (2 * COLUMNS) // 4 * 4
    weights = torch.randn(rows, COLUMNS).to(torch.bfloat16)
    masters = torch.randn(rows // 2, COLUMNS)

    results = []
    for cases in (
        digest_cases(weights),
        pack_cases(weights, masters),
        fused_cases(weights, masters),
    ):
        for case in cases:
            if options.names and not any(name in case.name for name in options.names):
                continue
            found = measure(case, options.repeats)
            results.append(found)
            if not options.json:
                print(
                    f"{found['name']:36s} {found['gb_per_s']:7} GB/s   {found['baseline']:13s} "
                    f"{found['baseline_gb_per_s']:7} GB/s   ratio {found['ratio']}",
                    flush=True,
                )
    for num_bytes in (64, 256):
        results.append(tiny_rows(num_bytes))
        if not options.json:
            print(f"{results[-1]['name']:36s} {results[-1]['ns_per_row']:7} ns per row")
    if options.json:
        host = {"machine": platform.machine(), "torch": torch.__version__, **_native.kernel_info()}
        print(json.dumps({"schema": "weightsync.bench.kernels/1", **host, "results": results}))


if __name__ == "__main__":
    main()
