"""The sink's side of one version: memory to write into, arrivals, digests, applying."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from weightsync import failpoints
from weightsync.encodings import kernels
from weightsync.errors import IntegrityError, InternalError, PlanBudgetError, TransferTimeoutError
from weightsync.ir import Arena
from weightsync.ir.dtypes import ITEMSIZE, Dtype
from weightsync.ir.plan import Plan
from weightsync.runtime.forwarder import Arrivals
from weightsync.runtime.program import InboundBucket, chunk_bits, constants, inbound_buckets
from weightsync.transport.base import Engine, Lease, Memory, Target

__all__ = ["Install", "Mode", "Receiver"]

Int64 = npt.NDArray[np.int64]
Mode = Literal["staged", "in_place"]
# Makes staged buffers live: gets their addresses, in manifest order.
Install = Callable[[Int64], None]

_POLL_S = 0.005  # how often a waiting sink looks for a cancel
_COMPARE_S = (0.0002, 0.005)  # between looks for the sources' digests: at first, and at most
_MAX_NAMED = 3  # tensors that an error lists


class Receiver:
    """Owns the memory that one sink rank receives into.

    In `staged` mode that is fabric memory laid out as the arena, and the live weights change in
    `apply` only. In `in_place` mode the arena is the live weights themselves.

    Args:
        fabric: Where memory is registered and exported.
        live: Address of every buffer of this rank, in manifest order.
        live_owner: Keeps those buffers alive.
        mode: See above.
        threads: Threads of copy and digest kernels.
        install: Staged mode only: called by `apply` instead of copying to `live`.
    """

    def __init__(
        self,
        fabric: Engine,
        *,
        live: Int64,
        live_owner: object,
        mode: Mode,
        threads: int = 1,
        install: Install | None = None,
    ) -> None:
        self.mode = mode
        self._install = install
        self.fabric = fabric
        self._live = live
        self._owner = live_owner
        self.threads = threads
        self._memory: Memory | None = None
        self._leases: list[Lease] = []
        self._target: Target | None = None
        self._generation = 0
        self._used_parities: set[int] = set()
        self._filled: dict[int, int] = {}  # digests of the last complete version, by slot
        self._live_digests: dict[int, int] | None = None  # in place: of what may be served
        self.buckets: list[InboundBucket] = []
        self.arrivals = Arrivals()  # of the open version, for those who pass it on
        self.verify_s = 0.0  # digests of the last version

    def bind(self, plan: Plan, sink: int) -> bytes:
        """Take on a plan and export this rank's memory for it.

        Returns:
            The descriptor that sources connect to.

        Raises:
            PlanBudgetError: Too little memory for staged mode.
            MemoryRegistrationError: The fabric cannot register the memory.
        """
        self._close_target()
        self.plan, self.sink = plan, sink
        self.buckets = inbound_buckets(plan, sink)
        self._arena = Arena(plan.sink, sink)
        mine = self._arena.buffers
        items = ITEMSIZE[plan.sink.buffers.dtype[mine]]
        self._sizes = plan.sink.buffers.numel[mine] * items
        self._constants = constants(plan, sink)
        ranges: list[tuple[int, Lease | Memory, int, int]] = []
        if self.mode == "staged":
            memory = self._staging()
            ranges.append((0, memory, 0, self._arena.nbytes))
        else:
            if not self._leases:
                self._leases = [
                    self.fabric.register(int(address), int(size), self._owner)
                    for address, size in zip(self._live, self._sizes, strict=True)
                ]
            for offset, lease, size in zip(
                self._arena.offset_bytes, self._leases, self._sizes, strict=True
            ):
                ranges.append((int(offset), lease, 0, int(size)))
        counts = np.array([b.num_chunks for b in self.buckets], np.int32)
        self._generation += 1
        self._target = self.fabric.export(
            ranges, np.concatenate([counts, counts]), chunk_bits(plan), self._generation
        )
        self._used_parities = set()
        self._live_digests = None
        return self._target.descriptor

    @property
    def num_slots(self) -> int:
        """Buckets of one version."""
        return len(self.buckets)

    def fill(
        self,
        version: int,
        expected: Callable[[int], npt.NDArray[np.uint64] | None],
        *,
        deadline: float,
        cancel: threading.Event,
    ) -> int | None:
        """Wait for every bucket of `version` and check what arrived.

        Args:
            version: Its parity chooses the slots.
            expected: Digests of one sender's buckets to this sink, or None while not known.
            deadline: `time.monotonic()` value.
            cancel: Ends the wait early; returns None.

        Returns:
            Bytes received and verified.

        Raises:
            IntegrityError: A digest or a constant differs; names bucket, source and tensors.
            TransferTimeoutError: The deadline passed; names missing buckets.
        """
        target = self._target
        assert target is not None
        base = (version % 2) * self.num_slots
        waiting = {base + bucket.slot: bucket for bucket in self.buckets}
        found: dict[int, int] = {}
        self.verify_s = 0.0
        arrived: deque[InboundBucket] = deque()
        while waiting or arrived:
            # While there is something to digest it looks, but does not wait: others may wait for
            # what this sink passes on.
            done = target.poll(0.0 if arrived else _POLL_S) if waiting else []
            done = [slot for slot in done if slot in waiting]
            if done:
                target.flush()  # arrived is not visible
                arrived += [waiting.pop(slot) for slot in done]
                self.arrivals.add([slot - base for slot in done])
            if not arrived:
                if cancel.is_set():
                    return None
                if time.monotonic() >= deadline:
                    self._raise_missing(target, waiting)
                continue
            bucket = arrived.popleft()
            failpoints.hit("sink.filling")
            began = time.monotonic()
            found[bucket.slot] = self._digest(bucket)
            self.verify_s += time.monotonic() - began
        if not self._constants_hold():
            raise IntegrityError(
                f"padding of {self.plan.sink.ranks[self.sink]} was overwritten", rank=self.sink
            )
        pause_s = _COMPARE_S[0]  # usually they are here, or will be in a moment
        while not self._compare(found, expected):
            if cancel.wait(pause_s):
                return None
            pause_s = min(2 * pause_s, _COMPARE_S[1])
            if time.monotonic() >= deadline:
                raise TransferTimeoutError(
                    f"version {version}: every byte arrived, but not every source reported its "
                    "digests in time",
                    version=version,
                )
        self._filled = found
        return int(sum(bucket.nbytes for bucket in self.buckets))

    def open_slots(self, version: int) -> None:
        """Make the slots of `version` empty; the version that used them before is closed."""
        if self.mode == "in_place" and self._live_digests is None:
            self._live_digests = self._digest_all()
        self.arrivals.clear()
        parity = version % 2
        if parity in self._used_parities:
            assert self._target is not None
            first = parity * self.num_slots
            self._target.reset(np.arange(first, first + self.num_slots, dtype=np.int32))
        self._used_parities.add(parity)

    def bases(self) -> Int64:
        """Address of every sink buffer of the plan, for passing on; those of other ranks are 0."""
        bases = np.zeros(len(self.plan.sink.buffers), np.int64)
        offsets = self._arena.offset_bytes.reshape(-1, 1)
        bases[self._arena.buffers] = self._bases(offsets)
        return bases

    def is_untouched(self) -> bool:
        """Whether live weights still are what they were when the slots were opened.

        Only a digest can tell: a write that was cut off changes bytes without arriving. Call
        after `fence`. Reads all weights once.
        """
        if self.mode == "staged":
            return True
        before, after = self._live_digests, self._digest_all()
        return before == after and self._constants_hold()

    def apply(self) -> None:
        """Make the staged weights the live ones; nothing to do in place. Blocks."""
        if self.mode == "in_place":
            self._live_digests = self._filled  # only now the live weights are meant to be these
            return
        if self._memory is None:
            raise InternalError("there is nothing staged to apply; it was fenced")
        staged: Int64 = self._memory.address + self._arena.offset_bytes
        if self._install is not None:
            self._install(staged)
            return
        table = np.zeros((len(self._sizes), 16), np.int64)
        table[:, 0] = staged
        table[:, 1] = self._live
        table[:, 2:4] = int(Dtype.U8)
        table[:, 4:8] = 1
        table[:, 7] = self._sizes
        table[:, 11] = 1
        table[:, 15] = 1
        kernels.pack(table[self._sizes > 0], self.threads)

    def fence(self) -> None:
        """After this no write that is on its way can change memory that is used again."""
        if self._target is not None:
            self._target.fence(discard=True)
            self._close_target()
            self._memory = None

    def close(self) -> None:
        """Fence, then give all memory back."""
        self.fence()
        for lease in self._leases:
            lease.release()
        self._leases = []

    # ---- inside ----

    def _staging(self) -> Memory:
        size = max(1, self._arena.nbytes)
        if self._memory is not None and self._memory.nbytes != size:
            self._memory = None
        if self._memory is None:
            _require_memory(size)
            self._memory = self.fabric.allocate(size)
            table = self._constants.table.copy()
            table[:, 0] += self._memory.address
            kernels.fill(table, self._constants.codes, self.threads)
        return self._memory

    def _bases(self, table: Int64) -> Int64:
        """Absolute addresses of a table whose first column is an arena offset."""
        if self.mode == "staged":
            assert self._memory is not None
            return table[:, 0] + self._memory.address
        buffer = np.searchsorted(self._arena.offset_bytes, table[:, 0], side="right") - 1
        return self._live[buffer] + table[:, 0] - self._arena.offset_bytes[buffer]

    def _digest(self, bucket: InboundBucket) -> int:
        table = bucket.digest.copy()
        table[:, 0] = self._bases(table)
        group = np.zeros(len(table), np.int32)
        return int(kernels.digest(table, group, 1, self.threads)[0])

    def _compare(
        self,
        found: dict[int, int],
        expected: Callable[[int], npt.NDArray[np.uint64] | None],
    ) -> bool:
        """Check every bucket; False while some sender has not reported."""
        by_sender: dict[int, list[InboundBucket]] = {}
        for bucket in self.buckets:
            by_sender.setdefault(bucket.sender, []).append(bucket)
        for sender, buckets in by_sender.items():
            values = expected(sender)
            if values is None:
                return False
            if len(values) != len(buckets):
                raise IntegrityError(
                    f"{self.plan.sender_label(sender)} reported {len(values)} digests for "
                    f"{len(buckets)} buckets"
                )
            for bucket, value in zip(buckets, values.tolist(), strict=True):
                if found[bucket.slot] != value:
                    names = [self.plan.sink.tensors.names[t] for t in bucket.tensors.tolist()]
                    more = f" and {len(names) - _MAX_NAMED} more" * (len(names) > _MAX_NAMED)
                    raise IntegrityError(
                        f"bucket {bucket.bucket} from {self.plan.sender_label(sender)} holds other "
                        f"values than were read there: {', '.join(names[:_MAX_NAMED])}{more}",
                        tensor=names[0] if len(names) == 1 else None,
                        rank=self.sink,
                    )
        return True

    def _digest_all(self) -> dict[int, int]:
        return {bucket.slot: self._digest(bucket) for bucket in self.buckets}

    def _constants_hold(self) -> bool:
        table = self._constants.table.copy()
        table[:, 0] = self._bases(table)
        return kernels.check_fill(table, self._constants.codes, self.threads) < 0

    def _raise_missing(self, target: Target, waiting: dict[int, InboundBucket]) -> None:
        texts = []
        for slot, bucket in list(waiting.items())[:_MAX_NAMED]:
            missing = len(target.missing(slot))
            texts.append(
                f"bucket {bucket.bucket} from {self.plan.sender_label(bucket.sender)} "
                f"({missing} of {bucket.num_chunks} chunks missing)"
            )
        raise TransferTimeoutError(
            f"{len(waiting)} bucket(s) did not arrive in time: {'; '.join(texts)}"
        )

    def _close_target(self) -> None:
        if self._target is not None:
            self._target.close()
            self._target = None


def available_bytes() -> int:
    """Memory that this host can still give out, as the kernel estimates it."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _require_memory(nbytes: int) -> None:
    """Staged mode never falls back: say what is missing before anything is allocated."""
    available = available_bytes()
    if nbytes > available:
        raise PlanBudgetError(
            f"staged mode needs {nbytes} bytes beside the live weights, {nbytes - available} more "
            f"than the {available} available; use mode='in_place', more memory, or a larger "
            "tensor-parallel degree",
            missing_bytes=nbytes - available,
        )
