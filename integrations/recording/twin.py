"""What the parameters of one engine rank hold, recorded from a model that has no storage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weightsync.errors import LayoutError, UnknownTensorError, WeightSyncError
from weightsync.integrations.recording.recorder import Recorder
from weightsync.integrations.recording.writes import Recorded
from weightsync.ir.builder import ManifestBuilder
from weightsync.ir.manifest import Manifest
from weightsync.live.sites import KINDS

__all__ = ["Recording", "load_twin", "read_twin"]


@dataclass(frozen=True)
class Recording:
    """The layout of one rank; a `weightsync.Layout` of one rank.

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
        """The manifest of this rank. Elements that no checkpoint fills are constants.

        Args:
            rank: Its number inside its replica, for messages.

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


def load_twin(
    engine: str,
    twin: nn.Module,
    recorder: Recorder,
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
) -> None:
    """Gives every canonical tensor to the loader of a model without storage.

    Args:
        engine: Name of the engine, for messages.
        twin: The model, built on the meta device while recording.
        recorder: What watches.
        tensors: Shape and dtype of every canonical tensor.

    Raises:
        UnknownTensorError: The loader does not know a name; names it.
        LayoutError: The loader computes on weights, or cannot take a tensor.
    """
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
            f"{engine}'s {type(twin).__name__} does not load {last}: {type(error).__name__}: "
            f"{error}; the trainer's model and the engine's are not the same, or this {engine} "
            "spells it otherwise",
            extra=(last,),
            missing=(),
        ) from error
    except (RuntimeError, AssertionError, IndexError) as error:
        raise LayoutError(
            f"{engine}'s {type(twin).__name__} cannot take {last} of shape {tensors[last][0]} at "
            f"these degrees of parallelism: {type(error).__name__}: {error}",
            tensor=last,
        ) from error


def read_twin(
    twin: nn.Module,
    recorder: Recorder,
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
) -> Recording:
    """Tells what the parameters and buffers of a loaded twin hold.

    Args:
        twin: The model, after `load_twin`.
        recorder: What watched.
        tensors: As given to `load_twin`.

    Returns:
        The recording.

    Raises:
        LayoutError: What was copied into a parameter cannot be expressed; names the parameter.
    """
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
