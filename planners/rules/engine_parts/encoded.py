"""Engines that store codes where sources hold BF16 values: the tensors of both."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from weightsync.planners.rules.canonical import canonical_tensors
from weightsync.planners.rules.config import ModelConfig
from weightsync.planners.rules.quantized import encoded_names

__all__ = ["encoded_from", "with_values"]


@lru_cache(maxsize=2)
def with_values(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Lists the quantized checkpoint's tensors and those of BF16 that they take the places of.

    Args:
        config: The model, with its quantization.

    Returns:
        Shape by name.
    """
    return {**canonical_tensors(config), **canonical_tensors(config, quantized=True)}


@lru_cache(maxsize=2)
def encoded_from(config: ModelConfig, encoding: str) -> Mapping[str, tuple[str, str, str]]:
    """Says what an engine's codes are encoded from.

    Args:
        config: The model, with its quantization.
        encoding: Name of the recipe.

    Returns:
        Recipe, values and scales of each encoded tensor by the name of its codes.
    """
    names = encoded_names(config, canonical_tensors(config))
    return {codes: (encoding, values, scales) for values, codes, scales in names}
