"""Linear layers: fused rows or columns of checkpoint tensors, with biases and block scales."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from weightsync.errors import ConfigError
from weightsync.ir.dtypes import Dtype
from weightsync.planners.rules.config import ModelConfig
from weightsync.planners.rules.parts import Parameter, columns, rows, stacked, whole

__all__ = ["SCALE", "Checkpoint", "Rows"]

SCALE = ".weight_scale_inv"


class Rows(NamedTuple):
    """Rows `start ... start + size - 1` of a Linear of the checkpoint."""

    source: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The canonical tensors that an engine's parameters are parts of.

    Args:
        config: The model.
        shapes: Shape by name.
        dtypes: Dtype by name, where it is not the model's.
        engine: Name of the engine, for messages.
    """

    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, Dtype]
    engine: str

    def whole(self, tensor: str, name: str | None = None, dtype: Dtype | None = None) -> Parameter:
        """A parameter that is one tensor.

        Args:
            tensor: Canonical name.
            name: Name of the parameter; None: the tensor's.
            dtype: Dtype of the parameter; None: the tensor's.
        """
        own = self.dtypes.get(tensor) if dtype is None else dtype
        return whole(tensor if name is None else name, tensor, self.shapes[tensor], own)

    def is_block_scaled(self, name: str, sources: Iterable[str]) -> bool:
        """Whether Linears of the checkpoint are in blocks of FP8.

        Args:
            name: Name of the module that holds them all, for the message.
            sources: Their names.

        Raises:
            ConfigError: Some are and some are not; engines refuse this as well.
        """
        found = {source + SCALE in self.shapes: source for source in sources}
        if len(found) > 1:
            raise ConfigError(
                f"{self.engine.lower()}: {name} would hold {found[True]}, which is in blocks of "
                f"FP8, beside {found[False]}, which is not; list all or none of them in "
                "modules_to_not_convert",
                key="quantization_config",
                tensor=name,
            )
        return True in found

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block of FP8."""
        assert self.config.weight_block_size is not None
        return self.config.weight_block_size

    def fused(
        self, name: str, slices: Sequence[Rows], *, bias: bool = False
    ) -> Iterator[Parameter]:
        """A Linear cut along its output: rows of several of the checkpoint, on top of each other.

        Args:
            name: Name of the module.
            slices: What it holds, top first.
            bias: Whether it has a bias, cut alike.

        Yields:
            Its parameters.

        Raises:
            ConfigError: Slices do not begin and end between blocks of FP8, or some have no blocks.
        """
        is_scaled = self.is_block_scaled(name, (part.source for part in slices))
        kinds = [".weight", *([SCALE] if is_scaled else []), *([".bias"] if bias else [])]
        if is_scaled:
            self._check_rows(name, slices)
        height = self.block[0] if is_scaled else 1
        for kind in kinds:
            per_row = height if kind == SCALE else 1
            parts = [
                rows(
                    part.source + kind,
                    self.shapes[part.source + kind],
                    part.start // per_row,
                    -(-part.size // per_row),
                )
                for part in slices
            ]
            made = stacked(name + kind, parts)
            dtype = self.dtypes.get(slices[0].source + kind)
            yield Parameter(made.name, made.shape, made.parts, dtype=dtype)

    def cut_columns(
        self, name: str, source: str, start: int, count: int, *, bias: bool = False
    ) -> Iterator[Parameter]:
        """A Linear cut along its input: the same columns of every row.

        Args:
            name: Name of the module.
            source: Name of the Linear of the checkpoint.
            start: First column.
            count: Number of columns.
            bias: Whether it has a bias; every rank holds it whole, the first one adds it.

        Yields:
            Its parameters.

        Raises:
            ConfigError: The columns do not begin and end between blocks of FP8.
        """
        is_scaled = self.is_block_scaled(name, [source])
        shape = self.shapes[source + ".weight"]
        if is_scaled and count < shape[1] and count % self.block[1]:
            raise self._misfit(name, f"{count} columns", self.block[1])
        for kind in (".weight", SCALE) if is_scaled else (".weight",):
            per_column = self.block[1] if kind == SCALE else 1
            part = columns(
                source + kind,
                self.shapes[source + kind],
                start // per_column,
                -(-count // per_column),
            )
            made = stacked(name + kind, [part])
            yield Parameter(made.name, made.shape, made.parts, dtype=self.dtypes.get(source + kind))
        if bias:
            yield self.whole(source + ".bias", name + ".bias")

    def _check_rows(self, name: str, slices: Sequence[Rows]) -> None:
        height = self.block[0]
        for number, part in enumerate(slices):
            is_whole = part.size == self.shapes[part.source + ".weight"][0]
            if part.size % height and not (is_whole and number == len(slices) - 1):
                raise self._misfit(name, f"{part.size} rows of {part.source}", height)

    def _misfit(self, name: str, what: str, block: int) -> ConfigError:
        return ConfigError(
            f"{self.engine.lower()}: {name} would hold {what} on a rank, which is no multiple of "
            f"the {block} that share a scale; {self.engine} refuses this or misplaces scales: use "
            "a smaller tp",
            key="tp",
            tensor=name,
        )
