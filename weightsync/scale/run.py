"""Run the scale model: calibrate, predict, blast, publish, compare with the usual way, clean up."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Final

from weightsync.bench.host import CpuTimes
from weightsync.calibrate.constants import Wiring, calibrate
from weightsync.calibrate.stored import store
from weightsync.demo.worker import Team
from weightsync.demo.workspace import Interrupts, workspace
from weightsync.dryrun.planning import read_cluster
from weightsync.errors import ConfigError, TransferError
from weightsync.fleet.fleet import Fleet, Host, JobSpec, Observed
from weightsync.planners.cluster import Cluster
from weightsync.planners.predict import predict
from weightsync.planners.traffic import Traffic, traffic_of
from weightsync.scale.layouts import LAYOUTS, Counts, limit_s, plan_options, sized
from weightsync.scale.links import links_report
from weightsync.scale.topology import Counters, Network, Shape, open_network
from weightsync.units import KIB, MIB

__all__ = ["ScaleOptions", "run_scale"]

_RANKS_PER_NODE: Final = 2
_LEAST_BLAST: Final = 0.95  # of the shaped limit; below that the processor is what limits
_BLASTS: Final = 3
_GATHER_START_S: Final = 180.0
_GATHER_S: Final = 600.0
# Sixteen senders and a queue of 50 ms in front of each sink: what each connection may hold is what
# that queue has room for. The default is 4 MiB, for links 400 times as fast.
_FABRIC: Final = {"streams": 1, "window_bytes": 64 * KIB}
_SCALED_NIC_GBIT_PER_S: Final = 400.0  # of the cluster that is modelled
_SCALED_SINK_BYTES: Final = 33.5e9  # that a rank of it receives


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleOptions:
    """What to run.

    Attributes:
        counts: Ranks.
        rails: Of each rank.
        layouts: Names of `LAYOUTS`; the first one is what the result tells of at its top level.
        repeats: Versions that count; one more goes before, which binds.
        seconds: Least physical limit of each layout.
        shape: Of the links.
        broadcast: Run the first layout the usual way, too.
        node_dedup: What the sinks of a node share crosses the network once.
        calibration: Constants to predict with; None: those stored for this network, or measured.
        recalibrate: Measure them even if there are stored ones.

    Raises:
        ConfigError: An unknown layout, or a number that cannot be.
    """

    counts: Counts
    rails: int = 2
    layouts: tuple[str, ...] = ("paper",)
    repeats: int = 5
    seconds: float = 4.0
    shape: Shape = dataclasses.field(default_factory=Shape)
    broadcast: bool = True
    node_dedup: bool = False
    calibration: Path | None = None
    recalibrate: bool = False

    def __post_init__(self) -> None:
        for name in self.layouts:
            if name not in LAYOUTS:
                raise ConfigError(f"no layout {name!r}; there are {', '.join(LAYOUTS)}")
        if not self.layouts or self.repeats < 1 or not self.seconds > 0:
            raise ConfigError("at least one layout, one repeat and more than 0 seconds")

    def network(self) -> Network:
        """Return the network: sources, sinks, and a host for the coordinator."""
        first, ranks = self.counts.sources, self.counts.ranks
        nodes = tuple(
            tuple(range(begin, min(begin + _RANKS_PER_NODE, replica + ranks)))
            for replica in range(first, first + self.counts.sinks, ranks)
            for begin in range(replica, replica + ranks, _RANKS_PER_NODE)
        )
        return Network(first + self.counts.sinks + 1, self.rails, self.shape, nodes)


def run_scale(
    options: ScaleOptions, on_step: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Run everything; blocks for about half a minute a layout, and minutes for the usual way.

    Args:
        options: What to run.
        on_step: Called with what is done next.

    Returns:
        The keys of `weightsync.scale_model/1`, without "schema".

    Raises:
        ConfigError: No such network can be made here, or a bad calibration.
        TransferError: `cpu_bound`: raw sockets are too slow; nothing else is measured.
        WeightSyncError: A process failed; nothing is left behind.
    """
    counts = options.counts
    if options.calibration is not None:
        read_cluster(options.calibration)  # before anything is built
    on_step("network")
    with Interrupts() as interrupts, workspace() as folder, open_network(options.network()) as net:
        hosts = [Host(net.inside(i), net.addresses(i), net.control(i)) for i in range(net.hosts)]
        with (
            Fleet(
                folder,
                sources=hosts[: counts.sources],
                sinks=hosts[counts.sources : -1],
                coordinator=hosts[-1],
                fabric_options=_FABRIC,
            ) as fleet,
            interrupts.allowed(),
        ):
            on_step("processes")
            fleet.start()
            cluster, calibration = _constants(options, fleet, on_step)
            model = _Model(options, net, fleet, cluster, on_step)
            found = [model.run(name) for name in options.layouts]
            fleet.dismiss()
        broadcast: dict[str, Any] = {"broadcast_s": None}
        if options.broadcast:
            on_step("the usual way: gather, broadcast")
            with Team(folder, package="weightsync.fleet") as team, interrupts.allowed():
                broadcast = _usual_way(options, net, team, found[0]["bytes_unique"])
            ratio = broadcast["broadcast_s"] / median(found[0]["measured_s"])
            broadcast["broadcast_ratio"] = ratio
    return {
        **found[0],
        **broadcast,
        "verified": all(one["verified"] for one in found)
        and not broadcast.get("broadcast_problems"),
        "sources": counts.sources,
        "sinks": counts.sinks,
        "replicas": counts.replicas,
        "rails": options.rails,
        "mbit_per_s": options.shape.mbit_per_s,
        "node_dedup": options.node_dedup,
        "scale": _scale(options, found[0]),
        "calibration": calibration,
        "layouts": found,
    }


