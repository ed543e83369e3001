"""The worker's half: one sink in every vLLM worker.

Bytes arrive in staging while the worker generates. A version is adopted in one call of
`update_weights`, which vLLM runs on all workers between the same two steps; it returns when every
rank of the replica holds the version. `weightsync.integrations.vllm.follow` makes that call, or the
owner of an engine in its own process, or the trainer's half.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import vllm
from torch import nn
from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from weightsync.client import Job, Sink
from weightsync.errors import ConfigError, LayoutError, TornError
from weightsync.integrations.vllm.follow import Follower
from weightsync.integrations.vllm.install import Installer
from weightsync.integrations.vllm.plugin import TESTED_VERSIONS
from weightsync.integrations.vllm.twin import record_worker
from weightsync.integrations.vllm.wire import encodes_errors
from weightsync.live.sites import TORCH_DTYPES
from weightsync.planners import rules

__all__ = ["WeightSyncEngine", "WeightSyncInitInfo", "WeightSyncUpdateInfo"]

_log = logging.getLogger(__name__)


@dataclass
class WeightSyncInitInfo(WeightTransferInitInfo):
    """What `attach` tells the workers of one engine.

    Args:
        job: URL of the job to join; a server started with $WEIGHTSYNC_JOB joins no other.
        replica: Name of this engine in the job.
        server: URL of the engine's own API server, when a worker makes it adopt versions; None:
            somebody else calls `update_weights`.
        pause: vLLM's pause mode around an update: keep, wait or abort.
        clear_cache: Whether cached prefixes, computed by older weights, are dropped.
        fabric: As `Sink`.
        fabric_options: As `Sink`.
        timeout_s: Longest time that ranks wait for each other.
    """

    job: str
    replica: str
    server: str | None = None
    pause: str = "keep"
    clear_cache: bool = True
    fabric: str = "local"
    fabric_options: dict[str, Any] = field(default_factory=dict)
    timeout_s: float = 120.0


@dataclass
class WeightSyncUpdateInfo(WeightTransferUpdateInfo):
    """What to adopt.

    Args:
        version: Smallest version to accept; None: what is committed next.
        timeout_s: Longest time to wait for it and for the other ranks.
    """

    version: int | None = None
    timeout_s: float | None = None


class WeightSyncEngine(WeightTransferEngine[WeightSyncInitInfo, WeightSyncUpdateInfo]):
    """Made by vLLM in each worker that was started with this backend; see the module."""

    init_info_cls = WeightSyncInitInfo
    update_info_cls = WeightSyncUpdateInfo
    supports_draft_weight_update = False

    def __init__(
        self,
        config: WeightTransferConfig,
        vllm_config: VllmConfig,
        device: torch.device,
        model: nn.Module,
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        _require_version()
        self._sink: Sink | None = None
        self._follower: Follower | None = None
        self._torn: TornError | None = None
        # The last line of defence: a worker that holds mixed weights computes nothing from them.
        model.register_forward_pre_hook(self._refuse_if_torn)

    @encodes_errors
    def init_transfer_engine(self, init_info: WeightSyncInitInfo) -> None:
        """Record this worker's layout and join the job. Blocks; called on every rank.

        Raises:
            ConfigError: The model is none that weightsync knows, or the job is not this server's.
            LayoutError: The model's layout cannot be recorded or made live; names the parameter.
            MembershipError, PeerLostError, AuthError: Joining failed.
        """
        own_job = os.environ.get("WEIGHTSYNC_JOB")
        if own_job is not None and own_job != init_info.job:
            raise ConfigError(
                f"this server was started for the job {own_job}, and does not join {init_info.job}"
            )
        if self.parallel_config.enable_eplb:
            raise ConfigError(
                "expert load balancing (EPLB) moves experts between ranks while a version is on "
                "its way; start vLLM without --enable-eplb"
            )
        is_paused = self._follower is not None and self._follower.is_paused
        self.shutdown()
        tensors = _canonical(self.model_config.hf_config.to_dict(), self.model_config.dtype)
        recording = record_worker(self.vllm_config, tensors)
        installer = Installer(self.model, recording, self.vllm_config)
        parallel = self.parallel_config
        rank = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._sink = Sink(
            None,
            install=installer.install,
            layout=recording,
            replica=init_info.replica,
            rank=rank,
            world_size=parallel.world_size_across_dp,
            job=Job.connect(init_info.job),
            fabric=init_info.fabric,
            fabric_options=init_info.fabric_options or None,
            timeout_s=init_info.timeout_s,
        )
        _log.info(
            "weightsync: rank %d of %s joined %s; %d layers are written in place, %d reloaded; "
            "not from checkpoints: %s",
            rank,
            init_info.replica,
            init_info.job,
            installer.num_plain,
            installer.num_processed,
            ", ".join(recording.ignored) or "nothing",
        )
        if init_info.server is not None and rank == 0:
            self._follower = Follower(
                self._sink,
                init_info.server,
                pause=init_info.pause,
                clear_cache=init_info.clear_cache,
                timeout_s=init_info.timeout_s,
                is_paused=is_paused,
            )
            self._follower.start()

    @encodes_errors
    def start_weight_update(self) -> None:
        """Nothing to prepare: bytes go to staging.

        Raises:
            ConfigError: No job was joined yet.
        """
        self._require_sink()

    @encodes_errors
    def receive_weights(self, update_info: WeightSyncUpdateInfo) -> None:
        """Adopt a committed version together with all ranks. Blocks; between steps of the engine.

        Raises:
            TornError: Ranks hold different versions; this worker computes nothing until a later
                version has been adopted.
            TransferTimeoutError: Nothing was committed, or a rank did not come; the old version
                goes on serving.
        """
        sink = self._require_sink()
        try:
            sink.refit(update_info.version, timeout_s=update_info.timeout_s)
        except TornError as error:
            self._torn = error
            raise
        except BaseException as error:
            if not sink.is_torn:
                raise
            self._torn = TornError(f"this rank failed to adopt a version: {error}")
            raise self._torn from error
        self._torn = None

    def finish_weight_update(self) -> None:
        """Nothing left to do: `receive_weights` returns when the replica has the version."""

    def shutdown(self) -> None:
        """Leave the job; the weights stay as they are. Idempotent."""
        if self._follower is not None:
            self._follower.close()
            self._follower = None
        if self._sink is not None:
            self._sink.close()
            self._sink = None

    def _require_sink(self) -> Sink:
        if self._sink is None:
            raise ConfigError(
                "this engine has joined no job: call weightsync.integrations.vllm.attach first"
            )
        return self._sink

    def _refuse_if_torn(self, *_: object) -> None:
        torn = self._torn
        if torn is None and self._sink is not None and self._sink.is_torn:
            torn = TornError("the replica holds mixed weights")
        if torn is not None:
            raise torn


def _canonical(
    config: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the tensors that trainers publish, for vLLM's loader."""
    model = rules.model_config(config)
    quantized = model.quantization is not None
    kinds = rules.canonical_dtypes(model, quantized=quantized)
    shapes = rules.canonical_tensors(model, quantized=quantized)
    return {
        name: (shape, TORCH_DTYPES[kinds[name]] if name in kinds else dtype)
        for name, shape in shapes.items()
    }


def _require_version() -> None:
    version = vllm.__version__
    if not version.startswith(tuple(f"{tested}." for tested in TESTED_VERSIONS)):
        raise LayoutError(
            f"vLLM {version} is not one that weightsync was tested with "
            f"({', '.join(TESTED_VERSIONS)}): its reload helpers may leave wrong weights; install "
            "one of those, or a newer weightsync"
        )
