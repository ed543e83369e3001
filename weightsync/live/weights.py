"""PyTorch weights as the core needs them: addresses, a manifest, and a watch for changes."""

from __future__ import annotations

import ctypes
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from weightsync.errors import (
    ConfigError,
    DtypeMismatchError,
    LayoutError,
    SourceMutatedError,
)
from weightsync.ir.dtypes import ITEMSIZE, Dtype
from weightsync.ir.layout import SourceLayout
from weightsync.live.layout import LiveLayout, match_buffers, module_layout
from weightsync.live.sites import TORCH_DTYPES, named_tensors
from weightsync.live.zero3 import is_partitioned

if TYPE_CHECKING:
    from torch import Tensor

    from weightsync.ir.layout import Layout
    from weightsync.ir.manifest import Manifest
    from weightsync.service.source import OpenVersion, SourceMember

__all__ = ["SourceWeights", "guard_optimizers", "sink_tensors", "staged_tensors"]

_HOOK_POLL_S = 0.05


@dataclass(frozen=True)
class _Snapshot:
    """What can be seen of tensors without describing them: columns of one entry a tensor.

    Every publish takes some while everybody waits, so no tensor costs more than a few attributes,
    and nothing is made that the garbage collector would have to look through.

    Args:
        names: As `named_tensors` lists them.
        addresses: Of local memory.
        num_writes: In place, as PyTorch counts them.
        ids: Identities of the objects, which are not kept alive; empty if not asked for.
        meta: Hashes of dtype, shape and strides of local memory, and of a DTensor's placements;
            empty if not asked for.
    """

    names: list[str]
    addresses: list[int]
    num_writes: list[int]
    ids: list[int]
    meta: list[int]

    @classmethod
    def take(cls, names: list[str], tensors: list[Tensor], *, with_meta: bool = False) -> Self:
        """Look at all tensors now."""
        local = _local(tensors)
        try:
            num_writes = [tensor._version for tensor in local]
        except RuntimeError:  # inference tensors do not count
            num_writes = [0 if t.is_inference() else t._version for t in local]
        cut: list[int] = []  # DTensors
        if local is not tensors:
            both = enumerate(zip(tensors, local, strict=True))
            cut = [index for index, (tensor, part) in both if tensor is not part]
        for index in cut:
            # A step on a DTensor counts up the DTensor alone.
            if isinstance(tensors[index], DTensor) and not tensors[index].is_inference():
                num_writes[index] += tensors[index]._version
        addresses = [tensor.data_ptr() for tensor in local]
        if not with_meta:
            return cls(names, addresses, num_writes, [], [])
        meta = [hash((tensor.dtype, tensor.shape, tensor.stride())) for tensor in local]
        for index in cut:
            meta[index] = hash((meta[index], _cut(tensors[index])))
        return cls(names, addresses, num_writes, [id(tensor) for tensor in tensors], meta)

    def is_laid_out_as(self, other: _Snapshot) -> bool:
        """Whether these are the same tensors in the same memory, whatever is written there."""
        return (self.ids, self.addresses, self.meta, self.names) == (
            other.ids,
            other.addresses,
            other.meta,
            other.names,
        )

    def difference(self, before: _Snapshot) -> str | None:
        """Name of a tensor of `before` that is another one, elsewhere, or written to now."""
        if (self.names, self.addresses, self.num_writes) == (
            before.names,
            before.addresses,
            before.num_writes,
        ):
            return None
        now = dict(zip(self.names, zip(self.addresses, self.num_writes, strict=True), strict=True))
        then = zip(before.names, before.addresses, before.num_writes, strict=True)
        return next((n for n, *seen in then if now.get(n) != tuple(seen)), None)


def _cut(tensor: Tensor) -> tuple[object, ...]:
    """What of a DTensor its local memory does not show; nothing of others."""
    return (tensor.shape, tensor.placements) if isinstance(tensor, DTensor) else ()


def _listed(weights: nn.Module | Mapping[str, Tensor]) -> tuple[list[str], list[Tensor]]:
    """Names and tensors; two lists, because ten thousand pairs would wake the garbage collector."""
    if not isinstance(weights, nn.Module):
        return list(weights.keys()), list(weights.values())
    names: list[str] = []
    tensors: list[Tensor] = []
    for name, tensor in named_tensors(weights):
        names.append(name)
        tensors.append(tensor)
    return names, tensors


