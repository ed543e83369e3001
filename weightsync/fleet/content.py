"""Made-up weights that can be checked anywhere: each element's value follows from its number.

An element of a canonical tensor has 16 bits that depend on the tensor's name, its row-major number
and a key of the version. A source writes them where its manifest says that its elements lie, a sink
looks them up where its own says so; the plan has no part in it, so one that misplaces elements is
found out. BF16 holds the bits as they are, F32 the same number, so a cast between them is exact.
"""

from __future__ import annotations

import zlib
from typing import Final

import numpy as np
import numpy.typing as npt

from weightsync.errors import ConfigError
from weightsync.ir import Manifest
from weightsync.ir.dtypes import ITEMSIZE, Dtype
from weightsync.ir.pieces import CONSTANT

__all__ = ["Held", "codes"]

Bytes = npt.NDArray[np.uint8]

_ALIGN: Final = 256
_FINITE: Final = 0xBFFF  # without the exponent's highest bit: no NaN, no infinity
_WORDS: Final = {int(Dtype.BF16): np.uint16, int(Dtype.F32): np.uint32}


def codes(name: str, number: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint16]:
    """Return the bits of elements of a tensor, for key 0.

    Args:
        name: Of the tensor.
        number: Row-major element numbers, any shape.
    """
    mixed = number * np.uint32(0x9E3779B1)
    mixed ^= np.uint32(zlib.crc32(name.encode()))
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(0x85EBCA6B)
    mixed >>= np.uint32(16)
    return mixed.astype(np.uint16) & np.uint16(_FINITE)


class Held:
    """What one rank holds: memory for all buffers of its manifest.

    Args:
        manifest: Of one rank; BF16 and F32 only.
        is_filled: Write the values of key 0; else zeros.

    Attributes:
        addresses: Of each buffer, in manifest order, `(B,)`.
        sizes: Bytes of each, `(B,)`.
        memory: Keeps them alive.

    Raises:
        ConfigError: A dtype that values are not made for.
    """

    def __init__(self, manifest: Manifest, *, is_filled: bool) -> None:
        unknown = set(manifest.buffers.dtype.tolist()) - set(_WORDS)
        if unknown:
            raise ConfigError(f"made-up weights are BF16 or F32, not {Dtype(min(unknown)).name}")
        self._manifest = manifest
        self.sizes = manifest.buffers.numel * ITEMSIZE[manifest.buffers.dtype]
        ends = np.cumsum(-(-self.sizes // _ALIGN) * _ALIGN)
        self._offsets = np.concatenate([[0], ends]).astype(np.int64)
        self.memory: Bytes = np.zeros(max(1, int(self._offsets[-1])), np.uint8)
        self.memory.fill(0)  # every page present
        self.addresses = self.memory.ctypes.data + self._offsets[:-1]
        self.key = 0
        if is_filled:
            for piece in range(len(manifest.pieces.tensor)):
                if manifest.pieces.tensor[piece] != CONSTANT:
                    self._view(piece)[...] = self._expected(piece, 0)

    def change(self, key: int) -> None:
        """Turn the values into those of another key, in place."""
        mask = (self.key ^ key) & _FINITE
        self.key = key
        for buffer in range(len(self._manifest.buffers)):
            words = self._words(buffer)
            words ^= words.dtype.type(mask << (8 * words.itemsize - 16))

    def difference(self, key: int) -> str | None:
        """Return where the memory does not hold the values of `key`; None if it does.

        Reads everything that the manifest describes, at about 0.3 GB/s.
        """
        pieces, names = self._manifest.pieces, self._manifest.tensors.names
        for piece in range(len(pieces.tensor)):
            found, tensor = self._view(piece), int(pieces.tensor[piece])
            if tensor == CONSTANT:
                wrong = int(np.count_nonzero(found))
                if pieces.fill[piece] != 0 or wrong:
                    return f"padding of {self._name(piece)} holds {wrong} other values"
                continue
            wrong = int(np.count_nonzero(found != self._expected(piece, key)))
            if wrong:
                lo = pieces.lo[piece].tolist()
                return (
                    f"{names[tensor]} from {lo} on, in {self._name(piece)}: {wrong} of "
                    f"{found.size} elements are wrong"
                )
        return None

    def _name(self, piece: int) -> str:
        return self._manifest.buffers.names[int(self._manifest.pieces.buffer[piece])]

    def _words(self, buffer: int) -> npt.NDArray[np.unsignedinteger]:
        dtype = _WORDS[int(self._manifest.buffers.dtype[buffer])]
        begin = int(self._offsets[buffer])
        return self.memory[begin : begin + int(self.sizes[buffer])].view(dtype)

    def _view(self, piece: int) -> npt.NDArray[np.unsignedinteger]:
        """Return a writable view of the elements of a piece, 4-dimensional."""
        pieces = self._manifest.pieces
        words = self._words(int(pieces.buffer[piece]))[int(pieces.offset[piece]) :]
        strides = pieces.stride[piece] * words.itemsize
        return np.lib.stride_tricks.as_strided(words, pieces.n[piece].tolist(), strides.tolist())

    def _expected(self, piece: int, key: int) -> npt.NDArray[np.unsignedinteger]:
        pieces, tensor = self._manifest.pieces, int(self._manifest.pieces.tensor[piece])
        shape = self._manifest.tensors.shape[tensor].tolist()
        number = np.zeros((1, 1, 1, 1), np.uint32)
        weight = 1
        for dim in range(len(shape) - 1, -1, -1):
            lo, n, step = (int(c[piece, dim]) for c in (pieces.lo, pieces.n, pieces.step))
            along = (lo + step * np.arange(n, dtype=np.int64)) * weight
            axes = [1, 1, 1, 1]
            axes[dim] = n
            number = number + along.astype(np.uint32).reshape(axes)
            weight *= shape[dim]
        found = codes(self._manifest.tensors.names[tensor], number) ^ np.uint16(key & _FINITE)
        if self._words(int(pieces.buffer[piece])).itemsize == 2:
            return found
        return found.astype(np.uint32) << np.uint32(16)
