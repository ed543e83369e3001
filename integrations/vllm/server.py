"""How the routes of a vLLM API server are called. Imports no vLLM."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Any, Final
from urllib.parse import urlsplit

from weightsync.errors import ConfigError

__all__ = ["Server", "StatusError"]

_MAX_REPLY: Final = 1 << 24
# Engines are asked directly: a proxy that http_proxy names knows nothing of this cluster's hosts.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class StatusError(ConnectionError):
    """A server answered with another status than 200.

    Attributes:
        status: The status.
        text: The first 64 KiB of the answer.
    """

    def __init__(self, url: str, status: int, text: str) -> None:
        super().__init__(f"{url} answered {status}: {text[:500]}")
        self.status = status
        self.text = text


class Server:
    """One API server.

    Args:
        url: Its base URL.

    Raises:
        ConfigError: It is no URL of a server.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            parts = urlsplit(self.url)
            self.host, self.port = parts.hostname or "", parts.port or 80
        except ValueError:
            self.host = ""
        if not self.host or parts.scheme not in ("http", "https"):
            raise ConfigError(f"{url!r} is no URL of a vLLM server, such as http://127.0.0.1:8000")
        self.name = parts.netloc

    def get(self, route: str, *, timeout_s: float = 60.0) -> Any:
        """The reply's JSON, or None where it has none. Blocks.

        Raises:
            StatusError: The server refuses.
            OSError: No server answers.
        """
        return self._call(route, None, timeout_s)

    def post(self, route: str, body: Any = None, *, timeout_s: float = 60.0) -> Any:
        """As `get`; sends JSON, or nothing."""
        return self._call(route, b"" if body is None else json.dumps(body).encode(), timeout_s)

    def _call(self, route: str, data: bytes | None, timeout_s: float) -> Any:
        request = urllib.request.Request(
            self.url + route, data=data, headers={"Content-Type": "application/json"}
        )
        try:
            with _opener.open(request, timeout=timeout_s) as reply:
                content = reply.read(_MAX_REPLY)
        except urllib.error.HTTPError as error:
            with error:
                text = error.read(1 << 16).decode(errors="replace")
            raise StatusError(self.url + route, error.code, text) from error
        except http.client.HTTPException as error:
            raise ConnectionError(f"{self.url}{route}: no HTTP answer: {error!r}") from error
        try:
            return json.loads(content) if content else None
        except ValueError as error:
            raise ConnectionError(f"{self.url}{route}: no JSON in the answer") from error
