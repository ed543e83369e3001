"""Degrees of parallelism of one SGLang server, and where they put a rank and its experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from weightsync.planners.rules.config import ModelConfig

__all__ = ["A2A_BACKENDS", "Cut", "Degrees", "Place"]

# What `--moe-a2a-backend` may be here. Every backend but none spans all ranks of a stage with
# experts and, in DeepSeek-V3, Kimi-K2 and GLM, keeps shared experts whole on every rank.
A2A_BACKENDS = ("none", "deepep", "mooncake", "nixl", "mori", "flashinfer")


class Cut(NamedTuple):
    """Into how many parts something is cut, and which one a rank holds."""

    size: int
    rank: int


WHOLE = Cut(1, 0)


@dataclass(frozen=True, slots=True)
class Degrees:
    """How one server is cut: ranks are numbered `(dp * PP + pp) * TP + tp`.

    Args:
        tp: Tensor-parallel ranks; with attention data parallelism, and expert parallelism, these
            are shared out further.
        pp: Pipeline stages.
        dp: Replicas of everything, each with ranks of its own.
        attention_dp: Groups of the `tp` ranks that each have all of attention.
        ep: Groups of the `tp` ranks that each have some of the experts, whole or cut.
        is_dense_whole: Whether dense MLPs are whole on every rank (`--moe-dense-tp-size 1`).
        is_head_in_group: Whether the head is cut over the ranks of an attention group only.
        num_redundant: Copies of experts beyond the first, for balance.
        a2a: Name of the all-to-all backend.
        expert_map: The logical expert in each physical slot of all ranks, for every decoder layer,
            once the balancer has moved them; empty: where SGLang starts.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    attention_dp: int = 1
    ep: int = 1
    is_dense_whole: bool = False
    is_head_in_group: bool = False
    num_redundant: int = 0
    a2a: str = "none"
    expert_map: tuple[tuple[int, ...], ...] = ()

    @property
    def world_size(self) -> int:
        """Ranks of the server."""
        return self.dp * self.pp * self.tp

    @property
    def attention_tp(self) -> int:
        """Ranks that share the heads of a layer."""
        return self.tp // self.attention_dp

    @property
    def expert_tp(self) -> int:
        """Ranks that share one expert."""
        return self.tp // self.ep

    def place(self, config: ModelConfig, rank: int) -> Place:
        """Finds a rank.

        Args:
            config: The model.
            rank: Its number, from 0 to `world_size - 1`.

        Returns:
            Its place.
        """
        stage, tp_rank = divmod(rank % (self.pp * self.tp), self.tp)
        ep_rank, expert_rank = divmod(tp_rank, self.expert_tp)
        tp = Cut(self.tp, tp_rank)
        attention = Cut(self.attention_tp, tp_rank % self.attention_tp)
        return Place(
            tp=tp,
            attention=attention,
            dense=WHOLE if self.is_dense_whole else tp,
            shared=tp if self.a2a == "none" else WHOLE,
            expert=Cut(self.expert_tp, expert_rank),
            head=attention if self.is_head_in_group else tp,
            ep_rank=ep_rank,
            layers=self._layers(config.num_layers, stage),
            is_first=stage == 0,
            is_last=stage == self.pp - 1,
        )

    def _layers(self, num_layers: int, stage: int) -> range:
        """Layers of a stage: the last ones have one more each where they do not divide."""
        share, rest = divmod(num_layers, self.pp)
        num_short = self.pp - rest
        start = stage * share + max(0, stage - num_short)
        return range(start, start + share + (stage >= num_short))

    def experts(self, config: ModelConfig, ep_rank: int, layer: int) -> tuple[int, ...]:
        """Lists the experts that one of `ep` groups holds.

        Args:
            config: The model.
            ep_rank: Number of the group.
            layer: Number of the decoder layer.

        Returns:
            The logical expert in each slot.
        """
        count = (config.num_experts + self.num_redundant) // self.ep
        slots = range(ep_rank * count, (ep_rank + 1) * count)
        if self.expert_map:
            return tuple(self.expert_map[layer][slot] for slot in slots)
        # Physical experts are the logical ones, then the redundant ones, from expert 0 on.
        return tuple(slot % config.num_experts for slot in slots)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one rank stands.

    Args:
        tp: Its part of what all tensor-parallel ranks share.
        attention: Its part of the heads.
        dense: Its part of dense MLPs.
        shared: Its part of shared experts.
        expert: Its part of every routed expert that its group holds.
        head: Its part of the head.
        ep_rank: Its group of experts.
        layers: Its decoder layers.
        is_first: Whether it holds the embedding.
        is_last: Whether it holds the last norm.
    """

    tp: Cut
    attention: Cut
    dense: Cut
    shared: Cut
    expert: Cut
    head: Cut
    ep_rank: int
    layers: range
    is_first: bool
    is_last: bool
