"""Random small fleets whose sinks store codes and scales of what their sources hold."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightsync.ir import Manifest, ManifestBuilder

__all__ = ["Fp8Fleet", "Mxfp4Fleet"]

Array = NDArray[np.int64]


def cuts(rng: random.Random, length: int, parts: int, unit: int = 1) -> list[int]:
    """Borders of some parts, maybe empty ones, at multiples of a unit."""
    inner = sorted(rng.randint(0, length // unit) * unit for _ in range(parts - 1))
    return [0, *inner, length]


class Fp8Fleet:
    """A matrix in shards of rows, columns or every other row, for sinks that want parts of it."""

    cell = (128, 128)

    def __init__(self, rng: random.Random) -> None:
        self.shape = (rng.randint(1, 420), rng.randint(1, 300))
        self.scales = tuple(-(-n // 128) for n in self.shape)
        kind = rng.choice(["rows", "columns", "both", "stepped"])
        self.sources = [self._source(rng, kind) for _ in range(rng.choice([1, 1, 2]))]
        self.dim, self.tp = rng.randint(0, 1), rng.randint(1, 3)
        self.borders = cuts(rng, self.shape[self.dim], self.tp, 128)
        self.gap = rng.choice([0, 5])

    def _source(self, rng: random.Random, kind: str) -> list[list[tuple[list[int], ...]]]:
        rows, columns = self.shape
        world = rng.randint(1, 5)
        if kind == "stepped":  # halves of heads, as rotary embeddings are laid out by some
            return [[([at, 0], [-(-(rows - at) // 2), columns], [2, 1])] for at in range(2)][:rows]
        row = cuts(rng, rows, world if kind != "columns" else 1)
        column = cuts(rng, columns, world if kind == "columns" else rng.randint(1, 2))
        boxes = [
            ([a, c], [b - a, d - c], [1, 1])
            for a, b in itertools.pairwise(row)
            for c, d in itertools.pairwise(column)
            if b > a and d > c
        ]
        if kind == "both":
            return [[box] for box in boxes]
        ranks: list[list[Any]] = [[] for _ in range(world)]
        for box in boxes:
            rng.choice(ranks).append(box)
        return ranks

    def manifests(self) -> tuple[Manifest, Manifest]:
        sources, sinks = [], []
        for held in itertools.chain(*self.sources):
            label = f"source {len(sources)}"
            builder = ManifestBuilder("source", label)
            builder.tensor("w", self.shape)
            for number, (lo, n, step) in enumerate(held):
                builder.buffer(f"w.{number}", "BF16", n[0] * n[1])
                builder.place("w", f"w.{number}", n, lo=lo, n=n, step=step)
            sources.append(builder.build())
        for rank, (begin, end) in enumerate(itertools.pairwise(self.borders)):
            builder = ManifestBuilder("sink", f"sink {rank}")
            builder.tensor("w", self.shape)
            builder.tensor("s", self.scales)
            builder.encode("fp8_block", "w", "w", "s")
            for name, dtype, shape, per in (
                ("w", "F8_E4M3", self.shape, 1),
                ("s", "F32", self.scales, 128),
            ):
                lo, n = [0, 0], list(shape)
                lo[self.dim], n[self.dim] = -(-begin // per), -(-end // per) - -(-begin // per)
                if 0 not in n:
                    view = (n[0] + self.gap, n[1])
                    builder.buffer(name, dtype, view[0] * view[1])
                    builder.place(name, name, view, lo=lo, n=n)
                    if self.gap:
                        builder.constant(name, n[0] * n[1], (self.gap, n[1]), (n[1], 1), 0)
            sinks.append(builder.build())
        return Manifest.merge("source", sources), Manifest.merge("sink", sinks)

    def origin(self, tensor: str, index: Array) -> Array:
        """Values that elements of a stored tensor begin with, `(N, 2)`."""
        return index if tensor == "w" else index * 128

    def cell_of(self, index: Array) -> Array:
        """Cell of each code, in elements of the scales."""
        return index // 128


class Mxfp4Fleet:
    """Experts of gpt-oss, K-major, for sinks that pack codes along the depth."""

    def __init__(self, rng: random.Random) -> None:
        self.shape = (rng.randint(1, 5), 32 * rng.randint(1, 3), 2 * rng.randint(1, 5))
        self.dim = rng.choice([0, 1, 2])
        self.replicas = rng.randint(1, 2)
        self.world = rng.randint(1, 4)
        unit = 32 if self.dim == 1 else 1
        self.borders = cuts(rng, self.shape[self.dim], self.world, unit)
        self.tp = cuts(rng, self.shape[2] // 2, rng.randint(1, 2))

    def manifests(self) -> tuple[Manifest, Manifest]:
        experts, depth, width = self.shape
        sources, sinks = [], []
        for _ in range(self.replicas):
            for begin, end in itertools.pairwise(self.borders):
                builder = ManifestBuilder("source", f"source {len(sources)}")
                builder.tensor("w", self.shape)
                lo, n = [0, 0, 0], list(self.shape)
                lo[self.dim], n[self.dim] = begin, end - begin
                if end > begin:
                    builder.buffer("w", "BF16", n[0] * n[1] * n[2])
                    builder.place("w", "w", n, lo=lo, n=n)
                sources.append(builder.build())
        codes, scales = (experts, width, depth // 32, 16), (experts, width, depth // 32)
        for rank, (begin, end) in enumerate(itertools.pairwise(self.tp)):
            builder = ManifestBuilder("sink", f"sink {rank}")
            for name, shape in (("w", self.shape), ("c", codes), ("s", scales)):
                builder.tensor(name, shape)
            builder.encode("mxfp4", "w", "c", "s")
            for name, shape in (("c", codes), ("s", scales)):
                if end == begin:
                    continue
                rows = 2 * (end - begin)
                builder.buffer(name, "U8", experts * rows * int(np.prod(shape[2:])))
                for half in range(2):  # gate in the even rows, up in the odd ones
                    part = (experts, rows // 2, *shape[2:])
                    at = (0, half * (rows // 2), *(0 for _ in shape[2:]))
                    lo = (0, 2 * begin + half, *(0 for _ in shape[2:]))
                    step = (1, 2, *(1 for _ in shape[2:]))
                    view = (experts, rows, *shape[2:])
                    builder.place(name, name, view, at=at, lo=lo, n=part, step=step)
            sinks.append(builder.build())
        return Manifest.merge("source", sources), Manifest.merge("sink", sinks)

    def origin(self, tensor: str, index: Array) -> Array:
        inner = 2 * index[:, 3] if tensor == "c" else 0
        return np.stack([index[:, 0], 32 * index[:, 2] + inner, index[:, 1]], axis=1)

    def cell_of(self, index: Array) -> Array:
        return index[:, :3]
