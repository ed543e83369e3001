"""Makes an engine adopt what its job commits, through the engine's own API server.

Runs in one worker of the replica, not in the trainer: an engine that was paused is resumed even if
every trainer is gone by then. The calls are those of vLLM's development routes.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import threading
import urllib.error
import urllib.request
from typing import Any

from weightsync.client import Sink
from weightsync.errors import WeightSyncError

__all__ = ["Follower"]

_log = logging.getLogger(__name__)

_LOOK_S = 1.0  # how often a waiting follower looks whether it is to end
_RETRY_S = 1.0
_CALL_S = 30.0  # pause and resume
_UPDATE_EXTRA_S = 30.0


class Follower:
    """A thread that pauses, updates and resumes the engine for every committed version.

    Args:
        sink: Of this worker.
        server: URL of the API server.
        pause: Mode for in-flight requests: keep, wait or abort.
        clear_cache: Whether what older weights computed is dropped with every version: cached
            prefixes, and the caches of requests in flight, which are computed anew.
        timeout_s: Of one update.
    """

    def __init__(
        self, sink: Sink, server: str, *, pause: str, clear_cache: bool, timeout_s: float
    ) -> None:
        self._sink = sink
        self._server = server.rstrip("/")
        self._pause = pause
        self._clear_cache = clear_cache
        self._timeout_s = timeout_s
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
            if version is None:
                continue
            try:
                self._adopt(version)
            except (OSError, http.client.HTTPException, WeightSyncError):
                _log.exception("weightsync: version %d was not adopted; trying again", version)
                self._closing.wait(_RETRY_S)

    def _adopt(self, version: int) -> None:
        """One short pause; what failed is told by `Sink` to the job, so nobody is misled."""
        self._call(f"/pause?mode={self._pause}&clear_cache={str(self._clear_cache).lower()}")
        try:
            self._call("/start_weight_update")
            info = {"version": version, "timeout_s": self._timeout_s}
            self._call("/update_weights", {"update_info": info}, self._timeout_s + _UPDATE_EXTRA_S)
            self._call("/finish_weight_update", {"weight_version": str(self._sink.version)})
        except Exception:
            self._end_update()
            raise
        finally:
            # Mixed weights serve nothing: such an engine stays paused until a version repairs it.
            if not self._sink.is_torn:
                self._call("/resume")

    def _end_update(self) -> None:
        """End an update that failed: vLLM refuses another while it takes one for open."""
        with contextlib.suppress(OSError):  # it was not open
            self._call("/finish_weight_update")

    def _call(self, route: str, body: Any = None, timeout_s: float = _CALL_S) -> None:
        request = urllib.request.Request(
            self._server + route,
            data=json.dumps(body).encode() if body is not None else b"",
            headers={"Content-Type": "application/json"},
            method="POST",
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as reply:
                reply.read()
        except urllib.error.HTTPError as error:
            text = error.read(4096).decode(errors="replace")
            raise ConnectionError(f"{route} answered {error.code}: {text}") from error
