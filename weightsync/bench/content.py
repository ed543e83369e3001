"""What a benchmark moves: sizes, and values that both sides can make from a seed.

The receiver makes the expected values anew and compares whole tensors with them, so a wrong
transfer cannot agree with itself. Every repetition has values of its own: all units of the weights
are combined with a key of the repetition, so what an earlier one left behind is seen as wrong.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from weightsync.errors import ConfigError
from weightsync.ir import Manifest, ManifestBuilder
from weightsync.units import KIB, MIB

__all__ = [
    "Expected",
    "FlatLayout",
    "Units",
    "allocate",
    "arena_offsets",
    "change",
    "make",
    "tensor_name",
    "tensor_sizes",
    "units",
]

Units = npt.NDArray[np.uint16]  # a bf16 weight's stored bits

_SEED: Final = 20261122
_ITEM: Final = 2  # bytes of a bf16
_ALIGN: Final = 256  # tensors in fabric memory start on such a boundary
# Above this mean, sizes are mixed as in real models: mostly small tensors, most bytes in a few.
_MIXED_ABOVE: Final = MIB
_SMALL: Final = (512, 64 * KIB)
_MIDDLE: Final = (1 * MIB, 8 * MIB)
_LARGE: Final = (34 * MIB, 148 * MIB)
_SHARE_SMALL: Final = 0.5
_SHARE_MIDDLE: Final = 0.3


def tensor_sizes(nbytes: int, num_tensors: int) -> list[int]:
    """Sizes that add up to `nbytes` exactly.

    Args:
        nbytes: Total, even: weights are bf16.
        num_tensors: How many, each of at least one element.

    Returns:
        Bytes of each. Equal (to one element) up to a mean of 1 MiB. Above, half have 512 B to
        64 KiB, three in ten 1 to 8 MiB, and the others the rest, in shuffled order; no larger than
        148 MiB where the total allows.

    Raises:
        ConfigError: A number that cannot be.
    """
    if num_tensors < 1:
        raise ConfigError(f"tensors={num_tensors}: at least 1")
    if nbytes % _ITEM or nbytes < _ITEM * num_tensors:
        raise ConfigError(
            f"bytes={nbytes}: {num_tensors} bf16 tensors take an even number, at least "
            f"{_ITEM * num_tensors}"
        )
    if nbytes <= _MIXED_ABOVE * num_tensors:
        few, more = divmod(nbytes // _ITEM, num_tensors)
        return [_ITEM * (few + (index < more)) for index in range(num_tensors)]
    draw = random.Random(_SEED)
    num_small = int(num_tensors * _SHARE_SMALL)
    num_middle = int(num_tensors * _SHARE_MIDDLE)
    num_large = num_tensors - num_small - num_middle
    sizes = [_log_uniform(draw, _SMALL) for _ in range(num_small)]
    middle = [_log_uniform(draw, _MIDDLE) for _ in range(num_middle)]
    # A mean little above 1 MiB leaves less for the large ones than the middle ones have.
    most = (nbytes - sum(sizes)) // 2
    if sum(middle) > most:
        middle = _shared_out(most, [float(size) for size in middle])
    sizes += middle
    rest = nbytes - sum(sizes)
    top = _LARGE[1]
    if rest <= top * num_large:
        sizes += _shared_out(rest, _below(draw, num_large, rest / num_large, top))
    else:
        sizes += _shared_out(rest, [1.0] * num_large)
    draw.shuffle(sizes)
    return sizes


def tensor_name(index: int) -> str:
    """Canonical name of a tensor."""
    return f"tensor.{index:06d}"


def arena_offsets(sizes: Sequence[int]) -> list[int]:
    """Where each tensor starts in one block of memory, and at last the block's size."""
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + -(-size // _ALIGN) * _ALIGN)
    return offsets


def make(index: int, nbytes: int, key: int = 0) -> Units:
    """The values of one tensor, whichever process asks. About 3 GB/s."""
    generator = np.random.SFC64(np.random.SeedSequence((_SEED, index)))
    words: npt.NDArray[np.uint64] = generator.random_raw(-(-nbytes // 8))
    found = words.view(np.uint16)[: nbytes // _ITEM]
    return found if key == 0 else found ^ np.uint16(key)


def allocate(sizes: Sequence[int], *, filled: bool) -> list[torch.Tensor]:
    """Ordinary bf16 tensors, each allocated by itself, every page present.

    Args:
        sizes: Bytes of each.
        filled: With the values of `make`, else with zeros.
    """
    tensors = []
    for index, size in enumerate(sizes):
        tensor = torch.zeros(size // _ITEM, dtype=torch.int16)
        if filled:
            units(tensor)[:] = make(index, size)
        tensors.append(tensor.view(torch.bfloat16))
    return tensors


def change(tensors: Sequence[torch.Tensor], key: int) -> None:
    """Combine all values with a key, in place, as PyTorch would change weights."""
    for tensor in tensors:
        tensor.view(torch.int16).bitwise_xor_(int(np.uint16(key).astype(np.int16)))


def units(tensor: torch.Tensor) -> Units:
    """The memory of a tensor."""
    found: Units = tensor.view(torch.int16).numpy().view(np.uint16)
    return found


class Expected:
    """What a receiver must hold, made from the seed and not from anything that was sent.

    Args:
        sizes: Bytes of each tensor.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._ends = np.stack([make(index, size)[[0, -1]] for index, size in enumerate(sizes)])

    def wrong_end(self, found: Sequence[Units], key: int) -> str | None:
        """Compare the first and the last element of every tensor, in milliseconds.

        Args:
            found: What was received.
            key: Of the repetition.

        Returns:
            Where it differs, for people; None if it does not.
        """
        ends = np.array([(tensor[0], tensor[-1]) for tensor in found], np.uint16)
        wrong = np.argwhere(ends != self._ends ^ np.uint16(key))
        if len(wrong) == 0:
            return None
        index, end = int(wrong[0][0]), "last" if wrong[0][1] else "first"
        return f"the {end} element of {tensor_name(index)} is not this repetition's"

    def difference(self, found: Sequence[Units], key: int) -> str | None:
        """Compare everything; as `wrong_end`, at about 2 GB/s."""
        for index, tensor in enumerate(found):
            expected = make(index, tensor.nbytes, key)
            if not np.array_equal(expected, tensor):
                wrong = np.flatnonzero(expected != tensor)
                at = int(wrong[0])
                return (
                    f"{tensor_name(index)} differs in {len(wrong)} elements, the first is {at}: "
                    f"{int(tensor[at]):#06x}, not {int(expected[at]):#06x}"
                )
        return None


class FlatLayout:
    """The tensors of a benchmark, whole and under their own names, as one sink rank's layout.

    Args:
        sizes: Bytes of each tensor.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes

    def manifest(self, rank: int) -> Manifest:
        """What the only rank holds."""
        builder = ManifestBuilder("sink", f"sink {rank}")
        for index, size in enumerate(self._sizes):
            name, shape = tensor_name(index), (size // _ITEM,)
            builder.tensor(name, shape)
            builder.buffer(name, "BF16", size // _ITEM)
            builder.place(name, name, shape, at=(0,))
        return builder.build()


def _log_uniform(draw: random.Random, bounds: tuple[int, int]) -> int:
    low, high = bounds
    size = low * (high / low) ** draw.random()
    return int(size) // _ITEM * _ITEM


def _below(draw: random.Random, count: int, mean: float, top: int) -> list[float]:
    """Weights spread like the large sizes; scaled to `mean`, none of them passes `top`."""
    raw = [draw.uniform(*_LARGE) for _ in range(count)]
    scale = mean / (sum(raw) / count)
    sizes = [size * scale for size in raw]
    # Draw them towards the mean as far as the largest one needs.
    over = max(sizes)
    if over > top:
        pull = (top - mean) / (over - mean)
        sizes = [mean + (size - mean) * pull for size in sizes]
    return sizes


def _shared_out(nbytes: int, weights: Sequence[float]) -> list[int]:
    """Cut `nbytes` into whole elements in proportion to `weights`, each of at least one."""
    total, spare = sum(weights), nbytes // _ITEM - len(weights)
    bounds, before = [0], 0.0
    for weight in weights:
        before += weight
        bounds.append(int(spare * min(1.0, before / total)))
    bounds[-1] = spare
    return [_ITEM * (1 + high - low) for low, high in pairwise(bounds)]
