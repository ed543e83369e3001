"""Two hosts on one machine: network namespaces with a cable between them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["NoNamespacesError", "TwoHosts", "two_hosts"]


class NoNamespacesError(Exception):
    """This machine or user cannot make network namespaces; says why."""


@dataclass(frozen=True)
class TwoHosts:
    """Names of the namespaces and their addresses on the cable."""

    names: tuple[str, str]
    addresses: tuple[str, str] = ("10.203.77.1", "10.203.77.2")

    def start(self, host: int, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a command on host 0 or 1; its standard streams are pipes."""
        pipe = subprocess.PIPE
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], *command],
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
            **options,
        )

    def cut(self) -> None:
        """Pull the cable: nothing arrives any more, and nobody is told."""
        # A route into nowhere; taking the link down would be an error that the kernel reports.
        for name, peer in zip(self.names, reversed(self.addresses), strict=True):
            _ip("-n", name, "neigh", "replace", peer, "lladdr", "02:00:00:00:00:01", "dev", "cable")


@contextlib.contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Make them, and remove them whatever happens.

    Raises:
        NoNamespacesError: Not possible here.
    """
    if shutil.which("ip") is None:
        raise NoNamespacesError("there is no ip command (Debian package iproute2)")
    hosts = TwoHosts((f"ws{os.getpid()}a", f"ws{os.getpid()}b"))
    made: list[str] = []
    try:
        try:
            for name in hosts.names:
                _ip("netns", "add", name)
                made.append(name)
            first, second = hosts.names
            _ip(
                "-n",
                first,
                "link",
                "add",
                "cable",
                "type",
                "veth",
                "peer",
                "cable",
                "netns",
                second,
            )
            for name, address in zip(hosts.names, hosts.addresses, strict=True):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "link", "set", "cable", "up")
        except subprocess.CalledProcessError as error:
            raise NoNamespacesError(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from error
        yield hosts
    finally:
        for name in made:
            _ip("netns", "delete", name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
