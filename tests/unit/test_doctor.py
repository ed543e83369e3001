"""The doctor on hosts that tests made up, and once on this one."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from weightsync import doctor
from weightsync.cli import app
from weightsync.doctor import Check, Host, examine
from weightsync.errors import MemoryRegistrationError

HUGE = "sys/kernel/mm/transparent_hugepage"
FILES = {
    "proc/cpuinfo": "processor : 0\nmodel name : Test CPU 3000\n\nmodel name : Other\n",
    "proc/meminfo": "MemTotal: 33554432 kB\nMemAvailable: 16777216 kB\n",
    "proc/self/status": "Name: python\nSeccomp: 2\n",
    "proc/sys/kernel/yama/ptrace_scope": "1\n",
    f"{HUGE}/enabled": "always [madvise] never\n",
    f"{HUGE}/shmem_enabled": "always within_size [advise] never deny force\n",
    "sys/fs/cgroup/memory.max": "max\n",
}


def refuse(name: str) -> object:
    raise OSError(f"{name}: cannot open shared object file: No such file or directory")


def look(tmp_path: Path, files: Mapping[str, str], **options: Any) -> dict[str, Check]:
    """What the doctor says of a host with these files, by name."""
    for path, text in {**FILES, **files}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    (tmp_path / "dev/shm").mkdir(parents=True)
    settings: dict[str, Any] = {
        "load": lambda name: None,
        "which": lambda name: f"/bin/{name}",
        "providers": lambda: ("1.17", ["shm", "tcp"]),
    }
    host = Host(root=tmp_path, environ={}, **{**settings, **options})
    return {check.name: check for check in examine(host)}


def test_well_equipped_host(tmp_path: Path) -> None:
    port = "sys/class/infiniband/mlx5_0/ports/1/state"
    found = look(tmp_path, {port: "4: ACTIVE\n"})
    good = {name for name, check in found.items() if check.status == "ok"}
    assert good >= {
        *("Python", "extension", "memory", "memfd", "huge pages", "job socket", "fabric local"),
        "fabric tcp",
        *("PyTorch", "expandable segments", "CUDA driver", "libibverbs", "libfabric"),
        *("RDMA devices", "spin"),
    }
    assert found["processor"].found.startswith("Test CPU 3000, ")
    assert found["memory"].found == "16.0 GiB of 32.0 GiB available"
    assert found["RDMA devices"].found == "mlx5_0 (ACTIVE)"
    assert found["libfabric"].found == "version 1.17; providers shm, tcp"
    assert "seccomp filter" in found["reading peers"].found
    assert "ptrace_scope 1" in found["reading peers"].found


def test_bare_host(tmp_path: Path) -> None:
    found = look(tmp_path, {}, load=refuse, which=lambda name: None)
    missing = {name: check for name, check in found.items() if check.status == "missing"}
    assert missing.keys() == {"CUDA driver", "libibverbs", "libfabric", "RDMA devices", "spin"}
    assert not any(check.is_needed for check in missing.values())
    assert "apt-get install rdma-core" in missing["libibverbs"].next
    assert "apt-get install libfabric1" in missing["libfabric"].next
    assert "apt-get install spin" in missing["spin"].next


def test_libfabric_that_is_old_or_silent_is_a_warning(tmp_path: Path) -> None:
    def silent() -> tuple[str, list[str]]:
        raise OSError("does not tell")

    old = look(tmp_path / "old", {}, providers=lambda: ("1.9", ["tcp"]))["libfabric"]
    assert (old.status, old.next) == ("warning", "ofi fabrics need version 1.17 or newer")
    assert look(tmp_path / "silent", {}, providers=silent)["libfabric"].status == "warning"


def test_every_problem_has_a_next_step(tmp_path: Path) -> None:
    found = look(
        tmp_path,
        {"proc/meminfo": "MemTotal: 2048 kB\nMemAvailable: 1024 kB\n", f"{HUGE}/shmem_enabled": ""},
        load=refuse,
        which=lambda name: None,
    )
    assert found["memory"].status == "warning"
    assert found["huge pages"].status == "warning"
    for check in found.values():
        assert (check.status == "ok") or check.next, check


@pytest.mark.parametrize(
    ("chosen", "status"), [("advise", "ok"), ("always", "ok"), ("never", "warning")]
)
def test_huge_pages(tmp_path: Path, chosen: str, status: str) -> None:
    choices = " ".join(
        f"[{word}]" if word == chosen else word for word in ("always", "advise", "never")
    )
    found = look(tmp_path, {f"{HUGE}/shmem_enabled": choices})["huge pages"]
    assert found.status == status
    assert f"fabric memory: {chosen}" in found.found


def test_memory_limit_of_a_container(tmp_path: Path) -> None:
    found = look(tmp_path, {"sys/fs/cgroup/memory.max": "1073741824\n"})
    assert "this cgroup may use 1.00 GiB" in found["memory"].found


@pytest.mark.parametrize(("scope", "way"), [("0", "SYS_PTRACE"), ("2", "ptrace_scope=1")])
def test_forbidden_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scope: str, way: str
) -> None:
    monkeypatch.setattr(doctor, "_READER", "input(); print(-1)")  # EPERM
    found = look(tmp_path, {"proc/sys/kernel/yama/ptrace_scope": scope})["reading peers"]
    assert found.status == "missing"
    assert "Operation not permitted" in found.found
    assert "'staged' works" in found.next
    assert way in found.next
    assert not found.is_needed


@pytest.mark.parametrize("reader", ["raise SystemExit(1)", "input(); print(7)"])
def test_reading_that_gives_something_else(monkeypatch: pytest.MonkeyPatch, reader: str) -> None:
    monkeypatch.setattr(doctor, "_READER", reader)
    assert doctor._try_process_read() is not None


def test_expandable_segments(tmp_path: Path) -> None:
    environ = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:True"}
    host = Host(root=tmp_path, environ=environ, load=refuse)
    found = {check.name: check for check in doctor._torch(host)}
    assert found["expandable segments"].status == "warning"


def test_broken_local_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fabric: str) -> None:
        raise MemoryRegistrationError("memfd_create: Operation not permitted")

    monkeypatch.setattr(doctor, "open_fabric", fail)
    result = doctor.run_doctor(Console(file=io.StringIO()))
    assert result["ok"] is False
    assert result["fabrics"] == []
    broken = {check["name"]: check for check in result["checks"] if check["is_needed"]}
    assert broken["fabric local"]["found"] == "memfd_create: Operation not permitted"


def test_markup_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [Check("x", "ok", "[red]1[/red]")])
    output = io.StringIO()
    doctor.run_doctor(Console(file=output, width=100))
    assert "[red]1[/red]" in output.getvalue()


def test_command() -> None:
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["schema"] == "weightsync.doctor/1"
    assert result["ok"] is True
    assert "local" in result["fabrics"]
    assert {check["status"] for check in result["checks"]} <= {"ok", "warning", "missing"}
    assert all(check["found"] for check in result["checks"])
    assert "fabrics that work now" in done.stderr