class _Model:
    """One running network, layout after layout."""

    def __init__(
        self,
        options: ScaleOptions,
        network: Network,
        fleet: Fleet,
        cluster: Cluster,
        on_step: Callable[[str], None],
    ) -> None:
        self._options, self._network, self._fleet = options, network, fleet
        self._cluster, self._on_step = cluster, on_step

    def run(self, name: str) -> dict[str, Any]:
        """Predict, blast and publish one layout."""
        options, fleet = self._options, self._fleet
        self._on_step(f"{name}: plan and prediction")
        budgets = plan_options(_RANKS_PER_NODE if options.node_dedup else 1)
        spec, plan = sized(LAYOUTS[name], options.counts, options.seconds, self._cluster, budgets)
        traffic = traffic_of(plan, self._cluster.gpus_per_node)
        limit, prediction = limit_s(plan, self._cluster), predict(plan, self._cluster)
        self._on_step(f"{name}: raw sockets")
        blast_s = self._blast(traffic, limit)
        fleet.open_job(spec)
        seen: list[Observed] = []
        counted: list[Counters] = []
        problems: list[str] = []
        foreign = []
        for version in range(1, options.repeats + 2):
            first = version == 1
            self._on_step(f"{name}: " + ("binding" if first else f"version {version - 1}"))
            before, cpu = self._network.counters(), CpuTimes.now(fleet.team.workers)
            one = fleet.publish(version)
            after, others = self._network.counters(), cpu.foreign_cores(fleet.team.workers)
            problems += fleet.check()
            if not first:
                seen.append(one)
                counted.append(after.since(before))
                foreign.append(round(others, 2))
        fleet.close_job()
        links = links_report(
            options.shape,
            self._network.rails,
            self._hosts(spec),
            traffic,
            plan.bytes_per_sink(),
            seen,
            counted,
        )
        measured = [one.seconds for one in seen]
        return {
            "layout": name,
            "what": LAYOUTS[name].what,
            "limit_s": limit,
            "physical_limit_s": limit,
            "blast_s": blast_s,
            "predicted_s": prediction.predicted_s,
            "measured_s": measured,
            "verified": not problems and links["match"],
            "ratio": median(measured) / limit,
            "prediction_error": prediction.predicted_s / median(measured) - 1,
            "stages_s": {
                stage: median(one.stages_s[stage] for one in seen) for stage in seen[0].stages_s
            },
            "bytes_total": int(traffic.pair_bytes.sum()),
            "bytes_unique": int(traffic.unique_bytes),
            "bytes_per_sink": int(traffic.need_bytes.max()),
            "buckets": len(plan.buckets),
            "links": links,
            "foreign_cores": foreign,
            "problems": problems,
        }

    def _hosts(self, spec: JobSpec) -> tuple[list[int], list[int]]:
        """Return the hosts of the sources and sinks of a job."""
        first = self._options.counts.sources
        return list(range(spec.sources)), list(range(first, first + spec.sinks))

    def _blast(self, traffic: Traffic, limit: float) -> float:
        """Return the best of some blasts; refuses where it is not near the limit."""
        best = math.inf
        for _ in range(_BLASTS):
            best = min(best, self._fleet.blast(traffic.pair_bytes.tolist()))
            if limit / best >= _LEAST_BLAST:
                break
        if limit / best < _LEAST_BLAST:
            raise TransferError(
                f"cpu_bound: raw sockets take {best:.2f} s for what the links allow in "
                f"{limit:.2f} s ({limit / best:.2f}, least {_LEAST_BLAST}); end other programs, or "
                "choose slower links or fewer ranks",
                reason="cpu_bound",
            )
        return best


