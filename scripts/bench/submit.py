"""Measures what it costs to submit writes: time inside the call, per write.

    .venv/bin/python scripts/bench/submit.py [--json] [--writes 100000] [--no-cpp]

Targets: at most 1 us per write in C++, at most 3 us per write from Python in batches. Writes have
64 bytes and an immediate each; every batch is waited for outside the measured time. `local-push`
copies such batches inside the call, so its figures hold the copies too; `local-pull` and `sim` only
queue them. Medians over batches. The C++ half is native/tests/submit_bench.cpp, built for this.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from weightsync.transport.base import Engine, Operation, Pages
from weightsync.transport.fabrics import open_fabric
from weightsync.transport.sim import SimWire

NATIVE = Path(__file__).parents[2] / "native"
WRITE_BYTES = 64
BATCHES = (1, 16, 256, 4096)
WAIT_S = 60.0
LIMITS_US = {"C++": 1.0, "Python": 3.0}


@dataclass(frozen=True)
class Result:
    """One figure.

    Attributes:
        language: Who called: `C++` or `Python`.
        fabric: `local-push`, `local-pull` or `sim`.
        call: `post`, `write_paged` or `scatter`.
        batch: Writes per call.
        ns_per_write: Median.
    """

    language: str
    fabric: str
    call: str
    batch: int
    ns_per_write: float


def measure(submit: Callable[[], Operation], batch: int, writes: int) -> float:
    """Median nanoseconds per write inside `submit`."""
    times = []
    for _ in range(max(5, writes // batch)):
        begin = time.perf_counter_ns()
        operation = submit()
        end = time.perf_counter_ns()
        operation.wait(WAIT_S)
        times.append((end - begin) / batch)
    return statistics.median(times)


def pairs() -> Iterator[tuple[str, Engine, Engine, bool]]:
    """Fabrics: name, source, sink, and whether the sink's memory is private."""
    for name, is_private in (("local-push", False), ("local-pull", True)):
        yield name, open_fabric("local", threads=1), open_fabric("local", threads=1), is_private
    wire = SimWire(1, blocking=False)
    yield "sim", open_fabric("sim", wire=wire), open_fabric("sim", wire=wire), True


def measure_python(writes: int) -> Iterator[Result]:
    """All calls on all fabrics, from Python."""
    for fabric, source, sink, is_private in pairs():
        with source, sink:
            for batch in BATCHES:
                nbytes = batch * WRITE_BYTES
                payload, private = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
                address = int(payload.__array_interface__["data"][0])
                lease = source.register(address, nbytes, payload)
                memory = (
                    sink.register(int(private.__array_interface__["data"][0]), nbytes, private)
                    if is_private
                    else sink.allocate(nbytes)
                )
                target = sink.export([(0, memory, 0, nbytes)], [batch], 12, 1)
                remote = source.connect(target.descriptor)
                indices = np.arange(batch)
                table = np.stack(
                    [
                        address + indices * WRITE_BYTES,
                        indices * WRITE_BYTES,
                        np.full(batch, WRITE_BYTES),
                        indices,
                    ],
                    axis=1,
                )
                read = Pages(indices, WRITE_BYTES, address)
                written = Pages(indices, WRITE_BYTES, 0)
                peers = np.zeros(batch, np.int32)
                calls: dict[str, Callable[[], Operation]] = {
                    "post": partial(remote.post, table),
                    "write_paged": partial(remote.write_paged, WRITE_BYTES, read, written, 0),
                    "scatter": partial(source.scatter, [remote], table, peers),
                }
                for call, submit in calls.items():
                    yield Result("Python", fabric, call, batch, measure(submit, batch, writes))
                target.close()
                lease.release()


def measure_cpp() -> Iterator[Result]:
    """The same from C++, by a program that is built first."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        options = [
            "-DCMAKE_BUILD_TYPE=Release",
            "-DWEIGHTSYNC_BUILD_MODULE=OFF",
            "-DWEIGHTSYNC_BUILD_TESTS=ON",
        ]
        for command in (
            ["cmake", "-S", str(NATIVE), "-B", folder, "-G", "Ninja", *options],
            ["ninja", "-C", folder, "weightsync_submit_bench"],
        ):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        program = Path(folder) / "weightsync_submit_bench"
        output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    for line in output.splitlines():
        yield Result("C++", **json.loads(line))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--writes", type=int, default=100_000, help="for each figure")
    parser.add_argument("--no-cpp", action="store_true", help="build nothing")
    arguments = parser.parse_args()
    results = list(measure_python(arguments.writes))
    if not arguments.no_cpp:
        results += measure_cpp()
    host = {"machine": platform.machine(), "cpus": os.cpu_count(), "load": os.getloadavg()[0]}
    if arguments.json:
        print(
            json.dumps(
                {
                    "schema": "weightsync.bench_submit/1",
                    "limits_us": LIMITS_US,
                    "results": [asdict(result) for result in results],
                    "host": host,
                }
            )
        )
        return
    print(f"{host}\n{'':8}{'fabric':12}{'call':14}{'batch':>6}{'us per write':>14}")
    for result in results:
        us = result.ns_per_write / 1000
        # Single writes from Python pay for the call; the limit is for batches.
        is_limited = result.language == "C++" or result.batch > 1
        over = "  over" if is_limited and us > LIMITS_US[result.language] else ""
        print(
            f"{result.language:8}{result.fabric:12}{result.call:14}{result.batch:6}{us:14.3f}{over}"
        )


if __name__ == "__main__":
    main()
