"""Parameters of transformers 5 modules: those of the checkpoint, but with fused experts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType

from weightsync.planners.rules.canonical import (
    CORRECTION_BIAS,
    EMBEDDING,
    LM_HEAD,
    canonical_dtypes,
    canonical_tensors,
    layer_tensors,
    outer_tensors,
)
from weightsync.planners.rules.config import ConfigLike, ModelConfig, model_config
from weightsync.planners.rules.layout import Block, layer_blocks
from weightsync.planners.rules.parts import Parameter, Part, Shape, rows, whole

__all__ = [
    "transformers_aliases",
    "transformers_blocks",
    "transformers_buffers",
    "transformers_parameters",
]

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def transformers_parameters(config: ConfigLike) -> Mapping[str, Parameter]:
    """Describes the parameters of a transformers 5 module, whole.

    The experts of a layer are two parameters: `mlp.experts.gate_up_proj` [E, 2I, H], gate above up,
    and `mlp.experts.down_proj` [E, H, I]. All others are canonical tensors, those of gpt-oss among
    them.

    Args:
        config: The model.

    Returns:
        Parameters by name, in the order of the checkpoint; each once, tied weights included.

    Raises:
        ConfigError: `config` describes no supported model.
    """
    return _parameters(model_config(config))


def transformers_buffers(config: ConfigLike) -> Mapping[str, Parameter]:
    """Describes the persistent buffers of a transformers 5 module.

    They are in its `state_dict` but no parameters: FSDP2 leaves them whole on every rank.

    Args:
        config: The model.

    Returns:
        Buffers by name: the `e_score_correction_bias` of every router that has one.

    Raises:
        ConfigError: `config` describes no supported model.
    """
    return _buffers(model_config(config))


def transformers_aliases(config: ConfigLike) -> dict[str, str]:
    """Names parameters that are another parameter's memory.

    Args:
        config: The model.

    Returns:
        The name that `transformers_parameters` uses, by alias.

    Raises:
        ConfigError: `config` describes no supported model.
    """
    return {LM_HEAD: EMBEDDING} if model_config(config).tie_word_embeddings else {}


def transformers_blocks(
    config: ModelConfig,
    cut: Callable[[Parameter], Parameter],
    layers: Sequence[int] | None = None,
    *,
    is_first: bool = True,
    is_last: bool = True,
) -> Iterator[Block]:
    """Describes what a rank holds of a transformers 5 module; buffers are whole everywhere.

    Args:
        config: The model.
        cut: Gives the rank's shard of a whole parameter.
        layers: The rank's decoder layers; None: all.
        is_first: Whether the rank holds the embedding.
        is_last: Whether it holds the last norm and the head; a tied head is the embedding.

    Yields:
        Blocks of parameters.
    """
    holds = {
        EMBEDDING: is_first or (is_last and config.tie_word_embeddings),
        "model.norm.weight": is_last,
        LM_HEAD: is_last,
    }
    top = (whole(name, name, shape) for name, shape in outer_tensors(config) if holds[name])
    yield Block(tuple(cut(parameter) for parameter in top))
    layers = range(config.num_layers) if layers is None else layers
    yield from layer_blocks(
        config,
        layers,
        [f"model.layers.{layer}." for layer in layers],
        lambda layer, _: (
            p if p.name.endswith(CORRECTION_BIAS) else cut(p) for p in _layer(config, layer)
        ),
    )


@lru_cache(maxsize=64)  # few are asked for: layers are alike
def _layer(config: ModelConfig, layer: int) -> tuple[Parameter, ...]:
    """Parameters and buffers of one layer."""
    shapes = dict(layer_tensors(config, layer))
    return (*_fused(config, shapes).values(), *_only_buffers(config, shapes).values())


@lru_cache(maxsize=8)
def _buffers(config: ModelConfig) -> Mapping[str, Parameter]:
    return MappingProxyType(_only_buffers(config, canonical_tensors(config)))


@lru_cache(maxsize=8)
def _parameters(config: ModelConfig) -> Mapping[str, Parameter]:
    return MappingProxyType(_fused(config, canonical_tensors(config)))


def _only_buffers(config: ModelConfig, shapes: Mapping[str, Shape]) -> dict[str, Parameter]:
    dtypes = canonical_dtypes(config)
    return {
        name: whole(name, name, shape, dtypes.get(name))
        for name, shape in shapes.items()
        if name.endswith(CORRECTION_BIAS)
    }


def _fused(config: ModelConfig, shapes: Mapping[str, Shape]) -> dict[str, Parameter]:
    """Describe the parameters that hold some canonical tensors; those of experts hold them all."""
    experts, width, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size
    found: dict[str, Parameter] = {}
    fused: dict[str, list[Part]] = {}
    for name, shape in shapes.items():
        if name.endswith(CORRECTION_BIAS):
            continue  # a buffer
        match = _EXPERT.fullmatch(name)
        if match is None:
            found[name] = whole(name, name, shape)
            continue
        prefix, expert, which = match.groups()
        fused_name = f"{prefix}.down_proj" if which == "down" else f"{prefix}.gate_up_proj"
        at = (int(expert), width if which == "up" else 0, 0)
        fused.setdefault(fused_name, []).append(rows(name, shape, 0, shape[0], at))
    for name, parts in fused.items():
        is_down = name.endswith("down_proj")
        shape = (experts, hidden, width) if is_down else (experts, 2 * width, hidden)
        found[name] = Parameter(name, shape, tuple(parts))
    return found