def _constants(
    options: ScaleOptions, fleet: Fleet, on_step: Callable[[str], None]
) -> tuple[Cluster, dict[str, Any]]:
    """Return the constants to predict with: given, stored, or measured now."""
    path, is_fresh = options.calibration, False
    if path is None:
        path = _stored_at(options)
        if options.recalibrate or not path.exists():
            on_step("calibration")
            wiring = Wiring(
                name="scale_model",
                ranks_per_node=_RANKS_PER_NODE,
                rails=options.rails,
                nic_gbit_per_s=options.shape.mbit_per_s / 1000,
                nic_source="rate of the shaped link",
                memory_bytes=_memory_bytes() // (options.counts.sources + options.counts.sinks),
                # A second and a half: short against the updates, long against bursts.
                wire_bytes=min(
                    int(1.5 * options.shape.mbit_per_s * 1e6 / 8 * options.rails), 256 * MIB
                ),
            )
            store(calibrate(fleet, wiring, lambda text: on_step(f"calibration: {text}")), path)
            is_fresh = True
    cluster = read_cluster(path)
    content = path.read_bytes()
    wanted = options.shape.mbit_per_s / 1000
    if cluster.rails_per_port != options.rails or cluster.nic_gbit_per_s.nominal != wanted:
        raise ConfigError(
            f"{path} is of {cluster.rails_per_port} rails of {cluster.nic_gbit_per_s.nominal} "
            f"Gbit/s, not of {options.rails} of {wanted}; leave it out to measure"
        )
    digest = hashlib.sha256(content).hexdigest()
    return cluster, {"path": str(path), "sha256": digest, "fresh": is_fresh}


def _stored_at(options: ScaleOptions) -> Path:
    """Return where the constants of such a network on this machine are kept."""
    facts = {
        "counts": dataclasses.asdict(options.counts),
        "rails": options.rails,
        "shape": dataclasses.asdict(options.shape),
        "fabric": _FABRIC,
        "host": [platform.node(), platform.release(), os.cpu_count()],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    return Path(cache) / "weightsync" / "scale_model" / f"{digest[:16]}.yaml"


def _usual_way(options: ScaleOptions, network: Network, team: Team, nbytes: int) -> dict[str, Any]:
    """Gather the model to rank 0 over gloo and broadcast it to all sinks; once."""
    counts = options.counts
    workers = [
        team.start(
            f"gather {rank}",
            "gather",
            network.inside(rank),
            rank=rank,
            sources=counts.sources,
            sinks=counts.sinks,
            bytes=nbytes,
            interfaces=network.interfaces(),
            store=str(team.folder / "gather.store"),
        )
        for rank in range(counts.sources + counts.sinks)
    ]
    team.wait(workers, "ready", timeout_s=_GATHER_START_S)
    for worker in workers:
        worker.send("gather")
    found = team.wait(workers, "gather", timeout_s=_GATHER_S)
    events = [found[worker] for worker in workers]
    team.dismiss()
    began = max(float(event["began"]) for event in events)
    problems = [event["problem"] for event in events if event["problem"] is not None]
    return {
        "broadcast_s": max(float(event["ended"]) for event in events) - began,
        "broadcast_bytes": int(events[0]["bytes"]),
        "broadcast_problems": problems,
    }


def _scale(options: ScaleOptions, found: dict[str, Any]) -> dict[str, float]:
    """Return the two factors between this model and the cluster that it stands for."""
    own = options.shape.mbit_per_s / 1000 * options.rails
    return {
        "nic": _SCALED_NIC_GBIT_PER_S / own,
        "bytes": _SCALED_SINK_BYTES / found["bytes_per_sink"],
    }


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
