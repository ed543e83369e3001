"""Layouts of known models in known trainers and engines: the only place that knows model names.

`rules.<engine or trainer>(config, **degrees)` gives a layout; its `manifest(rank)` needs no torch.
"""

from __future__ import annotations

from weightsync.planners.rules.canonical import canonical_dtypes, canonical_tensors
from weightsync.planners.rules.config import (
    SUPPORTED_MODELS,
    ConfigLike,
    LatentAttention,
    ModelConfig,
    model_config,
)
from weightsync.planners.rules.fsdp2 import Fsdp2Layout, fsdp2
from weightsync.planners.rules.hf import HfLayout, hf
from weightsync.planners.rules.layout import RuleLayout
from weightsync.planners.rules.megatron import MegatronLayout, megatron
from weightsync.planners.rules.sglang import SglangLayout, sglang
from weightsync.planners.rules.torchtitan import (
    torchtitan_aliases,
    torchtitan_buffers,
    torchtitan_parameter,
    torchtitan_parameters,
    torchtitan_skips,
)
from weightsync.planners.rules.transformers import (
    transformers_aliases,
    transformers_buffers,
    transformers_parameters,
)
from weightsync.planners.rules.vllm import VllmLayout, vllm
from weightsync.planners.rules.zero3 import Zero3Layout, zero3

__all__ = [
    "SUPPORTED_MODELS",
    "ConfigLike",
    "Fsdp2Layout",
    "HfLayout",
    "LatentAttention",
    "MegatronLayout",
    "ModelConfig",
    "RuleLayout",
    "SglangLayout",
    "VllmLayout",
    "Zero3Layout",
    "canonical_dtypes",
    "canonical_tensors",
    "fsdp2",
    "hf",
    "megatron",
    "model_config",
    "sglang",
    "torchtitan_aliases",
    "torchtitan_buffers",
    "torchtitan_parameter",
    "torchtitan_parameters",
    "torchtitan_skips",
    "transformers_aliases",
    "transformers_buffers",
    "transformers_parameters",
    "vllm",
    "zero3",
]
