"""What vLLM finds by its entry point: registers both halves of the backend `weightsync`."""

from __future__ import annotations

__all__ = ["BACKEND", "SERVE", "TESTED_VERSIONS", "register"]

BACKEND = "weightsync"

# How to start a server that can be attached, for messages.
SERVE = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --host 127.0.0.1 "
    """--weight-transfer-config '{"backend": "weightsync"}'"""
)

# Versions whose classes, reload helpers and routes are what this package expects. 0.32 runs in CI;
# 0.33 has no CPU build yet: its reload helpers are the same files, every name used was looked up.
TESTED_VERSIONS = ("0.32", "0.33")

_ENGINE = ("weightsync.integrations.vllm.engine", "WeightSyncEngine")
_TRAINER = ("weightsync.integrations.vllm.trainer", "WeightSyncTrainerEngine")


def register() -> None:
    """Register the backend with vLLM; called in its API server, engine core and every worker.

    Does nothing where it is registered already, or where vLLM has no weight transfer (before 0.28).
    """
    try:
        from vllm.distributed.weight_transfer import factory
    except ImportError:
        return
    for registry, (module, name) in (
        (factory.WeightTransferEngineFactory, _ENGINE),
        (factory.WeightTransferTrainerFactory, _TRAINER),
    ):
        if BACKEND not in registry._registry:
            registry.register_engine(BACKEND, module, name)
