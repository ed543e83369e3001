"""`weightsync doctor`: what this host can do, what is missing, and what to install for more.

Nothing is changed. What matters for the `local` fabric is tried, not guessed: memory is shared, a
child process reads this one, and tensors' worth of bytes go through the engine.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from weightsync.encodings import kernels
from weightsync.errors import WeightSyncError
from weightsync.service import selftest
from weightsync.settings import ENV_JOB, Settings
from weightsync.transport.cuda_ipc import cuda_ipc_problem
from weightsync.transport.fabrics import open_fabric
from weightsync.transport.ofi import ofi_providers
from weightsync.transport.verbs import RdmaPort, rdma_ports, verbs_problem
from weightsync.units import GIB, MIB, format_bytes

__all__ = ["Check", "Host", "examine", "run_doctor"]

Status = Literal["ok", "warning", "missing"]

_STYLE: Final[dict[Status, str]] = {"ok": "green", "warning": "yellow", "missing": "red"}
_MIN_PYTHON: Final = (3, 11)
_MIN_FILES: Final = 1024
_MIN_FREE: Final = 2 * GIB
_MIN_SHM: Final = 1 * GIB
_PROBE_S: Final = 20.0
_ANSWER_S: Final = 5.0
_MIN_DAYS: Final = 7
_PR_SET_PTRACER: Final = 0x59616D61
_SECCOMP: Final = {"0": "off", "1": "strict", "2": "filter"}
_F_ADD_SEALS: Final = 1033
_F_SEAL_SHRINK: Final = 2

# Reads eight bytes of the process that started it, which says where they are.
_READER: Final = """
import ctypes, os, sys
pid, address = map(int, sys.stdin.readline().split())
class Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("len", ctypes.c_size_t)]
value = ctypes.c_uint64(0)
here = Vector(ctypes.addressof(value), 8)
there = Vector(address, 8)
libc = ctypes.CDLL(None, use_errno=True)
libc.process_vm_readv.restype = ctypes.c_ssize_t
libc.process_vm_readv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p,
                                  ctypes.c_ulong, ctypes.c_ulong]
got = libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
print(value.value if got == 8 else -ctypes.get_errno())
"""


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Args:
        name: What was looked at.
        status: `ok`; `warning`: works, but could be better; `missing`: does not work.
        found: What there is.
        next: What to do about it; empty if nothing.
        is_needed: Whether `local` does not work without it.
    """

    name: str
    status: Status
    found: str
    next: str = ""
    is_needed: bool = False


@dataclass(frozen=True)
class Host:
    """How the host is looked at; tests look at one of their own.

    Args:
        root: Where /proc, /sys and /dev are.
        environ: Environment variables.
        load: Loads a shared library by name; raises OSError.
        which: Finds a program on the path.
        providers: Version and providers of libfabric; raises OSError.
    """

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    load: Callable[[str], object] = ctypes.CDLL
    which: Callable[[str], str | None] = shutil.which
    providers: Callable[[], tuple[str, list[str]]] = ofi_providers

    def read(self, path: str) -> str | None:
        """Content of a file below the root, stripped; None if it cannot be read."""
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return None

    def fields(self, path: str) -> dict[str, str]:
        """Lines `name: value` of a file; the first of each name."""
        text = self.read(path)
        found: dict[str, str] = {}
        for line in [] if text is None else text.splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
        return found

    def choice(self, path: str) -> str | None:
        """The word in brackets, as /sys shows which of several is chosen."""
        text = self.read(path)
        if text is None:
            return None
        _, _, rest = text.partition("[")
        return rest.partition("]")[0] or text


def examine(host: Host | None = None) -> list[Check]:
    """Look at everything; some hundred milliseconds, and seconds where torch is not in the cache.

    Args:
        host: None: this one.

    Returns:
        The lines of the table, in order.
    """
    host = Host() if host is None else host
    checks: list[Check] = []
    for look in (
        _python,
        _processor,
        _extension,
        _memory,
        _memfd,
        _huge_pages,
        _dev_shm,
        _sockets,
        _process_read,
        _local_fabric,
        _tcp_fabric,
        _tls,
        _job,
        _limits,
        _torch,
        _cuda,
        _rdma,
        _spin,
    ):
        checks += look(host)
    return checks


