"""The jobs that the scale model runs: layouts of the field with a small model, sized to a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final

from weightsync.errors import ConfigError
from weightsync.fleet.fleet import JobSpec
from weightsync.ir.plan import Plan, PlanOptions
from weightsync.planners.cluster import Cluster
from weightsync.planners.limits import limits_of
from weightsync.planners.traffic import traffic_of
from weightsync.units import KIB, MIB

__all__ = ["LAYOUTS", "Counts", "ScaleLayout", "limit_s", "plan_options", "sized"]

_STEP: Final = 64  # widths are multiples of it: every degree here divides them

_MOE: Final[dict[str, Any]] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "tie_word_embeddings": False,
}
_DENSE: Final[dict[str, Any]] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 8192,
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": False,
}


@dataclasses.dataclass(frozen=True)
class Counts:
    """How many ranks there are.

    Attributes:
        sources: Trainer ranks.
        sinks: Rollout ranks of all replicas.
        replicas: Must divide `sinks`.

    Raises:
        ConfigError: Numbers that do not fit together.
    """

    sources: int
    sinks: int
    replicas: int

    def __post_init__(self) -> None:
        if min(self.sources, self.sinks, self.replicas) < 1 or self.sinks % self.replicas:
            raise ConfigError(
                f"{self.sources} sources, {self.sinks} sinks, {self.replicas} replicas: numbers "
                "above 0, replicas a divisor of sinks"
            )

    @property
    def ranks(self) -> int:
        """Of one replica."""
        return self.sinks // self.replicas


@dataclasses.dataclass(frozen=True)
class ScaleLayout:
    """A way in which both sides hold a model.

    Attributes:
        name: To choose it by.
        what: For people.
        make: Gives the job, from the counts and a width of the model.
    """

    name: str
    what: str
    make: Callable[[Counts, int, PlanOptions], JobSpec]


def _job(
    counts: Counts,
    options: PlanOptions,
    model: Mapping[str, Any],
    source: tuple[str, Mapping[str, Any]],
    sink: Mapping[str, Any],
    *,
    sources: int | None = None,
    replicas: int | None = None,
    ranks: int | None = None,
) -> JobSpec:
    rule, degrees = source
    return JobSpec(
        source={"rule": rule, "model": model, "degrees": degrees},
        sink={"rule": "vllm", "model": model, "degrees": sink},
        sources=counts.sources if sources is None else sources,
        replicas=counts.replicas if replicas is None else replicas,
        ranks=counts.ranks if ranks is None else ranks,
        options=options,
    )


def _fsdp(num: int, replicate: int = 1) -> tuple[str, dict[str, Any]]:
    return "fsdp2", {"fsdp": num // replicate, "replicate": replicate, "dtype": "BF16"}


def _moe(width: int) -> dict[str, Any]:
    return {**_MOE, "moe_intermediate_size": width}


def _dense(width: int) -> dict[str, Any]:
    return {**_DENSE, "intermediate_size": width}


def _paper(c: Counts, width: int, options: PlanOptions) -> JobSpec:
    return _job(c, options, _moe(width), _fsdp(c.sources), {"tp": c.ranks, "ep": True})


def _moe_tp(c: Counts, width: int, options: PlanOptions) -> JobSpec:
    return _job(c, options, _moe(width), _fsdp(c.sources), {"tp": c.ranks})


def _moe_dp(c: Counts, width: int, options: PlanOptions) -> JobSpec:
    return _job(c, options, _moe(width), _fsdp(c.sources), {"dp": c.ranks, "ep": True})


def _dense_dp(c: Counts, width: int, options: PlanOptions) -> JobSpec:
    return _job(c, options, _dense(width), _fsdp(c.sources), {"dp": c.ranks})


def _hsdp(c: Counts, width: int, options: PlanOptions) -> JobSpec:
    copies = 2 if c.sources % 2 == 0 else 1
    return _job(c, options, _moe(width), _fsdp(c.sources, copies), {"tp": c.ranks, "ep": True})


def _dense_tp(c: Counts, width: int, options: PlanOptions) -> JobSpec:
    return _job(c, options, _dense(width), _fsdp(c.sources), {"tp": c.ranks})


def _one_replica(c: Counts, width: int, options: PlanOptions) -> JobSpec:
    tp = c.sinks
    return _job(c, options, _dense(width), _fsdp(c.sources), {"tp": tp}, replicas=1, ranks=tp)


def _whole(c: Counts, width: int, options: PlanOptions) -> JobSpec:
    return _job(c, options, _dense(width), _fsdp(c.sources), {"tp": 1}, replicas=c.sinks, ranks=1)


def _few_sources(c: Counts, width: int, options: PlanOptions) -> JobSpec:
    num = max(1, c.sources // 4)
    return _job(c, options, _moe(width), _fsdp(num), {"tp": c.ranks, "ep": True}, sources=num)


def _engine(c: Counts, width: int, options: PlanOptions) -> JobSpec:
    source = ("vllm", {"tp": min(8, c.sources)})
    return _job(c, options, _dense(width), source, {"tp": c.ranks}, sources=min(8, c.sources))


LAYOUTS: Final = {
    layout.name: layout
    for layout in (
        ScaleLayout("paper", "MoE, FSDP -> attention cut, experts whole (TP x EP)", _paper),
        ScaleLayout("moe_tp", "MoE, FSDP -> every expert cut (TP)", _moe_tp),
        ScaleLayout("moe_dp", "MoE, FSDP -> attention whole on each rank (DP x EP)", _moe_dp),
        ScaleLayout("hsdp", "MoE, two copies of the sources (HSDP) -> TP x EP", _hsdp),
        ScaleLayout("dense_tp", "dense, FSDP -> TP", _dense_tp),
        ScaleLayout("dense_dp", "dense, whole on each rank of a replica (DP)", _dense_dp),
        ScaleLayout("one_replica", "dense, FSDP -> one replica over all sinks", _one_replica),
        ScaleLayout("whole", "dense, FSDP -> every sink a replica", _whole),
        ScaleLayout("few_sources", "MoE, a quarter of the sources (sources limit)", _few_sources),
        ScaleLayout("engine", "dense, an engine's TP layout publishes", _engine),
    )
}


def limit_s(plan: Plan, cluster: Cluster) -> float:
    """Return the physical limit of a plan, as `weightsync plan` does."""
    return limits_of(traffic_of(plan, cluster.gpus_per_node), cluster).physical_limit_s


def sized(
    layout: ScaleLayout, counts: Counts, seconds: float, cluster: Cluster, options: PlanOptions
) -> tuple[JobSpec, Plan]:
    """Return the job whose physical limit is `seconds` or little more, and its plan.

    Raises:
        ConfigError: Even the smallest model takes longer.
    """
    base = _STEP
    plan = layout.make(counts, base, options).plan()
    first = limit_s(plan, cluster)
    if first > 1.1 * seconds:
        raise ConfigError(
            f"layout {layout.name}: the smallest model takes {first:.1f} s, more than {seconds:g}; "
            "choose more seconds or a faster link"
        )
    each = (limit_s(layout.make(counts, 2 * base, options).plan(), cluster) - first) / base
    width = base + max(0, -(-int((seconds - first) / each) // _STEP) * _STEP)
    for _ in range(64):
        spec = layout.make(counts, width, options)
        plan = spec.plan()
        if limit_s(plan, cluster) >= seconds:
            return spec, plan
        width += _STEP
    raise ConfigError(f"layout {layout.name}: no model takes {seconds:g} s; choose fewer seconds")


def plan_options(ranks_per_node: int = 1) -> PlanOptions:
    """Return the budgets of the scale model.

    Args:
        ranks_per_node: More than 1: what the sinks of a node share crosses the network once.

    A rank of the cluster that is modelled receives 33 GB in buckets of 32 MiB, one of 1000,
    in writes of 4 MiB. Here it is one of 100, in writes of 64 KiB: fewer buckets, since 24 ranks
    share two cores, but no fewer writes for a queue of a slow link to hold.
    """
    return PlanOptions(
        bucket_bytes=MIB,
        slot_bytes=MIB,
        chunk_bytes=64 * KIB,
        ranks_per_node=ranks_per_node,
        node_dedup="on",  # without effect where nodes have one rank
    )
