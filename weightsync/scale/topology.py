"""The network of the scale model: a namespace for each host, a bridge for each rail, shaped links.

    host i: rail0 .. railN, ctl                   the switch's namespace
      rail r  10.(81 + r).0.(i + 1)  --veth--  port p<i>r<r> of bridge br<r>     tbf on both ends
      ctl     10.80.0.(i + 1)        --veth--  port p<i>ctl of bridge brctl      not shaped
      node    10.79.0.(i + 1)        --veth--  port p<i>node of bridge brn<g>    not shaped

Hosts that form a node have a link among themselves, in place of NVLink: what one of them sends to
an address of another takes it.

Everything lies in namespaces of its own; the namespace of the caller gets no link, no address and
no rule. Names begin with `wsm-`, and a file lock says that the owner lives: whoever gets the lock
removes what a killed run left behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from weightsync.errors import ConfigError
from weightsync.units import KIB

__all__ = ["Counters", "Network", "Shape", "open_network", "why_not"]

_PREFIX: Final = "wsm-"
_SWITCH: Final = f"{_PREFIX}switch"
_LOCK: Final = Path("/run/weightsync-scale.lock")
_TIMEOUT_S: Final = 60.0
_MAX_HOSTS: Final = 250
_MAX_RAILS: Final = 8
# Of a connection over a shaped link; the queue of the link itself is tbf's.
_SYSCTLS: Final = {
    "net/ipv4/tcp_rmem": "4096 131072 33554432",
    "net/ipv4/tcp_wmem": "4096 65536 4194304",
    "net/ipv4/tcp_no_metrics_save": "1",
    "net/ipv4/tcp_slow_start_after_idle": "0",
    # By loss, as Ethernet without pacing: bbr and many senders into one port reach half the rate.
    # Not cubic, which only the first namespace may make a default on some systems.
    "net/ipv4/tcp_congestion_control": "reno",
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """What each end of each link lets through.

    Attributes:
        mbit_per_s: As the wire counts: headers included.
        latency_ms: Longest stay in the queue of a port; what would stay longer is dropped.
        burst_bytes: That may pass at once. Below 64 KiB the kernel cuts every packet of its own
            offload into frames, at four times the processor time; 1 MiB lets short runs exceed
            the rate.
        mtu: Of all links.
    """

    mbit_per_s: int = 100
    latency_ms: int = 50
    burst_bytes: int = 128 * KIB
    mtu: int = 9000

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) < 1:
                raise ConfigError(f"{field.name}={value}: at least 1")

    @property
    def payload_fraction(self) -> float:
        """Share of a link's bytes that TCP carries: Ethernet 14, IPv4 20, TCP 32 a frame."""
        return (self.mtu - 52) / (self.mtu + 14)


@dataclasses.dataclass(frozen=True)
class Counters:
    """Bytes on the wire of each host and rail, headers included, since they were made.

    Attributes:
        sent, received: `[host][rail]`.
        resent: TCP segments that each host sent again, over all its links, `[host]`.
        dropped: Packets that a queue had no room for, over all links.
    """

    sent: list[list[int]]
    received: list[list[int]]
    resent: list[int]
    dropped: int

    def since(self, before: Counters) -> Counters:
        """Return the difference."""
        return Counters(
            _minus(self.sent, before.sent),
            _minus(self.received, before.received),
            [now - then for now, then in zip(self.resent, before.resent, strict=True)],
            self.dropped - before.dropped,
        )


