"""The contract of every fabric: reliable, unordered, one-sided writes with an immediate.

A sink exports a `Target`: ranges of its memory, and slots. A source connects to it and posts
writes; each may carry an immediate, `slot << chunk_bits | chunk`, that sets one bit at the sink
once the bytes are there. A slot is complete when all of its bits are set. No write is ordered with
respect to another, a write may arrive twice, and it may arrive before anybody waits for it.

Three words that must not be mixed up. An `Operation` is *done* at the source: its memory may change
again. A slot or counter is *complete* at the sink: the writes have arrived. Bytes are *visible* to
the sink's process after `Target.flush`. None of them follows from another on the other side. All
blocking calls release the GIL, take a timeout in seconds (None waits for ever) and end on Ctrl-C.

On top of writes: pages (`Remote.write_paged`), writes to several peers as one operation
(`Engine.scatter`), counters (`Target.expect_count`), barriers and messages (`group.PeerGroup`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from weightsync.transport.group import PeerGroup

__all__ = [
    "COUNTER",
    "NO_IMMEDIATE",
    "WRITE_COLUMNS",
    "Data",
    "Engine",
    "Lease",
    "Memory",
    "Operation",
    "Pages",
    "Remote",
    "Slots",
    "Target",
]

NO_IMMEDIATE = -1
WRITE_COLUMNS = ("src_address", "dst_offset", "nbytes", "immediate")

# In `Engine.export`, in place of a slot's chunks: the slot is a counter; see `Target.expect_count`.
COUNTER: Final = -(2**31)

Slots: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]]
Data: TypeAlias = bytes | bytearray | memoryview | npt.NDArray[np.uint8]


class Pages(NamedTuple):
    """Where pages of one side lie: page i begins at `offset + indices[i] * stride`.

    Attributes:
        indices: One number per page, 0 or more; repeated and unordered ones are allowed.
        stride: Bytes from one number to the next, 0 or more.
        offset: At a source an address, at a destination bytes of the sink's arena.
    """

    indices: Slots
    stride: int
    offset: int


class Memory(Protocol):
    """Zeroed sink-owned memory that a target can hand out; also a source, without registration.

    Supports the buffer protocol (writable bytes) and is freed with its last view. Its address never
    changes, not even when a fence puts other pages behind it.
    """

    @property
    def address(self) -> int:
        """First byte, in this process."""
        ...

    @property
    def nbytes(self) -> int:
        """Length in bytes, as asked for."""
        ...

    def __buffer__(self, flags: int, /) -> memoryview:
        """Writable bytes."""
        ...


class Lease(Protocol):
    """A promise that some memory stays mapped: writes may read what live leases hold."""

    @property
    def address(self) -> int:
        """First byte, in this process."""
        ...

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        ...

    def release(self, timeout_s: float | None = 10.0) -> None:
        """End the lease and drop its owner; a second call does nothing.

        Blocks while operations still read the memory.

        Raises:
            ConfigError: An open target exports the memory.
            TransferTimeoutError: Operations still read it at the deadline; the lease lives on.
        """
        ...


class Operation(Protocol):
    """One posted batch of writes, or several (`Engine.scatter`), or one barrier of one member.

    Of several batches: done when all are, also when one has failed; the error tells of all that
    failed and has the facts of the first.
    """

    @property
    def done(self) -> bool:
        """True when the sources may be changed again: after success, or after a failure."""
        ...

    @property
    def error(self) -> BaseException | None:
        """Why it failed; None while it goes on and after success."""
        ...

    @property
    def nbytes(self) -> int:
        """Payload of the whole batch."""
        ...

    @property
    def num_writes(self) -> int:
        """Rows of the batch."""
        ...

    def wait(self, timeout_s: float | None) -> None:
        """Block until done.

        Raises:
            TransferTimeoutError: Not done at the deadline. It goes on, and its sources are in use.
            PeerLostError: The sink is gone.
            FencedError: The sink fenced or closed the target.
            RailError: A rail lost writes; they may or may not land, or land later.
            MemoryRegistrationError: A sink that pulls may not read this process.
        """
        ...


class Target(Protocol):
    """Memory of a sink with slots, open for one generation of writers. Context manager."""

    @property
    def descriptor(self) -> bytes:
        """What `Engine.connect` of a source needs; carries a key, so treat it as a secret."""
        ...

    @property
    def generation(self) -> int:
        """As given to `export`."""
        ...

    @property
    def num_slots(self) -> int:
        """Slots, counters included, numbered from 0."""
        ...

    @property
    def is_open(self) -> bool:
        """False once fenced or closed."""
        ...

    def wait(self, slots: Slots, timeout_s: float | None) -> None:
        """Block until all of `slots` are complete. Arrived is not visible: see `flush`.

        Raises:
            TransferTimeoutError: Some are not; `.slots` lists them, `.slot` and `.chunks` name the
                first and what it lacks; a counter says where it stands.
            FencedError: The target was fenced meanwhile.
        """
        ...

    def is_complete(self, slots: Slots) -> bool:
        """Tell without blocking whether all of `slots` are complete."""
        ...

    def poll(self, timeout_s: float | None = 0.0) -> list[int]:
        """Slots that became complete since the last poll, in order; each once until its reset.

        Args:
            timeout_s: How long to block while there is none.

        Returns:
            Slot numbers; empty when the time passed.

        Raises:
            FencedError: The target was fenced.
        """
        ...

    def missing(self, slot: int) -> list[int]:
        """Chunk numbers that have not arrived in a slot; a counter has none (ConfigError)."""
        ...

    def reset(self, slots: Slots) -> None:
        """Forget what arrived in `slots`, for their next use.

        Only when nobody can still write them: their version is decided, and every source that could
        re-send was waited for or fenced. A counter gives up what it expected and keeps what came
        on top, so its writers may go on meanwhile.
        """
        ...

    def expect_count(self, counter: int, count: int) -> None:
        """Let a counter be complete from `count` arrivals on; then `wait`, `poll` and so on.

        Whatever arrived before this call counts, and no arrival is lost. Every write with an
        immediate of the counter's slot counts one, whatever its chunk number, and a write that
        arrives twice counts twice: for those who send everything once. Slots with chunks stay
        exact under re-sends.

        Args:
            counter: A slot that was exported as `COUNTER`.
            count: 1 or more. A second call replaces the first.

        Raises:
            ConfigError: The slot has chunks.
            FencedError: The target was fenced.
        """
        ...

    def count(self, counter: int) -> int:
        """Arrivals at a counter since the export, less what `reset` took away."""
        ...

    def flush(self) -> None:
        """Make the bytes of all complete slots readable by this process."""
        ...

    def fence(self, discard: bool = False) -> None:
        """Cut off all writers: after it returns no byte changes through this target any more.

        Never waits for a peer. What had arrived is void; export again, with a new generation.

        Args:
            discard: The contents need not survive. Shared memory then reads as zero, without the
                copy that keeping it costs.
        """
        ...

    def close(self) -> None:
        """Let go of memory and sources. Not a fence: a source may still write what it mapped."""
        ...

    def counters(self) -> dict[str, int]:
        """What arrived: arrivals, bytes_arrived, duplicates, protocol_errors, wakeups.

        `bytes_arrived` is what this side sees: all bytes, but of writes that NICs place (`verbs`,
        `ofi`) only those with an immediate, and the last piece of a row that was cut.
        """
        ...


class Remote(Protocol):
    """A source's connection to one target. Context manager."""

    @property
    def peer(self) -> str:
        """Who it is, for messages."""
        ...

    @property
    def generation(self) -> int:
        """Generation of the target."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes from the start of the sink's arena to the end of its last range."""
        ...

    @property
    def address(self) -> int | None:
        """Where arena offset 0 is mapped in this process, valid until `close`; None if it is not.

        Bytes may be stored there, inside the exported ranges only, and announced with `notify`.
        """
        ...

    @property
    def is_open(self) -> bool:
        """False once closed."""
        ...

    def post(self, writes: npt.NDArray[np.int64]) -> Operation:
        """Start a batch of writes.

        Args:
            writes: (W, 4) int64, C-contiguous: source address, destination offset in the arena,
                bytes, immediate or -1. The table is copied. Zero bytes are allowed.

        Returns:
            The operation; it may be done already. Failures of the peer are reported by it.

        Raises:
            ConfigError: A row leaves the exported ranges or reads memory without a lease. Nothing
                of the batch was written.

        Cost: some tens of nanoseconds a row; no allocation, lock or system call per row.
        """
        ...

    def write_paged(
        self,
        page_bytes: int,
        source: Pages,
        destination: Pages,
        immediates: Slots | int | None = None,
    ) -> Operation:
        """Start one write per page; a `post` whose rows are made without a Python loop.

        Args:
            page_bytes: Length of every page.
            source: Pages to read; its offset is an address.
            destination: As many pages of the sink's arena. Where two overlap, either may win.
            immediates: One for each page (-1: none); or a number, and page i carries that plus i:
                consecutive chunks of one slot; or None.

        Returns:
            The operation, done when all pages are.

        Raises:
            ConfigError: As `post`, `.row` being the page; or lists of different lengths, or
                consecutive chunks that leave the slot. Nothing was written.
        """
        ...

    def notify(self, immediates: Slots, nbytes: int = 0) -> None:
        """Announce bytes that this process stored through `address`.

        Args:
            immediates: One for each chunk that is completely there.
            nbytes: How much was stored, for the counters.

        Raises:
            ConfigError: Nothing is mapped here.
            FencedError: The sink fenced or closed the target; the bytes went nowhere.
            PeerLostError: The sink is gone.
        """
        ...

    def counters(self) -> dict[str, int]:
        """What was sent: operations, failed_operations, writes, bytes_written, notifies."""
        ...

    def close(self) -> None:
        """Fail what is in flight, unmap the sink's memory, and hang up."""
        ...


