"""Memory of a GPU: a real one's, or that of `fake_cuda.so`, which stands in for the CUDA driver.

A process gets the fake driver by preloading it: `faked` makes the environment.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from support.shims import CACHE, FLAGS, SHIMS, compile_cpp

__all__ = ["HEADERS", "Gpu", "device_address", "faked", "in_gpu", "is_faked", "the_gpu"]

Bytes = npt.NDArray[np.uint8]

# Of the package nvidia-cuda-runtime; the folder's name is that of the toolkit's major version.
HEADERS: Final = next(iter(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/include")), None)


def fake_cuda() -> Path:
    """The path of the library; takes seconds the first time."""
    assert HEADERS is not None, "no header of the CUDA toolkit: make setup"
    source = SHIMS / "fake_cuda.cpp"
    digest = hashlib.sha256(" ".join(FLAGS).encode() + source.read_bytes())
    library = CACHE / f"fake_cuda-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        fresh = library.with_suffix(f".{os.getpid()}")
        # By this name a loader that is asked for the driver finds it.
        compile_cpp(source, fresh, f"-I{HEADERS}", "-shared", "-Wl,-soname,libcuda.so.1")
        fresh.rename(library)
    return library


def faked(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment whose processes have a GPU made of host memory."""
    preload = " ".join(filter(None, (str(fake_cuda()), environ.get("LD_PRELOAD", ""))))
    return {**environ, "LD_PRELOAD": preload}


class Gpu:
    """The CUDA driver of this process, by its C interface. Raises `OSError` without one."""

    def __init__(self) -> None:
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.is_fake = hasattr(self.driver, "fake_cuda_alias")
        self._check("cuInit", 0)
        context = ctypes.c_void_p()
        self._check("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self._context = context

    def _check(self, name: str, *arguments: Any) -> None:
        result = getattr(self.driver, name)(*arguments)
        assert result == 0, f"{name}: CUDA error {result}"

    def _call(self, name: str, *arguments: Any) -> None:
        """With the device's context, which is a thread's own."""
        self._check("cuCtxPushCurrent_v2", self._context)
        try:
            self._check(name, *arguments)
        finally:
            self._check("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def allocate(self, nbytes: int) -> int:
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        return address.value

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def write(self, address: int, array: Bytes) -> None:
        source = ctypes.c_void_p(int(array.__array_interface__["data"][0]))
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), source, ctypes.c_size_t(array.size))
        self._call("cuCtxSynchronize")  # from pageable memory it may return before all is there

    def read(self, address: int, nbytes: int) -> Bytes:
        array = np.empty(nbytes, np.uint8)
        target = ctypes.c_void_p(int(array.__array_interface__["data"][0]))
        self._call("cuMemcpyDtoH_v2", target, ctypes.c_uint64(address), ctypes.c_size_t(nbytes))
        return array

    # Of the fake only.

    def fail(self, name: str, result: int, skip: int = 0) -> None:
        """Let one call fail, after `skip` more that do not."""
        self.driver.fake_cuda_fail(name.encode(), result, skip)

    def live(self) -> int:
        """Allocations, imports, streams and retained contexts."""
        return int(self.driver.fake_cuda_live())

    def alias(self, address: int) -> int:
        self.driver.fake_cuda_alias.restype = ctypes.c_void_p
        return int(self.driver.fake_cuda_alias(ctypes.c_uint64(address)))


@functools.cache
def is_faked() -> bool:
    """Whether this process was started with the fake driver."""
    return hasattr(ctypes.CDLL(None), "fake_cuda_alias")


@functools.cache
def the_gpu() -> Gpu:
    """The first of this process."""
    return Gpu()


_devices: dict[int, tuple[int, int]] = {}  # by alias: size and address


class _Memory:
    """Memory of the fake GPU, and where tests look at it."""

    def __init__(self, nbytes: int) -> None:
        self.address = the_gpu().allocate(max(nbytes, 1))
        self.alias = the_gpu().alias(self.address)
        self.__array_interface__ = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (self.alias, False),
        }
        _devices[self.alias] = (max(nbytes, 1), self.address)

    def __del__(self) -> None:
        del _devices[self.alias]
        the_gpu().free(self.address)


def in_gpu(array: Bytes) -> Bytes:
    """A copy in memory of the fake GPU; `device_address` tells its address there."""
    memory = _Memory(array.nbytes)
    copy = np.asarray(memory)
    copy[:] = array.view(np.uint8).ravel()
    return copy.view(array.dtype).reshape(array.shape)


def device_address(address: int) -> int:
    """What an address of the host stands for: memory of the fake GPU, or itself."""
    for alias, (nbytes, device) in _devices.items():
        if alias <= address < alias + nbytes:
            return device + (address - alias)
    return address
