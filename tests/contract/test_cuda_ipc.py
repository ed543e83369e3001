"""Fabric cuda_ipc: memory of GPUs, on a GPU where there is one and on one made of host memory."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from support import IS_LONG
from support.cuda import HEADERS, Gpu, faked, is_faked, the_gpu
from support.fabrics import Bytes, Handle, no_leaks, random_bytes, rows
from support.peers import Peer
from support.shims import SHIMS, compile_cpp
from support.tree import ROOT
from weightsync.errors import ConfigError, MemoryRegistrationError
from weightsync.transport.base import Engine
from weightsync.transport.cuda_ipc import cuda_ipc_problem
from weightsync.transport.fabrics import open_fabric

WAIT_S = 10.0
PEER_ACCESS_UNSUPPORTED = 217
LAUNCH_FAILED = 719

gpu_only = pytest.mark.skipif(
    cuda_ipc_problem() is not None, reason=f"{cuda_ipc_problem()}; runs below on a fake one"
)
fake_only = pytest.mark.skipif(not is_faked(), reason="needs the fake driver; runs below with it")


@pytest.mark.skipif(is_faked(), reason="this is that run")
@pytest.mark.timeout(240)  # the first run compiles the fake driver
def test_the_contract_over_a_fake_gpu() -> None:
    suites = ["tests/contract", "tests/property/test_fabric_cover.py", "tests/native"]
    suites += ["tests/integration/test_hops.py"] if IS_LONG else []  # imports torch
    options = ["-q", "-p", "no:cacheprovider", "--timeout", "60", "-k", "cuda_ipc"]
    done = subprocess.run(  # a process of its own: the driver must be loaded first
        [sys.executable, "-m", "pytest", *options, *suites],
        cwd=ROOT,
        env=faked(os.environ),
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    passed = int(done.stdout.rsplit(" passed", 1)[0].split()[-1])
    assert passed > 300, done.stdout[-2000:]


def test_our_table_is_that_of_the_toolkits_header(tmp_path: Path) -> None:
    compile_cpp(SHIMS / "cuda_abi_check.cpp", tmp_path / "check.o", "-c", f"-I{HEADERS}")


@pytest.mark.skipif(cuda_ipc_problem() is None, reason="there is a driver")
def test_a_host_without_a_gpu_is_told_so() -> None:
    with pytest.raises(ConfigError, match=r"libcuda\.so\.1.*fabric 'local'"):
        open_fabric("cuda_ipc")


@pytest.fixture
def engine() -> Iterator[Engine]:
    live = the_gpu().live() if is_faked() else 0
    with no_leaks():
        handle = Handle(open_fabric("cuda_ipc"))
        yield cast(Engine, handle)
        handle.close()
    if is_faked():
        assert the_gpu().live() == live


@gpu_only
@pytest.mark.gpu
@pytest.mark.parametrize("nbytes", [1, 4097, (9 << 20) + 5])
@pytest.mark.parametrize("source", ["gpu", "host"])
def test_bytes_reach_a_gpu_from_another_process(engine: Engine, source: str, nbytes: int) -> None:
    gpu = the_gpu()
    address = gpu.allocate(nbytes)
    gpu.write(address, np.zeros(nbytes, np.uint8))
    lease = engine.register(address, nbytes, None)
    pieces = np.linspace(0, nbytes, 8).astype(int)
    target = engine.export([(0, lease, 0, nbytes)], [7], 8, 1)
    with Peer("cuda_ipc") as peer:
        peer.call("connect", descriptor=target.descriptor.hex())
        peer.call("load_device" if source == "gpu" else "load", nbytes=nbytes, seed=5)
        table = [
            [int(begin), int(begin), int(end - begin), number]
            for number, (begin, end) in enumerate(itertools.pairwise(pieces))
        ]
        peer.call("transfer", table=table, timeout_s=WAIT_S)
        target.wait([0], WAIT_S)
    assert np.array_equal(gpu.read(address, nbytes), random_bytes(nbytes, seed=5))
    target.close()
    lease.release()
    gpu.free(address)


@gpu_only
@pytest.mark.gpu
def test_memory_that_was_freed_and_allocated_again_is_opened_again(engine: Engine) -> None:
    """An allocator that gives the same address twice means another allocation by it, and what was
    freed must not be open any more: the fake driver refuses both."""
    nbytes = 2 << 20
    gpu = the_gpu()
    address = gpu.allocate(nbytes)
    lease = engine.register(address, nbytes, None)
    targets = [engine.export([(0, lease, 0, nbytes)], [1], 8, 1) for _ in range(2)]
    places = []
    with Peer("cuda_ipc") as peer:
        for target in targets:  # each is a session of its own, and opens for itself
            peer.call("connect", descriptor=target.descriptor.hex())
        for seed in range(6):
            live = gpu.live() if is_faked() else 0
            places.append(peer.call("load_device", nbytes=nbytes, seed=seed))
            for number, target in enumerate(targets):
                peer.call("use_remote", number=number)
                peer.call("transfer", table=[[0, 0, nbytes, 0]], timeout_s=WAIT_S)
                target.wait([0], WAIT_S)
                assert np.array_equal(gpu.read(address, nbytes), random_bytes(nbytes, seed=seed))
                target.reset([0])
            peer.call("unload_device")
            if is_faked() and seed > 0:  # the first round made the streams
                assert gpu.live() == live
    if is_faked():
        assert len(set(places)) == 1
    for target in targets:
        target.close()
    lease.release()
    gpu.free(address)


def _device(gpu: Gpu, content: Bytes) -> int:
    address = gpu.allocate(content.size)
    gpu.write(address, content)
    return address


@fake_only
@pytest.mark.parametrize(
    ("function", "result", "words"),
    [
        ("cuIpcOpenMemHandle", PEER_ACCESS_UNSUPPORTED, "PEER_ACCESS_UNSUPPORTED.*topo"),
        ("cuMemcpyAsync", LAUNCH_FAILED, "CUDA error 719"),
        ("cuStreamSynchronize", LAUNCH_FAILED, "CUDA error 719"),
        ("cuStreamCreate", 2, "CUDA error 2"),
        ("cuCtxPushCurrent", 2, "CUDA error 2"),
    ],
)
def test_an_error_of_the_sinks_driver_is_the_writers(
    engine: Engine, function: str, result: int, words: str
) -> None:
    gpu = the_gpu()
    payload = random_bytes(4096)
    with Peer("cuda_ipc") as peer:
        descriptor = peer.call("export", nbytes=4096, slots=[2], is_private=True)
        address = _device(gpu, payload)
        lease = engine.register(address, 4096, None)
        remote = engine.connect(bytes.fromhex(descriptor), WAIT_S)
        peer.call("fail_gpu", function=function, result=result)
        table = rows((address, 0, 1024, 0), (address + 2048, 2048, 1024, 1))
        with pytest.raises(MemoryRegistrationError, match=words):
            remote.post(table).wait(WAIT_S)
        assert peer.call("missing", slot=0) == [0, 1]  # nothing that failed counts
        remote.post(table).wait(WAIT_S)
        peer.call("wait", slots=[0], timeout_s=WAIT_S)
        remote.close()
        lease.release()
        gpu.free(address)


@fake_only
def test_rows_before_the_one_that_failed_count(engine: Engine) -> None:
    gpu = the_gpu()
    with Peer("cuda_ipc") as peer:
        descriptor = peer.call("export", nbytes=4096, slots=[3], is_private=True)
        address = _device(gpu, random_bytes(4096))
        lease = engine.register(address, 4096, None)
        remote = engine.connect(bytes.fromhex(descriptor), WAIT_S)
        peer.call("fail_gpu", function="cuMemcpyAsync", result=LAUNCH_FAILED, skip=1)
        # Apart, so that they are copies of their own.
        table = rows(*[(address + i * 1024, i * 1024, 512, i) for i in range(3)])
        with pytest.raises(MemoryRegistrationError, match="could not read write 1 "):
            remote.post(table).wait(WAIT_S)
        assert peer.call("missing", slot=0) == [1, 2]
        remote.close()
        lease.release()
        gpu.free(address)


@fake_only
def test_what_has_no_bytes_needs_no_driver(engine: Engine) -> None:
    with Peer("cuda_ipc") as peer:
        descriptor = peer.call("export", nbytes=4096, slots=[2], is_private=True)
        remote = engine.connect(bytes.fromhex(descriptor), WAIT_S)
        for function in ("cuStreamCreate", "cuCtxPushCurrent", "cuStreamSynchronize"):
            peer.call("fail_gpu", function=function, result=LAUNCH_FAILED)
        remote.post(rows((0, 0, 0, 1), (0, 0, 0, -1))).wait(WAIT_S)
        assert peer.call("missing", slot=0) == [0]
        remote.close()


@fake_only
def test_memory_that_cannot_be_shared_is_refused_when_it_is_leased(engine: Engine) -> None:
    gpu = the_gpu()
    address = _device(gpu, random_bytes(4096))
    with Peer("cuda_ipc") as peer:
        descriptor = bytes.fromhex(peer.call("export", nbytes=4096, slots=[1], is_private=True))
        lease = engine.register(address, 4096, None)  # no source yet, so nothing is asked
        gpu.fail("cuIpcGetMemHandle", 1)
        with pytest.raises(MemoryRegistrationError, match="expandable_segments:False"):
            engine.connect(descriptor, WAIT_S)
        engine.connect(descriptor, WAIT_S)
        gpu.fail("cuIpcGetMemHandle", 1)
        other = _device(gpu, random_bytes(64))
        with pytest.raises(MemoryRegistrationError, match=r"64 bytes of GPU 0.*cannot be shared"):
            engine.register(other, 64, None)
        with pytest.raises(MemoryRegistrationError, match="not of one allocation"):
            engine.register(other + 32, 64, None)
        lease.release()
    gpu.free(other)
    gpu.free(address)


@fake_only
def test_the_host_cannot_touch_what_is_moved() -> None:
    """What makes the other tests tell: device memory read by a processor ends the process."""
    gpu = the_gpu()
    address = _device(gpu, random_bytes(64))
    pipe = os.pipe()
    with pytest.raises(OSError, match="Bad address"):
        os.write(pipe[1], (ctypes.c_char * 64).from_address(address))
    for end in pipe:
        os.close(end)
    gpu.free(address)
