"""Native half of weightsync: fabric engine (weightsync.transport) and CPU kernels (encodings).

What the engine's methods do is described once, in `weightsync/transport/base.py`.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from weightsync.transport import base

# --- engine: see weightsync/transport/base.py

class Memory:
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Lease:
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def release(self, timeout_s: float | None = 10.0) -> None: ...

class Operation:
    @property
    def done(self) -> bool: ...
    @property
    def error(self) -> BaseException | None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def num_writes(self) -> int: ...
    def wait(self, timeout_s: float | None) -> None: ...

class ScatterOperation:
    @property
    def done(self) -> bool: ...
    @property
    def error(self) -> BaseException | None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def num_writes(self) -> int: ...
    def wait(self, timeout_s: float | None) -> None: ...

class BarrierRound:
    @property
    def number(self) -> int: ...
    @property
    def done(self) -> bool: ...
    @property
    def error(self) -> BaseException | None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def num_writes(self) -> int: ...
    def wait(self, timeout_s: float | None) -> None: ...

class PeerGroup:
    @property
    def index(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def message_bytes(self) -> int: ...
    @property
    def window(self) -> int: ...
    @property
    def is_open(self) -> bool: ...
    @property
    def descriptor(self) -> bytes: ...
    def connect(self, member: int, descriptor: bytes, timeout_s: float | None = 30.0) -> None: ...
    def is_connected(self, member: int) -> bool: ...
    def start_barrier(self) -> BarrierRound: ...
    def barrier(self, timeout_s: float | None) -> None: ...
    def send(self, member: int, data: base.Data, timeout_s: float | None) -> Operation: ...
    def try_send(self, member: int, data: base.Data) -> Operation | None: ...
    def can_send(self, member: int) -> bool: ...
    def recv(self, timeout_s: float | None, member: int | None = None) -> tuple[int, bytes]: ...
    def try_recv(self, member: int | None = None) -> tuple[int, bytes] | None: ...
    def can_recv(self, member: int | None = None) -> bool: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

class Target:
    @property
    def descriptor(self) -> bytes: ...
    @property
    def generation(self) -> int: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def is_open(self) -> bool: ...
    def wait(self, slots: base.Slots, timeout_s: float | None) -> None: ...
    def is_complete(self, slots: base.Slots) -> bool: ...
    def poll(self, timeout_s: float | None = 0.0) -> list[int]: ...
    def missing(self, slot: int) -> list[int]: ...
    def reset(self, slots: base.Slots) -> None: ...
    def expect_count(self, counter: int, count: int) -> None: ...
    def count(self, counter: int) -> int: ...
    def flush(self) -> None: ...
    def fence(self, discard: bool = False) -> None: ...
    def close(self) -> None: ...
    def counters(self) -> dict[str, int]: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

class Remote:
    @property
    def peer(self) -> str: ...
    @property
    def generation(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def address(self) -> int | None: ...
    @property
    def is_open(self) -> bool: ...
    def post(self, writes: npt.NDArray[np.int64]) -> Operation: ...
    def write_paged(
        self,
        page_bytes: int,
        source: base.Pages,
        destination: base.Pages,
        immediates: base.Slots | int | None = None,
    ) -> Operation: ...
    def notify(self, immediates: base.Slots, nbytes: int = 0) -> None: ...
    def counters(self) -> dict[str, int]: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

class Engine:
    @property
    def name(self) -> str: ...
    @property
    def fabric(self) -> str: ...
    @property
    def is_open(self) -> bool: ...
    @property
    def is_driven(self) -> bool: ...
    @property
    def progress_fd(self) -> int: ...
    def allocate(self, nbytes: int, *, prefault: bool = True) -> Memory: ...
    def register(self, address: int, nbytes: int, owner: object = None) -> Lease: ...
    def export(
        self,
        ranges: Sequence[tuple[int, base.Lease | base.Memory, int, int]],
        slots: base.Slots,
        chunk_bits: int,
        generation: int,
    ) -> Target: ...
    def connect(self, descriptor: bytes, timeout_s: float | None = 30.0) -> Remote: ...
    def scatter(
        self,
        remotes: Sequence[base.Remote],
        writes: npt.NDArray[np.int64],
        peers: base.Slots,
    ) -> ScatterOperation: ...
    def open_group(
        self,
        index: int,
        size: int,
        *,
        generation: int = 0,
        message_bytes: int = 4096,
        window: int = 8,
    ) -> PeerGroup: ...
    def counters(self) -> dict[str, int]: ...
    def rails(self) -> list[dict[str, Any]]: ...
    def arm(self, on: bool) -> None: ...
    def drain_progress(self) -> None: ...
    def drive(self) -> bool: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

class SimWire:
    """Wire of the sim fabric.

    Args:
        seed: Decides every fault; equal seeds and calls give equal runs.
        blocking: A wait that finds nothing in flight blocks in real time until another thread
            posts. False: it moves the virtual time to its deadline and gives up at once.
    """

    def __init__(self, seed: int = 0, *, blocking: bool = True) -> None: ...
    def open(self, name: str) -> Engine:
        """Attach an engine; names are distinct on one wire."""

    def set_faults(
        self,
        engine: str = "",
        *,
        reorder: bool = False,
        delay_s: float = 0.0,
        duplicate: float = 0.0,
        drop: float = 0.0,
        late: float = 0.0,
        late_s: float = 1.0,
        invisible: float = 0.0,
        rails: int = 1,
        resend: float = 0.0,
    ) -> None:
        """Set the faults of the writes that an engine posts from now on.

        Args:
            engine: Name; empty means every engine that has no faults of its own.
            reorder: Deliver in any order.
            delay_s: Each write takes up to this much longer, in virtual seconds; in order unless
                `reorder`.
            duplicate: Chance that a write lands a second time, up to `late_s` later, with the bytes
                of the first.
            drop: Chance that a write never lands; its operation fails with RailError.
            late: Chance that its operation fails with RailError, and it lands `late_s` after that.
            late_s: Virtual seconds.
            invisible: Chance that a write is counted before its bytes are there; `Target.flush`
                brings them.
            rails: Writes take turns on this many rails; order is kept on each, if at all.
            resend: Chance that a write lands but is not acknowledged, and is sent again on the next
                rail, up to `late_s` later. Its operation is done when the second copy has landed.
        """

    def freeze(self, engine: str, rail: int | None = None) -> None:
        """Hold the writes of an engine, or of one of its rails, until `thaw`.

        They land then, whatever happened meanwhile.
        """

    def thaw(self, engine: str) -> None:
        """Let a frozen engine go on, with all its rails."""

    def kill(self, engine: str) -> None:
        """End an engine: its writes vanish, and writes to it fail with PeerLostError."""

    def step(self) -> bool:
        """Deliver the next event; False when nothing can move."""

    def run_until(self, time_s: float) -> None:
        """Deliver everything due up to a moment and move the time there."""

    def run(self) -> None:
        """Deliver until nothing can move."""

    @property
    def now_s(self) -> float:
        """Virtual time."""

    @property
    def num_pending(self) -> int:
        """Events on their way; without held ones."""

    def counts(self) -> dict[str, int]:
        """How often each fault really happened."""

def open_cuda_ipc(name: str, num_threads: int) -> Engine: ...
def open_local(name: str, num_threads: int) -> Engine: ...

class Near:
    """A fabric that goes before another one inside a host; "" is none."""

    def __init__(self, fabric: str, num_threads: int) -> None: ...

def open_ofi(
    name: str,
    provider: str,
    addresses: list[str],
    domains: list[str],
    trusted_network: bool,
    register_sources: bool,
    near: Near,
) -> Engine: ...
def open_tcp(
    name: str, addresses: Sequence[str], num_streams: int, window_bytes: int, near: Near
) -> Engine: ...
def open_verbs(
    name: str,
    devices: list[str],
    addresses: list[str],
    gid_index: int,
    pkey: int,
    traffic_class: int,
    service_level: int,
    mtu_bytes: int,
    timeout: int,
    retry_count: int,
    relaxed_ordering: bool,
    near: Near,
) -> Engine: ...
def verbs_problem() -> str:
    """Why libibverbs cannot be used, or ""."""

def rdma_ports(sysfs: str = "/sys") -> list[dict[str, Any]]:
    """Fields as weightsync.transport.verbs.RdmaPort."""

def live_object_count() -> int: ...
def live_objects() -> dict[str, int]: ...

# --- kernels
#
# Tables hold absolute addresses of this process and are C-contiguous; nothing is converted. Shapes,
# dtypes and codes are checked (ConfigError; a cast that does not exist is DtypeMismatchError), the
# addresses cannot be. The GIL is released. Dtypes are the codes of weightsync.ir.dtypes.Dtype.
# `isa` is for tests: "auto" or one of kernel_info()["isas"].

def pack(rows: npt.NDArray[np.int64], threads: int = 1, *, isa: str = "auto") -> None:
    """Copy strided boxes, cast where dtypes differ.

    Args:
        rows: (R, 16): src_address, dst_address, src_dtype, dst_dtype, n[4], src_stride_bytes[4],
            dst_stride_bytes[4].
        threads: At most this many, this one included.
        isa: Instruction set.
    """

def fill(rows: npt.NDArray[np.int64], codes: npt.NDArray[np.uint64], threads: int = 1) -> None:
    """Write codes[r] into every element of row r.

    Args:
        rows: (R, 10): dst_address, dtype, n[4], stride_bytes[4].
        codes: (R,) stored bits of one element, zero-extended.
        threads: At most this many, this one included.
    """

def check_fill(rows: npt.NDArray[np.int64], codes: npt.NDArray[np.uint64], threads: int = 1) -> int:
    """Index of the first row (as `fill`) with an element unlike its code; -1 if there is none."""

def digest(
    rows: npt.NDArray[np.int64],
    group: npt.NDArray[np.int32],
    num_groups: int,
    threads: int = 1,
    *,
    isa: str = "auto",
) -> npt.NDArray[np.uint64]:
    """Digests of boxes, added up by group.

    Args:
        rows: (R, 19): address, itemsize, seed, lo[4], step[4], n[4], stride_bytes[4].
        group: (R,) where each row counts, 0 .. num_groups - 1.
        num_groups: Length of the result.
        threads: At most this many, this one included.
        isa: Instruction set.

    Returns:
        (num_groups,) digests as weightsync.encodings.digest defines them.
    """

def pack_digest(
    rows: npt.NDArray[np.int64],
    keys: npt.NDArray[np.int64],
    group: npt.NDArray[np.int32],
    num_groups: int,
    threads: int = 1,
    *,
    isa: str = "auto",
) -> npt.NDArray[np.uint64]:
    """Pack, and digest what was written, in one pass over memory.

    Args:
        rows: (R, 16) as of `pack`.
        keys: (R, 9): seed, lo[4], step[4] of each row's destination.
        group: (R,) as of `digest`.
        num_groups: Length of the result.
        threads: At most this many, this one included.
        isa: Instruction set.

    Returns:
        (num_groups,) digests.
    """

def kernel_info() -> dict[str, Any]:
    """`isa` in use, all `isas` of this machine, `num_processors`."""