def run_doctor(console: Console, more: Sequence[Check] = ()) -> dict[str, Any]:
    """Look at everything and print a table.

    Args:
        console: Where to print.
        more: What was looked at besides.

    Returns:
        The keys of `weightsync.doctor/1`, without "schema": `ok` (nothing that `local` needs is
        missing), `fabrics` that work now, `checks`.
    """
    checks = [*examine(), *more]
    broken = [check for check in checks if check.is_needed and check.status == "missing"]
    works = {check.name for check in checks if check.status == "ok"}
    fabrics = [] if broken else ["local", "sim", *(["tcp"] if "fabric tcp" in works else [])]
    for name, problem in (("cuda_ipc", cuda_ipc_problem), ("verbs", verbs_problem)):
        if not broken and problem() is None:
            fabrics.append(name)
    table = Table(box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    table.add_column("what", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("next step", style="dim", overflow="fold")
    for check in checks:
        status = Text(check.status, _STYLE[check.status])
        table.add_row(status, check.name, Text(check.found), Text(check.next))
    console.print(table)
    ports = _ports()
    if ports:
        console.print(_port_table(ports))
    if broken:
        names = ", ".join(check.name for check in broken)
        console.print(f"local does not work here: {names}", style="bold red")
    else:
        console.print(f"fabrics that work now: {', '.join(fabrics)}", style="green")
    return {
        "ok": not broken,
        "fabrics": fabrics,
        "checks": [asdict(check) for check in checks],
        "rdma_ports": [asdict(port) for port in ports],
    }


# ---- what to look at ----


def _python(host: Host) -> Iterator[Check]:
    version, least = platform.python_version(), ".".join(map(str, _MIN_PYTHON))
    if sys.version_info[:2] < _MIN_PYTHON:
        yield Check("Python", "missing", version, f"install Python {least} or newer", True)
    else:
        yield Check("Python", "ok", f"{version}, Linux {platform.release()}")


def _processor(host: Host) -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0))
    info = host.fields("proc/cpuinfo")
    model = info.get("model name", info.get("Model", platform.machine()))
    text = f"{model}, {cores} core{'s' if cores > 1 else ''} for this process"
    if cores < 2:
        yield Check("processor", "warning", text, "copies and digests overlap from 2 cores on")
    else:
        yield Check("processor", "ok", text)


def _extension(host: Host) -> Iterator[Check]:
    try:
        info = kernels.kernel_info()
    except (WeightSyncError, ImportError, OSError) as error:
        next_step = "make setup in a checkout, or pip install weightsync"
        yield Check("extension", "missing", str(error), next_step, True)
        return
    others = ", ".join(name for name in info["isas"] if name != info["isa"])
    text = f"built; kernels use {info['isa']}" + (f" (also {others})" if others else "")
    if info["isa"] == "portable":
        next_step = "digests run at half speed or less without AVX2"
        yield Check("extension", "warning", text, next_step)
    else:
        yield Check("extension", "ok", text)


def _memory(host: Host) -> Iterator[Check]:
    info = host.fields("proc/meminfo")
    total, free = (_kib(info.get(name, "")) for name in ("MemTotal", "MemAvailable"))
    text = f"{format_bytes(free)} of {format_bytes(total)} available"
    limit = host.read("sys/fs/cgroup/memory.max")
    if limit is not None and limit.isdecimal():
        text += f", this cgroup may use {format_bytes(int(limit))}"
    if free < _MIN_FREE:
        next_step = "staged mode keeps a second copy of a sink's weights; free some, or in_place"
        yield Check("memory", "warning", text, next_step)
    else:
        yield Check("memory", "ok", text)


def _memfd(host: Host) -> Iterator[Check]:
    import fcntl

    try:
        fd = os.memfd_create("weightsync-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        next_step = "allow memfd_create (seccomp, kernel 3.17 or newer)"
        yield Check("memfd", "missing", str(error), next_step, True)
        return
    try:
        os.ftruncate(fd, MIB)
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK)
    except OSError as error:
        yield Check(
            "memfd", "missing", str(error), "allow sealed memfds (seccomp, ulimit -f)", True
        )
    else:
        yield Check("memfd", "ok", "sealed shared memory works")
    finally:
        os.close(fd)


