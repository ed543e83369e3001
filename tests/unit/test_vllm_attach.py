"""What `attach` makes of the answers of servers; no vLLM is needed for that."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from support.http import serving
from weightsync import Job, errors
from weightsync.errors import ConfigError, LayoutError, PeerLostError, WeightSyncError
from weightsync.integrations.vllm import attach
from weightsync.integrations.vllm.wire import decoded, encodes_errors


class Server(ThreadingHTTPServer):
    answer: tuple[int, str] = (200, "{}")
    asked: list[tuple[str, Any]]
    before: Callable[[], object] = staticmethod(lambda: None)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Server)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, json.loads(body)))
        self.server.before()
        status, text = self.server.answer
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    made.asked = []
    with serving(made):
        yield made


@pytest.fixture
def job() -> Iterator[Job]:
    with Job.start() as made:
        yield made


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_what_a_server_is_told(server: Server, job: Job) -> None:
    assert attach(url(server) + "/", job=job, pause="wait", clear_cache=False) is job
    ((path, body),) = server.asked
    info = body["init_info"]
    assert path == "/init_weight_transfer_engine"
    assert info["job"] == job.url
    assert info["server"] == url(server)
    assert info["replica"] == url(server).removeprefix("http://")
    assert (info["pause"], info["clear_cache"]) == ("wait", False)


def test_a_job_is_started_where_none_is_named(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WEIGHTSYNC_JOB", raising=False)
    with attach([url(server)]) as job:
        assert job.status()["phase"] == "idle"
        assert server.asked[0][1]["init_info"]["job"] == job.url


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        ((404, "Not Found"), ConfigError, "VLLM_SERVER_DEV_MODE=1"),
        (
            (500, "Worker failed with error 'Weight transfer not configured. Please set'"),
            ConfigError,
            "not started with this backend",
        ),
        (
            (500, "Call failed: weightsync.LayoutError: model.norm is odd [weightsync] see trace"),
            LayoutError,
            "model.norm is odd",
        ),
        ((503, "overloaded"), PeerLostError, "answered 503: overloaded"),
    ],
)
def test_answers_become_typed_errors(
    server: Server, job: Job, answer: tuple[int, str], kind: type[WeightSyncError], text: str
) -> None:
    server.answer = answer
    with pytest.raises(kind, match=text):
        attach([url(server)], job=job)


def test_a_port_where_something_else_answers(job: Job) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        def greet() -> None:
            connection, _ = other.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                connection.recv(1 << 16)

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(PeerLostError, match="no HTTP answer"):
            attach([f"http://127.0.0.1:{port}"], job=job)
        thread.join()


def test_servers_are_asked_at_the_same_time(server: Server, job: Job) -> None:
    """Each joins only when the other does, as replicas of a job with min_replicas=2 may."""
    both = threading.Barrier(2, timeout=10)
    server.before = both.wait
    attach([url(server), url(server).replace("127.0.0.1", "localhost")], job=job)
    assert len(server.asked) == 2


def test_a_refusal_does_not_wait_for_slow_servers(server: Server, job: Job) -> None:
    ended = threading.Event()
    server.before = ended.wait
    with pytest.raises(PeerLostError, match="no vLLM server answers"):
        attach([url(server), "http://127.0.0.1:9"], job=job)
    ended.set()


def test_no_proxy_is_asked(server: Server, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    attach([url(server)], job=job)
    assert len(server.asked) == 1


def test_bad_arguments(job: Job) -> None:
    with pytest.raises(ConfigError, match="'keep', 'wait' or 'abort'"):
        attach([], job=job, pause="never")  # type: ignore[arg-type]
    for wrong in ("localhost:8000", "http://", "http://h:80x", "http://[::1"):
        with pytest.raises(ConfigError, match="no URL"):
            attach([wrong], job=job)


@pytest.mark.parametrize("name", sorted(n for n in errors.__all__))
def test_every_error_survives_the_way_through_vllm(name: str) -> None:
    kind = getattr(errors, name)

    @encodes_errors
    def fails() -> None:
        raise kind("rank 3: model.layers.0\nhas another shape")

    with pytest.raises(RuntimeError) as caught:
        fails()
    back = decoded(f"Worker failed with error '{caught.value}', please check the stack trace")
    assert type(back) is kind
    assert str(back) == "rank 3: model.layers.0\nhas another shape"


def test_strange_texts_are_nobodys_error() -> None:
    assert decoded("CUDA out of memory") is None
    assert decoded("weightsync.os: system('x') [weightsync]") is None
    assert decoded("weightsync.annotations: x [weightsync]") is None
