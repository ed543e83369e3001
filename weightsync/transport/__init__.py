"""One-sided writes over several fabrics, behind one contract (`base`)."""

from weightsync.transport.base import Engine, Lease, Memory, Operation, Remote, Target
from weightsync.transport.fabrics import FABRICS, open_fabric

__all__ = [
    "FABRICS",
    "Engine",
    "Lease",
    "Memory",
    "Operation",
    "Remote",
    "Target",
    "open_fabric",
]