def _local(tensors: list[Tensor]) -> list[Tensor]:
    """Memory of this process. Unlike `to_local()` it makes no tensor and no node of a graph.

    The same list where it holds no DTensor, and no parameter that ZeRO-3 has partitioned.
    """
    if any(issubclass(kind, DTensor) for kind in set(map(type, tensors))):
        return [t._local_tensor if isinstance(t, DTensor) else t for t in tensors]
    if any(map(is_partitioned, tensors)):
        return [getattr(t, "ds_tensor", t) for t in tensors]
    return tensors


class SourceWeights:
    """The weights of one trainer rank: what they are, where they lie, whether they changed.

    Args:
        weights: A module or tensors by name.
        layout: How they hold canonical tensors; None reads it from the weights. A `LiveLayout` of
            the same weights is how a config reaches them.
        rank: Of the source side.
        dtype: When given, every tensor must have it.

    Raises:
        LayoutError, UnknownTensorError: The weights cannot be described, or are not as `layout`.
        ConfigError: A tensor is not on the CPU.
    """

    def __init__(
        self,
        weights: nn.Module | Mapping[str, Tensor],
        *,
        layout: Layout | None,
        rank: int,
        dtype: torch.dtype | None,
    ) -> None:
        given = layout.layout if isinstance(layout, SourceLayout) else layout
        live = given if isinstance(given, LiveLayout) else None
        self._live = module_layout(weights, rank=rank) if live is None else live
        self._rule = layout is not None and live is None
        self._label = f"source {rank}"
        self.manifest = layout.manifest(rank) if layout is not None else self._live.manifest()
        self._weights = weights
        tensors = self._tensors()
        _require_cpu(tensors, self._label)
        for name, tensor in tensors.items():
            if dtype is not None and tensor.dtype != dtype:
                raise DtypeMismatchError(
                    f"{self._label}: {name} is {tensor.dtype}, not {dtype}; convert it, or leave "
                    "dtype out",
                    tensor=name,
                    rank=rank,
                )
        buffers = self.manifest.buffers
        # FSDP modules show whole tensors while they compute: what they hold is looked up only when
        # the user's thread calls, and kept.
        self._is_fsdp = isinstance(weights, nn.Module) and any(
            isinstance(module, FSDPModule) for module in weights.modules()
        )
        self._held = _listed(weights)
        self._meta = self._metas(*self._held)
        self.sizes: npt.NDArray[np.int64] = buffers.numel * ITEMSIZE[buffers.dtype]
        self._known: _Snapshot | None = None  # what `_check` was content with
        self._order = np.zeros(0, np.int64)  # of the buffers among its tensors
        self._fresh: _Snapshot | None = None

    def prepare(self) -> None:
        """Bring FSDP modules into their sharded state and check that the layout still holds.

        Cost: under a microsecond a tensor where the tensors are the same objects as last time.

        Raises:
            LayoutError: A tensor has another dtype, shape or stride than when the source joined.
        """
        self._held = _listed(self._weights)
        snapshot = _Snapshot.take(*self._held, with_meta=True)
        if self._known is None or not snapshot.is_laid_out_as(self._known):
            self._tensors()  # raises if some came or went
            self._check(self._metas(*self._held))
            place = {name: index for index, name in enumerate(snapshot.names)}
            self._order = np.array([place[n] for n in self.manifest.buffers.names], np.int64)
            self._known = snapshot
        self._fresh = snapshot

    @staticmethod
    def _metas(names: list[str], tensors: list[Tensor]) -> dict[str, tuple[object, ...]]:
        listed = zip(names, tensors, _local(tensors), strict=True)
        return {
            name: (part.dtype, part.shape, part.stride(), _cut(tensor))
            for name, tensor, part in listed
        }

    def _check(self, metas: Mapping[str, tuple[object, ...]]) -> None:
        for name in self.manifest.buffers.names:
            if metas.get(name) != self._meta[name]:
                raise LayoutError(
                    f"{self._label}: {name} is not what it was when the source joined; make a new "
                    "Source for changed weights",
                    tensor=name,
                )

    def addresses(self) -> npt.NDArray[np.int64]:
        """Address of every buffer of the manifest, in its order. On any thread, after `prepare`."""
        names, tensors = self._now()
        if self._known is not None and names == self._known.names:
            found = np.array([tensor.data_ptr() for tensor in _local(tensors)], np.int64)
            in_order: npt.NDArray[np.int64] = found[self._order]
            return in_order
        return np.array([t.data_ptr() for t in self._tensors().values()], np.int64)

    def fingerprint(self) -> object:
        """A value that changes when PyTorch writes to or replaces any of the tensors.

        Right after `prepare` it is what that one saw.
        """
        snapshot, self._fresh = self._fresh, None
        return snapshot if snapshot is not None else _Snapshot.take(*self._now())

    def changed_since(self, before: object) -> str | None:
        """Name of a tensor that was replaced or written to since `fingerprint`, or None.

        On any thread, also while a forward or backward pass runs. Parameters of FSDP modules that
        are replaced go unseen: the version is what they were.
        """
        assert isinstance(before, _Snapshot)
        return _Snapshot.take(*self._now()).difference(before)

    def _now(self) -> tuple[list[str], list[Tensor]]:
        return self._held if self._is_fsdp else _listed(self._weights)

    def _tensors(self) -> dict[str, Tensor]:
        """Local tensors by buffer, in the manifest's order. No copy, no communication."""
        if self._rule:
            return match_buffers(self.manifest, self._weights)
        found = self._live.tensors()
        return {name: found[name] for name in self.manifest.buffers.names}


