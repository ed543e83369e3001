"""PyTorch weights as the core needs them: addresses, a manifest, and a watch for changes."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from weightsync.errors import (
    ConfigError,
    DtypeMismatchError,
    LayoutError,
    SourceMutatedError,
)
from weightsync.ir.dtypes import ITEMSIZE
from weightsync.live.layout import fingerprint, match_buffers, module_layout

if TYPE_CHECKING:
    from torch import Tensor, nn

    from weightsync.ir.layout import Layout
    from weightsync.ir.manifest import Manifest
    from weightsync.service.source import OpenVersion, SourceMember

__all__ = ["SourceWeights", "guard_optimizers", "sink_tensors"]

_HOOK_POLL_S = 0.05


class SourceWeights:
    """The weights of one trainer rank: what they are, where they lie, whether they changed.

    Args:
        weights: A module or tensors by name.
        layout: How they hold canonical tensors; None reads it from the weights.
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
        self._live = module_layout(weights, rank=rank)
        self._rule = layout is not None
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
        self._meta = {n: (t.dtype, t.shape, t.stride()) for n, t in tensors.items()}
        self.sizes: npt.NDArray[np.int64] = buffers.numel * ITEMSIZE[buffers.dtype]

    def prepare(self) -> None:
        """Bring FSDP modules into their sharded state and check that the layout still holds.

        Raises:
            LayoutError: A tensor has another dtype, shape or stride than when the source joined.
        """
        tensors = self._tensors()
        for name, meta in self._meta.items():
            tensor = tensors.get(name)
            if tensor is None or (tensor.dtype, tensor.shape, tensor.stride()) != meta:
                raise LayoutError(
                    f"{self._label}: {name} is not what it was when the source joined; make a new "
                    "Source for changed weights",
                    tensor=name,
                )

    def addresses(self) -> npt.NDArray[np.int64]:
        """Address of every buffer of the manifest, in its order."""
        return np.array([t.data_ptr() for t in self._tensors().values()], np.int64)

    def fingerprint(self) -> object:
        """A value that changes when PyTorch writes to or replaces any of the tensors."""
        return fingerprint(self._weights)

    def changed_since(self, before: object) -> str | None:
        """Name of a tensor that was replaced or written to since `fingerprint`, or None."""
        assert isinstance(before, dict)
        now = fingerprint(self._weights)
        return next((str(name) for name in before if now.get(name) != before[name]), None)

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
