"""Quantized checkpoints: what stands there in place of a BF16 tensor."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache

from weightsync.errors import ConfigError
from weightsync.ir.dtypes import Dtype
from weightsync.ir.recipes import recipe_named
from weightsync.planners.rules.config import ModelConfig

__all__ = [
    "MX_BLOCK",
    "encoded_config",
    "encoded_names",
    "is_unconverted",
    "quantized_tensor",
]

MX_BLOCK = 32
"""Elements that share a scale in MXFP4 (OCP Microscaling Formats 1.0, section 5)."""

Shape = tuple[int, ...]

# What block FP8 quantizes: Linear layers. Routers, norms and embeddings are none, and no checkpoint
# of these families quantizes its head.
_LINEAR = re.compile(r"(.+\.(?:\w+_proj|kv_a_proj_with_mqa))\.weight")
_MX_EXPERTS = re.compile(r"(.+\.mlp\.experts)\.(?:gate_up|down)_proj")


def encoded_config(config: ModelConfig, encoding: str) -> ModelConfig:
    """Says what the checkpoint would be that an engine with this encoding loads.

    Args:
        config: The model, as published in BF16 or quantized.
        encoding: Name of a recipe.

    Returns:
        The model with the quantization that the recipe makes.

    Raises:
        ConfigError: There is no such recipe, or none of that name for this model.
    """
    recipe = recipe_named(encoding)
    method = "fp8" if recipe.name == "fp8_block" else recipe.name
    block = (recipe.cell[0], recipe.cell[1]) if method == "fp8" else None
    fits = (method == "mxfp4") == (config.model_type == "gpt_oss")
    same = config.quantization in (None, method) and config.weight_block_size in (None, block)
    if not fits or not same:
        raise ConfigError(
            f"{config.model_type}: rollout encoding {encoding!r} is none that engines have for it; "
            f"its config says quant_method {config.quantization!r} in blocks of "
            f"{config.weight_block_size}. Block FP8 (128 x 128) is for all but gpt_oss, mxfp4 for "
            "gpt_oss; leave the encoding out for BF16",
            key="encoding",
        )
    if config.quantization is None:
        # As Qwen3-*-FP8 is published: routers and heads stay as they are.
        config = dataclasses.replace(config, unconverted_modules=("mlp.gate", "lm_head"))
    return dataclasses.replace(config, quantization=method, weight_block_size=block)


def encoded_names(
    config: ModelConfig, shapes: Mapping[str, Shape]
) -> Iterator[tuple[str, str, str]]:
    """Pairs the tensors of the BF16 checkpoint with those that take their places.

    Args:
        config: The model, with its quantization.
        shapes: The BF16 checkpoint's.

    Yields:
        Names of the values, their codes and their scales.
    """
    for name, shape in shapes.items():
        found = quantized_tensor(config, name, shape)
        if found is not None:
            codes, scales = found
            yield name, codes, scales


def quantized_tensor(
    config: ModelConfig, name: str, shape: Shape
) -> dict[str, tuple[Shape, Dtype]] | None:
    """Tells what a quantized checkpoint holds in place of a BF16 tensor.

    Args:
        config: The model, with its quantization.
        name: Canonical name of the tensor in the BF16 checkpoint.
        shape: Its shape.

    Returns:
        Shape and dtype of each tensor that takes its place, by name; None: it is there unchanged.

    Raises:
        ConfigError: The model has no quantization, or one that is not known.
    """
    if config.quantization == "fp8" and config.weight_block_size is not None:
        return _block_fp8(config, name, shape, config.weight_block_size)
    if config.quantization == "mxfp4" and config.model_type == "gpt_oss":
        return _mxfp4(config, name, shape)
    if config.quantization is None:
        problem = "has no quantization_config"
    elif config.quantization == "fp8":
        problem = "quantizes to fp8 without a weight_block_size"
    else:
        problem = f"has quant_method {config.quantization!r}"
    raise ConfigError(
        f"{config.model_type}: the config {problem}; known checkpoints are block fp8 and, of "
        "gpt_oss, mxfp4",
        key="quantization_config",
    )


def _block_fp8(
    config: ModelConfig, name: str, shape: Shape, block: tuple[int, int]
) -> dict[str, tuple[Shape, Dtype]] | None:
    match = _LINEAR.fullmatch(name)
    if match is None or is_unconverted(config, match[1]):
        return None
    scales = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    return {name: (shape, Dtype.F8_E4M3), name + "_scale_inv": (scales, Dtype.F32)}


def _mxfp4(config: ModelConfig, name: str, shape: Shape) -> dict[str, tuple[Shape, Dtype]] | None:
    match = _MX_EXPERTS.fullmatch(name)
    if match is None or is_unconverted(config, match[1]):
        return None
    experts, depth, rows = shape
    if depth % MX_BLOCK:
        raise ConfigError(
            f"{config.model_type}: mxfp4 needs a depth that is a multiple of {MX_BLOCK}, but "
            f"{name} has {depth}",
            key="quantization_config",
            tensor=name,
        )
    blocks = depth // MX_BLOCK
    return {
        # Two values of four bits a byte, along the depth.
        name + "_blocks": ((experts, rows, blocks, MX_BLOCK // 2), Dtype.U8),
        name + "_scales": ((experts, rows, blocks), Dtype.U8),
    }


def is_unconverted(config: ModelConfig, module: str) -> bool:
    """Tells whether `modules_to_not_convert` names a module, one above it, or the end of its name.

    Args:
        config: The model.
        module: Name of the module.

    Returns:
        Whether the checkpoint leaves it as it was.
    """
    pattern = _pattern(config.unconverted_modules)
    return pattern is not None and pattern.search(module) is not None


@lru_cache(maxsize=8)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str] | None:
    if not names:
        return None
    # Whole words between dots only: `mlp.gate` is not `mlp.gate_proj`, layer 1 is not layer 11.
    escaped = (".*".join(re.escape(part) for part in name.split("*")) for name in names)
    joined = "|".join(escaped)
    return re.compile(rf"^(?:{joined})(?:\.|$)|(?:^|\.)(?:{joined})$")
