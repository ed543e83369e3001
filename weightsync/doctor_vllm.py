"""`weightsync doctor --vllm URL`: whether a server can follow a job, and who else can reach it."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from typing import Final

from weightsync.doctor import Check
from weightsync.integrations.vllm.plugin import SERVE, TESTED_VERSIONS
from weightsync.integrations.vllm.server import Server, StatusError

__all__ = ["check_vllm"]

_ANSWER_S: Final = 5.0
_KNOCK_S: Final = 1.0


def check_vllm(url: str) -> list[Check]:
    """Ask a server what `attach` needs, and knock at its port from outside.

    vLLM's development routes take no password: whoever reaches them can pause the engine, have it
    join another job, or overwrite its weights. Nothing is changed by asking.

    Args:
        url: Base URL of the API server.

    Raises:
        ConfigError: It is no URL.
    """
    server = Server(url)
    try:
        server.get("/health", timeout_s=_ANSWER_S)
    except OSError as error:
        return [Check("vllm server", "missing", f"{url}: {error}", f"start it with: {SERVE}")]
    return [_version(server), *_routes(server)]


def _version(server: Server) -> Check:
    version = str(server.get("/version", timeout_s=_ANSWER_S).get("version", "unknown"))
    known = any(version.startswith(f"{tested}.") for tested in TESTED_VERSIONS)
    if known:
        return Check("vllm version", "ok", version)
    return Check(
        "vllm version",
        "missing",
        f"{version}; weightsync was tested with {', '.join(TESTED_VERSIONS)}",
        "install one of those: another vLLM refuses to join",
    )


def _routes(server: Server) -> list[Check]:
    host, port = server.host, server.port
    try:
        shown = server.get("/weight_info", timeout_s=_ANSWER_S)
    except StatusError:
        return [Check("vllm routes", "missing", "no development routes", f"start it with: {SERVE}")]
    serves = f"development routes answer; weight version {shown.get('weight_version')}"
    open_at = [host] if not _is_loopback(host) else _reachable_elsewhere(port)
    if not open_at:
        return [Check("vllm routes", "ok", f"{serves}; on loopback only")]
    return [
        Check(
            "vllm routes",
            "warning",
            f"{serves}, without a password, at {', '.join(open_at)}:{port}",
            "whoever reaches them can replace the weights: serve with --host 127.0.0.1, or keep "
            "others out with a firewall",
        )
    ]


def _reachable_elsewhere(port: int) -> list[str]:
    """Addresses of this host, other than loopback, where the routes answer too."""
    found = []
    for address in sorted(_own_addresses()):
        host = f"[{address}]" if ":" in address else address
        try:
            Server(f"http://{host}:{port}").get("/weight_info", timeout_s=_KNOCK_S)
        except (OSError, ValueError):
            continue
        found.append(address)
    return found


def _own_addresses() -> set[str]:
    """Addresses that other hosts may know this one by."""
    found: set[str] = set()
    for family, peer in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((peer, 9))  # sends nothing; only a route is chosen
            except OSError:
                continue
            found.add(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        found |= {str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None)}
    return {address for address in found if not _is_loopback(address)}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"
