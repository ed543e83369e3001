"""What a vLLM worker's parameters hold, recorded from a twin of its model that has no storage.

The live model is left alone: it generates, and post-load steps have changed what its parameters
hold. The twin is built by vLLM's own classes with the worker's own configuration and ranks, on the
meta device, and loaded by vLLM's own `load_weights` (see `weightsync.integrations.recording`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import utils as model_utils
from vllm.utils.torch_utils import set_default_torch_dtype

from weightsync.integrations.recording import Recorder, Recording, load_twin, read_twin

__all__ = ["record_worker"]


def record_worker(
    vllm_config: VllmConfig, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> Recording:
    """Records the layout of this process's worker. Blocks; seconds for large models.

    Args:
        vllm_config: The worker's own.
        tensors: Shape and dtype of every canonical tensor, as the trainer publishes them.

    Returns:
        The layout.

    Raises:
        UnknownTensorError: vLLM's loader does not know a name; names it.
        LayoutError: The loader computes on weights, or does not load a part of the model.
    """
    config = _private(vllm_config)
    model_config = config.model_config
    with (
        _private_rotary(),
        _real_expert_maps(),
        _private_stage(),
        Recorder() as recorder,
        set_current_vllm_config(config),
    ):
        with set_default_torch_dtype(model_config.dtype), torch.device("meta"):
            twin = initialize_model(vllm_config=config, model_config=model_config)
            load_twin("vLLM", twin, recorder, tensors)
        return read_twin(twin, recorder, tensors)


def _private(vllm_config: VllmConfig) -> VllmConfig:
    """The same configuration with registers of its own: layers enter themselves by name."""
    private = copy.copy(vllm_config)
    private.compilation_config = copy.copy(vllm_config.compilation_config)
    private.compilation_config.static_forward_context = {}
    private.compilation_config.static_all_moe_layers = []
    return private


@contextmanager
def _private_rotary() -> Iterator[None]:
    """Keep the twin's rotary embeddings, which have no storage, out of those that vLLM shares."""
    shared = rotary_embedding._ROPE_DICT
    before = dict(shared)
    shared.clear()
    try:
        yield
    finally:
        shared.clear()
        shared.update(before)


@contextmanager
def _private_stage() -> Iterator[None]:
    """Keep the twin out of vLLM's list of what stages lack, whose key is the id of a model."""
    lists: dict[int, Any] = model_utils._model_to_pp_missing_layer_names
    before = dict(lists)
    lists.clear()
    try:
        yield
    finally:
        lists.clear()
        lists.update(before)


@contextmanager
def _real_expert_maps() -> Iterator[None]:
    """Let the tables of experts be real ones: the loader asks them which experts are held here."""
    make = ExpertMapManager.__init__

    @functools.wraps(make)
    def make_on_host(*args: Any, **kwargs: Any) -> None:
        with torch.device("cpu"):
            make(*args, **kwargs)

    ExpertMapManager.__init__ = make_on_host
    try:
        yield
    finally:
        ExpertMapManager.__init__ = make
