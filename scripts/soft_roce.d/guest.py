"""One guest: started, its output passed on, its end waited for, nothing of it left."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import resource
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import host

HERE: Final = Path(__file__).resolve().parent
DRAIN_S: Final = 5.0
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Order:
    """What to run, and on which devices; `delay_ms` and `loss_pct` have one value for each NIC."""

    command: list[str]
    num_nics: int
    memory_mb: int
    timeout_s: float
    writable: list[Path]
    topology: str
    delay_ms: list[float]
    loss_pct: list[float]
    is_verbose: bool


def run(kind: str, kernel: Path, order: Order, interrupts: host.Interrupts) -> int:
    """Run the order in a guest of that kind; returns the exit status. Blocks up to its timeout.

    Everything that this process has started is ended: it must have nothing else running.

    Raises:
        SoftRoceError: The guest failed before the command had a status.
        Interrupted: A signal came; the guest is gone by then.
    """
    with host.run_folder() as work:
        control = write_control(kind, order, work)
        streams = [Stream(work / "out", 1), Stream(work / "err", 2)]
        try:
            if kind == "uml":
                words, environ = uml_command(kernel, order, control, streams), uml_environ(order)
            else:
                words, environ = qemu_command(kernel, order, work), None
            is_over = run_machine(words, environ, streams, work, order.timeout_s)
        finally:
            interrupts.ignore()  # the end is short, and has its own limits
            host.end_descendants()
            for stream in streams:
                stream.close()
        return conclude(order, work, is_over)


# ---- what the guest reads ---------------------------------------------------------------------


def write_control(kind: str, order: Order, work: Path) -> Path:
    """The folder through which host and guest talk; returns its path."""
    control = work / "control"
    control.mkdir()

    def words(values: list[str]) -> str:
        return "(" + " ".join(map(shlex.quote, values)) + ")"

    conf = {
        "kind": kind,
        "hostname": shlex.quote(platform.node() or "guest"),
        "num_nics": str(order.num_nics),
        "topology": order.topology,
        "delay_ms": words([f"{value:g}" for value in order.delay_ms]),
        "loss_pct": words([f"{value:g}" for value in order.loss_pct]),
        "writable": words([str(folder) for folder in order.writable]),
    }
    (control / "conf").write_text("".join(f"{key}={value}\n" for key, value in conf.items()))
    (control / "command").write_text(command_script(order.command))
    shutil.copy(HERE / "stage2.sh", control)
    if kind == "uml":
        shutil.copy(HERE / "init_uml.sh", control)
        (control / "init_uml.sh").chmod(0o755)
    return control


def command_script(command: list[str]) -> str:
    """A bash script that is the command, in this environment and working directory."""
    mask = os.umask(0)
    os.umask(mask)
    here = shlex.quote(str(Path.cwd()))
    lines = [f"umask {mask:04o}", f"cd -- {here} || exit {host.GUEST_FAILED}"]
    for name, value in os.environ.items():  # exported functions of bash have other names
        if _NAME.fullmatch(name) and name not in ("_", "SHLVL"):
            lines.append(f"export {name}={shlex.quote(value)}")
    lines.append("exec -- " + shlex.join(command))
    return "\n".join(lines) + "\n"


# ---- the two machines -------------------------------------------------------------------------


def uml_command(kernel: Path, order: Order, control: Path, streams: list[Stream]) -> list[str]:
    """User Mode Linux: the kernel is a program. Its consoles 1 and 2 are our pipes."""
    return [
        str(kernel),
        f"mem={order.memory_mb}M",
        "root=/dev/root",
        "rootfstype=hostfs",
        "rootflags=/",
        "ro",
        f"init={control / 'init_uml.sh'}",
        f"uml_dir={control.parent / 'uml'}",
        "con=null",
        "ssl=null",
        "con0=null,fd:2",
        *(f"con{i}=null,fd:{stream.inlet}" for i, stream in enumerate(streams, start=1)),
        "console=tty0",
        "loglevel=5",
    ]


def uml_environ(order: Order) -> dict[str, str]:
    """The environment of the kernel itself: it maps the guest's memory from a file in TMPDIR.

    The file has no name, so nothing is left of it. Memory is faster than a disk, where it fits.
    """
    folder = "/dev/shm"  # where the memory is
    try:
        is_fit = shutil.disk_usage(folder).free > order.memory_mb * 1_000_000
        is_fit = is_fit and not os.statvfs(folder).f_flag & os.ST_NOEXEC
    except OSError:
        is_fit = False
    return {
        "HOME": "/",
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "TMPDIR": folder if is_fit else os.environ.get("TMPDIR", "/tmp"),
    }


def qemu_command(kernel: Path, order: Order, work: Path) -> list[str]:
    """An emulated PC. Files go over 9p, output through two virtio ports that end in fifos."""

    def share(tag: str, path: Path, options: str = "") -> list[str]:
        return ["-virtfs", f"local,path={path},mount_tag={tag},security_model=none{options}"]

    def port(name: str) -> list[str]:
        return [
            *("-chardev", f"file,id={name},path={work / name}"),
            *("-device", f"virtserialport,chardev={name},name={name}"),
        ]

    program = host.find_tool("qemu-system-x86_64")
    assert program is not None
    append = (
        "console=ttyS0 quiet loglevel=5 panic=-1 reboot=t mitigations=off nokaslr nopti audit=0 "
        "apparmor=0 random.trust_cpu=on no_timer_check cryptomgr.notests"
    )
    command = [program, "-M", "q35", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max"]
    command += ["-smp", str(min(2, len(os.sched_getaffinity(0)))), "-m", str(order.memory_mb)]
    command += ["-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none"]
    command += ["-no-reboot", "-kernel", str(kernel / "vmlinuz"), "-initrd", str(kernel / "initrd")]
    command += ["-append", append, "-serial", f"file:{work / 'guest.log'}"]
    command += share("host", Path("/"), ",readonly=on,multidevs=remap")
    command += share("control", work / "control")
    for i, folder in enumerate(order.writable):
        command += share(f"rw{i}", folder, ",multidevs=remap")
    return [*command, "-device", "virtio-serial-pci", *port("out"), *port("err")]


# ---- running ----------------------------------------------------------------------------------


class Stream:
    """One output of the guest, copied to one of ours by a thread.

    Both ends of the fifo are held from the start: neither opening it nor reading can hang for want
    of a guest, and closing `inlet` is the end of the stream once the guest is gone.
    """

    def __init__(self, path: Path, target: int) -> None:
        os.mkfifo(path)
        self._outlet = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self.inlet = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        os.set_blocking(self._outlet, True)
        self._target = target
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to copy: after the guest was forked, which threads would endanger."""
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Copy what is left. The guest must be gone; who does not read our output is given up."""
        os.close(self.inlet)
        if self._thread is not None:
            self._thread.join(DRAIN_S)
            if self._thread.is_alive():
                host.say("nobody reads our output: the rest of it is dropped")
                return  # the thread still uses the outlet; both end with this program
        os.close(self._outlet)

    def _copy(self) -> None:
        while data := os.read(self._outlet, 1 << 16):
            left = memoryview(data)
            while left:
                try:
                    left = left[os.write(self._target, left) :]
                except BlockingIOError:  # somebody made our output non-blocking
                    select.select([], [self._target], [])
                except OSError:  # nobody will read it: as if the command had written there itself
                    main = threading.main_thread().ident
                    assert main is not None
                    with contextlib.suppress(ProcessLookupError):
                        signal.pthread_kill(main, signal.SIGPIPE)
                    left = memoryview(b"")


def run_machine(
    words: list[str],
    environ: dict[str, str] | None,
    streams: list[Stream],
    work: Path,
    timeout_s: float,
) -> bool:
    """Run the program that is the machine to its end; True if the time was over first.

    It leads its own process group: Ctrl-C reaches only us, and what it sends to its group is not
    for us.
    """
    with (work / "machine.log").open("wb") as log:
        machine = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environ,
            cwd="/",
            pass_fds=[stream.inlet for stream in streams],
            start_new_session=True,
            preexec_fn=prepare_machine(),
        )
    for stream in streams:
        stream.start()
    return not wait_for(machine, timeout_s)


def prepare_machine() -> Callable[[], None]:
    """What the child does before it becomes the machine."""

    def prepare() -> None:
        host.die_with_parent()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # uml aborts when its guest panics

    return prepare


def wait_for(machine: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Wait without polling; False if the time was over, and the machine was asked to end."""
    pidfd = os.pidfd_open(machine.pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        deadline = time.monotonic() + timeout_s
        if poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            machine.wait()
            return True
        machine.terminate()
        if poll.poll(2000):
            machine.wait()
        return False
    finally:
        os.close(pidfd)


def conclude(order: Order, work: Path, is_over: bool) -> int:
    """The exit status, out of what the guest left in the control folder."""

    def note(name: str) -> str:
        path = work / "control" / name
        return path.read_text(errors="replace").strip() if path.exists() else ""

    def show(num_lines: int) -> None:
        for name in ("machine.log", "guest.log"):
            path = work / name
            lines = path.read_text(errors="replace").splitlines() if path.exists() else []
            for line in lines[-num_lines:]:
                sys.stderr.write(f"  {line.strip()}\n")
        sys.stderr.flush()

    if order.is_verbose:
        host.say(f"NICs ready after {note('ready') or '-'} s, end after {note('end') or '-'} s:")
        show(1000)
    if status := note("status"):
        return int(status)
    if is_over:
        what = "the command did not end" if note("ready") else "the guest did not start"
        host.say(f"{what} within {order.timeout_s:g} s")
        return host.TIMED_OUT
    if not order.is_verbose:
        show(20)
    raise host.SoftRoceError(note("error") or "the guest ended without a status of the command")
