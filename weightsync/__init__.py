"""weightsync: new weights from trainers to rollout engines, shard to shard, everywhere or nowhere.

Importing this package is cheap: public names are loaded when they are first used, so that neither
torch nor the compiled extension is needed to plan or to read a configuration.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightsync.client import (
        Job,
        Layout,
        Sink,
        SinkHooks,
        Source,
        Stage,
        Update,
        VersionReport,
    )
    from weightsync.dryrun import PlanReport, plan
    from weightsync.errors import (
        AuthError,
        CheckpointError,
        ConfigError,
        CoverageError,
        DtypeMismatchError,
        EncodingError,
        FencedError,
        IntegrityError,
        InternalError,
        LayoutError,
        MembershipError,
        MemoryRegistrationError,
        NativeUnavailableError,
        NoQuorumError,
        PeerLostError,
        PlanBudgetError,
        PlanDigestError,
        PlanError,
        QueuePairError,
        RailError,
        SourceMutatedError,
        StaleVersionError,
        TornError,
        TransferError,
        TransferTimeoutError,
        UnknownTensorError,
        VersionAbortedError,
        VersionError,
        WeightSyncError,
    )

__version__ = "0.1.0"

__all__ = [
    "AuthError",
    "CheckpointError",
    "ConfigError",
    "CoverageError",
    "DtypeMismatchError",
    "EncodingError",
    "FencedError",
    "IntegrityError",
    "InternalError",
    "Job",
    "Layout",
    "LayoutError",
    "MembershipError",
    "MemoryRegistrationError",
    "NativeUnavailableError",
    "NoQuorumError",
    "PeerLostError",
    "PlanBudgetError",
    "PlanDigestError",
    "PlanError",
    "PlanReport",
    "QueuePairError",
    "RailError",
    "Sink",
    "SinkHooks",
    "Source",
    "SourceMutatedError",
    "Stage",
    "StaleVersionError",
    "TornError",
    "TransferError",
    "TransferTimeoutError",
    "UnknownTensorError",
    "Update",
    "VersionAbortedError",
    "VersionError",
    "VersionReport",
    "WeightSyncError",
    "__version__",
    "plan",
]

_CLIENT_NAMES = ("Job", "Layout", "Sink", "SinkHooks", "Source", "Stage", "Update", "VersionReport")
_HOMES = dict.fromkeys(_CLIENT_NAMES, "weightsync.client") | dict.fromkeys(
    ("PlanReport", "plan"), "weightsync.dryrun"
)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES.get(name, "weightsync.errors")), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
