"""What all rules share: a layout writes, for one rank, what its parameters hold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from weightsync.errors import ConfigError
from weightsync.ir.builder import ManifestBuilder
from weightsync.ir.dtypes import Dtype
from weightsync.ir.manifest import Manifest, Side
from weightsync.ir.repeat import repeat_layers
from weightsync.planners.rules.canonical import canonical_tensors
from weightsync.planners.rules.config import ModelConfig
from weightsync.planners.rules.parts import Parameter, write

__all__ = ["RuleLayout", "checked_degree", "named_dtype"]


@dataclass(frozen=True, slots=True)
class RuleLayout(ABC):
    """How all ranks of a trainer or of one replica of an engine hold a model.

    Args:
        side: Which side these ranks are on.
        config: The model.
        dtype: Type of the parameters in memory that have none of their own.
        world_size: Number of ranks.
    """

    side: Side
    config: ModelConfig
    dtype: Dtype
    world_size: int

    def manifest(self, rank: int) -> Manifest:
        """Describes what one rank holds. Pure; about 10 us a tensor.

        Args:
            rank: The rank, from 0 to `world_size - 1`.

        Returns:
            A manifest of one rank, labelled with side and rank.

        Raises:
            ConfigError: There is no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise ConfigError(
                f"{self.side} rank {rank} does not exist: this layout has {self.world_size} ranks",
                rank=rank,
                side=self.side,
            )
        builder = ManifestBuilder(self.side, f"{self.side} {rank}")
        shapes, encodings = self.tensors(), self.encodings()
        groups = self.like_layers(rank)
        added = frozenset(layer for group in groups for layer in group[1:])
        write(builder, self.parameters(rank, added), shapes, self.dtype)
        for codes in builder.tensors:
            if codes in encodings:
                recipe, values, scales = encodings[codes]
                builder.tensor(values, shapes[values])
                builder.encode(recipe, values, codes, scales)
        return repeat_layers(builder.build(), groups)

    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Gives the shapes of the canonical tensors that the parameters are parts of.

        Returns:
            Shape by name: the BF16 checkpoint's, unless a layout holds quantized tensors.
        """
        return canonical_tensors(self.config)

    def encodings(self) -> Mapping[str, tuple[str, str, str]]:
        """Lists what sources may have to encode.

        Returns:
            Recipe, and the names of the values and scales, of each encoded tensor by the name of
            its codes.
        """
        return {}

    def like_layers(self, rank: int) -> Sequence[Sequence[int]]:
        """Groups the decoder layers that one rank holds alike.

        Args:
            rank: The rank.

        Returns:
            Layers whose parameters differ in the number behind `layers.` only; those that are
            missing are like no other. A manifest describes the first of each group and repeats it.
        """
        del rank
        return ()

    @abstractmethod
    def parameters(self, rank: int, without: Container[int] = ()) -> Iterable[Parameter]:
        """Lists the buffers of one rank.

        Args:
            rank: The rank.
            without: Decoder layers to leave out, of those in `like_layers`.

        Returns:
            The parameters, as the rank holds them; empty shards included.
        """


def checked_degree(name: str, value: int) -> int:
    """Checks a degree of parallelism.

    Args:
        name: Its name, for the message.
        value: The degree.

    Returns:
        The degree.

    Raises:
        ConfigError: It is no positive integer.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a positive integer, not {value!r}", key=name)
    return value


def named_dtype(name: str | Dtype) -> Dtype:
    """Reads a floating-point dtype given by name.

    Args:
        name: `BF16`, `F16` or `F32`, or such a `Dtype`.

    Returns:
        The dtype.

    Raises:
        ConfigError: It is no dtype that parameters of these models can have.
    """
    known = {dtype.name: dtype for dtype in (Dtype.BF16, Dtype.F16, Dtype.F32)}
    found = known.get(name.name if isinstance(name, Dtype) else name)
    if found is None:
        raise ConfigError(f"dtype {name!r} is none of {', '.join(known)}", dtype=str(name))
    return found
