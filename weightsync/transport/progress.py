"""Operations, slots, barriers and messages as asyncio futures."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from types import TracebackType

from weightsync.errors import TransferTimeoutError, WeightSyncError
from weightsync.transport.base import Data, Engine, Operation, Slots, Target
from weightsync.transport.group import PeerGroup

__all__ = ["Progress"]

# A source that is killed between its last bit and its wake-up wakes nobody: look again this often.
_SWEEP_S = 0.25
# A driven fabric with nothing in flight waits for other tasks to post.
_IDLE_DRIVE_S = 0.001
# Events per turn of the loop: other tasks go on meanwhile.
_DRIVE_BATCH = 64


class Progress:
    """Watches one engine on one event loop; nothing blocks and nothing runs while nobody waits.

    Use it from the loop's thread. Context manager; `close` cancels what is pending.

    Args:
        engine: What to watch; at most one `Progress` for each engine at a time.
        loop: None takes the running loop.
    """

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop() if loop is None else loop
        self._pending: dict[asyncio.Future[None], Callable[[], bool]] = {}
        # Sends of one group to one member keep their order.
        self._turns: weakref.WeakValueDictionary[tuple[int, int], asyncio.Lock]
        self._turns = weakref.WeakValueDictionary()
        self._timer: asyncio.TimerHandle | None = None
        self._is_armed = False

    def operation(self, operation: Operation) -> asyncio.Future[None]:
        """Future of an operation or barrier round being done; fails with its error."""

        def is_done() -> bool:
            if not operation.done:
                return False
            if operation.error is not None:
                raise operation.error
            return True

        return self._watch(is_done)

    def slots(self, target: Target, slots: Slots) -> asyncio.Future[None]:
        """Future of the completion of all `slots`; fails when the target is fenced or closed.

        Complete is arrived, not visible: see `Target.flush`.
        """
        return self._watch(lambda: target.is_complete(slots))

    async def wait_operation(self, operation: Operation, timeout_s: float | None) -> None:
        """Await an operation; raises as `Operation.wait` does."""
        try:
            await asyncio.wait_for(self.operation(operation), timeout_s)
        except TransferTimeoutError:
            raise
        except TimeoutError:
            operation.wait(0.0)  # raises the error that names what is missing

    async def wait_slots(self, target: Target, slots: Slots, timeout_s: float | None) -> None:
        """Await slots; raises as `Target.wait` does."""
        try:
            await asyncio.wait_for(self.slots(target, slots), timeout_s)
        except TransferTimeoutError:
            raise
        except TimeoutError:
            target.wait(slots, 0.0)

    async def barrier(self, group: PeerGroup, timeout_s: float | None) -> None:
        """Await all members of a group; raises as `PeerGroup.barrier` does."""
        await self.wait_operation(group.start_barrier(), timeout_s)

    async def send(
        self, group: PeerGroup, member: int, data: Data, timeout_s: float | None
    ) -> Operation:
        """Await room for a message and send it; returns and raises as `PeerGroup.send` does.

        Calls for one member send in the order in which they were made.
        """
        key = (id(group), member)
        turn = self._turns.get(key)
        if turn is None:
            turn = self._turns[key] = asyncio.Lock()

        try:
            async with asyncio.timeout(timeout_s), turn:
                while (operation := group.try_send(member, data)) is None:
                    await self._watch(lambda: group.can_send(member))
                return operation
        except TransferTimeoutError:
            raise
        except TimeoutError as error:
            # Not by group.send(): it could overtake calls made before this one.
            raise TransferTimeoutError(
                f"no room for a message to member {member} after {timeout_s} s", member=member
            ) from error

    async def recv(
        self, group: PeerGroup, timeout_s: float | None, member: int | None = None
    ) -> tuple[int, bytes]:
        """Await a message; returns and raises as `PeerGroup.recv` does. Cancelling loses none."""
        try:
            # Not wait_for: its inner task could take a message that a cancelled caller never sees.
            async with asyncio.timeout(timeout_s):
                while (message := group.try_recv(member)) is None:
                    await self._watch(lambda: group.can_recv(member))
                return message
        except TransferTimeoutError:
            raise
        except TimeoutError:
            return group.recv(0.0, member)

    def close(self) -> None:
        """Cancel all futures and stop watching."""
        for future in list(self._pending):
            future.cancel()
        self._pending.clear()
        self._disarm()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _watch(self, is_done: Callable[[], bool]) -> asyncio.Future[None]:
        future: asyncio.Future[None] = self._loop.create_future()
        self._pending[future] = is_done
        self._arm()
        # After arming: what finished before is found here, what finishes later writes the fd.
        self._sweep()
        return future

    def _sweep(self) -> None:
        for future, is_done in list(self._pending.items()):
            try:
                if not future.done() and not is_done():
                    continue
            except WeightSyncError as error:
                if not future.done():
                    future.set_exception(error)
            if not future.done():
                future.set_result(None)
            del self._pending[future]
        if not self._pending:
            self._disarm()

    def _on_readable(self) -> None:
        self._engine.drain_progress()
        self._sweep()

    def _on_timer(self) -> None:
        self._timer = None
        is_moving = False
        if self._engine.is_driven:
            for _ in range(_DRIVE_BATCH):
                is_moving = self._engine.drive()
                if not is_moving:
                    break
        self._sweep()
        if self._is_armed:
            self._start_timer(is_moving)

    def _start_timer(self, is_moving: bool) -> None:
        if self._engine.is_driven:
            self._timer = self._loop.call_later(0 if is_moving else _IDLE_DRIVE_S, self._on_timer)
        else:
            self._timer = self._loop.call_later(_SWEEP_S, self._on_timer)

    def _arm(self) -> None:
        if not self._is_armed:
            self._is_armed = True
            self._engine.arm(True)
            self._loop.add_reader(self._engine.progress_fd, self._on_readable)
            self._start_timer(is_moving=True)

    def _disarm(self) -> None:
        if self._is_armed:
            self._is_armed = False
            self._engine.arm(False)
            self._loop.remove_reader(self._engine.progress_fd)
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
