"""When a follower pauses and resumes its engine; stand-ins for the server and the sink."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

import pytest

from support.http import serving
from weightsync.client import Sink
from weightsync.integrations.vllm import follow
from weightsync.integrations.vllm.follow import Follower

DEADLINE_S = 10.0


class Engine(ThreadingHTTPServer):
    """Pauses, resumes and updates as vLLM does; `failing` are answered 500 so many times."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.is_paused = False
        self.calls: list[str] = []
        self.failing: dict[str, int] = {}
        self.pause_s = 0.0
        self.sink = FakeSink()

    def call(self, route: str) -> tuple[int, Any]:
        if route != "/is_paused":
            self.calls.append(route)
        if self.failing.get(route, 0):
            self.failing[route] -= 1
            return 500, None
        if route == "/pause":
            time.sleep(self.pause_s)
            self.is_paused = True
        elif route == "/resume":
            self.is_paused = False
        elif route == "/update_weights":
            assert self.is_paused
            self.sink.adopt()
        return 200, {"is_paused": self.is_paused}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Engine)
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, body = self.server.call(self.path.partition("?")[0])
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    do_POST = do_GET  # noqa: N815 - the name is http.server's

    def log_message(self, *args: object) -> None:
        """Say nothing."""


class FakeSink:
    """What a follower asks of a sink."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.committed: int | None = None
        self.version: int | None = None
        self.is_torn = False

    def wait_committed(self, timeout_s: float) -> int | None:
        with self.changed:
            self.changed.wait_for(lambda: self.committed is not None, timeout_s)
            return self.committed

    def commit(self, version: int) -> None:
        with self.changed:
            self.committed = version
            self.changed.notify_all()

    def adopt(self) -> None:
        with self.changed:
            self.version, self.committed = self.committed, None
            self.changed.notify_all()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(follow, "_LOOK_S", 0.02)
    monkeypatch.setattr(follow, "_RETRY_S", 0.02)
    made = Engine()
    with serving(made):
        yield made


@pytest.fixture
def follower(engine: Engine) -> Iterator[Follower]:
    url = f"http://127.0.0.1:{engine.server_address[1]}"
    sink = cast("Sink", engine.sink)
    made = Follower(sink, url, pause="keep", clear_cache=True, timeout_s=5.0)
    made.start()
    yield made
    made.close()
    made._thread.join(DEADLINE_S)


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


ROUTES = ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update", "/resume"]


def test_one_short_pause(engine: Engine, follower: Follower) -> None:
    engine.sink.commit(1)
    wait_until(lambda: engine.calls[-1:] == ["/resume"] and not follower.is_paused)
    assert engine.calls == ROUTES
    assert (engine.sink.version, engine.is_paused) == (1, False)


@pytest.mark.parametrize("route", ["/resume", "/pause", "/update_weights", "/finish_weight_update"])
def test_a_call_that_fails_leaves_no_engine_paused(
    engine: Engine, follower: Follower, route: str
) -> None:
    engine.failing[route] = 2
    engine.sink.commit(1)
    wait_until(lambda: engine.sink.version == 1 and not follower.is_paused)
    assert not engine.is_paused


def test_a_pause_without_an_answer_is_taken_back(
    engine: Engine, follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "_CALL_S", 0.1)
    engine.pause_s = 0.3
    engine.failing["/resume"] = 1
    engine.sink.commit(1)
    wait_until(lambda: "/pause" in engine.calls)
    engine.sink.committed = None  # the replica dropped the version meanwhile
    wait_until(lambda: engine.calls.count("/resume") >= 2 and not follower.is_paused)


def test_mixed_weights_serve_nothing(engine: Engine, follower: Follower) -> None:
    engine.failing["/update_weights"] = 1
    engine.sink.is_torn = True
    engine.sink.commit(1)
    wait_until(lambda: "/update_weights" in engine.calls)
    engine.sink.committed = None
    time.sleep(0.2)
    assert engine.is_paused
    engine.sink.is_torn = False  # as after the version that repairs it
    engine.sink.commit(2)
    wait_until(lambda: engine.sink.version == 2 and not engine.is_paused)


def test_an_engine_that_somebody_else_paused_is_left_alone(
    engine: Engine, follower: Follower
) -> None:
    engine.is_paused = True
    engine.sink.commit(1)
    time.sleep(0.2)
    assert engine.calls == []
    engine.is_paused = False
    wait_until(lambda: engine.calls[-1:] == ["/resume"])
    assert engine.calls == ROUTES
