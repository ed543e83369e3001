"""The coordinator: a gRPC server around the pure `CoordinatorCore`.

One thread runs one asyncio loop that owns the core, the journal and all streams, so there are
no locks. Planning runs on a worker thread. Where the service listens, and who may call it, is
the listener's matter.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc

from weightsync import failpoints
from weightsync.errors import ConfigError, FencedError, InternalError, WeightSyncError
from weightsync.ir.plan import PlanOptions
from weightsync.service import weightsync_pb2 as pb
from weightsync.service import weightsync_pb2_grpc as rpc
from weightsync.service.core import CoordinatorCore
from weightsync.service.core_types import (
    Action,
    CoreOptions,
    Disconnect,
    MakePlan,
    Persist,
    Send,
)
from weightsync.service.credentials import ServerCredentials
from weightsync.service.gateways import Gateways, Outlet, Streams
from weightsync.service.journal import Journal
from weightsync.service.listen import Listener, TlsListener, open_listener
from weightsync.service.planning import PlanMaker
from weightsync.transport.fabrics import spares_nics

__all__ = ["Coordinator"]

_log = logging.getLogger(__name__)

_START_TIMEOUT_S = 40.0
_STOP_TIMEOUT_S = 10.0


class Coordinator:
    """Hosts one job in this process until `close`.

    Args:
        url: `unix:PATH`, `grpcs://HOST:PORT` (port 0: a free one), or None for a socket in a fresh
            private directory.
        credentials: Certificate, key and token; grpcs:// is not served without.
        journal: SQLite file with the decisions; None keeps them in memory only.
        options: Rules of the job.
        plan_options: Budgets of its plans; staging is bounded by the sources besides.
        num_gateways: Processes that hold the members' connections, for grpcs:// and large jobs; 0:
            this process does.

    Raises:
        ConfigError: The URL is taken, of a kind that is not served, or lacks credentials; gateways
            for a Unix socket.
        InternalError: A gateway did not start.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        credentials: ServerCredentials | None = None,
        journal: Path | None = None,
        options: CoreOptions | None = None,
        plan_options: PlanOptions | None = None,
        num_gateways: int = 0,
    ) -> None:
        self._listener = open_listener(url, credentials)
        self._server: _Direct | Gateways = _Direct(self._listener, self)
        if num_gateways:
            if not isinstance(self._listener, TlsListener) or credentials is None:
                raise ConfigError(
                    f"job url {url}: gateways share a port; a job on a Unix socket has none"
                )
            self._server = Gateways(num_gateways, self._listener, credentials, self)
        self._options = options if options is not None else CoreOptions()
        self._plan_options = plan_options if plan_options is not None else PlanOptions()
        self._plans = PlanMaker()
        self._journal_path = journal
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._outlets: dict[int, Outlet] = {}
        self._next_member = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="weightsync-job", daemon=True)
        self._thread.start()
        if not self._started.wait(_START_TIMEOUT_S):
            raise InternalError(
                f"the coordinator at {self.url} did not start in {_START_TIMEOUT_S} s"
            )
        self._raise_failure()

    @property
    def url(self) -> str:
        """What members connect to."""
        return self._listener.url

    def close(self) -> None:
        """Tell every member that the job ends, stop serving, remove the socket. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(_STOP_TIMEOUT_S)
        self._listener.close()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            self._thread.join(_STOP_TIMEOUT_S)
            self._listener.close()
            raise self._failure

    def __enter__(self) -> Coordinator:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---- the loop's thread ----

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:  # noqa: BLE001 - see below
            # Raised again in the thread that constructs; later failures end the process's job.
            self._failure = error
            if self._started.is_set():
                _log.exception("the coordinator at %s stopped", self.url)
        finally:
            self._started.set()
            self._loop.close()

    async def _serve(self) -> None:
        self._journal = Journal(self._journal_path)
        self._core = CoordinatorCore(self._options, self._journal.load())
        try:
            await self._server.start()
        except BaseException:
            await self._server.stop()
            self._journal.close()
            raise
        self._started.set()
        ticker = asyncio.create_task(self._tick())
        await self._stopping.wait()
        ticker.cancel()
        closing = pb.CoordinatorMessage(closing=pb.Closing(reason="the job ended"))
        for outlet in self._outlets.values():
            outlet.put_nowait(closing)
            outlet.put_nowait(None)
        await self._server.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._journal.close()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(min(0.2, self._options.lease_s / 4))
            self._perform(self._core.tick(time.monotonic()))

    # ---- streams; see `Streams` ----

    def joined(self, outlet: Outlet) -> int:
        """A stream begins; its number."""
        self._next_member += 1
        self._outlets[self._next_member] = outlet
        return self._next_member

    def heard(self, member: int, message: pb.MemberMessage) -> None:
        """A message came in."""
        self._perform(self._core.receive(time.monotonic(), member, message))

    def left(self, member: int) -> None:
        """The stream has ended."""
        self._outlets.pop(member, None)
        self._perform(self._core.lost(time.monotonic(), member))

    def status(self) -> pb.StatusReply:
        """How the job stands."""
        return self._core.status()

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                outlet = self._outlets.get(action.member)
                if outlet is not None:
                    _pass_failpoint(action.message)
                    outlet.put_nowait(action.message)
            elif isinstance(action, Disconnect):
                outlet = self._outlets.get(action.member)
                if outlet is not None:
                    outlet.put_nowait(None)
            elif isinstance(action, Persist):
                failpoints.hit("coordinator.voted")
                try:
                    self._journal.record(action.version, commit=action.commit, reason=action.reason)
                except FencedError as error:
                    # Nobody may hear of a decision that is not on disk: stop serving at once.
                    _log.error("the coordinator at %s stops: %s", self.url, error)
                    self._stopping.set()
                    return
                failpoints.hit("coordinator.recorded")
            else:
                task = asyncio.create_task(self._plan(action))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _plan(self, action: MakePlan) -> None:
        failpoints.hit("coordinator.bind")
        try:
            agreed = await asyncio.to_thread(
                self._plans.agree,
                action.sources,
                action.sinks,
                _options_for(self._plan_options, action),
            )
        except WeightSyncError as error:
            problem = pb.Problem(error=type(error).__name__, message=str(error))
            actions = self._core.planned(time.monotonic(), action.epoch, problem=problem)
        except Exception as error:  # noqa: BLE001 - members must hear of any failure
            _log.exception("planning epoch %d failed", action.epoch)
            problem = pb.Problem(error="InternalError", message=f"planning failed: {error!r}")
            actions = self._core.planned(time.monotonic(), action.epoch, problem=problem)
        else:
            actions = self._core.planned(
                time.monotonic(),
                action.epoch,
                digest=agreed.digest,
                shares=agreed.shares,
                options_json=agreed.options_json,
                hops=agreed.hops,
            )
        self._perform(actions)


class _Direct:
    """Serves streams in this process, on the coordinator's loop."""

    def __init__(self, listener: Listener, streams: Streams) -> None:
        self._listener, self._streams = listener, streams
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Listen."""
        self._server = self._listener.make_server()
        rpc.add_CoordinatorServicer_to_server(_Service(self._streams), self._server)
        await self._listener.start(self._server)

    async def stop(self) -> None:
        """Send what is left, then end."""
        if self._server is not None:
            await self._server.stop(grace=1.0)


class _Service(rpc.CoordinatorServicer):
    """Hands gRPC calls on."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    async def Join(  # noqa: N802 - named by the .proto
        self, request_iterator: AsyncIterator[pb.MemberMessage], context: object
    ) -> AsyncIterator[pb.CoordinatorMessage]:
        queue: asyncio.Queue[pb.CoordinatorMessage | None] = asyncio.Queue()
        member = self._streams.joined(queue)
        reader = asyncio.create_task(self._read(member, queue, request_iterator))
        try:
            while (message := await queue.get()) is not None:
                yield message
        finally:
            reader.cancel()
            self._streams.left(member)

    async def _read(
        self,
        member: int,
        queue: asyncio.Queue[pb.CoordinatorMessage | None],
        messages: AsyncIterator[pb.MemberMessage],
    ) -> None:
        with contextlib.suppress(asyncio.CancelledError, grpc.RpcError):
            async for message in messages:
                self._streams.heard(member, message)
        queue.put_nowait(None)

    async def Status(self, request: pb.StatusRequest, context: object) -> pb.StatusReply:  # noqa: N802
        return self._streams.status()


def _options_for(options: PlanOptions, action: MakePlan) -> PlanOptions:
    """Options whose buckets fit the smallest staging budget (0 is no bound).

    Where sinks of one node reach each other over its NICs only, node deduplication spares nothing.
    """
    if options.node_dedup == "auto" and not all(map(spares_nics, action.fabrics)):
        options = dataclasses.replace(options, node_dedup="off")
    if action.staging_bytes == 0:
        return options
    return dataclasses.replace(options, slot_bytes=min(options.slot_bytes, action.staging_bytes))


def _pass_failpoint(message: pb.CoordinatorMessage) -> None:
    kind = message.WhichOneof("kind")
    place = {"arm": "open", "write": "writing", "decide": "decided", "apply": "applying"}.get(
        kind if kind is not None else ""
    )
    if place is not None:
        failpoints.hit(f"coordinator.{place}")