def sink_tensors(
    weights: nn.Module | Mapping[str, Tensor], manifest: Manifest, *, label: str
) -> list[Tensor]:
    """The live tensors of a sink in the manifest's buffer order.

    Raises:
        UnknownTensorError, DtypeMismatchError, LayoutError: They are not what the layout says.
        ConfigError: A tensor is not on the CPU.
    """
    matched = match_buffers(manifest, weights)
    _require_cpu(matched, label)
    return list(matched.values())


def staged_tensors(
    manifest: Manifest, install: Callable[[Mapping[str, Tensor]], None]
) -> Callable[[npt.NDArray[np.int64]], None]:
    """What a receiver calls with addresses, for an `install` that wants tensors.

    Args:
        manifest: Of one sink rank: names, dtypes and sizes of its buffers.
        install: Gets flat tensors of that memory by buffer name; no copies.
    """
    buffers = manifest.buffers
    sizes = (buffers.numel * ITEMSIZE[buffers.dtype]).tolist()
    kinds = [TORCH_DTYPES[Dtype(kind)] for kind in buffers.dtype.tolist()]

    def call(addresses: npt.NDArray[np.int64]) -> None:
        staged: dict[str, Tensor] = {}
        for name, address, size, kind in zip(
            buffers.names, addresses.tolist(), sizes, kinds, strict=True
        ):
            memory = (ctypes.c_char * size).from_address(address)
            staged[name] = torch.frombuffer(memory, dtype=kind)
        install(staged)

    return call


def _require_cpu(tensors: Mapping[str, Tensor], label: str) -> None:
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu":
            raise ConfigError(
                f"{label}: {name} is on {tensor.device}; this version moves CPU memory only",
                tensor=name,
            )


class _Guard:
    """Holds optimizer steps of this process back while any version is open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[tuple[weakref.ref[SourceMember], OpenVersion]] = []
        self._installed = False

    def add(self, member: SourceMember, opened: OpenVersion) -> None:
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        with self._lock:
            self._open = [(m, o) for m, o in self._open if not o.is_decided]
            self._open.append((weakref.ref(member), opened))
            if not self._installed:
                register_optimizer_step_pre_hook(self._before_step)
                self._installed = True

    def _before_step(self, optimizer: object, args: Any, kwargs: Any) -> None:
        with self._lock:
            waiting = list(self._open)
        for reference, opened in waiting:
            member = reference()
            while member is not None and not opened.is_decided and not member.closing.is_set():
                if time.monotonic() > opened.deadline:
                    raise SourceMutatedError(
                        f"source {member.rank}: an optimizer step would change version "
                        f"{opened.version or 'next'}, which is still undecided at its deadline",
                        rank=member.rank,
                        version=opened.version,
                    )
                with member.changed:
                    member.changed.wait(_HOOK_POLL_S)


_guard = _Guard()


def guard_optimizers(member: SourceMember, opened: OpenVersion) -> None:
    """Make optimizer steps of this process wait until `opened` is decided."""
    _guard.add(member, opened)
