"""Peer groups: barriers and small messages, over every fabric.

They are made of one-sided writes and arrival slots alone, between small targets that the members
export for the purpose. What they use again and again is safe because no copy of a write lands once
its operation is done (F1 in docs/protocol.md).
"""

from __future__ import annotations

from typing import Protocol

from weightsync.transport.base import Data, Operation

__all__ = ["PeerGroup"]


class PeerGroup(Protocol):
    """One member of a group whose members know each other by number. Context manager, thread-safe.

    Hand round the descriptors by other means, then `connect` to every other member. A member that
    was restarted needs a new group, of all: messages and rounds of the old one are not counted on.
    """

    @property
    def index(self) -> int:
        """Which member this is."""
        ...

    @property
    def size(self) -> int:
        """Members, this one included."""
        ...

    @property
    def message_bytes(self) -> int:
        """Longest message."""
        ...

    @property
    def window(self) -> int:
        """Messages of one member that can wait at another."""
        ...

    @property
    def is_open(self) -> bool:
        """False once closed."""
        ...

    @property
    def descriptor(self) -> bytes:
        """What `connect` of the others needs; carries a key, so treat it as a secret."""
        ...

    def connect(self, member: int, descriptor: bytes, timeout_s: float | None = 30.0) -> None:
        """Connect to another member; for this member itself nothing happens.

        Raises:
            ConfigError: Not the descriptor of that member of such a group, or connected already.
            TransferError: As `Engine.connect`; may be tried again.
        """
        ...

    def is_connected(self, member: int) -> bool:
        """Whether this member can talk to that one; True for itself."""
        ...

    def start_barrier(self) -> Operation:
        """Tell all others that this member has come, and go on.

        Returns:
            The round, `done` when all others have come to it too. Until this member has seen that,
            by `done` or `wait`, the same round is returned again. It says nothing about writes: no
            operation is done and no slot complete because of it, so wait for those first.

        Raises:
            ConfigError: A member is not connected; `.members` lists them.
        """
        ...

    def barrier(self, timeout_s: float | None) -> None:
        """Block until every member has come here as often as this one.

        Raises:
            ConfigError: A member is not connected; `.members` lists them.
            TransferTimeoutError: The message and `.members` name who has not come. The round goes
                on: a further call waits for the same one.
            PeerLostError: A member is gone; `.member` says which. The group is of no more use.
            FencedError: A member closed its group.
        """
        ...

    def send(self, member: int, data: Data, timeout_s: float | None) -> Operation:
        """Copy a message and start sending it; messages to one member arrive in order, once.

        Blocks while `window` messages wait at the receiver.

        Returns:
            The operation: done when the message lies in the receiver's mailbox. Whether anybody
            took it out is not known. `data` may be changed as soon as this returns.

        Raises:
            ConfigError: Longer than `message_bytes`, or the member is not connected.
            TransferTimeoutError: The receiver took nothing out; nothing was sent.
            TransferError: An earlier message failed, so that none can follow; of its class.
        """
        ...

    def try_send(self, member: int, data: Data) -> Operation | None:
        """As `send`, but None where that would block."""
        ...

    def can_send(self, member: int) -> bool:
        """Whether `try_send` would send, or raise."""
        ...

    def recv(self, timeout_s: float | None, member: int | None = None) -> tuple[int, bytes]:
        """Take the oldest message of one member, or of each in turn.

        Returns:
            Who sent it, and a copy of what.

        Raises:
            TransferTimeoutError: None came.
            ConfigError: The group is closed, or there is no such member.
            TransferError: What lies in the mailbox is no message; the group is of no more use.
        """
        ...

    def try_recv(self, member: int | None = None) -> tuple[int, bytes] | None:
        """As `recv`, but None where that would block."""
        ...

    def can_recv(self, member: int | None = None) -> bool:
        """Whether a message has arrived."""
        ...

    def close(self) -> None:
        """Hang up; what others still send fails at their side."""
        ...
