"""What all rules share: a layout writes, for one rank, what its parameters hold."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from weightsync.errors import ConfigError
from weightsync.ir.builder import ManifestBuilder
from weightsync.ir.dtypes import Dtype
from weightsync.ir.manifest import Manifest, Side
from weightsync.ir.repeat import repeat_blocks
from weightsync.planners.rules.canonical import canonical_tensors
from weightsync.planners.rules.config import ModelConfig
from weightsync.planners.rules.parts import Parameter, write

__all__ = ["Block", "RuleLayout", "checked_degree", "layer_blocks", "named_dtype"]

Prefixes = tuple[str, str]


class Block(NamedTuple):
    """Parameters of one rank, and where the rank holds the like of them again.

    Args:
        parameters: The parameters.
        prefixes: How the names of their tensors begin, and their own names.
        copies: The prefixes of the copies: a layer like this one is the same under other names.
    """

    parameters: Sequence[Parameter]
    prefixes: Prefixes = ("", "")
    copies: Sequence[Prefixes] = ()

    def unrolled(self) -> Iterator[Parameter]:
        """Lists the parameters and those of all copies."""
        yield from self.parameters
        (tensor, name) = (len(prefix) for prefix in self.prefixes)
        for to_tensor, to_name in self.copies:
            for parameter in self.parameters:
                parts = (replace(p, tensor=to_tensor + p.tensor[tensor:]) for p in parameter.parts)
                yield replace(parameter, name=to_name + parameter.name[name:], parts=tuple(parts))


@dataclass(frozen=True, slots=True)
class RuleLayout(ABC):
    """How all ranks of a trainer or of one replica of an engine hold a model.

    A layout says so by `parameters`, or by `blocks`, which is faster where layers are alike.

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
        """Describes what one rank holds. Pure; about 10 us a tensor, less where layers are alike.

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
        repeated = []
        for block in self.blocks(rank):
            write(builder, block.parameters, shapes, self.dtype)
            if block.copies:
                repeated.append((block.prefixes, [block.prefixes, *block.copies]))
        for codes in builder.tensors:
            if codes in encodings:
                recipe, values, scales = encodings[codes]
                builder.tensor(values, shapes[values])
                builder.encode(recipe, values, codes, scales)
        return repeat_blocks(builder.build(), repeated)

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

    def parameters(self, rank: int) -> Iterable[Parameter]:
        """Lists the buffers of one rank.

        Args:
            rank: The rank.

        Returns:
            The parameters, as the rank holds them; empty shards included.
        """
        return (parameter for block in self.blocks(rank) for parameter in block.unrolled())

    def blocks(self, rank: int) -> Iterable[Block]:
        """Lists the buffers of one rank, layers that are alike only once.

        Args:
            rank: The rank.

        Returns:
            What together is `parameters(rank)`.
        """
        return [Block(tuple(self.parameters(rank)))]


def layer_blocks(
    config: ModelConfig,
    layers: Sequence[int],
    names: Sequence[str],
    describe: Callable[[int, str], Iterable[Parameter]],
) -> Iterator[Block]:
    """Describes layers: those with experts once, and those without once.

    Args:
        config: The model.
        layers: Their numbers in the checkpoint.
        names: How the names of each layer's parameters begin.
        describe: Gives the parameters of a layer by its number and that beginning.

    Yields:
        A block for each of the two kinds that is there.
    """
    for is_sparse in (False, True):
        held = [
            (layer, (f"model.layers.{layer}.", name))
            for layer, name in zip(layers, names, strict=True)
            if config.is_sparse(layer) is is_sparse
        ]
        if held:
            [(layer, prefixes), *copies] = held
            parameters = tuple(describe(layer, prefixes[1]))
            yield Block(parameters, prefixes, [copy for _, copy in copies])


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
