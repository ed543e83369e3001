"""Makes an engine adopt what its job commits, through the engine's own API server.

Runs in one worker of the replica, not in the trainer: an engine that was paused is resumed even if
every trainer is gone by then. The calls are those of vLLM's development routes.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import Final

from weightsync.client import Sink
from weightsync.integrations.vllm.server import Server

__all__ = ["Follower"]

_log = logging.getLogger(__name__)

_LOOK_S: Final = 1.0  # how often a waiting follower looks whether it is to end
_RETRY_S: Final = 1.0
_CALL_S: Final = 30.0  # pause, where requests are not waited for, and resume
_UPDATE_EXTRA_S: Final = 30.0


class Follower:
    """A thread that pauses, updates and resumes the engine for every committed version.

    An engine that somebody else has paused or put to sleep is left alone until it runs again: its
    weights may have no memory.

    Args:
        sink: Of this worker.
        server: URL of the API server.
        pause: Mode for in-flight requests: keep, wait or abort.
        clear_cache: Whether what older weights computed is dropped with every version: cached
            prefixes, and the caches of requests in flight, which are computed anew.
        timeout_s: Of one update, and of a pause that waits for requests.
        is_paused: Whether a follower before this one left the engine paused.

    Attributes:
        is_paused: Whether the engine may be paused by this follower now.
    """

    def __init__(
        self,
        sink: Sink,
        server: str,
        *,
        pause: str,
        clear_cache: bool,
        timeout_s: float,
        is_paused: bool = False,
    ) -> None:
        self._sink = sink
        self._server = Server(server)
        self._pause = pause
        self._clear_cache = clear_cache
        self._timeout_s = timeout_s
        self.is_paused = is_paused
        self._was_told = False  # that it waits for somebody else
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="weightsync-follow", daemon=True)

    def start(self) -> None:
        """Start following. Returns at once."""
        self._thread.start()

    def close(self) -> None:
        """Stop after the update under way, if any. Does not wait for it: it may need our thread."""
        self._closing.set()

    def _run(self) -> None:
        while not self._closing.is_set():
            version = self._sink.wait_committed(_LOOK_S)
            try:
                if version is not None:
                    self._adopt(version)
                elif self.is_paused and not self._sink.is_torn:
                    self._resume()
            except Exception:  # noqa: BLE001 - the next try may succeed; this thread must live
                what = f"version {version} was not adopted" if version else "cannot resume"
                _log.exception("weightsync: %s; trying again", what)
                self._closing.wait(_RETRY_S)

    def _adopt(self, version: int) -> None:
        """One short pause; what failed is told by `Sink` to the job, so nobody is misled."""
        if not self.is_paused and self._server.get("/is_paused", timeout_s=_CALL_S)["is_paused"]:
            if not self._was_told:
                _log.warning(
                    "weightsync: version %d waits: somebody else paused this engine, or put it to "
                    "sleep",
                    version,
                )
            self._was_told = True
            self._closing.wait(_LOOK_S)
            return
        self._was_told = False
        self.is_paused = True  # even if no answer comes
        try:
            self._update(version)
        finally:
            # Mixed weights serve nothing: such an engine stays paused until a version repairs it.
            if not self._sink.is_torn:
                self._resume()

    def _update(self, version: int) -> None:
        self._server.post(
            f"/pause?mode={self._pause}&clear_cache={str(self._clear_cache).lower()}",
            timeout_s=self._timeout_s if self._pause == "wait" else _CALL_S,
        )
        info = {"version": version, "timeout_s": self._timeout_s}
        body, timeout_s = {"update_info": info}, self._timeout_s + _UPDATE_EXTRA_S
        try:
            self._server.post("/start_weight_update", timeout_s=_CALL_S)
            self._server.post("/update_weights", body, timeout_s=timeout_s)
            shown = {"weight_version": str(self._sink.version)}
            self._server.post("/finish_weight_update", shown, timeout_s=_CALL_S)
        except Exception:
            # vLLM refuses another update while it takes this one for open.
            with contextlib.suppress(OSError):
                self._server.post("/finish_weight_update", timeout_s=_CALL_S)
            raise

    def _resume(self) -> None:
        self._server.post("/resume", timeout_s=_CALL_S)
        self.is_paused = False
