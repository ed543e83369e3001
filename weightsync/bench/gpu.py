"""Memory of a GPU for the fabric benchmark, by the CUDA driver alone: no torch, no compiler."""

from __future__ import annotations

import ctypes
import functools
import time
from typing import Any, Final

from weightsync.bench.payload import Words, address_of
from weightsync.errors import ConfigError, MemoryRegistrationError

__all__ = ["DeviceCopy", "DeviceWords", "device_count"]

_SIZE: Final = ctypes.c_size_t
_POINTER: Final = ctypes.c_uint64


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise ConfigError(f"no CUDA driver: {error}") from error


def _call(name: str, *arguments: Any) -> None:
    """Call the driver; names are those with versions that its header maps to."""
    result = getattr(_driver(), name)(*arguments)
    if result != 0:
        raise MemoryRegistrationError(f"{name}: CUDA error {result}")


def device_count() -> int:
    """GPUs that this process sees. Loads the driver."""
    count = ctypes.c_int()
    _call("cuInit", 0)
    _call("cuDeviceGetCount", ctypes.byref(count))
    return count.value


class DeviceWords:
    """Words in the memory of a GPU, beside an array of the host that they are compared by.

    Args:
        host: The array; its size is that of the device's memory.
        device: Ordinal.

    Raises:
        ConfigError: No driver.
        MemoryRegistrationError: The device has not so much memory.
    """

    def __init__(self, host: Words, device: int) -> None:
        _call("cuInit", 0)
        self.host = host
        self.device = device
        self.context = ctypes.c_void_p()
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), device)
        self.make_current()
        address = _POINTER()
        _call("cuMemAlloc_v2", ctypes.byref(address), _SIZE(host.nbytes))
        self.address = address.value
        self.upload()

    def make_current(self) -> None:
        """Let this thread's calls go to the device."""
        _call("cuCtxSetCurrent", self.context)

    def upload(self) -> None:
        """Take the host's words."""
        self.make_current()
        source = ctypes.c_void_p(address_of(self.host))
        _call("cuMemcpyHtoD_v2", _POINTER(self.address), source, _SIZE(self.host.nbytes))
        _call("cuCtxSynchronize")  # from pageable memory it may return before all is there

    def download(self) -> None:
        """Give the host the device's words."""
        self.make_current()
        target = ctypes.c_void_p(address_of(self.host))
        _call("cuMemcpyDtoH_v2", target, _POINTER(self.address), _SIZE(self.host.nbytes))


class DeviceCopy:
    """`cuMemcpyAsync` from one device's memory to another's, or inside one; a single call.

    That is the ceiling: what `cudaMemcpyAsync` does, without a peer, rows or arrivals.
    """

    name = "cudaMemcpyAsync, device to device"

    def __init__(self, target: DeviceWords, source: DeviceWords) -> None:
        self.target, self._source = target, source
        if target.device != source.device:
            for one, other in ((target, source), (source, target)):
                one.make_current()
                _call("cuCtxEnablePeerAccess", other.context, 0)  # or the host would be between
        source.make_current()
        self._stream = ctypes.c_void_p()
        _call("cuStreamCreate", ctypes.byref(self._stream), 1)

    def run(self, nbytes: int) -> float:
        """Copy the first bytes; the seconds until they are there."""
        self._source.make_current()
        target, source = _POINTER(self.target.address), _POINTER(self._source.address)
        start = time.perf_counter()
        _call("cuMemcpyAsync", target, source, _SIZE(nbytes), self._stream)
        _call("cuStreamSynchronize", self._stream)
        return time.perf_counter() - start