class Engine(Protocol):
    """All targets and remotes of one process over one fabric. Context manager, thread-safe.

    No rank, no master: an engine may be a source, a sink or both, for any number of peers.
    """

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def fabric(self) -> str:
        """`local`, `sim`, ..."""
        ...

    @property
    def is_open(self) -> bool:
        """False once closed."""
        ...

    @property
    def is_driven(self) -> bool:
        """True when nothing moves outside waits and `drive` (sim)."""
        ...

    @property
    def progress_fd(self) -> int:
        """Descriptor that becomes readable on progress while armed; see `progress.Progress`."""
        ...

    def allocate(self, nbytes: int, *, prefault: bool = True) -> Memory:
        """Allocate zeroed memory that other processes can be given.

        Args:
            nbytes: At least 1.
            prefault: Make every page present now; without it a full machine shows as a signal.

        Raises:
            MemoryRegistrationError: Not enough memory.
        """
        ...

    def register(self, address: int, nbytes: int, owner: object = None) -> Lease:
        """Allow writes to read [address, address + nbytes), and keep `owner` alive meanwhile."""
        ...

    def export(
        self,
        ranges: Sequence[tuple[int, Lease | Memory, int, int]],
        slots: Slots,
        chunk_bits: int,
        generation: int,
    ) -> Target:
        """Open memory for writers.

        Args:
            ranges: (arena offset, memory, offset in it, bytes); disjoint in the arena. `local`: all
                of them `Memory`: sources write by themselves (push). One `Lease` among them: this
                engine reads the sources' memory (pull).
            slots: Chunks of each slot, 1 .. 2**chunk_bits, or `COUNTER`.
            chunk_bits: Low bits of an immediate that number the chunk; the rest is the slot.
            generation: Names this incarnation of the sink in messages and checks.

        Raises:
            ConfigError: Overlapping ranges, bad slots, or memory that another open target has.
        """
        ...

    def connect(self, descriptor: bytes, timeout_s: float | None = 30.0) -> Remote:
        """Connect to a target and map what can be mapped.

        Raises:
            ConfigError: Not a descriptor of this fabric and version.
            PeerLostError: Nobody listens there any more.
            FencedError: The target of that generation is gone.
            TransferTimeoutError: The sink does not answer.
            AuthError: Another user, or a forged descriptor.
        """
        ...

    def scatter(
        self, remotes: Sequence[Remote], writes: npt.NDArray[np.int64], peers: Slots
    ) -> Operation:
        """Start writes to several peers as one operation.

        Args:
            remotes: Connections of this engine.
            writes: As of `Remote.post`.
            peers: For each row, where it goes: a position in `remotes`.

        Returns:
            The operation: done when the writes to every peer are, failed ones included. Its error
            names each peer that failed, `.peer` the first, `.remotes` lists their positions.

        Raises:
            ConfigError: As `Remote.post`, for any row; `.row` is its number in `writes`. Nothing
                was written to any peer.
        """
        ...

    def open_group(
        self,
        index: int,
        size: int,
        *,
        generation: int = 0,
        message_bytes: int = 4096,
        window: int = 8,
    ) -> PeerGroup:
        """Open this process' part of a group of peers.

        All members give the same `size`, `message_bytes` and `window`. Each takes
        2 * (size - 1) * window * (message_bytes + 16) bytes of memory, rounded up.

        Args:
            index: Which member this is, 0 .. size - 1.
            size: Members, 1 .. 4096.
            generation: Names this incarnation of the group in messages.
            message_bytes: Longest message, at most 65536.
            window: Messages that one member can have waiting at another, 1 .. 1024.

        Raises:
            ConfigError: Numbers out of range.
            MemoryRegistrationError: Not enough memory.
        """
        ...

    def counters(self) -> dict[str, int]:
        """Sums over all targets and remotes since the engine was opened."""
        ...

    def rails(self) -> list[dict[str, Any]]:
        """One entry per rail (NIC and its path), none for fabrics that use no NIC.

        `name`, `address`; `state`: of the worst connection that this engine opened over it: idle
        (there is none), active, probing, quarantined or fencing; `bytes_out` and `bytes_in`:
        payload since the engine was opened, re-sent bytes included; `outstanding`: bytes that were
        sent and not yet answered.
        """
        ...

    def arm(self, on: bool) -> None:
        """Ask for `progress_fd` to be written; a system call per progress, none while off."""
        ...

    def drain_progress(self) -> None:
        """Make `progress_fd` unreadable again."""
        ...

    def drive(self) -> bool:
        """Move a driven fabric by one event; True when something moved."""
        ...

    def close(self) -> None:
        """Close remotes and targets, end the threads. Memory stays as long as it is referenced."""
        ...
