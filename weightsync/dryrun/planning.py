"""`weightsync.plan`: plan offline, prove the cover, work out limits, memory and prediction."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from weightsync.dryrun.report import Memory, Mode, PlanReport
from weightsync.dryrun.sides import SizedLayout, describe, manifest_of
from weightsync.errors import ConfigError
from weightsync.ir import Manifest, Plan, PlanOptions
from weightsync.ir.plan import HopRule
from weightsync.planners.cluster import Cluster, Quality, Rate
from weightsync.planners.limits import limits_of
from weightsync.planners.planner import plan_transfer
from weightsync.planners.predict import Prediction, predict
from weightsync.planners.protocol import MAX_GATEWAYS
from weightsync.planners.rules import ConfigLike, ModelConfig, canonical_tensors, model_config
from weightsync.planners.traffic import BucketWork, bucket_work, traffic_of
from weightsync.units import GB

__all__ = ["HOP_KEYS", "DryRun", "plan", "read_cluster", "read_model", "with_hops"]

HOP_KEYS: Final = ("node_dedup", "relays")
"""Keys of the group rollout that are options of the plan."""

_QUALITIES: Final[tuple[Quality, Quality]] = ("nominal", "attainable")

# A second prediction for the share of fixed costs: below a second up to here.
_MAX_FIXED_BUCKETS: Final = 20_000
_MOST_RATIO: Final = 1e3  # more is as good
_FREE: Final = 1e6  # how many times faster than a cluster one is whose bytes cost nothing

# What is counted for each pair of ranks takes some GiB there.
_MAX_RANKS: Final = 1 << 15
_MAX_PAIRS: Final = 1 << 26


def plan(
    *,
    model: ConfigLike,
    trainer: SizedLayout,
    rollout: SizedLayout,
    cluster: Cluster | Mapping[str, Any] | str | Path = "h100_cx7",
    replicas: int = 1,
    options: PlanOptions | None = None,
    node_dedup: HopRule = "auto",
    relays: HopRule = "auto",
    mode: Mode = "staged",
    is_offloaded: bool = False,
    staging_bytes: int | None = None,
    gateways: int | None = None,
) -> PlanReport:
    """Plan a transfer that nobody started: the same plan as a job with these layouts makes.

    Args:
        model: Name of a preset, such as `kimi_k2`, or whatever describes a model: a `config.json`,
            its folder or content. Both layouts must be of it.
        trainer: Layout of the sources, such as `rules.fsdp2(config, fsdp=8)`.
        rollout: Layout of one replica, such as `rules.vllm(config, tp=8)`.
        cluster: Name of a preset, a file like those of `configs/cluster`, its content, or a
            `Cluster`.
        replicas: How many equal replicas there are.
        options: Budgets; None takes those of jobs.
        node_dedup: Whether what the sinks of a node store alike crosses the network once: auto, on
            or off. Where nodes are, the cluster says.
        relays: Whether equal replicas pass on to each other.
        mode: Whether versions land beside the live weights or in them.
        is_offloaded: The sources' weights are in host memory.
        staging_bytes: Budget of each source; None takes eight of its largest buckets.
        gateways: As in `Job.start`; None takes as many as so many ranks do well with.

    Returns:
        The report; nothing in it was measured but `plan_seconds`.

    Raises:
        ConfigError: Something that describes no model, cluster or number of replicas.
        LayoutError: The two sides do not fit together; names tensor, piece and rank.
        PlanBudgetError: The plan does not fit the options, or a bucket the staging.

    Cost: that of the layouts' manifests, then some microseconds a row; no I/O, no torch.
    """
    config, name = read_model(model)
    where = read_cluster(cluster)
    chosen = PlanOptions() if options is None else options
    for side, layout in (("trainer", trainer), ("rollout", rollout)):
        _check_layout(side, layout, config)
    return DryRun(
        model=name,
        trainer=trainer,
        rollout=rollout,
        cluster=where,
        replicas=replicas,
        options=with_hops(chosen, where, node_dedup, relays),
        mode=mode,
        is_offloaded=is_offloaded,
        staging_bytes=staging_bytes,
        gateways=gateways,
        trainer_keys=describe(trainer),
        rollout_keys=describe(rollout),
    ).run()


def with_hops(
    options: PlanOptions, cluster: Cluster, node_dedup: HopRule = "auto", relays: HopRule = "auto"
) -> PlanOptions:
    """Return options that let sinks pass on as fits a cluster.

    Args:
        options: The others.
        cluster: Says where nodes are, and how much faster than its NIC a sink receives inside one.
        node_dedup: Whether what a node shares crosses the network once.
        relays: Whether replicas pass on to each other. Where NICs cannot send and receive at once,
            the formulas of `weightsync.planners.sharing` do not hold, and "auto" relays nothing.

    Raises:
        ConfigError: No such rule.
    """
    port = cluster.port_bytes_per_s("attainable") * cluster.ports_per_node / cluster.gpus_per_node
    if relays == "auto" and not cluster.is_full_duplex:
        relays = "off"
    return dataclasses.replace(
        options,
        ranks_per_node=cluster.gpus_per_node,
        node_dedup=node_dedup,
        relays=relays,
        node_link_ratio=min(cluster.nvlink_gb_per_s.of("attainable") * GB / port, _MOST_RATIO),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DryRun:
    """Everything that a dry run needs, read and checked; arguments as in `plan`.

    Attributes:
        trainer_keys, rollout_keys: What the report says of the two sides besides their ranks.
    """

    model: str
    trainer: SizedLayout
    rollout: SizedLayout
    cluster: Cluster
    replicas: int
    options: PlanOptions | None
    mode: Mode
    is_offloaded: bool
    staging_bytes: int | None
    gateways: int | None
    trainer_keys: Mapping[str, Any]
    rollout_keys: Mapping[str, Any]

    def __post_init__(self) -> None:
        replicas, mode = self.replicas, self.mode
        if isinstance(replicas, bool) or not isinstance(replicas, int) or replicas < 1:
            raise ConfigError(
                f"replicas must be a positive integer, not {replicas!r}", key="replicas"
            )
        if mode not in ("staged", "in_place"):
            raise ConfigError(f"mode must be staged or in_place, not {mode!r}", key="mode")
        gateways = self.gateways
        if gateways is not None and (
            isinstance(gateways, bool)
            or not isinstance(gateways, int)
            or not 0 <= gateways <= MAX_GATEWAYS
        ):
            raise ConfigError(f"gateways={gateways!r}: 0 to {MAX_GATEWAYS}", key="gateways")
        ranks = self.trainer.world_size, self.rollout.world_size * replicas
        if max(ranks) > _MAX_RANKS or ranks[0] * ranks[1] > _MAX_PAIRS:
            raise ConfigError(
                f"{ranks[0]:,} trainer ranks and {ranks[1]:,} rollout ranks are more than a dry "
                f"run takes: {_MAX_RANKS:,} a side, {_MAX_PAIRS:,} pairs; lower their degrees, or "
                "rollout.replicas"
            )
        if not isinstance(self.is_offloaded, bool):
            raise ConfigError(
                f"offloaded must be true or false, not {self.is_offloaded!r}", key="offloaded"
            )

    def run(self, on_step: Callable[[str], None] = lambda text: None) -> PlanReport:
        """Plan and report; raises what `plan` raises.

        Args:
            on_step: Called with what is done next, for progress.
        """
        started = time.perf_counter()
        made = plan_transfer(*self._manifests(on_step), self.options)
        plan_seconds = time.perf_counter() - started
        on_step("limits")
        work = bucket_work(made)
        traffic = traffic_of(made, self.cluster.gpus_per_node, work)
        limits, attainable = (
            limits_of(traffic, self.cluster, quality, is_offloaded=self.is_offloaded)
            for quality in _QUALITIES
        )
        on_step("prediction")
        prediction = self._predict(made, self.cluster, work)
        fixed_s = None
        if len(made.buckets) <= _MAX_FIXED_BUCKETS:
            fixed_s = self._predict(made, _without_bytes(self.cluster), work).predicted_s
        sides = (self.trainer, self.trainer_keys), (self.rollout, self.rollout_keys)
        trainer, rollout = ({**keys, "ranks": layout.world_size} for layout, keys in sides)
        return PlanReport(
            model=self.model,
            trainer=trainer | {"offloaded": self.is_offloaded},
            rollout=rollout | {"replicas": self.replicas, "mode": self.mode},
            cluster=self.cluster,
            plan=made,
            traffic=traffic,
            limits=limits,
            attainable=attainable,
            prediction=prediction,
            fixed_s=fixed_s,
            memory=Memory.of(made, prediction.staging_bytes),
            plan_seconds=plan_seconds,
        )

    def _manifests(self, on_step: Callable[[str], None]) -> tuple[Manifest, Manifest]:
        def counted(side: str, layout: SizedLayout) -> Callable[[int], None]:
            last = layout.world_size - 1
            return lambda rank: on_step(f"manifests of the {side}: rank {rank} of 0 to {last}")

        source = manifest_of(self.trainer, "source", on_rank=counted("trainer", self.trainer))
        on_rank = counted("rollout", self.rollout)
        sink = manifest_of(self.rollout, "sink", replicas=self.replicas, on_rank=on_rank)
        on_step("plan and proof")
        return source, sink

    def _predict(self, made: Plan, cluster: Cluster, work: BucketWork) -> Prediction:
        return predict(
            made,
            cluster,
            work=work,
            staging_bytes=self.staging_bytes,
            is_offloaded=self.is_offloaded,
            mode=self.mode,
            num_gateways=self.gateways,
        )


def read_model(model: ConfigLike) -> tuple[ModelConfig, str]:
    """Return a model and its name.

    Args:
        model: As in `plan`.

    Raises:
        ConfigError: It describes no supported model.
    """
    if isinstance(model, str) and not Path(model).exists() and "/" not in model:
        from weightsync.dryrun.choices import preset

        return preset("model", model, _read_model_option), model
    config = model_config(model)
    if isinstance(model, str | Path):
        path = Path(model)
        return config, path.parent.resolve().name if path.name == "config.json" else path.stem
    return config, config.model_type


def _read_model_option(path: Path) -> ModelConfig:
    return ModelConfig.from_json(path.parent / _read_yaml(path, "model")["preset"])


def read_cluster(cluster: Cluster | Mapping[str, Any] | str | Path) -> Cluster:
    """Return a cluster.

    Args:
        cluster: As in `plan`.

    Raises:
        ConfigError: It describes none; names the file and the key.
    """
    if isinstance(cluster, Cluster):
        return cluster
    if isinstance(cluster, Mapping):
        return Cluster.from_mapping(cluster, where="cluster")
    if isinstance(cluster, str) and "/" not in cluster and not cluster.endswith(".yaml"):
        from weightsync.dryrun.choices import preset

        found: Cluster = preset("cluster", cluster, _read_cluster_file)
        return found
    return _read_cluster_file(Path(cluster))


def _read_cluster_file(path: Path) -> Cluster:
    return Cluster.from_mapping(_read_yaml(path, "cluster"), where=str(path))


def _read_yaml(path: Path, what: str) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from yaml import YAMLError  # OmegaConf lets its errors through

    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, UnicodeError, YAMLError) as error:
        raise ConfigError(f"{what} {path} cannot be read: {error}", path=path) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{what} {path} is no mapping of keys", path=path)
    return {str(key): value for key, value in values.items()}


def _check_layout(side: str, layout: SizedLayout, config: ModelConfig) -> None:
    if not isinstance(getattr(layout, "world_size", None), int):
        raise ConfigError(
            f"{side} must be a layout with a world_size, such as those of "
            f"weightsync.planners.rules, not {type(layout).__name__}"
        )
    own = getattr(layout, "config", None)
    if isinstance(own, ModelConfig) and canonical_tensors(own) != canonical_tensors(config):
        raise ConfigError(
            f"{side} is a layout of another model ({own.model_type}, {own.num_layers} layers) than "
            f"model= ({config.model_type}, {config.num_layers} layers); give all three the same"
        )


def _without_bytes(cluster: Cluster) -> Cluster:
    """Return a cluster whose bytes cost nothing; writes, buckets and messages cost the same."""
    rates: dict[str, Any] = {
        field.name: Rate(rate.nominal * _FREE, rate.attainable * _FREE)
        for field in dataclasses.fields(Cluster)
        if isinstance(rate := getattr(cluster, field.name), Rate)
    }
    return dataclasses.replace(cluster, **rates)
