"""A small model cut by hand: layouts for both sides, and what sinks must hold, by torch slicing."""

from __future__ import annotations

from typing import Any

import torch

from weightsync.ir import Manifest, ManifestBuilder

SHAPES = {"embed": (37, 16), "up": (24, 16), "down": (16, 24), "norm": (16,)}
CUTS = {"embed": None, "up": 0, "down": 1, "norm": None}


def toy_shard(values: dict[str, torch.Tensor], rank: int, world: int) -> dict[str, torch.Tensor]:
    """A source's rows of every tensor: chunks of ceil(n / world)."""
    found = {}
    for name, value in values.items():
        chunk = -(-value.shape[0] // world)
        shard = value[rank * chunk : (rank + 1) * chunk]
        if shard.numel():
            found[name] = shard.clone()
    return found


def toy_sink(tp: int) -> dict[str, torch.Tensor]:
    """Zeroed bf16 weights of one sink rank."""
    found = {}
    for name, shape in SHAPES.items():
        size = list(shape)
        if (cut := CUTS[name]) is not None:
            size[cut] //= tp
        found[name] = torch.zeros(size, dtype=torch.bfloat16)
    return found


def expected_sink(values: dict[str, torch.Tensor], rank: int, tp: int) -> dict[str, torch.Tensor]:
    """What a sink rank must hold."""
    found = {}
    for name, value in values.items():
        cut = CUTS[name]
        part = value if cut is None else value.chunk(tp, dim=cut)[rank]
        found[name] = part.to(torch.bfloat16).contiguous()
    return found


class ToySourceLayout:
    """Row shards of fp32 tensors. `change` makes one of the mistakes that users make."""

    def __init__(self, world: int, *, change: str = "") -> None:
        self.world = world
        self.shapes: dict[str, tuple[int, ...]] = dict(SHAPES)
        self.dtype = {name: "F32" for name in SHAPES}
        if change == "missing":
            del self.shapes["norm"]
        elif change == "extra":
            self.shapes["surplus"] = (4, 4)
        elif change == "renamed":
            self.shapes["up_renamed"] = self.shapes.pop("up")
        elif change == "shape":
            self.shapes["down"] = (16, 26)
        elif change == "dtype":
            self.dtype["embed"] = "I32"

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights of rank 0 of 1 that fit this layout."""
        kinds = {"F32": torch.float32, "I32": torch.int32}
        return {
            n: torch.ones(s, dtype=kinds[self.dtype.get(n, "F32")]) for n, s in self.shapes.items()
        }

    def manifest(self, rank: int) -> Manifest:
        builder = ManifestBuilder("source", f"source {rank}")
        for name, shape in self.shapes.items():
            chunk = -(-shape[0] // self.world)
            lo, hi = min(rank * chunk, shape[0]), min((rank + 1) * chunk, shape[0])
            builder.tensor(name, shape)
            if hi > lo:
                n = (hi - lo, *shape[1:])
                zeros: Any = (0,) * len(shape)
                builder.buffer(name, self.dtype.get(name, "F32"), torch.Size(n).numel())
                builder.place(name, name, n, at=zeros, lo=(lo, *zeros[1:]), n=n)
        return builder.build()


class ToySinkLayout:
    """Tensor-parallel bf16 tensors."""

    def __init__(self, tp: int) -> None:
        self.tp = tp

    def manifest(self, rank: int) -> Manifest:
        builder = ManifestBuilder("sink", f"sink {rank}")
        for name, shape in SHAPES.items():
            n, lo = list(shape), [0] * len(shape)
            if (cut := CUTS[name]) is not None:
                n[cut] //= self.tp
                lo[cut] = rank * n[cut]
            builder.tensor(name, shape)
            builder.buffer(name, "BF16", torch.Size(n).numel())
            zeros: Any = (0,) * len(shape)
            builder.place(name, name, tuple(n), at=zeros, lo=tuple(lo), n=tuple(n))
        return builder.build()