@dataclasses.dataclass(frozen=True)
class Network:
    """A network; `open_network` makes one.

    Attributes:
        hosts: Number of hosts.
        rails: Shaped links of each.
        shape: Of these links.
        nodes: Hosts that form a node; each host is in one of them at most.
    """

    hosts: int
    rails: int
    shape: Shape
    nodes: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.hosts <= _MAX_HOSTS or not 1 <= self.rails <= _MAX_RAILS:
            raise ConfigError(
                f"{self.hosts} hosts with {self.rails} rails each: 1 to {_MAX_HOSTS} hosts, 1 to "
                f"{_MAX_RAILS} rails"
            )

    def inside(self, host: int) -> tuple[str, ...]:
        """Return the command that runs another one on a host."""
        return ("ip", "netns", "exec", self._name(host))

    def addresses(self, host: int) -> tuple[str, ...]:
        """Return a host's addresses for weights, one for each rail."""
        return tuple(f"10.{81 + rail}.0.{host + 1}" for rail in range(self.rails))

    def control(self, host: int) -> str:
        """Return its address for messages."""
        return f"10.80.0.{host + 1}"

    def interfaces(self) -> list[str]:
        """Return the names of the shaped links on every host."""
        return [f"rail{rail}" for rail in range(self.rails)]

    def counters(self) -> Counters:
        """Read what every shaped link has carried so far."""
        switch = _queues(_SWITCH)
        own = [_queues(self._name(host)) for host in range(self.hosts)]
        ports = [[switch[self._port(host, r)] for r in range(self.rails)] for host in self._all()]
        links = [[own[host][f"rail{rail}"] for rail in range(self.rails)] for host in self._all()]
        return Counters(
            sent=[[int(queue["bytes"]) for queue in row] for row in links],
            received=[[int(queue["bytes"]) for queue in row] for row in ports],
            resent=[_resent(self.inside(host)) for host in self._all()],
            dropped=sum(int(queue["drops"]) for row in ports + links for queue in row),
        )

    # ---- making it ----

    def links(self) -> dict[str, list[str]]:
        """Return the lines of `ip -batch` for each namespace, the switch's first."""
        mtu, host_lines = self.shape.mtu, {}
        lines = ["link set lo up"]
        nodes = [f"brn{number}" for number in range(len(self.nodes))]
        for bridge in [f"br{rail}" for rail in range(self.rails)] + ["brctl", *nodes]:
            kind = "type bridge stp_state 0 forward_delay 0 mcast_snooping 0"
            lines += [f"link add {bridge} {kind}", f"link set {bridge} mtu {mtu} up"]
        for host in self._all():
            name = self._name(host)
            own = ["link set lo up"]
            for end, port, bridge, address in self._cables(host):
                peer = f"type veth peer name {end} mtu {mtu} netns {name}"
                lines += [f"link add {port} mtu {mtu} {peer}"]
                lines += [f"link set {port} master {bridge} up"]
                own += [f"addr add {address}/24 dev {end}"]
                own += [f"link set {end} address {_mac(address)} up"]
            own += self._known(host)
            for other in self._neighbours(host):
                own += [f"route add {address}/32 dev node" for address in self.addresses(other)]
            host_lines[name] = own
        return {_SWITCH: lines, **host_lines}

    def queues(self) -> dict[str, list[str]]:
        """Return the lines of `tc -batch` for each namespace."""
        shape = self.shape
        tbf = (
            f"root handle 1: tbf rate {shape.mbit_per_s}mbit burst {shape.burst_bytes} "
            f"latency {shape.latency_ms}ms"
        )
        found = {
            self._name(host): [f"qdisc replace dev rail{r} {tbf}" for r in range(self.rails)]
            for host in self._all()
        }
        found[_SWITCH] = [
            f"qdisc replace dev {self._port(host, rail)} {tbf}"
            for host in self._all()
            for rail in range(self.rails)
        ]
        return found

    def _make(self) -> None:
        for host in self._all():
            _run("ip", "netns", "add", self._name(host))
        for name, lines in self.links().items():
            _run("ip", "-n", name, "-batch", "-", lines=lines)
        for name, lines in self.queues().items():
            _run("tc", "-n", name, "-batch", "-", lines=lines)
        set_all = "; ".join(f"echo '{value}' >/proc/sys/{key}" for key, value in _SYSCTLS.items())
        for host in self._all():
            _run(*self.inside(host), "sh", "-ec", set_all)

    def _cables(self, host: int) -> Iterator[tuple[str, str, str, str]]:
        """Yield the host's end, the switch's end, the bridge and the address of each link."""
        for rail, address in enumerate(self.addresses(host)):
            yield f"rail{rail}", self._port(host, rail), f"br{rail}", address
        yield "ctl", f"p{host}ctl", "brctl", self.control(host)
        for number, members in enumerate(self.nodes):
            if host in members:
                yield "node", f"p{host}node", f"brn{number}", f"10.79.0.{host + 1}"

    def _known(self, host: int) -> list[str]:
        """Return the lines that tell a host which link of another has which address.

        What hosts ask for (ARP) is kept in a table that all namespaces of a system share: 1024
        entries by default, fewer than two dozen hosts with two rails need. These do not count.
        """
        known: list[tuple[str, str, str]] = []
        for other in self._all():
            beside = other in self._neighbours(host)
            for end, _, _, address in self._cables(other):
                if other != host and (end != "node" or beside):
                    known.append((address, address, end))
                if end == "node" and beside:
                    known += [(rail, address, end) for rail in self.addresses(other)]
        return [
            f"neigh add {address} lladdr {_mac(link)} dev {end} nud permanent"
            for address, link, end in known
        ]

    def _neighbours(self, host: int) -> list[int]:
        """Return the other hosts of its node."""
        return [other for node in self.nodes if host in node for other in node if other != host]

    def _all(self) -> range:
        return range(self.hosts)

    @staticmethod
    def _name(host: int) -> str:
        return f"{_PREFIX}{host}"

    @staticmethod
    def _port(host: int, rail: int) -> str:
        return f"p{host}r{rail}"