def _huge_pages(host: Host) -> Iterator[Check]:
    folder = "sys/kernel/mm/transparent_hugepage"
    enabled, shmem = host.choice(f"{folder}/enabled"), host.choice(f"{folder}/shmem_enabled")
    if shmem in ("advise", "within_size", "always", "force"):
        yield Check("huge pages", "ok", f"fabric memory: {shmem}; weights: {enabled}")
        return
    found = f"fabric memory: {shmem}; weights: {enabled}"
    next_step = f"echo advise > /{folder}/shmem_enabled (as root); copies are some percent slower"
    yield Check("huge pages", "warning", found, next_step)


def _dev_shm(host: Host) -> Iterator[Check]:
    try:
        info = os.statvfs(host.root / "dev/shm")
    except OSError as error:
        found, size = str(error), 0
    else:
        size = info.f_frsize * info.f_blocks
        found = f"{format_bytes(info.f_frsize * info.f_bavail)} of {format_bytes(size)} free"
    if size < _MIN_SHM:
        next_step = "not used by local; PyTorch and NCCL want some: docker run --shm-size=8g"
        yield Check("/dev/shm", "warning", found, next_step)
    else:
        yield Check("/dev/shm", "ok", f"{found}; local does not use it")


def _sockets(host: Host) -> Iterator[Check]:
    try:
        with (
            tempfile.TemporaryDirectory(prefix="weightsync-") as folder,
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server,
        ):
            server.bind(f"{folder}/job.sock")
            server.listen()
    except OSError as error:
        next_step = "set TMPDIR to a short writable path on a file system that has sockets"
        yield Check("job socket", "missing", f"{tempfile.gettempdir()}: {error}", next_step, True)
    else:
        yield Check("job socket", "ok", f"Unix sockets in {tempfile.gettempdir()}")


def _tls(host: Host) -> Iterator[Check]:
    try:
        selftest.try_tls(_ANSWER_S)
    except (WeightSyncError, OSError) as error:
        yield Check("job over TLS", "missing", str(error), "unix: jobs work; see the message")
    else:
        yield Check("job over TLS", "ok", "a job on 127.0.0.1 answered over grpcs://")


def _job(host: Host) -> Iterator[Check]:
    """The job that this environment names, if any, and how long its certificate lasts."""
    try:
        settings = Settings.resolve(environ=host.environ)
        certificate = selftest.server_certificate(settings)
        if certificate is not None:
            left = selftest.days_left(certificate)
            text = f"for {', '.join(certificate.hosts)}, until {certificate.not_after:%Y-%m-%d}"
            if left < _MIN_DAYS:
                next_step = "weightsync certs --renew, then start the job again"
                yield Check("job certificate", "warning", text, next_step)
            else:
                yield Check("job certificate", "ok", text)
        if settings.job_url is None:
            yield Check("job", "ok", f"${ENV_JOB} names none")
            return
        status = selftest.ask_job(settings, _ANSWER_S)
    except WeightSyncError as error:
        yield Check("job", "missing", f"{type(error).__name__}: {error}", "see the message")
    else:
        found = f"{settings.job_url}: {status.phase}, version {status.committed_version} committed"
        yield Check("job", "ok", found)


def _process_read(host: Host) -> Iterator[Check]:
    status = host.fields("proc/self/status")
    seccomp = _SECCOMP.get(status.get("Seccomp", ""), "unknown")
    scope = host.read("proc/sys/kernel/yama/ptrace_scope")
    yama = "no Yama" if scope is None else f"Yama ptrace_scope {scope}"
    failure = _try_process_read()
    if failure is None:
        found = f"process_vm_readv works ({yama}, seccomp {seccomp})"
        yield Check("reading peers", "ok", found)
        return
    next_step = "mode='staged' works; for 'in_place': run all as one user in one pid namespace, "
    if scope in ("2", "3"):
        next_step += "sysctl kernel.yama.ptrace_scope=1"
    else:
        next_step += "with --cap-add SYS_PTRACE or a seccomp profile that allows it"
    yield Check("reading peers", "missing", f"{failure} ({yama}, seccomp {seccomp})", next_step)


