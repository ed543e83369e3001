"""Live GPT models of Megatron-Core: what this rank's modules hold, read from their parameters.

layout = megatron_layout(model, config="Qwen3-30B-A3B/config.json")
source = Source(layout.tensors(), layout=layout, job=url)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from weightsync.errors import ConfigError, LayoutError, UnknownTensorError
from weightsync.ir.builder import ManifestBuilder
from weightsync.ir.manifest import Manifest
from weightsync.live.sites import live_sites, skipped_buffers
from weightsync.planners.rules.canonical import EMBEDDING, LM_HEAD, canonical_tensors
from weightsync.planners.rules.config import ConfigLike, ModelConfig, model_config
from weightsync.planners.rules.megatron_parts.whole import (
    Whole,
    dense_parameters,
    expert_parameters,
    vocabulary,
)
from weightsync.planners.rules.parts import Parameter, whole, write

__all__ = ["MegatronLiveLayout", "gather_parameters", "megatron_layout"]

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_FORMS = {
    "sequential": re.compile(r".*\.mlp\.experts\.local_experts\..+"),
    "grouped": re.compile(r".*\.mlp\.experts\.linear_fc[12]\.weight\d+"),
    "single": re.compile(r".*\.mlp\.experts\.linear_fc[12]\.weight"),
}
_ENDS = {"embedding.word_embeddings.weight": EMBEDDING, "output_layer.weight": LM_HEAD}
_NORM = "decoder.final_layernorm.weight"
_NAMES_SHOWN = 8


def megatron_layout(
    model: nn.Module | Sequence[nn.Module], *, config: ConfigLike, rank: int | None = None
) -> MegatronLiveLayout:
    """Describes what this rank holds of a Megatron-Core GPTModel. Nothing is communicated.

    Which layer is which comes from the layers themselves (`layer_number`), how they are cut from
    the shapes of the parameters and the process groups that the modules were built with.

    Args:
        model: The model; a list of its chunks with virtual pipeline parallelism. Wrapped or not.
        config: The model's Hugging Face configuration, as a path or its content.
        rank: Number of this process among the sources; None: that in torch.distributed.

    Returns:
        The layout, which keeps references to the parameters.

    Raises:
        ConfigError: `config` describes no supported model.
        LayoutError: A parameter is not as the config and the degrees say; the message names it.
        UnknownTensorError: A parameter is no part of the model that the config describes.
    """
    modules = list(model) if isinstance(model, Sequence) else [model]
    number = dist.get_rank() if rank is None else rank
    return MegatronLiveLayout(modules, model_config(config), number)


def gather_parameters(model: nn.Module | Sequence[nn.Module]) -> None:
    """Completes the parameters that the distributed optimizer has updated in parts.

    With `overlap_param_gather` an optimizer step leaves every data-parallel rank with its own part
    up to date; the rest arrives during the next forward pass. Call this on all ranks between a step
    and a publish; without that setting it does nothing.

    Args:
        model: The model as it was trained: wrapped in Megatron's DistributedDataParallel.
    """
    for module in model if isinstance(model, Sequence) else [model]:
        wrapped: Any = module
        ddp_config = getattr(wrapped, "ddp_config", None)
        if ddp_config is not None and ddp_config.overlap_param_gather:
            wrapped.start_param_sync(force_sync=True)


class MegatronLiveLayout:
    """What this rank holds of a live GPTModel; made by `megatron_layout`.

    Args:
        modules: The chunks of the model.
        config: The model.
        rank: Number of this process among the sources.

    Attributes:
        rank: Number of this process among the sources.
        skipped: Tensors that no checkpoint stores, and that are not moved: buffers that are not
            persistent, layers of multi-token prediction, and the balancing bias of routers in
            models whose checkpoint has no place for it.
    """

    def __init__(self, modules: Sequence[nn.Module], config: ModelConfig, rank: int) -> None:
        self.rank = rank
        self._tensors: dict[str, Tensor] = {}
        skipped: list[str] = []
        unknown: list[str] = []
        builder = ManifestBuilder("source", f"source {rank}")
        for number, module in enumerate(modules):
            prefix = f"model{number}." if len(modules) > 1 else ""
            chunk = _Chunk(module, config)
            skipped += (prefix + name for name in skipped_buffers(chunk.module))
            for site in live_sites(chunk.module):
                name = site.names[0]
                if chunk.has_no_place(name):
                    skipped.append(prefix + name)
                    continue
                parameter = chunk.parameter(name, site.shape)
                if parameter is None:
                    unknown.append(prefix + name)
                    continue
                held = replace(parameter, name=prefix + name, dtype=site.dtype)
                write(builder, [held], canonical_tensors(config), site.dtype)
                self._tensors[prefix + name] = site.local
        if unknown:
            raise UnknownTensorError(
                f"source {rank}: not part of the {config.model_type} that the config describes: "
                f"{', '.join(unknown[:_NAMES_SHOWN])}"
                + (f" and {len(unknown) - _NAMES_SHOWN} more" * (len(unknown) > _NAMES_SHOWN)),
                extra=tuple(unknown),
                missing=(),
                rank=rank,
                side="source",
            )
        self.skipped = tuple(skipped)
        self._manifest = builder.build()

    def manifest(self, rank: int | None = None) -> Manifest:
        """Describes what this process holds.

        Args:
            rank: None, or the number of this process: it cannot see what others hold.

        Returns:
            A manifest of one rank, equal to that of `rules.megatron` at the same degrees.

        Raises:
            ConfigError: `rank` is another process.
        """
        if rank is not None and rank != self.rank:
            raise ConfigError(
                f"live weights of rank {self.rank} cannot describe rank {rank}; ask that process",
                rank=rank,
                side="source",
            )
        return self._manifest

    def tensors(self) -> dict[str, Tensor]:
        """Gives the memory behind the manifest.

        Returns:
            The parameter of every buffer, in the manifest's order: no copy, detached.
        """
        return {name: self._tensors[name] for name in self._manifest.buffers.names}


class _Chunk:
    """One chunk of a model: its parameters by what they hold."""

    def __init__(self, module: nn.Module, config: ModelConfig) -> None:
        inner: Any = module
        while not hasattr(inner, "decoder") and isinstance(
            getattr(inner, "module", None), nn.Module
        ):
            inner = inner.module  # DistributedDataParallel, Float16Module
        if not hasattr(inner, "decoder") or not hasattr(inner, "pg_collection"):
            raise LayoutError(
                f"{type(module).__name__} is no GPTModel of Megatron-Core 0.16 or newer; pass the "
                "model, or the list of its chunks"
            )
        if getattr(inner.config, "moe_mlp_glu_interleave_size", None) is not None:
            raise LayoutError(
                "moe_mlp_glu_interleave_size puts gate and up into each other, which is not "
                "supported; leave it at None"
            )
        self.module = inner
        self._config = config
        self._parameters = dict(inner.named_parameters())
        forms = (
            form
            for form, pattern in _FORMS.items()
            if any(pattern.fullmatch(name) for name in self._parameters)
        )
        self._form = next(forms, None)
        self._tables: dict[int, Mapping[str, Sequence[Whole]]] = {}

    def has_no_place(self, name: str) -> bool:
        """Whether the checkpoint of no model of this config has such a tensor."""
        is_bias = name.endswith(".mlp.router.expert_bias")
        return name.startswith("mtp.") or (is_bias and not self._config.correction_bias)

    def parameter(self, name: str, shape: tuple[int, ...]) -> Parameter | None:
        """What a parameter holds here; None if the model has no such name.

        Args:
            name: Name in the module.
            shape: Its shape.
        """
        config = self._config
        if name in _ENDS:
            tp = self.module.pg_collection.tp
            tensor = EMBEDDING if config.tie_word_embeddings else _ENDS[name]
            made = vocabulary(config, name, tensor, shape[0], tp.rank())
            if made.shape != shape or shape[0] * tp.size() < config.vocab_size:
                least = (-(-config.vocab_size // tp.size()), config.hidden_size)
                raise self._misfit(name, shape, f"at least {least}")
            return made
        if name == _NORM:
            norm = whole(name, "model.norm.weight", (config.hidden_size,))
            return self._cut(name, shape, [Whole(norm)])
        match = _LAYER.fullmatch(name)
        if match is None:
            return None
        known = self._table(int(match[1])).get(match[2])
        return None if known is None else self._cut(name, shape, known)

    def _table(self, place: int) -> Mapping[str, Sequence[Whole]]:
        """All that a layer may hold, by name; a name may mean one thing or another."""
        if place in self._tables:
            return self._tables[place]
        config = self._config
        layer = int(self.module.decoder.layers[place].layer_number) - 1
        if layer >= config.num_layers:
            raise LayoutError(
                f"decoder.layers.{place} is layer {layer} of the model, but the config has "
                f"{config.num_layers}"
            )
        found: dict[str, list[Whole]] = {}
        for te in (True, False):
            for one in dense_parameters(config, layer, te=te):
                found.setdefault(one.parameter.name, []).append(one)
        if config.is_sparse(layer) and self._form is not None:
            ep = self.module.pg_collection.ep
            count = config.num_experts // ep.size()
            held = range(ep.rank() * count, (ep.rank() + 1) * count)
            for one in expert_parameters(config, layer, self._form, held):
                found[one.parameter.name] = [one]
        self._tables[place] = found
        return found

    def _cut(self, name: str, shape: tuple[int, ...], known: Sequence[Whole]) -> Parameter:
        """The shard that has the shape of the parameter."""
        groups, parameter = self.module.pg_collection, self._parameters.get(name)
        shards = []
        for one in known:
            group = groups.expt_tp if one.is_expert else groups.tp
            shard = one.shard(group.size(), group.rank())
            shards.append(shard.shape)
            more = len(shard.shape) - len(shape)  # the number of experts, which is 1
            if shard.shape[max(more, 0) :] != shape or math.prod(shard.shape[: max(more, 0)]) != 1:
                continue
            cut_by_megatron = getattr(parameter, "partition_dim", -1)
            is_marked = bool(getattr(parameter, "tensor_model_parallel", False))
            # Transformer Engine marks experts with whatever dimension (TEGroupedLinear).
            if is_marked and not one.is_expert and group.size() > 1 and one.dim != cut_by_megatron:
                continue
            return shard
        raise self._misfit(name, shape, " or ".join(map(str, dict.fromkeys(shards))))

    def _misfit(self, name: str, shape: tuple[int, ...], expected: str) -> LayoutError:
        groups = self.module.pg_collection
        return LayoutError(
            f"{name} has shape {shape}; a {self._config.model_type} of this config has {expected} "
            f"on rank {groups.tp.rank()} of {groups.tp.size()} tensor-parallel ranks (experts: "
            f"{groups.expt_tp.rank()} of {groups.expt_tp.size()}, with {groups.ep.size()} "
            "expert-parallel ones)",
            tensor=name,
        )