def _mac(address: str) -> str:
    """Return the hardware address of the link that has an address."""
    return "02:00:" + ":".join(f"{int(part):02x}" for part in address.split("."))


def why_not() -> str | None:
    """Return why this machine or user cannot have such a network; None if it can."""
    if os.geteuid() != 0:
        return "it takes root to make network namespaces"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"there is no {tool} command: apt-get install iproute2"
    probe = f"{_PREFIX}probe{os.getpid()}"
    try:
        _run("ip", "netns", "add", probe)
    except ConfigError as error:
        return f"no network namespaces: {error}"
    try:
        cable = ["link add name va type veth peer name vb", "link add name vc type bridge"]
        _run("ip", "-n", probe, "-batch", "-", lines=cable)
        queue = "qdisc add dev va root tbf rate 1mbit burst 4kb latency 1ms"
        _run("tc", "-n", probe, "-batch", "-", lines=[queue])
    except ConfigError as error:
        return f"the kernel lacks veth, bridge or tbf: {error}"
    finally:
        _run("ip", "netns", "delete", probe)
    return None


@contextlib.contextmanager
def open_network(network: Network) -> Iterator[Network]:
    """Make a network, and remove it whatever happens.

    Raises:
        ConfigError: Another scale model runs, or this machine or user cannot have one.
    """
    with _only_one():
        if (problem := why_not()) is not None:
            raise ConfigError(f"no scale model here: {problem}")
        _remove_all()
        try:
            _run("ip", "netns", "add", _SWITCH)
            network._make()
            yield network
        finally:
            _remove_all()


@contextlib.contextmanager
def _only_one() -> Iterator[None]:
    """Hold the lock; the kernel gives it back when this process ends, however that is."""
    try:
        file = _LOCK.open("w")
    except OSError as error:
        raise ConfigError(f"no scale model here: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError("another scale model runs on this machine; wait for it") from None
        yield


def _remove_all() -> None:
    """Remove every namespace of a scale model; links and queues go with them."""
    for line in _run("ip", "netns", "list").splitlines():
        name = line.split()[0]
        if name.startswith(_PREFIX):
            _run("ip", "netns", "delete", name)


def _queues(namespace: str) -> dict[str, dict[str, Any]]:
    """Return the statistics of every tbf of a namespace by device."""
    found = json.loads(_run("tc", "-n", namespace, "-s", "-j", "qdisc", "show"))
    return {queue["dev"]: queue for queue in found if queue["kind"] == "tbf"}


def _resent(inside: Sequence[str]) -> int:
    """Return how many segments TCP has sent again in a namespace."""
    lines = _run(*inside, "cat", "/proc/net/snmp").splitlines()
    names, values = (line.split() for line in lines if line.startswith("Tcp:"))
    return int(dict(zip(names, values, strict=True))["RetransSegs"])


def _run(*command: str, lines: Sequence[str] | None = None) -> str:
    done = subprocess.run(
        command,
        input=None if lines is None else "\n".join(lines) + "\n",
        stdin=subprocess.DEVNULL if lines is None else None,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise ConfigError(f"{' '.join(command[:6])}: {done.stderr.strip()}")
    return done.stdout


def _minus(a: list[list[int]], b: list[list[int]]) -> list[list[int]]:
    return [[x - y for x, y in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)]
