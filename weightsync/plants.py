"""Layout bugs on purpose, so that tests can see what catches them.

A planted plan is one that was made for a wrong layout of the sinks. Its cover is exact and its
structure validates; only the values land in the wrong places. `WEIGHTSYNC_PLANT=name` makes every
party of a job plant the same bug, `WEIGHTSYNC_PLANT_SKIP_DIGEST=1` makes sinks accept what their
digest refuses, so that the next line of defence can be tried.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from weightsync.errors import ConfigError
from weightsync.ir.manifest import Manifest
from weightsync.ir.pieces import PieceTable, sorted_pieces
from weightsync.ir.plan import Plan
from weightsync.planners.planner import plan_transfer
from weightsync.runtime.receiver import Receiver
from weightsync.service import planning

__all__ = ["PLANTS", "apply", "install", "requested"]

ENV_PLANT: Final = "WEIGHTSYNC_PLANT"
ENV_SKIP_DIGEST: Final = "WEIGHTSYNC_PLANT_SKIP_DIGEST"


def requested() -> str | None:
    """Name of the bug that $WEIGHTSYNC_PLANT asks for, or None.

    Raises:
        ConfigError: There is no such bug.
    """
    name = os.environ.get(ENV_PLANT, "")
    if not name:
        return None
    if name not in PLANTS:
        raise ConfigError(f"${ENV_PLANT}={name}: the bugs are {', '.join(PLANTS)}")
    return name


def install(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Plant what the environment asks for into this process; without a request do nothing.

    Nothing of the package looks for bugs to plant by itself: a process has to ask for it.

    Args:
        patch: Sets an attribute; tests pass one that is undone.

    Raises:
        ConfigError: There is no such bug.
    """
    name = requested()
    if name is None:
        return
    make = planning.make_plan

    def make_planted(*args: Any, **kwargs: Any) -> planning.Planned:
        planned = make(*args, **kwargs)
        return dataclasses.replace(planned, plan=apply(planned.plan, name))

    patch(planning, "make_plan", make_planted)
    if os.environ.get(ENV_SKIP_DIGEST) == "1":
        patch(Receiver, "_compare", lambda *_: True)


def apply(plan: Plan, name: str) -> Plan:
    """Replace a plan by one with a layout bug.

    Args:
        plan: A right plan. It keeps its manifests: only rows, chunks and buckets are changed.
        name: One of `PLANTS`.

    Returns:
        A plan with exact cover that moves some elements to where others belong. Its digest
        differs from the right plan's, and is the same wherever the bug is planted.

    Raises:
        ConfigError: There is no such bug, or the model lacks what it needs.
    """
    if name not in PLANTS:
        raise ConfigError(f"there is no planted bug {name!r}; choose one of {', '.join(PLANTS)}")
    wrong = dataclasses.replace(plan.sink, pieces=sorted_pieces(PLANTS[name](plan.sink)))
    # Buffers and constants keep their numbers: only pieces of tensors were changed.
    return dataclasses.replace(plan_transfer(plan.source, wrong, plan.options), sink=plan.sink)


def _swap(sink: Manifest, pairs: list[tuple[str, str]]) -> PieceTable:
    """Exchange tensors of equal shape, by the endings of their names, once on every rank."""
    number = np.arange(len(sink.tensors))
    for first, second in pairs:
        name = _first(sink, first)
        a, b = sink.tensors.index[name], sink.tensors.index[name.replace(first, second)]
        number[[a, b]] = number[[b, a]]
    tensor = sink.pieces.tensor
    return _with(sink.pieces, tensor=np.where(tensor < 0, tensor, number[tensor]))


def _swap_k_v(sink: Manifest) -> PieceTable:
    return _swap(sink, [("k_proj.weight", "v_proj.weight")])


def _swap_gate_up(sink: Manifest) -> PieceTable:
    return _swap(sink, [("gate_proj.weight", "up_proj.weight")])


def _swap_experts(sink: Manifest) -> PieceTable:
    parts = ("gate_proj", "up_proj", "down_proj")
    return _swap(sink, [(f"experts.0.{part}.weight", f"experts.1.{part}.weight") for part in parts])


def _wrong_kv_head(sink: Manifest) -> PieceTable:
    """Give one rank the keys of the next kv head instead of its own."""
    index = sink.tensors.index[_first(sink, "k_proj.weight")]
    held = np.flatnonzero(sink.pieces.tensor == index)
    piece = held[1] if len(held) > 1 else held[0]
    rows, dim = int(sink.tensors.shape[index, -2]), -2
    lo, n = sink.pieces.lo.copy(), int(sink.pieces.n[piece, dim])
    if n == rows:
        raise ConfigError(
            "kv_head needs more kv heads than one rank holds: take more sinks or another model"
        )
    lo[piece, dim] = (lo[piece, dim] + n) % rows
    return _with(sink.pieces, lo=lo)


def _shift_rows(sink: Manifest) -> PieceTable:
    """Let every row of one piece hold the next one, and the last row the first."""
    pieces = sink.pieces
    index = sink.tensors.index[_first(sink, "q_proj.weight")]
    piece, dim = int(np.flatnonzero(pieces.tensor == index)[0]), -2
    rows = int(pieces.n[piece, dim])
    single, rest = pieces.take(np.array([piece])), pieces.take(np.array([piece]))
    lo, n, offset = rest.lo.copy(), rest.n.copy(), single.offset.copy()
    lo[0, dim] += 1
    n[0, dim] = rows - 1
    one, stride = single.n.copy(), single.stride.copy()
    offset += (rows - 1) * stride[0, dim]
    one[0, dim], stride[0, dim] = 1, 0
    return PieceTable.concat(
        [
            pieces.take(np.arange(len(pieces)) != piece),
            _with(rest, lo=lo, n=n),
            _with(single, n=one, stride=stride, offset=offset),
        ]
    )


def _with(pieces: PieceTable, **columns: Any) -> PieceTable:
    return dataclasses.replace(pieces, **columns)


def _first(sink: Manifest, ending: str) -> str:
    for name in sink.tensors.names:
        if name.endswith(ending):
            return name
    raise ConfigError(f"the model has no tensor that ends in {ending!r}")


PLANTS: Final[dict[str, Callable[[Manifest], PieceTable]]] = {
    "k_v": _swap_k_v,
    "gate_up": _swap_gate_up,
    "kv_head": _wrong_kv_head,
    "row_shift": _shift_rows,
    "experts": _swap_experts,
}
