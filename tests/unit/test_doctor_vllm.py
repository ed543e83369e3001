"""`doctor --vllm` on a stand-in server; tests/vllm asks a real one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from support.http import serving
from weightsync import doctor_vllm
from weightsync.doctor_vllm import check_vllm
from weightsync.errors import ConfigError

ROUTES: dict[str, Any] = {
    "/health": None,
    "/version": {"version": "0.32.0+cpu"},
    "/weight_info": {"weight_version": "7"},
}


class Server(ThreadingHTTPServer):
    routes: dict[str, Any]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        if self.path not in self.server.routes:
            self.send_error(404)
            return
        body = self.server.routes[self.path]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"" if body is None else json.dumps(body).encode())

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    made = Server((request.param, 0), Handler)
    made.routes = dict(ROUTES)
    with serving(made):
        yield made


@pytest.fixture(autouse=True)
def second_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that other hosts would use: here the second one of loopback."""
    monkeypatch.setattr(doctor_vllm, "_own_addresses", lambda: {"127.0.0.2"})


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/"


@pytest.mark.parametrize("server", ["127.0.0.1"], indirect=True)
def test_routes_on_loopback_are_fine(server: Server) -> None:
    version, routes = check_vllm(url(server))
    assert (version.status, routes.status) == ("ok", "ok")
    assert "weight version 7" in routes.found


@pytest.mark.parametrize("server", ["0.0.0.0"], indirect=True)
def test_routes_that_others_can_reach_are_a_warning(server: Server) -> None:
    _, routes = check_vllm(url(server))
    assert routes.status == "warning"
    assert "without a password, at 127.0.0.2" in routes.found
    assert "--host 127.0.0.1" in routes.next


@pytest.mark.parametrize("server", ["127.0.0.1"], indirect=True)
def test_a_server_without_the_routes_or_of_another_version(server: Server) -> None:
    del server.routes["/weight_info"]
    server.routes["/version"] = {"version": "0.27.1"}
    version, routes = check_vllm(url(server))
    assert (version.status, routes.status) == ("missing", "missing")
    assert "0.27.1" in version.found
    assert "VLLM_SERVER_DEV_MODE=1" in routes.next


def test_nobody_there_and_no_url() -> None:
    (only,) = check_vllm("http://127.0.0.1:9")
    assert only.status == "missing"
    with pytest.raises(ConfigError, match="is no URL"):
        check_vllm("127.0.0.1:8000")
