"""What the layouts of all engines have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from weightsync.planners.rules.canonical import canonical_dtypes, canonical_tensors
from weightsync.planners.rules.engine_parts.encoded import encoded_from, with_values
from weightsync.planners.rules.engine_parts.linears import Checkpoint
from weightsync.planners.rules.layout import Block, RuleLayout, layer_blocks
from weightsync.planners.rules.parts import Parameter

__all__ = ["EngineLayout"]


@dataclass(frozen=True, slots=True)
class EngineLayout(RuleLayout):
    """One replica of an engine that holds a checkpoint, as it is or quantized.

    Args:
        vocab_padding: Rows of the embeddings are padded to a multiple of this.
        quantized: Whether the engine holds the checkpoint that `quantization_config` describes.
        encoding: Recipe that sources encode BF16 weights by; None: they hold what the engine does.
    """

    vocab_padding: int
    quantized: bool
    encoding: str | None

    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Gives the shapes of the canonical tensors; see `RuleLayout.tensors`."""
        if self.encoding is None:
            return canonical_tensors(self.config, quantized=self.quantized)
        return with_values(self.config)

    def encodings(self) -> Mapping[str, tuple[str, str, str]]:
        """Lists what sources encode; see `RuleLayout.encodings`."""
        return {} if self.encoding is None else encoded_from(self.config, self.encoding)

    def check_scales(self, ranks: Iterable[int]) -> None:
        """Refuse a quantized model with scales that some of these ranks could not hold.

        Raises:
            ConfigError: Names the tensor and what to change.
        """
        for rank in ranks if self.quantized else ():
            for _ in self.blocks(rank):
                pass

    def _checkpoint(self, engine: str) -> Checkpoint:
        dtypes = canonical_dtypes(self.config, quantized=self.quantized)
        return Checkpoint(self.config, self.tensors(), dtypes, engine)

    def _layers(
        self,
        layers: Sequence[int],
        describe: Callable[[int, str], Iterable[Parameter]],
        *,
        are_alike: bool,
    ) -> Iterator[Block]:
        """Describes the decoder layers of a rank: once where they are alike."""
        names = [f"model.layers.{number}." for number in layers]
        if are_alike:
            yield from layer_blocks(self.config, layers, names, describe)
            return
        for number, name in zip(layers, names, strict=True):
            yield Block(tuple(describe(number, name)))
