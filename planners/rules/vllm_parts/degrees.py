"""Degrees of parallelism of one replica, and where they put a rank, its layers and its experts."""

from __future__ import annotations

from dataclasses import dataclass

from weightsync.planners.rules.config import ModelConfig

__all__ = ["ALL2ALL_BACKENDS", "Degrees", "Place"]

# What vLLM's `--all2all-backend` may be, and which of them cut the tokens of a sparse layer over
# the tensor-parallel ranks (`ParallelConfig.use_sequence_parallel_moe`): shared experts are then
# whole on every rank.
ALL2ALL_BACKENDS = {
    "allgather_reducescatter": True,
    "deepep_high_throughput": True,
    "deepep_low_latency": True,
    "deepep_v2": True,
    "flashinfer_nvlink_one_sided": True,
    "passthrough": True,
    "mori_high_throughput": True,
    "mori_low_latency": True,
    "nixl_ep": True,
    "flashinfer_all2allv": False,
    "flashinfer_nvlink_two_sided": False,
    "naive": False,
    "pplx": False,
}
# Those that have the tables of a round-robin placement.
_ROUND_ROBIN = ("deepep_low_latency", "nixl_ep")


@dataclass(frozen=True, slots=True)
class Degrees:
    """How one replica is cut: ranks are numbered `(dp * PP + pp) * TP + tp`.

    Args:
        tp: Tensor-parallel ranks.
        pp: Pipeline stages.
        dp: Data-parallel ranks of attention; together with tensor parallelism they share experts.
        is_ep: Whether experts are placed whole.
        placement: `linear` or `round_robin`, as asked for.
        num_redundant: Copies of experts beyond the first, for balance.
        all2all: Name of the all-to-all backend.
        expert_map: The logical expert in each physical slot of all ranks, for every sparse layer
            from the first on, once the balancer has moved them; empty: where vLLM starts.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    is_ep: bool = False
    placement: str = "linear"
    num_redundant: int = 0
    all2all: str = "allgather_reducescatter"
    expert_map: tuple[tuple[int, ...], ...] = ()

    @property
    def world_size(self) -> int:
        """Ranks of the replica."""
        return self.dp * self.pp * self.tp

    @property
    def moe_ranks(self) -> int:
        """Ranks that share the experts of a layer: vLLM flattens both degrees."""
        return self.dp * self.tp

    @property
    def shares_whole(self) -> bool:
        """Whether shared experts are whole on every rank, where the model heeds it."""
        is_cut = ALL2ALL_BACKENDS[self.all2all]
        return is_cut and self.is_ep and self.tp > 1 and self.dp > 1

    def place(self, config: ModelConfig, rank: int) -> Place:
        """Finds a rank.

        Args:
            config: The model.
            rank: Its number, from 0 to `world_size - 1`.

        Returns:
            Its place.
        """
        outer, tp_rank = divmod(rank, self.tp)
        dp_rank, pp_rank = divmod(outer, self.pp)
        moe_rank = dp_rank * self.tp + tp_rank
        return Place(
            tp_rank=tp_rank,
            moe_rank=moe_rank,
            layers=self._layers(config.num_layers, pp_rank),
            is_first=pp_rank == 0,
            is_last=pp_rank == self.pp - 1,
            experts=self.experts(config, moe_rank),
            moved=tuple(self.experts(config, moe_rank, row) for row in self.expert_map),
        )

    def _layers(self, num_layers: int, pp_rank: int) -> range:
        """Layers of a stage: what is left over goes to the stages from the last but one down."""
        share, rest = divmod(num_layers, self.pp)
        sizes = [share] * self.pp
        for i in range(2, rest + 2):
            sizes[-i] += 1
        start = sum(sizes[:pp_rank])
        return range(start, start + sizes[pp_rank])

    def experts(
        self, config: ModelConfig, moe_rank: int, row: tuple[int, ...] = ()
    ) -> tuple[int, ...]:
        """Lists the experts that one of `moe_ranks` holds.

        Args:
            config: The model.
            moe_rank: Number of the rank among those that share experts.
            row: Of `expert_map`; empty: vLLM's initial placement.

        Returns:
            The logical expert in each slot.
        """
        if not self.is_ep:
            return tuple(range(config.num_experts))
        num_slots = config.num_experts + self.num_redundant
        base, rest = divmod(num_slots, self.moe_ranks)
        count = base + (moe_rank < rest)  # the first `rest` ranks hold one more
        if self._is_round_robin(config):
            physical = range(moe_rank, num_slots, self.moe_ranks)
        else:
            first = moe_rank * base + min(moe_rank, rest)
            physical = range(first, first + count)
        # Physical experts are the logical ones, then the redundant ones, from expert 0 on.
        return tuple(row[slot] if row else slot % config.num_experts for slot in physical)

    def _is_round_robin(self, config: ModelConfig) -> bool:
        """Whether vLLM heeds a round-robin placement; else it falls back to the linear one."""
        if self.placement != "round_robin" or config.num_expert_groups <= 1 or self.num_redundant:
            return False
        return self.dp == 1 or self.all2all in _ROUND_ROBIN


@dataclass(frozen=True, slots=True)
class Place:
    """Where one rank stands.

    Args:
        tp_rank: Its number among the tensor-parallel ranks.
        moe_rank: Its number among the ranks that share experts.
        layers: Its decoder layers.
        is_first: Whether it holds the embedding.
        is_last: Whether it holds the last norm and the head.
        experts: The expert in each of its slots, where vLLM starts.
        moved: The same of every sparse layer from the first on, after the balancer moved them;
            empty if it did not.
    """

    tp_rank: int
    moe_rank: int
    layers: range
    is_first: bool
    is_last: bool
    experts: tuple[int, ...]
    moved: tuple[tuple[int, ...], ...] = ()

    def experts_of(self, sparse_layer: int) -> tuple[int, ...]:
        """The expert in each slot of a layer; layers with experts are counted from 0."""
        return self.moved[sparse_layer] if self.moved else self.experts
