"""Every error that weightsync raises, grouped by what must be rebuilt to go on.

    WeightSyncError
    +-- ConfigError (ValueError)         wrong input, before anything is allocated
    +-- LayoutError                      the two sides do not describe the same weights
    |   +-- CoverageError                gap or overlap: tensor, box, side
    |   +-- DtypeMismatchError           no cast leads from the source's dtype to the sink's
    |   +-- UnknownTensorError           missing and extra names, both listed
    +-- PlanError                        a plan that contradicts itself
    |   +-- PlanBudgetError              a budget (staging, rows, chunks, memory) is too small
    |   +-- PlanDigestError              ranks hold different plans
    +-- TransferError                    .scope .rail .peer .tensor .version .errno
    |   +-- TransferTimeoutError (TimeoutError)
    |   +-- QueuePairError               rebuild the queue pair
    |   +-- RailError                    stop using the rail
    |   +-- PeerLostError                re-plan without the peer
    +-- MemoryRegistrationError          memory cannot be registered, mapped or attached
    +-- IntegrityError                   a digest or constant of received weights differs
    +-- VersionError
    |   +-- StaleVersionError            not newer than the last one
    |   +-- VersionAbortedError          the fleet decided abort; the old version serves
    |   +-- SourceMutatedError           weights changed while a version was open
    |   +-- TornError                    mixed bytes: fenced until a rewrite passes its digest
    +-- MembershipError
    |   +-- NoQuorumError                too few replicas by the deadline (.reason)
    |   +-- FencedError                  an old generation tried to go on
    +-- CheckpointError                  a stored checkpoint is not what it says
    +-- EncodingError                    a recipe cannot encode these values
    +-- AuthError                        a peer is not who it must be
    +-- NativeUnavailableError (ImportError)
    +-- InternalError                    our bug

A message says what happened, to what, and what to check next. `context` holds the
same facts as keyword attributes; all are optional, so that every class survives
`pickle` (Ray moves exceptions between processes).
"""

from __future__ import annotations

from typing import Any

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
    "LayoutError",
    "MembershipError",
    "MemoryRegistrationError",
    "NativeUnavailableError",
    "NoQuorumError",
    "PeerLostError",
    "PlanBudgetError",
    "PlanDigestError",
    "PlanError",
    "QueuePairError",
    "RailError",
    "SourceMutatedError",
    "StaleVersionError",
    "TornError",
    "TransferError",
    "TransferTimeoutError",
    "UnknownTensorError",
    "VersionAbortedError",
    "VersionError",
    "WeightSyncError",
]


class WeightSyncError(Exception):
    """Base of all errors of this package.

    Args:
        message: What happened, to what, and what to check next.
        context: Facts by name (`tensor`, `rank`, `rail`, `peer`, `version`, ...), readable as
            attributes of the same name; an absent fact reads as None.
    """

    def __init__(self, message: str = "", **context: Any) -> None:
        super().__init__(message)
        self.context = context

    def __getattr__(self, name: str) -> Any:
        # Only reached for names that are no real attribute: a fact that nobody stated is None.
        if name.startswith("_") or name == "context":
            raise AttributeError(name)
        return self.context.get(name)


class ConfigError(WeightSyncError, ValueError):
    """Wrong input; nothing was allocated or changed."""


class LayoutError(WeightSyncError):
    """The two sides do not describe the same weights."""


class CoverageError(LayoutError):
    """A gap or an overlap; `.tensor`, `.box` and `.side` say where."""


class DtypeMismatchError(LayoutError):
    """No supported cast leads from the source's dtype to the sink's."""


class UnknownTensorError(LayoutError):
    """Tensors that only one side has; `.missing` and `.extra` list them."""


class PlanError(WeightSyncError):
    """A plan contradicts itself or the manifests it was made from."""


class PlanBudgetError(PlanError):
    """A budget is too small; the message says by how much and the ways out."""


class PlanDigestError(PlanError):
    """Two ranks made different plans from what must be the same manifests."""


class TransferError(WeightSyncError):
    """Moving bytes failed. Raised only when the memory involved is quiescent."""


class TransferTimeoutError(TransferError, TimeoutError):
    """A deadline passed; names who was waited for."""


class QueuePairError(TransferError):
    """One queue pair must be rebuilt."""


class RailError(TransferError):
    """One rail must not be used any more."""


class PeerLostError(TransferError):
    """A peer is gone; re-plan without it."""


class MemoryRegistrationError(WeightSyncError):
    """Memory cannot be registered, mapped or attached; names the limit to raise."""


class IntegrityError(WeightSyncError):
    """A digest or a constant of received weights differs from what it must be."""


class VersionError(WeightSyncError):
    """Base of errors about one version of the weights."""


class StaleVersionError(VersionError):
    """The version is not newer than the last one of this job."""


class VersionAbortedError(VersionError):
    """The fleet decided to abort this version; the old one serves. `.reason` says why."""


class SourceMutatedError(VersionError):
    """Weights of a source changed while their version was open."""


class TornError(VersionError):
    """A replica holds two versions' bytes; fenced until a full rewrite passes its digest."""


class MembershipError(WeightSyncError):
    """Base of errors about who takes part."""


class NoQuorumError(MembershipError):
    """Too few replicas by the deadline; `.reason` names who is missing."""


class FencedError(MembershipError):
    """A member of an old generation tried to go on; it must join again."""


class CheckpointError(WeightSyncError):
    """A stored checkpoint is incomplete or not what its index says."""


class EncodingError(WeightSyncError):
    """A recipe cannot encode these values."""


class AuthError(WeightSyncError):
    """A peer is not who it must be."""


class NativeUnavailableError(WeightSyncError, ImportError):
    """The compiled extension is missing; run `make setup` or `pip install -e .`."""


class InternalError(WeightSyncError):
    """A bug of ours; please report it with the message."""