def _try_process_read() -> str | None:
    """Have a child read this process; why it could not, or None."""
    secret = ctypes.c_uint64(int.from_bytes(os.urandom(7), "little"))
    try:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _READER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    except OSError as error:
        return f"no child process: {error}"
    # As the engine does: with Yama a process names who may read it. Fails where there is no Yama.
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(child.pid), 0, 0, 0)
    try:
        text, _ = child.communicate(f"{os.getpid()} {ctypes.addressof(secret)}\n", _PROBE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return f"no answer in {_PROBE_S:g} s"
    finally:
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(0), 0, 0, 0)
    value = int(text) if text.strip().lstrip("-").isdecimal() else -errno.EPROTO
    if value == secret.value:
        return None
    return f"process_vm_readv: {os.strerror(-value) if value < 0 else 'read something else'}"


def _local_fabric(host: Host) -> Iterator[Check]:
    yield _try_fabric("local", is_needed=True)


def _tcp_fabric(host: Host) -> Iterator[Check]:
    yield _try_fabric("tcp", is_needed=False)


def _try_fabric(name: str, *, is_needed: bool) -> Check:
    """Send a few bytes from one engine to another one, as two processes would."""
    what = f"fabric {name}"
    data = np.arange(MIB, dtype=np.uint8)
    try:
        with contextlib.ExitStack() as stack:
            sink, source = open_fabric(name), open_fabric(name)
            stack.callback(sink.close)
            stack.callback(source.close)
            memory = sink.allocate(data.nbytes)
            target = sink.export([(0, memory, 0, data.nbytes)], [1], 1, 1)
            lease = source.register(data.ctypes.data, data.nbytes, data)
            remote = source.connect(target.descriptor, _PROBE_S)
            row = np.array([[lease.address, 0, data.nbytes, 0]], np.int64)
            remote.post(row).wait(_PROBE_S)
            target.wait([0], _PROBE_S)
            target.flush()
            if not np.array_equal(np.frombuffer(memoryview(memory), np.uint8), data):
                next_step = "report this, with the output of `weightsync doctor --json`"
                return Check(what, "missing", "wrong bytes arrived", next_step, is_needed)
            remote.close()
            target.close()
            lease.release()
    except (WeightSyncError, OSError) as error:
        return Check(what, "missing", str(error), "see the message", is_needed)
    return Check(what, "ok", f"{format_bytes(data.nbytes)} written and compared")


def _limits(host: Host) -> Iterator[Check]:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files != resource.RLIM_INFINITY and files < _MIN_FILES:
        yield Check("open files", "warning", str(files), f"ulimit -n {_MIN_FILES}")
    else:
        yield Check("open files", "ok", _limit(files, str(files)))
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if locked == resource.RLIM_INFINITY:
        yield Check("locked memory", "ok", "unlimited")
    else:
        next_step = "not needed by local; RDMA is: ulimit -l unlimited, docker --ulimit memlock=-1"
        yield Check("locked memory", "warning", format_bytes(locked), next_step)


def _torch(host: Host) -> Iterator[Check]:
    try:
        import torch
    except ImportError as error:
        next_step = "pip install torch; planning works without"
        yield Check("PyTorch", "missing", str(error), next_step)
        return
    text = f"{torch.__version__}, {torch.get_num_threads()} threads"
    yield Check("PyTorch", "ok", text)
    settings = {
        name: host.environ[name]
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
        if name in host.environ
    }
    is_on = any("expandable_segments:true" in text.lower() for text in settings.values())
    if is_on:
        next_step = "no effect on CPU weights; cannot be shared over CUDA IPC or registered whole"
        yield Check("expandable segments", "warning", "on", next_step)
    else:
        yield Check("expandable segments", "ok", "off")


def _cuda(host: Host) -> Iterator[Check]:
    if (problem := _loads(host, "libcuda.so.1")) is None:
        yield Check("CUDA driver", "ok", "libcuda.so.1 loads; fabric cuda_ipc uses it")
    else:
        next_step = "install the NVIDIA driver; only fabric cuda_ipc needs it"
        yield Check("CUDA driver", "missing", problem, next_step)


