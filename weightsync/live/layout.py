"""Live PyTorch weights: what this process holds, without gathering or copying anything."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weightsync.errors import ConfigError, DtypeMismatchError, LayoutError, UnknownTensorError
from weightsync.ir.builder import ManifestBuilder
from weightsync.ir.dtypes import Dtype
from weightsync.ir.manifest import Manifest, Side
from weightsync.live.sites import (
    Site,
    Weights,
    live_sites,
    skipped_buffers,
    unwrapped,
)
from weightsync.planners.rules.canonical import canonical_tensors
from weightsync.planners.rules.config import SUPPORTED_MODELS, ModelConfig
from weightsync.planners.rules.parts import Parameter, Part, whole, write
from weightsync.planners.rules.torchtitan import torchtitan_parameter, torchtitan_skips
from weightsync.planners.rules.transformers import transformers_aliases, transformers_parameters

__all__ = ["LiveLayout", "match_buffers", "module_layout"]

_NAMES_SHOWN = 8


def module_layout(
    weights: Weights,
    *,
    config: Mapping[str, Any] | None = None,
    rank: int | None = None,
    side: Side = "source",
) -> LiveLayout:
    """Describes live weights of this process.

    Plain modules, modules under `fully_shard` (FSDP2; also HSDP, and over tensor or expert
    parallelism) or DeepSpeed ZeRO-3, and mappings of tensors, DTensors of any `Shard`,
    `_StridedShard` and `Replicate` among them, are understood. Modules of transformers and
    torchtitan that the rules know get the names of their Hugging Face checkpoint; the names of all
    others are canonical as they stand.
    FSDP modules that are unsharded at this moment are resharded; nothing is communicated.

    Args:
        weights: The module, or tensors by parameter name.
        config: Content of the model's `config.json`, so that names mean what they mean in
            transformers, or in torchtitan, whose modules have no such config. None: the module's
            own `config` if the rules know its model type.
        rank: Number of this process on its side. None: torch.distributed if initialised, else
            $RANK, else 0.
        side: Whether the weights are published (`source`) or overwritten (`sink`).

    Returns:
        The layout, which keeps a reference to `weights`.

    Raises:
        ConfigError: `config` describes no supported model.
        LayoutError: A tensor cannot be described; the message names it and says what can.
        UnknownTensorError: A parameter is not part of the model that the config describes.
    """
    return LiveLayout(weights, _model_of(weights, config), _rank(rank), side)


class LiveLayout:
    """What this process holds of live weights; made by `module_layout`.

    Args:
        weights: The module, or tensors by parameter name.
        config: The transformers model that the names belong to, or None.
        rank: Number of this process on its side.
        side: `source` or `sink`.

    Attributes:
        rank: Number of this process on its side.
        skipped: Tensors that no checkpoint stores, and that are not moved: buffers that are not
            persistent, and what `rules.torchtitan_skips` names.
    """

    def __init__(self, weights: Weights, config: ModelConfig | None, rank: int, side: Side) -> None:
        self.rank = rank
        self._weights = weights
        self._config = config
        homeless = (s.names[0] for s in live_sites(weights) if self._has_no_place(s))
        self.skipped = (*skipped_buffers(weights), *homeless)
        self._side = side
        self._manifest = self._describe()

    def manifest(self, rank: int | None = None) -> Manifest:
        """Describes what this process holds.

        Args:
            rank: None, or the number of this process: it cannot see what others hold.

        Returns:
            A manifest of one rank, with a buffer for every local tensor that is not empty. It was
            made with the layout: weights that were replaced by others need a new layout.

        Raises:
            ConfigError: `rank` is another process.
        """
        if rank is not None and rank != self.rank:
            raise ConfigError(
                f"live weights of rank {self.rank} cannot describe rank {rank}; ask that process",
                rank=rank,
                side=self._side,
            )
        return self._manifest

    def tensors(self) -> dict[str, Tensor]:
        """Gives the memory behind the manifest, looked up anew at every call.

        Returns:
            The local tensor of every buffer, in the manifest's order: no copy, detached. The buffer
            starts at its `data_ptr()`; strides are in the manifest.

        Raises:
            LayoutError: Tensors came or went since the layout was made, or cannot be described.
        """
        found = {site.names[0]: site.local for site in self._sites()}
        names = self._manifest.buffers.names
        if found.keys() != set(names):
            changed = sorted(found.keys() ^ set(names))
            raise LayoutError(
                f"{self._side} {self.rank}: weights came or went since their layout was made: "
                f"{_listed(changed)}; make a new one",
                tensor=changed[0],
                rank=self.rank,
                side=self._side,
            )
        return {name: found[name] for name in names}

    def _sites(self) -> list[Site]:
        return [site for site in live_sites(self._weights) if not self._has_no_place(site)]

    def _has_no_place(self, site: Site) -> bool:
        config = self._config
        return config is not None and all(torchtitan_skips(config, name) for name in site.names)

    def _describe(self) -> Manifest:
        builder = ManifestBuilder(self._side, f"{self._side} {self.rank}")
        unknown: list[str] = []
        for site in self._sites():
            # Tied names usually mean the same parts; where they do not, the memory holds them all.
            parts: dict[Part, None] = {}
            for name in site.names:
                parameter = self._parameter(name, site)
                if parameter is None:
                    unknown.append(name)
                else:
                    held = (
                        parameter.collected(site.n, site.boxes)
                        if site.window is None
                        else parameter.flat(*site.window)
                    )
                    parts |= dict.fromkeys(held.parts)
            local = Parameter(site.names[0], site.n, tuple(parts), window=site.window)
            stride = site.stride if site.window is None else None
            write(builder, [local], self._shapes(site), site.dtype, stride)
        if unknown:
            raise UnknownTensorError(
                f"{self._side} {self.rank}: not part of the model that the config describes: "
                f"{_listed(unknown)}; pass the tensors as a mapping to keep their own names",
                extra=tuple(unknown),
                missing=(),
                rank=self.rank,
                side=self._side,
            )
        return builder.build()

    def _shapes(self, site: Site) -> Mapping[str, tuple[int, ...]]:
        if self._config is None:
            return {site.names[0]: site.shape}
        return canonical_tensors(self._config)

    def _parameter(self, name: str, site: Site) -> Parameter | None:
        """What the whole parameter of a name holds, or None if the model has no such name."""
        if self._config is None:
            return whole(site.names[0], site.names[0], site.shape)
        true_name = transformers_aliases(self._config).get(name, name)
        parameter = transformers_parameters(self._config).get(true_name)
        if parameter is None:
            parameter = torchtitan_parameter(self._config, name)
        if parameter is None:
            # Buffers, and experts of transformers 4: apart, under their canonical names.
            shape = canonical_tensors(self._config).get(true_name)
            if shape is None:
                return None
            parameter = whole(true_name, true_name, shape)
        if parameter.shape != site.shape:
            raise LayoutError(
                f"{self._side} {self.rank}: {name} has shape {site.shape}, but a "
                f"{self._config.model_type} of this config has {parameter.shape}",
                tensor=name,
                rank=self.rank,
                side=self._side,
            )
        return parameter


def match_buffers(manifest: Manifest, weights: Weights) -> dict[str, Tensor]:
    """Finds the live tensors behind a manifest that a rule made, such as an engine's parameters.

    Args:
        manifest: A manifest of one rank.
        weights: This rank's module or tensors, by the names of the manifest's buffers.

    Returns:
        The local tensor of every buffer, in the manifest's order; no copy, detached.

    Raises:
        UnknownTensorError: Names are missing, or tensors that the manifest does not know are there.
        DtypeMismatchError: A tensor has another dtype than its buffer.
        LayoutError: A tensor has another size than its buffer, or is not contiguous.
    """
    found = {name: site for site in live_sites(weights) for name in site.names}
    buffers = manifest.buffers
    missing = [name for name in buffers.names if name not in found]
    known = {alias for name in buffers.names if name in found for alias in found[name].names}
    extra = [name for name in found if name not in known]
    label = manifest.ranks[0]
    if missing or extra:
        raise UnknownTensorError(
            f"{label}: weights and layout name different tensors; missing: {_listed(missing)}; "
            f"extra: {_listed(extra)}",
            missing=tuple(missing),
            extra=tuple(extra),
        )
    matched: dict[str, Tensor] = {}
    for index, name in enumerate(buffers.names):
        site = found[name]
        dtype, numel = Dtype(int(buffers.dtype[index])), int(buffers.numel[index])
        if site.dtype != dtype:
            raise DtypeMismatchError(
                f"{label}: {name} is {site.dtype.name}, its layout says {dtype.name}", tensor=name
            )
        if site.local.numel() != numel or not site.local.is_contiguous():
            raise LayoutError(
                f"{label}: {name} must be contiguous with {numel} elements, but has shape "
                f"{tuple(site.local.shape)} and strides {site.local.stride()}",
                tensor=name,
            )
        matched[name] = site.local
    return matched


def _model_of(weights: Weights, config: Mapping[str, Any] | None) -> ModelConfig | None:
    if config is not None:
        return ModelConfig.from_dict(config)
    if not isinstance(weights, nn.Module):
        return None
    own: Any = getattr(unwrapped(weights), "config", None)
    if getattr(own, "model_type", None) not in SUPPORTED_MODELS:
        return None
    return ModelConfig.from_dict(own.to_dict())


def _rank(rank: int | None) -> int:
    if rank is None and torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    if rank is None:
        text = os.environ.get("RANK", "0")
        if not text.isdecimal():
            raise ConfigError(f"environment variable RANK must be a number, not {text!r}")
        rank = int(text)
    if rank < 0:
        raise ConfigError(f"rank must not be negative, but is {rank}", rank=rank)
    return rank


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    rest = len(names) - _NAMES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown or "none"
