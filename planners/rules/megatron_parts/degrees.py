"""Degrees of parallelism of Megatron-Core, where they put a rank, and which layers a stage has."""

from __future__ import annotations

import re
from dataclasses import dataclass

from weightsync.errors import ConfigError

__all__ = ["Chunk", "Degrees", "Place", "Stages"]


@dataclass(frozen=True, slots=True)
class Degrees:
    """How a model is cut: ranks are numbered in the order `tp-cp-ep-dp-pp`, `tp` fastest.

    Experts have an order of their own on the ranks of a stage: `etp` fastest, then `ep`, then
    copies (`RankGenerator` in megatron/core/parallel_state.py).

    Args:
        tp: Tensor-parallel ranks.
        cp: Context-parallel ranks; they hold the same parameters.
        dp: Data-parallel ranks; they hold the same parameters but for experts.
        pp: Pipeline stages.
        vpp: Chunks of the model on every stage.
        ep: Ranks that share the experts of a layer whole.
        etp: Ranks that cut an expert.
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def stage_size(self) -> int:
        """Ranks of a pipeline stage."""
        return self.tp * self.cp * self.dp

    def place(self, rank: int) -> Place:
        """Finds a rank.

        Args:
            rank: Its number, from 0 on.

        Returns:
            Its place.
        """
        pp_rank, inside = divmod(rank, self.stage_size)
        outer, etp_rank = divmod(inside, self.etp)
        return Place(inside % self.tp, pp_rank, outer % self.ep, etp_rank)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one rank stands: its number among the tensor-parallel ranks, and so on."""

    tp_rank: int
    pp_rank: int
    ep_rank: int
    etp_rank: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one stage has of one virtual pipeline.

    Args:
        layers: Its decoder layers.
        has_embedding: Whether it has the embedding.
        has_norm: Whether it has the last norm.
        has_head: Whether it has the head.
    """

    layers: range
    has_embedding: bool
    has_norm: bool
    has_head: bool


@dataclass(frozen=True, slots=True)
class Stages:
    """How layers are dealt out to pipeline stages; the names are Megatron's.

    Args:
        first: `num_layers_in_first_pipeline_stage`, all its chunks together; None: as others.
        last: `num_layers_in_last_pipeline_stage`.
        embedding: `account_for_embedding_in_pipeline_split`: it counts as a layer.
        loss: `account_for_loss_in_pipeline_split`: the head counts as a layer.
        layout: `pipeline_model_parallel_layout`, such as `Ett|(tt|)*2ttL`; replaces the others.
    """

    first: int | None = None
    last: int | None = None
    embedding: bool = False
    loss: bool = False
    layout: str | None = None

    def chunks(self, num_layers: int, pp: int, vpp: int) -> tuple[tuple[Chunk, ...], ...]:
        """Deals out the layers (`get_num_layers_to_build`, `get_transformer_layer_offset`).

        Args:
            num_layers: Decoder layers of the model.
            pp: Pipeline stages.
            vpp: Chunks of every stage.

        Returns:
            The chunks of each stage. Layers go around the stages once for every chunk.

        Raises:
            ConfigError: Megatron would refuse this.
        """
        stages = self._drawn(num_layers, pp, vpp) if self.layout is not None else None
        if stages is None:
            counts = [count for _ in range(vpp) for count in self._counts(num_layers, pp, vpp)]
            counts[0] -= self.embedding
            counts[-1] -= self.loss
            if min(counts) < 0:
                raise ConfigError(
                    f"megatron: {num_layers} layers leave none to a chunk that embedding or loss "
                    f"is in, with pp={pp} and vpp={vpp}",
                    key="pp",
                )
            stages = ["t" * count for count in counts]
            stages[0] = "E" + stages[0]
            stages[-1] += "L"
        # With layers of multi-token prediction the norm goes with the last layer before them.
        has_mtp = any("m" in stage for stage in stages)
        norm = max(n for n, stage in enumerate(stages) if ("t" if has_mtp else "L") in stage)
        made, first = [], 0
        for number, stage in enumerate(stages):
            layers = range(first, first + stage.count("t"))
            first = layers.stop
            # Those layers need the embedding once more.
            made.append(Chunk(layers, bool({"E", "m"} & set(stage)), number == norm, "L" in stage))
        return tuple(tuple(made[stage::pp]) for stage in range(pp))

    def _counts(self, num_layers: int, pp: int, vpp: int) -> list[int]:
        """Layers of one chunk of every stage, embedding and loss included where they count."""
        rest = num_layers + self.embedding + self.loss
        given = {"first_layers": self.first, "last_layers": self.last}
        if any(count is not None for count in given.values()) and (self.embedding or self.loss):
            raise ConfigError(
                "megatron: first_layers and last_layers cannot be combined with "
                "account_for_embedding and account_for_loss",
                key="first_layers",
            )
        middle = pp
        for key, count in given.items():
            if count is None:
                continue
            middle -= 1
            rest -= count
            if count < 1 or count % vpp or pp == 1:
                raise ConfigError(
                    f"megatron: {key}={count} must be a positive multiple of vpp={vpp}, with more "
                    "than one stage",
                    key=key,
                )
        share = rest // middle if middle else 0
        is_even = share * middle == rest and share % vpp == 0
        if middle < pp:
            # No stage in between may be empty; where there is none, Megatron divides chunks by 0.
            is_even = is_even and (share > 0 if middle else vpp == 1)
        if not is_even:
            raise ConfigError(
                f"megatron: {middle} stages of {vpp} chunks do not divide {rest} layers"
                + ("" if self.first is self.last is None else " that first and last stage leave")
                + "; use first_layers and last_layers, or pipeline_layout",
                key="pp" if vpp == 1 else "vpp",
            )
        counts = [share] * pp
        counts[0] = share if self.first is None else self.first
        counts[-1] = share if self.last is None else self.last
        return [count // vpp for count in counts]

    def _drawn(self, num_layers: int, pp: int, vpp: int) -> list[str]:
        """The stages of a layout that is written down (`parse_str_to_list`)."""
        text = layout = self.layout or ""
        text = re.sub(r"\(([^)]+)\)\*(\d+)", lambda m: m[1] * int(m[2]), text.replace(",", ""))
        text = re.sub(r"(.)\*(\d+)", lambda m: m[1] * int(m[2]), text)
        stages = text.split("|")
        flat = text.replace("|", "")
        problem = None
        if self.first or self.last or self.embedding or self.loss:
            problem = "it cannot be combined with other settings of the pipeline"
        elif not re.fullmatch(r"Et*m*L", flat):
            problem = "it must be E, layers t, perhaps m, and L, with | between stages"
        elif flat.count("t") != num_layers:
            problem = f"it has {flat.count('t')} layers, the model {num_layers}"
        elif len(stages) != pp * vpp:
            problem = f"it has {len(stages)} stages, pp={pp} and vpp={vpp} make {pp * vpp}"
        if problem is not None:
            raise ConfigError(
                f"megatron: pipeline_layout {layout!r}: {problem}", key="pipeline_layout"
            )
        return stages
