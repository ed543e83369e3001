"""Random small fleets: models, meshes, placements and storage of both sides.

A scenario covers, by chance: uneven and empty shards on any dim, hybrid sharding with replicas,
2-D meshes, interleaves with a step, flat row-major partitions, overlapping halos, aliases, ranks
without weights, head replication, fused buffers (concatenated, interleaved or stacked tensors),
transposes, padding constants and casts.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable

from weightsync.ir import Dtype, Manifest, ManifestBuilder, PlanOptions
from weightsync.ir.manifest import Side

Box = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # lo, n, step
Call = Callable[[ManifestBuilder], None]

_CASTS = {Dtype.F32: (Dtype.F32, Dtype.BF16, Dtype.F16)}
_DTYPES = (Dtype.F32, Dtype.F32, Dtype.BF16, Dtype.U8, Dtype.F64)


@dataclasses.dataclass
class Scenario:
    """Calls that declare every rank, so that they can be repeated in another order."""

    tensors: dict[str, tuple[int, ...]]
    sources: list[tuple[list[Call], list[Call]]]  # per rank: declarations of buffers, pieces
    sinks: list[tuple[list[Call], list[Call]]]
    options: PlanOptions

    def manifests(self, shuffle: random.Random | None = None) -> tuple[Manifest, Manifest]:
        """Build both merged manifests, the calls of each rank in the given or a shuffled order."""
        return self._merged("source", shuffle), self._merged("sink", shuffle)

    def _merged(self, side: Side, shuffle: random.Random | None) -> Manifest:
        ranks = self.sources if side == "source" else self.sinks
        manifests = []
        for rank, (buffers, pieces) in enumerate(ranks):
            builder = ManifestBuilder(side, f"{side} {rank}")
            names = list(self.tensors)
            buffers, pieces = list(buffers), list(pieces)
            if shuffle is not None:
                for calls in (names, buffers, pieces):
                    shuffle.shuffle(calls)
            for name in names:
                builder.tensor(name, self.tensors[name])
            for call in buffers + pieces:
                call(builder)
            manifests.append(builder.build())
        return Manifest.merge(side, manifests)


def full_box(shape: tuple[int, ...]) -> Box:
    return (0,) * len(shape), shape, (1,) * len(shape)


def shard(box: Box, dim: int, part: int, parts: int, *, even: bool = False) -> Box:
    """Return one contiguous part along a dim: ceil-sized, the last ones short or empty."""
    lo, n, step = (list(x) for x in box)
    size = -(-n[dim] // parts)
    begin = min(part * size, n[dim]) if not even else part * n[dim] // parts
    end = min(begin + size, n[dim]) if not even else (part + 1) * n[dim] // parts
    lo[dim] += begin * step[dim]
    n[dim] = end - begin
    return tuple(lo), tuple(n), tuple(step)


def interleave(box: Box, dim: int, part: int, parts: int) -> Box:
    """Return every `parts`-th element along a dim, from element `part`."""
    lo, n, step = (list(x) for x in box)
    lo[dim] += part * step[dim]
    n[dim] = len(range(part, n[dim], parts))
    step[dim] *= parts
    return tuple(lo), tuple(n), tuple(step)


def flat_boxes(shape: tuple[int, ...], begin: int, end: int) -> list[Box]:
    """Return boxes that make up a range of the row-major flattened tensor, in order."""
    if begin >= end:
        return []
    if len(shape) == 1:
        return [((begin,), (end - begin,), (1,))]
    inner = math.prod(shape[1:])
    first, last = begin // inner, (end - 1) // inner
    boxes = []
    for row in (first, last) if first != last else (first,):
        from_, to = max(begin - row * inner, 0), min(end - row * inner, inner)
        for lo, n, step in flat_boxes(shape[1:], from_, to):
            boxes.append(((row, *lo), (1, *n), (1, *step)))
    if last - first > 1:
        whole = ((first + 1,) + (0,) * (len(shape) - 1), (last - first - 1, *shape[1:]))
        boxes.append((*whole, (1,) * len(shape)))
    return boxes


def _source_boxes(rng: random.Random, shape: tuple[int, ...], ranks: int) -> list[list[Box]]:
    """Return what each source rank holds of a tensor; together everything."""
    full = full_box(shape)
    dim, other = rng.randrange(len(shape)), rng.randrange(len(shape))
    kind = rng.choice(
        ["replicate", "one", "shard", "hsdp", "mesh", "interleave", "flat", "halo", "alias"]
    )
    if kind == "one":
        owner = rng.randrange(ranks)
        return [[full] if r == owner else [] for r in range(ranks)]
    if kind == "shard":
        return [[shard(full, dim, r, ranks)] for r in range(ranks)]
    if kind == "hsdp":
        parts = rng.randint(1, ranks)
        # Ranks that do not divide evenly hold replicas of the first shards.
        return [[shard(full, dim, r % parts, parts)] for r in range(ranks)]
    if kind == "mesh":
        rows = 2 if ranks % 2 == 0 else 1
        inner = [shard(full, dim, r % rows, rows) for r in range(ranks)]
        return [[shard(box, other, r // rows, ranks // rows)] for r, box in enumerate(inner)]
    if kind == "interleave":
        parts = rng.randint(1, ranks)
        boxes = [interleave(full, dim, r % parts, parts) for r in range(ranks)]
        return [[box] for box in boxes]
    if kind == "flat":
        size = -(-math.prod(shape) // ranks)
        limit = math.prod(shape)
        return [
            flat_boxes(shape, min(r * size, limit), min((r + 1) * size, limit))
            for r in range(ranks)
        ]
    if kind == "halo":
        result = []
        for r in range(ranks):
            lo, n, step = shard(full, dim, r, ranks, even=True)
            grown = list(lo), list(n)
            grown[0][dim] = max(lo[dim] - rng.randint(0, 2), 0)
            grown[1][dim] = min(lo[dim] + n[dim] + rng.randint(0, 2), shape[dim]) - grown[0][dim]
            result.append([(tuple(grown[0]), tuple(grown[1]), step)])
        return result
    return [[full, full] if kind == "alias" else [full] for _ in range(ranks)]


def _sink_boxes(rng: random.Random, shape: tuple[int, ...], ranks: int) -> list[Box]:
    """Return what each sink rank wants of a tensor; may be empty, need not be everything."""
    full = full_box(shape)
    dim, other = rng.randrange(len(shape)), rng.randrange(len(shape))
    kind = rng.choice(["replicate", "shard", "heads", "mesh", "interleave", "some"])
    if kind == "shard":
        return [shard(full, dim, r, ranks) for r in range(ranks)]
    if kind == "heads":  # replication of kv heads: neighbours hold the same shard
        parts = -(-ranks // 2)
        return [shard(full, dim, r // 2, parts) for r in range(ranks)]
    if kind == "mesh":
        return [
            shard(shard(full, dim, r % 2, 2), other, r // 2, -(-ranks // 2)) for r in range(ranks)
        ]
    if kind == "interleave":
        parts = rng.randint(1, 3)
        return [interleave(full, dim, r % parts, parts) for r in range(ranks)]
    empty = ((0,) * len(shape), (0,) * len(shape), (1,) * len(shape))
    return [empty if kind == "some" and rng.random() < 0.5 else full for _ in range(ranks)]


def _store(
    rng: random.Random,
    calls: tuple[list[Call], list[Call]],
    names: list[str],
    boxes: list[Box],
    buffer: str,
    dtype: Dtype,
    *,
    is_sink: bool,
) -> None:
    """Store equal-sized boxes of several tensors in one buffer: fused in some way, maybe padded.

    The buffer is a dense array of the box's dims and one more dim that tells the tensors apart,
    in any order: tensors concatenated (that dim outside), interleaved (inside), or stacked.
    """
    n = boxes[0][1]
    if 0 in n:
        return
    slots = len(names) + (1 if is_sink and rng.random() < 0.2 else 0)
    sizes = (*n, slots)
    order = list(range(len(sizes)))
    if rng.random() < 0.6:
        rng.shuffle(order)
    view = [sizes[d] for d in order]
    axes = [order.index(d) for d in range(len(n))]
    head = rng.choice([0, 0, rng.randint(1, 5)])
    tail = rng.choice([0, 0, rng.randint(1, 5)])
    volume = math.prod(view)
    calls[0].append(lambda b: b.buffer(buffer, dtype, head + volume + tail))
    strides = [math.prod(view[d + 1 :]) for d in range(len(view))]
    for slot, (name, (lo, _, step)) in enumerate(zip(names, boxes, strict=True)):
        at = [0] * len(view)
        at[order.index(len(n))] = slot
        calls[1].append(
            lambda b, name=name, at=at, lo=lo, step=step: b.place(  # type: ignore[misc]
                name, buffer, view, at=at, lo=lo, n=n, step=step, axes=axes, offset=head
            )
        )
    if not is_sink:
        return
    fill = rng.choice([0.0, 1.0])
    if head:
        calls[1].append(lambda b: b.constant(buffer, 0, (head,), (1,), fill))
    if tail:
        calls[1].append(lambda b: b.constant(buffer, head + volume, (tail,), (1,), 0.0))
    if slots > len(names):
        hole = [strides[axis] for axis in axes]
        start = head + len(names) * strides[order.index(len(n))]
        calls[1].append(lambda b: b.constant(buffer, start, n, hole, fill))


def random_scenario(rng: random.Random) -> Scenario:
    """Draw a fleet of up to 4 sources and 4 sinks with a few small tensors."""
    num_sources, num_sinks = rng.randint(1, 4), rng.randint(1, 4)
    tensors: dict[str, tuple[int, ...]] = {}
    sources: list[tuple[list[Call], list[Call]]] = [([], []) for _ in range(num_sources)]
    sinks: list[tuple[list[Call], list[Call]]] = [([], []) for _ in range(num_sinks)]
    for group in range(rng.randint(1, 3)):
        shape = tuple(rng.randint(1, 6) for _ in range(rng.randint(1, 4)))
        names = [f"layers.{group}.t{i}" for i in range(rng.randint(1, 3))]
        tensors |= dict.fromkeys(names, shape)
        dtype = rng.choice(_DTYPES)
        is_fused = rng.random() < 0.5
        for sub in [names] if is_fused else [[name] for name in names]:
            held = _source_boxes(rng, shape, num_sources)
            for rank, boxes in enumerate(held):
                for number, box in enumerate(boxes):
                    at = f"{sub[0]}.{number}"
                    _store(rng, sources[rank], sub, [box] * len(sub), at, dtype, is_sink=False)
        wanted = _sink_boxes(rng, shape, num_sinks)
        is_fused = rng.random() < 0.6
        copies = 2 if rng.random() < 0.15 else 1  # tied: one tensor, two places
        for sub, copy in itertools.product(
            [names] if is_fused else [[n] for n in names], range(copies)
        ):
            to = rng.choice(_CASTS.get(dtype, (dtype,)))
            for rank, box in enumerate(wanted):
                at = f"{sub[0]}.copy{copy}"
                _store(rng, sinks[rank], sub, [box] * len(sub), at, to, is_sink=True)
    return Scenario(tensors, sources, sinks, _random_options(rng))


def _random_options(rng: random.Random) -> PlanOptions:
    if rng.random() < 0.3:
        return PlanOptions()
    return PlanOptions(
        bucket_bytes=rng.randint(8, 600),
        chunk_bytes=rng.randint(8, 200),
        slot_bytes=rng.randint(8, 200),
        direct_run_bytes=rng.choice([1, 8, 32, 1000]),
        max_chunks_per_bucket=rng.randint(1, 8),
    )
