"""What is needed of this host: tools, signals, and an end without leftovers."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

TIMED_OUT: Final = 124
GUEST_FAILED: Final = 125
RUN_PREFIX: Final = "weightsync-soft-roce-"
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_LIBC: Final = ctypes.CDLL(None, use_errno=True)

# Tool -> the Debian package that has it. The guest has this host's files, so it needs them here.
PACKAGES: Final = {
    "bash": "bash",
    "bc": "bc",
    "bison": "bison",
    "busybox": "busybox-static",
    "depmod": "kmod",
    "dpkg-deb": "dpkg",
    "flex": "flex",
    "gcc": "gcc",
    "ip": "iproute2",
    "make": "make",
    "modprobe": "kmod",
    "qemu-system-x86_64": "qemu-system-x86",
    "rdma": "iproute2",
    "strip": "binutils",
    "tar": "tar",
    "tc": "iproute2",
    "xz": "xz-utils",
}
GUEST_TOOLS: Final = ("bash", "busybox", "ip", "rdma", "tc")


class SoftRoceError(Exception):
    """The guest cannot run; the text says why and what to do."""


class Interrupted(BaseException):
    """A signal asked this program to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


def say(text: str) -> None:
    """Write to standard error, marked as ours: it is the command's standard error too."""
    print(f"soft_roce: {text}", file=sys.stderr, flush=True)


def search_path() -> str:
    """PATH, and the folders of administrators' tools, which users do not have on it."""
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/bin:/bin"


def find_tool(name: str) -> str | None:
    """The path of a program."""
    return shutil.which(name, path=search_path())


def missing_packages(*tools: str) -> list[str]:
    """Debian packages of those tools that are not there."""
    return sorted({PACKAGES[tool] for tool in tools if find_tool(tool) is None})


def install_command(packages: list[str]) -> str:
    """What to type."""
    return f"sudo apt-get install -y --no-install-recommends {' '.join(packages)}"


def need(*tools: str) -> None:
    """Raise, naming the packages, unless all tools are there."""
    if packages := missing_packages(*tools):
        raise SoftRoceError(f"missing {', '.join(packages)}: {install_command(packages)}")


def check_machine() -> None:
    """Both kinds run this host's programs, and both kernels are x86-64."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise SoftRoceError(f"needs Linux on x86-64, this is {platform.platform()}")


# ---- signals --------------------------------------------------------------------------------


class Interrupts:
    """Turns signals that ask for an end into `Interrupted`, once: cleaning up is not interrupted.

    Python ignores SIGPIPE; the reader threads send it to the main thread when nobody reads our
    output any more.
    """

    SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)

    def __enter__(self) -> Interrupts:
        for number in self.SIGNALS:
            signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self.ignore()

    def ignore(self) -> None:
        """From here on nothing interrupts."""
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.ignore()
        raise Interrupted(number)


def die_of(number: int) -> NoReturn:
    """End as if the signal had never been caught, so that the parent sees its number."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    raise SystemExit(128 + number)


# ---- processes ------------------------------------------------------------------------------


def adopt_orphans() -> None:
    """Make descendants that lose their parent our children, so that `end_descendants` sees them."""
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent() -> None:
    """For a new child, before exec: SIGTERM when this program dies, however it dies."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def descendants() -> list[int]:
    """Processes that we started and their children, by id; zombies too."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208  # names only
        if entry.isdigit():
            with contextlib.suppress(OSError):
                stat = Path("/proc", entry, "stat").read_bytes()
                parent = int(stat.rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry))
    found: list[int] = []
    ahead = [os.getpid()]
    while ahead:
        below = children.get(ahead.pop(), [])
        found += below
        ahead += below
    return found


def end_descendants(limit_s: float = 10.0) -> None:
    """Kill and reap whatever we started that still runs."""
    deadline = time.monotonic() + limit_s
    while left := descendants():
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if time.monotonic() > deadline:
            say(f"processes that do not end: {left}")
            return
        time.sleep(0.005)


def run_tool(
    *command: str | Path, limit_s: float, log: Path | None = None, cwd: Path | None = None
) -> str:
    """Run a tool to its end; its standard output.

    Args:
        command: Program and arguments; the program is looked up as `find_tool` does.
        limit_s: It is killed after this time.
        log: Where all output goes; the result is empty then.
        cwd: Its working directory.

    Raises:
        SoftRoceError: Status other than 0, or out of time; with the end of what it said.
    """
    shown = " ".join(str(part) for part in command[:3])
    with log.open("ab") if log else contextlib.nullcontext(subprocess.PIPE) as sink:
        try:
            done = subprocess.run(
                [find_tool(str(command[0])) or str(command[0]), *map(str, command[1:])],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT if log else subprocess.PIPE,
                timeout=limit_s,
                check=False,
                cwd=cwd,
                env={**os.environ, "LC_ALL": "C", "PATH": search_path()},
            )
        except subprocess.TimeoutExpired as error:
            end_descendants()  # what the tool started
            raise SoftRoceError(f"{shown} did not end within {limit_s:.0f} s") from error
        except Interrupted:
            end_descendants()
            raise
    if done.returncode:
        said = log.read_bytes() if log else done.stderr
        tail = "\n".join(said.decode(errors="replace").splitlines()[-12:])
        raise SoftRoceError(f"{shown} failed with status {done.returncode}:\n{tail}")
    return "" if log else done.stdout.decode(errors="replace")


# ---- folders --------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where kernels are kept; made if it is not there."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "weightsync" / "soft_roce"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def locked(path: Path, limit_s: float, what: str) -> Iterator[None]:
    """Hold a lock between processes; the file stays, empty."""
    deadline = time.monotonic() + limit_s
    with path.open("w") as file:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise SoftRoceError(f"{what} is still busy after {limit_s:.0f} s") from None
                if not told:
                    say(f"waiting for another process: {what}")
                    told = True
                time.sleep(0.2)
        yield


@contextlib.contextmanager
def run_folder() -> Iterator[Path]:
    """A private folder for one run. What runs left that were killed with SIGKILL is removed."""
    base = Path(tempfile.gettempdir())
    for old in base.glob(f"{RUN_PREFIX}*"):
        with contextlib.suppress(OSError):
            if old.stat().st_uid == os.geteuid():
                with (old / "alive").open("r+") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=RUN_PREFIX, dir=base))
    try:
        with (folder / "locking").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            (folder / "locking").rename(folder / "alive")  # never there without its lock
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
