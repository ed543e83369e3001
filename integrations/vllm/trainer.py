"""The trainer's half, for scripts written against vLLM's own weight-transfer interface.

    engine = WeightTransferTrainerFactory.trainer_init(
        WeightSyncTrainerInitInfo(rank=rank, world_size=world, job=url),
        client=HTTPVLLMWeightSyncClient("http://127.0.0.1:8000"),
        source=ModuleSource(model),
    )
    engine.send_weights()       # on every trainer rank, after every step

Scripts of one's own need none of this: `weightsync.integrations.vllm.attach` and `Source.publish`.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import nn
from vllm.distributed.weight_transfer.base import (
    ModuleSource,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
)

from weightsync.client import Job, Source
from weightsync.errors import ConfigError, WeightSyncError
from weightsync.integrations.vllm.plugin import BACKEND
from weightsync.integrations.vllm.wire import decoded

__all__ = ["WeightSyncTrainerEngine", "WeightSyncTrainerInitInfo"]


@dataclass
class WeightSyncTrainerInitInfo(TrainerInitInfo):
    """How this trainer rank joins; the base class adds `rank`.

    Args:
        world_size: Trainer ranks.
        job: URL of the job; None: $WEIGHTSYNC_JOB, else, with one rank only, a new job.
        fabric: As `Source`; engines are told to use the same.
        fabric_options: Of the trainer's side.
        engine_fabric_options: Of the engines' side.
        timeout_s: Deadline of one version.
    """

    backend: ClassVar[str] = BACKEND

    world_size: int = 1
    job: str | None = None
    fabric: str = "local"
    fabric_options: Mapping[str, Any] | None = None
    engine_fabric_options: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 120.0


class WeightSyncTrainerEngine(TrainerWeightTransferEngine[WeightSyncTrainerInitInfo]):
    """Made on every trainer rank by `trainer_init`. Nothing is gathered on any of them."""

    init_info_cls = WeightSyncTrainerInitInfo

    def __init__(
        self,
        *,
        client: VLLMWeightSyncClient,
        source: WeightSource,
        is_sender: bool,
        job: Job,
        member: Source,
    ) -> None:
        super().__init__(client=client, source=source, is_sender=is_sender)
        self._job = job
        self._member = member

    @classmethod
    def trainer_init(
        cls,
        init_info: WeightSyncTrainerInitInfo,
        *,
        client: VLLMWeightSyncClient,
        source: WeightSource | None = None,
    ) -> Self:
        """Join the job on this rank; the sender, rank 0, has the engine behind `client` join too.

        Raises:
            ConfigError: `source` is no `ModuleSource`, or no job is known.
            LayoutError: The module, or the engine's model, cannot be described.
        """
        if not isinstance(source, ModuleSource):
            raise ConfigError(
                "weightsync reads live shards of a module: pass source=ModuleSource(model)"
            )
        job = _job(init_info)
        if init_info.is_sender:
            _call(
                client.init_weight_transfer_engine,
                {
                    "job": job.url,
                    "replica": f"vllm-{secrets.token_hex(3)}",
                    "fabric": init_info.fabric,
                    "fabric_options": dict(init_info.engine_fabric_options),
                    "timeout_s": init_info.timeout_s,
                },
            )
        module: nn.Module = source._module
        member = Source(
            module,
            job=job,
            rank=init_info.rank,
            world_size=init_info.world_size,
            fabric=init_info.fabric,
            fabric_options=init_info.fabric_options,
            timeout_s=init_info.timeout_s,
        )
        return cls(
            client=client, source=source, is_sender=init_info.is_sender, job=job, member=member
        )

    def send_weights(self) -> None:
        """Publish the weights as they are and have the engine adopt them. On every rank; blocks.

        Generation goes on until the version is committed; the engine then adopts it between two
        steps.

        Raises:
            VersionAbortedError: The fleet aborted the version; the old one serves.
            TornError: The engine failed to adopt it and computes nothing.
        """
        update = self._member.start_publish()
        version = update.wait("committed").version
        if self.is_sender:
            _call(self.client.start_weight_update)
            _call(self.client.update_weights, {"version": version})
            _call(self.client.finish_weight_update, str(version))
        update.wait("adopted")

    def shutdown(self) -> None:
        """Leave the job. Idempotent."""
        self._member.close()
        self._job.close()


def _job(init_info: WeightSyncTrainerInitInfo) -> Job:
    if init_info.job is not None or "WEIGHTSYNC_JOB" in os.environ:
        return Job.connect(init_info.job)
    if init_info.world_size > 1:
        raise ConfigError(
            "several trainer ranks must name one job: pass job=URL of weightsync.Job.start() on "
            "one of them, or set $WEIGHTSYNC_JOB"
        )
    return Job.start()


def _call(route: Any, *arguments: Any) -> None:
    """Call the engine; errors of ours come back as what they are."""
    try:
        route(*arguments)
    except WeightSyncError:
        raise
    except Exception as error:
        response = getattr(error, "response", None)  # requests keeps what the server said there
        raise decoded(f"{error} {getattr(response, 'text', '')}") or error from error
