"""The command line of `scripts/soft_roce`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Final, NoReturn

import guest
import host
import kernels

MAX_NICS: Final = 64
EPILOG: Final = """\
In the guest:
  * devices rxe0..rxeN-1 on nic0..nicN-1 with 10.77.0.1..10.77.0.N; GID index 1 is RoCEv2 over IPv4
  * all files of this host, environment and working directory; the command runs as root
  * writes go to memory and are lost at the end, except below each --rw DIR
  * no network but the NICs, standard input is empty
  * `ip link set nic0 down` and `tc qdisc replace dev nic0 root netem ...` work while it runs

Exit status: the command's own; 124 the time was over; 125 the guest failed or bad usage;
126 and 127 come from the guest's shell: not executable, not found.

Kinds of guest, chosen by WEIGHTSYNC_SOFT_ROCE=uml or qemu (default: uml if it is built, else qemu):
  uml   User Mode Linux: starts in a second, runs at native speed, one CPU. Build it once, for
        minutes, with scripts/soft_roce --build
  qemu  emulated machine with Debian's stock kernel: nothing to build, 10 s and more to start, slow

Examples:
  scripts/soft_roce --nics 2 -- ibv_devices
  scripts/soft_roce --nics 4 -- .venv/bin/pytest -k verbs
  scripts/soft_roce --nics 2 --delay 0,5 --loss 0.1 --timeout 60 -- ./a.out
  scripts/soft_roce --nics 1 --rw results -- sh -c 'ibv_devinfo -v > results/devinfo'
"""


class Parser(argparse.ArgumentParser):
    """Leaves with our own status for bad usage: 2 may be the command's."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and leave."""
        host.say(f"{message} (see scripts/soft_roce --help)")
        raise SystemExit(host.GUEST_FAILED)


def numbers(text: str) -> list[float]:
    """`5` or `0,5,10`: one for all NICs, or one for each."""
    values = [float(part) for part in text.split(",")]
    if not all(0 <= value < 1e6 for value in values):
        raise ValueError(text)
    return values


def make_parser() -> Parser:
    """All options; the command after `--` is cut off before."""
    parser = Parser(
        prog="scripts/soft_roce",
        usage="scripts/soft_roce [options] -- COMMAND [ARGUMENT...]",
        description="Run COMMAND against real verbs on N Soft-RoCE devices in a small guest.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--nics", type=int, default=1, metavar="N", help="number of devices (default 1)")
    add("--mem", type=int, default=2048, metavar="MB", help="memory of the guest (default 2048)")
    add(
        "--timeout",
        type=float,
        default=300.0,
        metavar="S",
        help="end the guest after S seconds, its start included, the download of a kernel not "
        "(default 300)",
    )
    add(
        "--rw",
        action="append",
        default=[],
        metavar="DIR",
        help="keep what is written below DIR; may be given again",
    )
    add(
        "--topo",
        choices=("bridge", "rail"),
        default="bridge",
        help="bridge: every device reaches every other; rail: each only itself, as on rails "
        "without a common switch (default bridge)",
    )
    add(
        "--delay",
        type=numbers,
        default=[0.0],
        metavar="MS",
        help="delay of every packet that a NIC sends; 5 for all, 0,5 for nic0 and nic1",
    )
    add(
        "--loss",
        type=numbers,
        default=[0.0],
        metavar="PCT",
        help="percentage of packets lost; for all, or one for each NIC as above",
    )
    add("--verbose", action="store_true", help="show the guest's console and times at the end")
    add("--build", action="store_true", help="build the uml kernel if it is not cached, and leave")
    add(
        "--probe",
        action="store_true",
        help="get ready what a run needs, and print its kind, or why it cannot run",
    )
    return parser


def per_nic(values: list[float], num_nics: int, option: str) -> list[float]:
    """One value for each NIC."""
    if len(values) == 1:
        return values * num_nics
    if len(values) != num_nics:
        raise host.SoftRoceError(f"{option} has {len(values)} values for {num_nics} NICs")
    return values


def make_order(options: argparse.Namespace, command: list[str]) -> guest.Order:
    """Check what argparse cannot."""
    if not 0 <= options.nics <= MAX_NICS:
        raise host.SoftRoceError(f"--nics must be between 0 and {MAX_NICS}")
    if options.mem < 256:
        raise host.SoftRoceError("--mem must be at least 256 (MB)")
    if not 0 < options.timeout <= 86400:
        raise host.SoftRoceError("--timeout must be above 0 and at most 86400 (seconds)")
    delay_ms = per_nic(options.delay, options.nics, "--delay")
    loss_pct = per_nic(options.loss, options.nics, "--loss")
    if any(value > 100 for value in loss_pct):
        raise host.SoftRoceError("--loss is a percentage: at most 100")
    if options.topo == "rail" and any(delay_ms + loss_pct):
        raise host.SoftRoceError("--delay and --loss need --topo bridge: on a rail nothing is sent")
    writable = []
    for name in options.rw:
        folder = Path(name).resolve()
        if not folder.is_dir():
            raise host.SoftRoceError(f"--rw {name}: no such folder")
        if "," in str(folder) or folder == Path("/"):
            raise host.SoftRoceError(f"--rw {name}: neither / nor a name with a comma can be used")
        writable.append(folder)
    return guest.Order(
        command=command,
        num_nics=options.nics,
        memory_mb=options.mem,
        timeout_s=options.timeout,
        writable=writable,
        topology=options.topo,
        delay_ms=delay_ms,
        loss_pct=loss_pct,
        is_verbose=options.verbose,
    )


def main(arguments: list[str]) -> int:
    """Run; returns the exit status."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    command = arguments[cut + 1 :]
    parser = make_parser()
    options = parser.parse_args(arguments[:cut])
    try:
        with host.Interrupts() as interrupts:
            host.check_machine()
            host.adopt_orphans()
            if options.build:
                print(kernels.build_uml())
                return 0
            if not command and not options.probe:
                parser.error("what to run is missing: write it after --")
            order = make_order(options, command)
            kind, kernel = kernels.choose(os.environ.get("WEIGHTSYNC_SOFT_ROCE", ""))
            if options.probe:
                print(kind)
                return 0
            return guest.run(kind, kernel, order, interrupts)
    except host.SoftRoceError as error:
        host.say(str(error))
        return host.GUEST_FAILED
    except host.Interrupted as interrupted:
        host.die_of(interrupted.signal)
