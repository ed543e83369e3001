"""What a vLLM worker's parameters hold, recorded from a twin of its model that has no storage.

The live model is left alone: it generates, and post-load steps have changed what its parameters
hold. The twin is built by vLLM's own classes with the worker's own configuration and ranks, on the
meta device, and loaded by vLLM's own `load_weights` (see `weightsync.integrations.recording`).
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import utils as model_utils
from vllm.utils.torch_utils import set_default_torch_dtype

from weightsync.errors import LayoutError, UnknownTensorError, WeightSyncError
from weightsync.integrations.recording import Recorded, Recorder
from weightsync.ir.builder import ManifestBuilder
from weightsync.ir.manifest import Manifest
from weightsync.live.sites import KINDS

__all__ = ["Recording", "record_worker"]


@dataclass(frozen=True)
class Recording:
    """The layout of one worker; a `weightsync.Layout` of one rank.

    Attributes:
        parameters: What every parameter that the loader writes holds, by its first name.
        sites: Every place where such a parameter is attached: path of the module, name in it,
            name of the parameter. Tied weights have several.
        ignored: Parameters and buffers that no checkpoint fills.
        constants: Of those, the ones that are made with one value everywhere, and the value.
        shapes: Shapes of the canonical tensors.
    """

    parameters: Mapping[str, Recorded]
    sites: tuple[tuple[str, str, str], ...]
    ignored: tuple[str, ...]
    constants: Mapping[str, float]
    shapes: Mapping[str, tuple[int, ...]]

    def manifest(self, rank: int) -> Manifest:
        """The manifest of this worker. Elements that no checkpoint fills are constants.

        Args:
            rank: Number of the worker inside its replica, for messages.

        Raises:
            CoverageError: The loader writes an element twice.
        """
        builder = ManifestBuilder("sink", f"sink {rank}")
        for name, parameter in self.parameters.items():
            builder.buffer(name, KINDS[parameter.dtype], math.prod(parameter.shape))
            for piece in parameter.pieces:
                builder.tensor(piece.tensor, self.shapes[piece.tensor])
                builder.piece(
                    piece.tensor,
                    name,
                    lo=piece.lo,
                    n=piece.n,
                    step=piece.step,
                    offset=piece.offset,
                    stride=piece.stride,
                )
            for fill in parameter.fills:
                builder.constant(name, fill.offset, fill.n, fill.stride, fill.value)
        return builder.build()


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
            _load(twin, recorder, tensors)
        return _read(twin, recorder, tensors)


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


def _load(
    twin: nn.Module,
    recorder: Recorder,
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
) -> None:
    last = ""

    def weights() -> Iterator[tuple[str, Tensor]]:
        nonlocal last
        for name, (shape, dtype) in tensors.items():
            last = name
            yield name, recorder.source(name, shape, dtype)

    try:
        load: Any = twin.load_weights
        load(weights())
    except WeightSyncError:
        raise
    except (KeyError, ValueError, AttributeError) as error:
        raise UnknownTensorError(
            f"vLLM's {type(twin).__name__} does not load {last}: {type(error).__name__}: {error}; "
            "the trainer's model and the engine's are not the same, or this vLLM spells it "
            "otherwise",
            extra=(last,),
            missing=(),
        ) from error
    except (RuntimeError, AssertionError, IndexError) as error:
        raise LayoutError(
            f"vLLM's {type(twin).__name__} cannot take {last} of shape {tensors[last][0]} at these "
            f"degrees of parallelism: {type(error).__name__}: {error}",
            tensor=last,
        ) from error


def _read(
    twin: nn.Module,
    recorder: Recorder,
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
) -> Recording:
    parameters: dict[str, Recorded] = {}
    sites: list[tuple[str, str, str]] = []
    ignored: list[str] = []
    constants: dict[str, float] = {}
    first_name: dict[tuple[object, ...], str] = {}
    for path, module in twin.named_modules():
        for attribute, tensor in _own_tensors(module):
            name = f"{path}.{attribute}" if path else attribute
            known = first_name.setdefault(_place(tensor), name)
            if known == name:
                recorded = _recorded(recorder, name, tensor)
                if recorded is None or not recorded.is_loaded:
                    ignored.append(name)
                    if recorded is not None and recorded.fills:
                        constants[name] = recorded.fills[0].value
                    continue
                parameters[name] = recorded
            if known in parameters:
                sites.append((path, attribute, known))
    shapes = {name: shape or (1,) for name, (shape, _) in tensors.items()}
    return Recording(parameters, tuple(sites), tuple(ignored), constants, shapes)


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Equal for tied parameters; not for different views of one storage."""
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for found in (module._parameters, module._buffers):
        for name, tensor in found.items():
            if tensor is not None and tensor.numel():
                yield name, tensor


def _recorded(recorder: Recorder, name: str, tensor: Tensor) -> Recorded | None:
    if tensor.device.type != "meta":
        return None  # made by the engine for itself, on a device that it chose
    try:
        return recorder.recorded(tensor)
    except LayoutError as error:
        raise LayoutError(f"{name}: {error}", tensor=name) from error
