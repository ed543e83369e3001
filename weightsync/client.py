"""The public face: `Job`, `Source` on every trainer rank, `Sink` on every rollout rank.

with Job.start() as job:                     # anywhere, once
    ...
source = Source(model, job=url)              # every trainer rank
source.publish()                             # after every optimizer step
sink = Sink(weights, layout=rules.vllm(config, tp=2), replica="a", rank=r, world_size=2, job=url)
sink.refit()                                 # between tokens
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from weightsync.errors import ConfigError, PlanBudgetError
from weightsync.ir.layout import Layout, SourceLayout
from weightsync.ir.plan import HopRule, PlanOptions
from weightsync.planners.protocol import MAX_GATEWAYS
from weightsync.report import Stage, VersionReport
from weightsync.runtime.receiver import Receiver
from weightsync.service.address import TcpAddress, parse_url
from weightsync.service.coordinator import Coordinator
from weightsync.service.core_types import CoreOptions
from weightsync.service.credentials import MemberCredentials, load_member, load_server
from weightsync.service.session import fetch_status
from weightsync.service.sink import SinkHooks, SinkMember
from weightsync.service.source import OpenVersion, SourceMember
from weightsync.settings import Settings
from weightsync.transport.fabrics import open_for_job

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "Job",
    "Layout",
    "Sink",
    "SinkHooks",
    "Source",
    "Stage",
    "Update",
    "VersionReport",
]


# A page: packed writes of less cost more in requests than in bytes.
_MIN_STAGING_BYTES = 4096


class Job:
    """One stream of versions. Context manager; leaving it closes a hosted coordinator.

    Attributes:
        url: What the other processes connect to.
    """

    def __init__(
        self,
        url: str,
        coordinator: Coordinator | None = None,
        credentials: MemberCredentials | None = None,
    ) -> None:
        self.url = url
        self._coordinator = coordinator
        self._credentials = credentials

    @classmethod
    def start(
        cls,
        url: str | None = None,
        *,
        min_replicas: int = 1,
        lease_s: float = 10.0,
        journal: str | Path | None = None,
        bucket_bytes: int | None = None,
        ranks_per_node: int = 1,
        node_dedup: HopRule = "auto",
        relays: HopRule = "off",
        gateways: int = 0,
        token_file: str | Path | None = None,
        ca_file: str | Path | None = None,
        cert_file: str | Path | None = None,
        key_file: str | Path | None = None,
    ) -> Job:
        """Host the coordinator of a new job in this process.

        Args:
            url: `unix:PATH` for one host; `grpcs://HOST:PORT` for several (port 0: a free one; host
                0.0.0.0 or [::]: every address). None takes a socket in a fresh private directory.
            min_replicas: Fewest complete replicas that a version needs.
            lease_s: A member that is silent for longer is taken for lost.
            journal: SQLite file that survives this process; a job started again on it goes on
                with its versions. None keeps decisions in memory.
            bucket_bytes: Size of the unit that is staged, tracked and verified; None: 32 MiB.
            ranks_per_node: Sink ranks of a replica that share a node; they fill nodes in order.
            node_dedup: Whether what they store alike crosses the network once ("auto", "on",
                "off"); one of them passes it on. Without effect where ranks_per_node is 1. "auto"
                needs a fabric that spares the NICs inside a host, such as `local+verbs`.
            relays: Whether equal replicas pass on to each other; a rank that is lost while it does
                aborts the version like a source.
            gateways: Processes that hold the members' connections, beside this one; for grpcs://
                and jobs of some hundred ranks, where messages would take longer than a transfer
                can spare: one for each 48 ranks. 0: this process holds them.
            token_file: The job's token, made by `weightsync certs`. For grpcs:// only, like the
                following; None reads $WEIGHTSYNC_TOKEN_FILE.
            ca_file: None reads $WEIGHTSYNC_CA_FILE, else takes ca.pem beside the token.
            cert_file: None reads $WEIGHTSYNC_CERT_FILE, else takes server.pem beside the token.
            key_file: None reads $WEIGHTSYNC_KEY_FILE, else takes server.key beside the token.

        Raises:
            ConfigError: The URL is taken, of a kind that is not served, or needs files that are not
                there; the certificate is not for this host.
            AuthError: The certificate is not valid now.
        """
        if min_replicas < 1:
            raise ConfigError(f"min_replicas={min_replicas}: at least 1")
        if not 0 <= gateways <= MAX_GATEWAYS:
            raise ConfigError(f"gateways={gateways}: 0 to {MAX_GATEWAYS}")
        options = CoreOptions(min_replicas=min_replicas, lease_s=lease_s)
        path = Path(journal) if journal is not None else None
        plans = PlanOptions(ranks_per_node=ranks_per_node, node_dedup=node_dedup, relays=relays)
        if bucket_bytes is not None:
            plans = dataclasses.replace(plans, bucket_bytes=bucket_bytes)
        member = server = None
        if url is not None and isinstance(parse_url(url), TcpAddress):
            settings = Settings.resolve(
                job=url,
                token_file=token_file,
                ca_file=ca_file,
                cert_file=cert_file,
                key_file=key_file,
            )
            server, member = load_server(settings), load_member(settings)
        coordinator = Coordinator(
            url,
            credentials=server,
            journal=path,
            options=options,
            plan_options=plans,
            num_gateways=gateways,
        )
        return cls(coordinator.url, coordinator, member)

    @classmethod
    def connect(
        cls,
        url: str | None = None,
        *,
        token_file: str | Path | None = None,
        ca_file: str | Path | None = None,
    ) -> Job:
        """Name a job that another process hosts. Connects to nobody yet.

        Args:
            url: None reads $WEIGHTSYNC_JOB.
            token_file: For grpcs://, a copy of the job's token; None reads $WEIGHTSYNC_TOKEN_FILE.
            ca_file: None reads $WEIGHTSYNC_CA_FILE, else takes ca.pem beside the token.

        Raises:
            ConfigError: No URL given, or a bad one; a file that is not there or open to others.
        """
        settings = Settings.resolve(job=url, token_file=token_file, ca_file=ca_file)
        return cls(settings.require_job_url(), None, _credentials(settings))

    def status(self) -> dict[str, Any]:
        """Committed version, phase, and what every replica serves. Blocks for one round trip.

        Raises:
            PeerLostError: Nobody hosts the job.
            AuthError: The token or a certificate is not accepted.
        """
        reply = fetch_status(self.url, self._credentials)
        return {
            "committed_version": reply.committed_version,
            "last_version": reply.last_version,
            "phase": reply.phase,
            "epoch": reply.epoch,
            "replicas": {
                r.replica: {"serving": r.serving, "version": r.version, "ranks": list(r.ranks)}
                for r in reply.replicas
            },
            "sources": list(reply.sources),
        }

    def close(self) -> None:
        """End a hosted job; members see it end. Idempotent."""
        if self._coordinator is not None:
            self._coordinator.close()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Update:
    """One publish under way. Awaitable: `await update` waits for "committed"."""

    def __init__(self, source: Source, opened: OpenVersion) -> None:
        self._source = source
        self._opened = opened

    @property
    def version(self) -> int:
        """Its number; 0 until the coordinator gave it one."""
        return self._opened.version

    @property
    def stage(self) -> Stage | None:
        """The latest stage reached; None while undecided."""
        return self._opened.stage

    def wait(self, until: Stage = "committed", timeout_s: float | None = None) -> VersionReport:
        """Block until the version reached `until`.

        Raises:
            VersionAbortedError: The fleet aborted the version; the old one serves.
            NoQuorumError: Too few replicas by the deadline.
            StaleVersionError: The number is not newer than the last one.
            LayoutError, PlanError: The two sides do not fit; nothing was written.
            TransferTimeoutError: `timeout_s` or the version's deadline passed.
            PeerLostError: The coordinator went away before it had numbered the version.
            AuthError: It came back, but this rank's token is of no use there.
        """
        self._source._member.wait(self._opened, until, timeout_s)
        return self._source._member.report(self._opened)

    def __await__(self) -> Generator[Any, None, VersionReport]:
        return asyncio.to_thread(self.wait).__await__()


class Source:
    """The weights of one trainer rank. Context manager.

    Args:
        weights: A module (FSDP2 or plain), or tensors by canonical name. Borrowed: read in
            place while a version is open, never copied or gathered.
        job: Where to publish; None reads $WEIGHTSYNC_JOB.
        layout: How this side holds canonical tensors; None derives it from `weights`. An
            engine's, such as `rules.vllm(...)`, publishes what that engine serves.
        rank: None: torch.distributed if initialised, else $RANK.
        world_size: Likewise, else $WORLD_SIZE.
        dtype: Unused dtype conversions are decided by the sinks; a value here is checked
            against what `weights` holds.
        staging_bytes: Budget of packed and cast bytes in flight; None takes eight buckets.
        timeout_s: Deadline of one version.
        fabric: `local` (one host), `tcp` (any hosts) or both, `local+tcp`, or another of
            `transport.FABRICS`; sources and sinks use the same.
        fabric_options: Of that fabric, as `transport.open_fabric` takes them: for `tcp`
            {"addresses": ["10.0.0.5"]}, one address for each rail; without it loopback only.
        threads: Threads of copy and digest kernels.

    Raises:
        ConfigError: No rank known, or the rank has joined already.
        LayoutError: The weights cannot be described.
        PlanBudgetError: `staging_bytes` is too small for any write.
        PeerLostError: No coordinator answers.
        AuthError: The job's token or certificate is not accepted.
    """

    def __init__(
        self,
        weights: nn.Module | Mapping[str, torch.Tensor],
        *,
        job: Job | str | None = None,
        layout: Layout | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        dtype: torch.dtype | None = None,
        staging_bytes: int | None = None,
        timeout_s: float = 120.0,
        fabric: str = "local",
        fabric_options: Mapping[str, Any] | None = None,
        threads: int = 1,
    ) -> None:
        from weightsync.live.weights import SourceWeights

        self.rank, self.world_size = _find_rank(rank, world_size)
        if staging_bytes is not None and staging_bytes < _MIN_STAGING_BYTES:
            raise PlanBudgetError(
                f"source {self.rank}: staging_bytes={staging_bytes} is less than the "
                f"{_MIN_STAGING_BYTES} that one packed write needs; leave it out for eight buckets"
            )
        settings, credentials = _resolve(job, timeout_s)
        self._timeout_s = settings.timeout_s
        if layout is not None:
            layout = SourceLayout(layout)
        held = SourceWeights(weights, layout=layout, rank=self.rank, dtype=dtype)
        self._weights = held
        self._fabric = open_for_job(fabric, threads=threads, options=fabric_options)
        self._member = SourceMember(
            settings.require_job_url(),
            manifest=held.manifest.to_bytes(),
            rank=self.rank,
            world_size=self.world_size,
            fabric=self._fabric,
            fabric_name=fabric,
            bases=held.addresses,
            sizes=held.sizes,
            fingerprint=held.fingerprint,
            changed_since=held.changed_since,
            owner=held,
            staging_bytes=staging_bytes if staging_bytes is not None else 0,
            threads=threads,
            connect_timeout_s=min(settings.connect_timeout_s, timeout_s),
            credentials=credentials,
        )
        try:
            self._member.join()
        except BaseException:
            self._fabric.close()
            raise

    def publish(
        self,
        version: int | None = None,
        *,
        tag: str = "",
        until: Stage = "committed",
        timeout_s: float | None = None,
    ) -> VersionReport:
        """Make the weights as they are now a version of the job. Call on every source rank.

        Blocks until `until`. The weights must not change before the version is decided; an
        optimizer step of this process waits for that by itself.

        Args:
            version: Its number; None: last + 1.
            tag: Carried along, such as the training step.
            until: "local" and "committed": the fleet decided; "adopted": every live replica
                serves the version.
            timeout_s: Deadline of this call; None takes the constructor's.

        Raises:
            As `Update.wait`, and VersionError while an earlier version is open on this rank.
        """
        update = self._start(version, tag, timeout_s)
        return update.wait(until)  # the version itself carries the deadline

    def start_publish(self, version: int | None = None, *, tag: str = "") -> Update:
        """As `publish`, but return at once; wait on the result before changing weights."""
        return self._start(version, tag, None)

    def _start(self, version: int | None, tag: str, timeout_s: float | None) -> Update:
        from weightsync.live.weights import guard_optimizers

        if version is not None and version < 1:
            raise ConfigError(f"version={version}: versions count from 1")
        self._weights.prepare()
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        opened = self._member.start(version if version is not None else 0, tag, timeout_s)
        guard_optimizers(self._member, opened)
        return Update(self, opened)

    def close(self) -> None:
        """Leave the job. Idempotent."""
        self._member.close()
        self._fabric.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Sink:
    """The weights of one rollout rank. Context manager.

    Args:
        weights: A module, or tensors by the names that `layout` gives them; contiguous, on the
            CPU. Borrowed, written to by `refit` only (in place: while `refit` waits, or
            between the hooks). None with `install`.
        layout: How an engine lays canonical tensors out, such as `rules.vllm(...)`.
        replica: Name of the copy of the model that this rank serves a part of.
        rank: Inside the replica.
        world_size: Ranks of the replica.
        job: Where versions come from; None reads $WEIGHTSYNC_JOB.
        mode: "staged": versions land beside the live weights and are copied over them in
            `refit`. "in_place": they land in the live weights while generation is paused; a
            failure after the first byte leaves the replica TORN until the next version.
        hooks: For in place without a waiting `refit`.
        install: Makes a staged version live, where copying over `weights` would not: engines
            that store weights otherwise than they load them. Called in `refit` with the staged
            tensors by the layout's names, flat and in the layout's dtypes, to be read during the
            call only. If it raises, the replica is TORN.
        timeout_s: Default deadline of `refit`.
        fabric: `local` (one host), `tcp` (any hosts) or both, `local+tcp`, or another of
            `transport.FABRICS`; sources and sinks use the same.
        fabric_options: Of that fabric, as `transport.open_fabric` takes them: for `tcp`
            {"addresses": ["10.0.0.5"]}, one address for each rail; without it loopback only.
        threads: Threads of copy and digest kernels.

    Raises:
        ConfigError: This replica and rank have joined already, or weights that cannot be used.
        UnknownTensorError, LayoutError, DtypeMismatchError: `weights` are not what `layout` says.
        PeerLostError: No coordinator answers.
        AuthError: The job's token or certificate is not accepted.
    """

    def __init__(
        self,
        weights: nn.Module | Mapping[str, torch.Tensor] | None,
        *,
        layout: Layout,
        replica: str,
        rank: int,
        world_size: int,
        job: Job | str | None = None,
        mode: Literal["staged", "in_place"] = "staged",
        hooks: SinkHooks | None = None,
        install: Callable[[Mapping[str, torch.Tensor]], None] | None = None,
        timeout_s: float = 120.0,
        fabric: str = "local",
        fabric_options: Mapping[str, Any] | None = None,
        threads: int = 1,
    ) -> None:
        from weightsync.live.weights import sink_tensors, staged_tensors

        if (weights is None) != (install is not None):
            raise ConfigError("a sink needs either weights or install")
        if install is not None and mode != "staged":
            raise ConfigError("install makes staged versions live; mode='in_place' stages nothing")
        if mode not in ("staged", "in_place"):
            raise ConfigError(f"mode={mode!r}: 'staged' or 'in_place'")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank} is outside world_size={world_size}")
        settings, credentials = _resolve(job, timeout_s)
        self._timeout_s = settings.timeout_s
        manifest = layout.manifest(rank)
        label = f"sink {replica}/{rank}"
        tensors = [] if weights is None else sink_tensors(weights, manifest, label=label)
        self._fabric = open_for_job(fabric, threads=threads, options=fabric_options)
        receiver = Receiver(
            self._fabric,
            live=np.array([t.data_ptr() for t in tensors], np.int64),
            live_owner=tensors,
            mode=mode,
            threads=threads,
            install=None if install is None else staged_tensors(manifest, install),
        )
        self._member = SinkMember(
            settings.require_job_url(),
            manifest=manifest.to_bytes(),
            replica=replica,
            rank=rank,
            world_size=world_size,
            receiver=receiver,
            fabric_name=fabric,
            hooks=hooks,
            connect_timeout_s=min(settings.connect_timeout_s, timeout_s),
            credentials=credentials,
        )
        try:
            self._member.join()
        except BaseException:
            self._fabric.close()
            raise

    @property
    def version(self) -> int | None:
        """What the live weights hold; None before the first refit and while TORN."""
        active = self._member.active_version
        return active if active > 0 else None

    @property
    def is_torn(self) -> bool:
        """Whether this rank holds weights of no version, or of another than its replica."""
        return self._member.is_torn

    @property
    def committed_version(self) -> int | None:
        """Newest version that this rank was told of as committed."""
        committed = self._member.committed_version
        return committed if committed > 0 else None

    @property
    def seconds(self) -> dict[str, float]:
        """Of the last version: `fill` (armed to verified) and `pause` (copy over live weights)."""
        return {name: end - start for name, (start, end) in self._member.spans.items()}

    @property
    def spans(self) -> dict[str, tuple[float, float]]:
        """The same as (start, end) on this process's monotonic clock, for traces."""
        return dict(self._member.spans)

    def refit(self, version: int | None = None, *, timeout_s: float | None = None) -> int:
        """Wait for a committed version and adopt it together with the whole replica.

        Call between tokens, on every rank of the replica.

        Args:
            version: Smallest version to return with; one that was committed before it is
                adopted on the way. None: any that is newer than the active one.
            timeout_s: Deadline; None takes the constructor's. A rank whose weights have changed
                by then waits up to 5 s longer for the others: it cannot go back.

        Returns:
            The version now active.

        Raises:
            TornError: The replica holds mixed weights and must not serve; a later version,
                adopted by another `refit`, repairs it.
            TransferTimeoutError: Nothing was committed, or a rank of the replica did not come.
            LayoutError, PlanError: The two sides do not fit.
            AuthError: As for `Update.wait`.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        return self._member.refit(version, timeout_s)

    def wait_committed(self, timeout_s: float) -> int | None:
        """Wait until `refit` has a version to adopt, for engines that pause only then. Blocks.

        Returns:
            The version, which another may follow before `refit`; None when time is up or the sink
            is closed.
        """
        return self._member.wait_ready(timeout_s)

    async def refit_async(
        self, version: int | None = None, *, timeout_s: float | None = None
    ) -> int:
        """As `refit`, without blocking the event loop."""
        return await asyncio.to_thread(self.refit, version, timeout_s=timeout_s)

    def close(self) -> None:
        """Leave the job; the live weights stay. Idempotent."""
        self._member.close()
        self._fabric.close()

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _resolve(job: Job | str | None, timeout_s: float) -> tuple[Settings, MemberCredentials | None]:
    """Where the job is and how to prove that we belong to it; a Job brings its own proof."""
    if isinstance(job, Job):
        return Settings.resolve(job=job.url, timeout_s=timeout_s), job._credentials
    settings = Settings.resolve(job=job, timeout_s=timeout_s)
    return settings, _credentials(settings)


def _credentials(settings: Settings) -> MemberCredentials | None:
    is_tcp = isinstance(parse_url(settings.require_job_url()), TcpAddress)
    return load_member(settings) if is_tcp else None


def _find_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Explicit, else torch.distributed, else the environment."""
    if rank is None or world_size is None:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            rank = dist.get_rank() if rank is None else rank
            world_size = dist.get_world_size() if world_size is None else world_size
        elif "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            try:
                rank = int(os.environ["RANK"]) if rank is None else rank
                world_size = int(os.environ["WORLD_SIZE"]) if world_size is None else world_size
            except ValueError as error:
                raise ConfigError(f"$RANK or $WORLD_SIZE is no number: {error}") from error
        else:
            raise ConfigError(
                "rank and world_size are unknown: pass them, initialise torch.distributed, or "
                "set RANK and WORLD_SIZE"
            )
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank={rank} is outside world_size={world_size}")
    return rank, world_size