def _libfabric(host: Host) -> Check:
    if (problem := _loads(host, "libfabric.so.1")) is not None:
        return Check("libfabric", "missing", problem, "apt-get install libfabric1, for ofi fabrics")
    try:
        version, providers = host.providers()
    except OSError as error:
        return Check("libfabric", "warning", str(error), "run `fi_info`; only ofi fabrics need it")
    found = f"version {version}; providers {', '.join(providers) or 'none'}"
    if tuple(int(part) for part in version.split(".")) < (1, 17):
        return Check("libfabric", "warning", found, "ofi fabrics need version 1.17 or newer")
    return Check("libfabric", "ok", found)


def _rdma(host: Host) -> Iterator[Check]:
    if (problem := _loads(host, "libibverbs.so.1")) is None:
        yield Check("libibverbs", "ok", "loads; fabric verbs uses it")
    else:
        next_step = "apt-get install rdma-core; only fabric verbs needs it"
        yield Check("libibverbs", "missing", problem, next_step)
    yield _libfabric(host)
    folder = host.root / "sys/class/infiniband"
    devices = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if devices:
        found = ", ".join(f"{name} ({_port_state(host, name)})" for name in devices)
        yield Check("RDMA devices", "ok", found)
    else:
        next_step = "a NIC with its driver, or software: modprobe rdma_rxe (kernel module)"
        yield Check("RDMA devices", "missing", "none", next_step)


def _spin(host: Host) -> Iterator[Check]:
    path = host.which("spin")
    if path is None:
        next_step = "apt-get install spin; only checking the protocol's model needs it"
        yield Check("spin", "missing", "not found", next_step)
    else:
        yield Check("spin", "ok", path)


# ---- RDMA ports ----


def _ports() -> list[RdmaPort]:
    """None as well when the extension is missing, which has a line of its own."""
    try:
        return rdma_ports()
    except (WeightSyncError, ImportError, OSError):
        return []


def _port_table(ports: list[RdmaPort]) -> Table:
    has_gpus = any(port.gpus for port in ports)
    table = Table(box=SIMPLE_HEAD)
    for name in ("RDMA port", "state", "link", "Gbit/s", "NUMA", "interface", "GID", "address"):
        table.add_column(name, no_wrap=name != "address")
    if has_gpus:
        table.add_column("nearest GPUs", overflow="fold")
    for port in ports:
        chosen = next((gid for gid in port.gids if gid[0] == port.gid_index), None)
        table.add_row(
            port.name,
            Text(port.state, _STYLE["ok" if port.is_active else "missing"]),
            port.link_layer,
            f"{port.gbit_per_s:g}" if port.gbit_per_s else "-",
            str(port.numa_node) if port.numa_node >= 0 else "-",
            port.interface or "-",
            str(port.gid_index) if chosen else "none fits",
            f"{chosen[1]} ({chosen[2]})" if chosen else "give its interface an IP address",
            *([_nearest_gpus(port)] if has_gpus else []),
        )
    return table


def _nearest_gpus(port: RdmaPort) -> str:
    """Such as "PIX 0000:18:00.0 0000:19:00.0"."""
    if not port.gpus:
        return "-"
    nearest = port.gpus[0][1]
    return " ".join([nearest, *(address for address, distance in port.gpus if distance == nearest)])


# ---- help ----


def _loads(host: Host, library: str) -> str | None:
    """Why a library cannot be loaded, or None."""
    try:
        host.load(library)
    except OSError as error:
        text = str(error)
        return f"{library} is not installed" if "No such file" in text else text
    return None


def _port_state(host: Host, device: str) -> str:
    """State of the first port, such as "ACTIVE"."""
    text = host.read(f"sys/class/infiniband/{device}/ports/1/state")
    return "no port" if text is None else text.partition(":")[2].strip() or text


def _kib(text: str) -> int:
    """Bytes of a value of /proc/meminfo, such as "24 kB"."""
    number = text.partition(" ")[0]
    return int(number) * 1024 if number.isdecimal() else 0


def _limit(value: int, text: str) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else text
