"""`weightsync calibrate`: measure this host and store what came out as a cluster."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import math
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from weightsync.bench.host import host_facts, load
from weightsync.calibrate.constants import Calibration, Wiring, calibrate
from weightsync.calibrate.stored import prepare, store
from weightsync.demo.workspace import Interrupts, workspace
from weightsync.errors import ConfigError
from weightsync.fleet.fleet import Fleet, Host
from weightsync.planners.cluster import Cluster, Rate
from weightsync.units import MIB

__all__ = ["CalibrateOptions", "run_calibrate"]

_MAX_RANKS: Final = 64
_IP_S: Final = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """What to measure.

    Attributes:
        name: Of the cluster.
        out: YAML file to write; its folder is to be called `cluster` for `weightsync plan`.
        addresses: Of this host, one for each rail of a rank; empty: loopback.
        nic_gbit_per_s: Nominal rate of a rail; None: what the system says of the interface, or
            what is measured.
        sources, sinks: Processes that messages are measured with.
        ranks_per_node: For the cluster.

    Raises:
        ConfigError: A number, name or address that cannot be.
    """

    name: str = "this_host"
    out: Path | None = None
    addresses: tuple[str, ...] = ()
    nic_gbit_per_s: float | None = None
    sources: int = 2
    sinks: int = 2
    ranks_per_node: int = 1

    def __post_init__(self) -> None:
        if not self.name.replace("_", "").isalnum():
            raise ConfigError(f"name={self.name!r}: letters, digits and _")
        for what in ("sources", "sinks", "ranks_per_node"):
            if not 1 <= getattr(self, what) <= _MAX_RANKS:
                raise ConfigError(f"{what}={getattr(self, what)}: 1 to {_MAX_RANKS}")
        for address in self.addresses:
            try:
                ipaddress.ip_address(address)
            except ValueError as error:
                raise ConfigError(f"address {address!r}: {error}") from error
        if self.nic_gbit_per_s is not None and not 0 < self.nic_gbit_per_s < math.inf:
            raise ConfigError(f"nic_gbit_per_s={self.nic_gbit_per_s}: above 0, and a number")

    @property
    def path(self) -> Path:
        """Where the cluster goes."""
        if self.out is not None:
            return self.out
        home = os.environ.get("XDG_CONFIG_HOME") or str(Path("~/.config").expanduser())
        return Path(home) / "weightsync" / "cluster" / f"{self.name}.yaml"


def run_calibrate(options: CalibrateOptions, console: Console) -> dict[str, Any]:
    """Measure, store, print a table. Blocks for about 20 s.

    Returns:
        The keys of `weightsync.calibrate/1`, without "schema".

    Raises:
        ConfigError: The file cannot be written.
        WeightSyncError: A process failed; nothing is stored.
    """
    prepare(options.path, f"cluster/{options.name}.yaml")
    began = load()
    addresses = options.addresses or ("127.0.0.1",)
    nominal, source = _nominal(options)
    wiring = Wiring(
        name=options.name,
        ranks_per_node=options.ranks_per_node,
        rails=len(addresses),
        nic_gbit_per_s=nominal,
        nic_source=source,
        memory_bytes=os.sysconf("SC_PAGE_SIZE")
        * os.sysconf("SC_PHYS_PAGES")
        // options.ranks_per_node,
        wire_bytes=256 * MIB,
    )
    here = Host((), addresses)
    with (
        Interrupts() as interrupts,
        workspace() as folder,
        Fleet(
            folder,
            sources=[here] * options.sources,
            sinks=[here] * options.sinks,
            coordinator=here,
        ) as fleet,
        interrupts.allowed(),
    ):
        _say(console, "processes")
        fleet.start()
        found = calibrate(fleet, wiring, lambda text: _say(console, text))
        fleet.dismiss()
    store(found, options.path)
    _print(console, options, found)
    return {
        "ok": True,
        "cluster": options.name,
        "path": str(options.path),
        "constants": constants(found.cluster),
        "how": dict(found.how),
        "host": host_facts(began),
    }


def constants(cluster: Cluster) -> dict[str, Any]:
    """Return a cluster as plain values, as its file has them."""
    return dataclasses.asdict(cluster)


def _nominal(options: CalibrateOptions) -> tuple[float | None, str]:
    if options.nic_gbit_per_s is not None:
        return options.nic_gbit_per_s, "as it was given"
    if not options.addresses:
        return None, ""
    speeds = [_speed(address) for address in options.addresses]
    known = [speed for speed in speeds if speed is not None]
    if len(known) < len(speeds):
        return None, ""
    return min(known), "speed of the interface, as the system says"


def _speed(address: str) -> float | None:
    """Return the Gbit/s of the interface that has an address; None where nobody knows."""
    if (ip := shutil.which("ip")) is None:
        return None
    command = [ip, "-j", "address"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=_IP_S, check=False)
    except subprocess.TimeoutExpired:
        return None
    for link in json.loads(listed.stdout or "[]"):
        if address in {one["local"] for one in link["addr_info"]}:
            try:
                text = Path("/sys/class/net", link["ifname"], "speed").read_text(encoding="ascii")
            except OSError:  # as of loopback
                return None
            return int(text) / 1000 if int(text) > 0 else None
    raise ConfigError(f"no interface of this host has the address {address}")


def _say(console: Console, text: str) -> None:
    console.print(Text(f"calibrate: {text}", "dim"))


def _print(console: Console, options: CalibrateOptions, found: Calibration) -> None:
    table = Table(
        title=f"Constants of {platform.node()} as cluster {options.name}",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for name, side in (
        ("", "left"),
        ("nominal", "right"),
        ("attainable", "right"),
        ("how", "left"),
    ):
        table.add_column(name, justify="right" if side == "right" else "left")
    for field in dataclasses.fields(Cluster):
        value = getattr(found.cluster, field.name)
        if isinstance(value, Rate):
            cells = (f"{value.nominal:.4g}", f"{value.attainable:.4g}")
        elif isinstance(value, float):
            cells = ("", f"{value:.4g}")
        else:
            cells = ("", str(value))
        table.add_row(field.name, *cells, found.how[field.name])
    console.print(table)
    folder = options.path.parent
    if folder.name == "cluster":
        console.print(
            Text(
                f"stored: {options.path}\nuse it: weightsync plan --config-dir {folder.parent} "
                f"cluster={options.path.stem} model=... trainer=... rollout=..."
            ),
            soft_wrap=True,
        )
    else:
        console.print(Text(f"stored: {options.path}"), soft_wrap=True)
