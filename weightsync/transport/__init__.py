"""One-sided writes over several fabrics, behind one contract (`base`)."""

from weightsync.transport.base import (
    COUNTER,
    Engine,
    Lease,
    Memory,
    Operation,
    Pages,
    Remote,
    Target,
)
from weightsync.transport.fabrics import FABRICS, open_fabric
from weightsync.transport.group import PeerGroup

__all__ = [
    "COUNTER",
    "FABRICS",
    "Engine",
    "Lease",
    "Memory",
    "Operation",
    "Pages",
    "PeerGroup",
    "Remote",
    "Target",
    "open_fabric",
]
