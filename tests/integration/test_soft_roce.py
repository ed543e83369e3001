"""`scripts/soft_roce` as its users run it: real verbs, statuses, and nothing left behind.

With the uml guest all of it runs; with the slow one only what proves that it works.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from support import IS_LONG
from support.soft_roce import SCRIPT, guest_kind, run_in_guest
from support.tree import ROOT

pytestmark = pytest.mark.timeout(300)

WRITES: Final = ROOT / "tests/support/verbs_writes.py"


@pytest.fixture
def private(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment whose guests can be told from those of others; looks for what they left."""
    guest_kind()
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    temporary, cache = tmp_path / "tmp", tmp_path / "cache"
    temporary.mkdir()
    kernels = base / "weightsync/soft_roce"
    own = shutil.copytree(kernels, cache / "weightsync/soft_roce", ignore=just_kernels)
    before = sorted(path.name for path in own.iterdir())
    yield {**os.environ, "TMPDIR": str(temporary), "XDG_CACHE_HOME": str(cache)}
    left = wait_until(lambda: not guests(tmp_path), 5.0) or guests(tmp_path)
    assert left is True, left
    assert list(temporary.iterdir()) == []
    assert sorted(path.name for path in own.iterdir()) == before
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


def just_kernels(_: str, names: list[str]) -> list[str]:
    """What is being built by others is not copied."""
    return [name for name in names if name.startswith(("build-", "unpack-"))]


def guests(tmp_path: Path) -> list[psutil.Process]:
    """Processes of kernels below `tmp_path`, or with something of it among their arguments."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [process.exe(), *process.cmdline()]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if process.pid != os.getpid() and any(str(tmp_path) in word for word in words):
            found.append(process)
    return found


def wait_until(is_so: Callable[[], Any], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def only_fast() -> None:
    if guest_kind() != "uml":
        pytest.skip("the qemu guest is slow; scripts/soft_roce --build makes the fast one")


def test_verbs_writes_and_the_commands_own_status(private: dict[str, str], tmp_path: Path) -> None:
    kept, lost = tmp_path / "kept", tmp_path / "lost"
    kept.mkdir()
    lost.mkdir()
    script = f"""
        "$1" {WRITES} 100000 || exit
        echo "$MESSAGE" >&2
        pwd >kept/where
        echo gone >lost/file
        cat lost/file
        exit 9"""
    done = run_in_guest(
        "sh", "-c", script, "sh", sys.executable,
        options=("--rw", "kept"),
        environ={**private, "MESSAGE": "it's\n a \\ \"message\" $HOME"},
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 9, done.stderr
    *pairs, last = done.stdout.splitlines()
    assert last == "gone"
    assert [line.rsplit(" ", 1)[0] for line in pairs] == [
        f"rxe{i} rxe{k} ok" for i in range(2) for k in range(2)
    ]
    assert done.stderr == 'it\'s\n a \\ "message" $HOME\n'
    assert (kept / "where").read_text() == f"{tmp_path}\n"
    assert list(lost.iterdir()) == []


def test_the_fall_back_while_no_kernel_is_built() -> None:
    if guest_kind() == "qemu":
        pytest.skip("all other tests of this file use it")
    if not IS_LONG:
        pytest.skip("the qemu guest is slow; make test-long runs it")
    slow = {**os.environ, "WEIGHTSYNC_SOFT_ROCE": "qemu"}
    done = run_in_guest(sys.executable, WRITES, environ=slow, timeout_s=240.0)
    assert (done.returncode, done.stdout.count(" ok ")) == (0, 4), done.stderr


def test_the_time_is_over(private: dict[str, str]) -> None:
    start = time.monotonic()
    done = run_in_guest("sleep", "1000", timeout_s=3.0, environ=private)
    assert done.returncode == 124
    assert "within 3 s" in done.stderr
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_of_it(private: dict[str, str], tmp_path: Path, number: int) -> None:
    if number == signal.SIGTERM:
        only_fast()
    command = [str(SCRIPT), "--", "sh", "-c", "echo up; sleep 1000"]
    with subprocess.Popen(command, env=private, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if guest_kind() == "uml":
            assert process.stdout.readline() == "up\n"
        else:  # while it starts
            assert wait_until(lambda: len(guests(tmp_path)) > 0, 20)
        process.send_signal(number)
        assert process.wait(15) == -number


def test_a_killed_runner_takes_its_guest_along(private: dict[str, str], tmp_path: Path) -> None:
    only_fast()
    command = [str(SCRIPT), "--", "sh", "-c", "echo up; sleep 1000"]
    with subprocess.Popen(command, env=private, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.kill()
    assert wait_until(lambda: not guests(tmp_path), 10), guests(tmp_path)
    assert len(list((tmp_path / "tmp").iterdir())) == 1
    # The next run removes what that one could not.
    assert run_in_guest("true", environ=private, num_nics=0).returncode == 0


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["no-such-command"], 127),
        (["sh", "-c", "kill -9 $$"], 137),
    ],
)
def test_statuses_of_the_shell(private: dict[str, str], command: list[str], status: int) -> None:
    only_fast()
    done = run_in_guest(*command, environ=private, num_nics=0)
    assert done.returncode == status
    assert done.stdout == ""


def test_much_output_arrives_as_it_is(private: dict[str, str]) -> None:
    only_fast()
    data = hashlib.shake_256(b"soft_roce").digest(3_000_000)
    source = Path(private["XDG_CACHE_HOME"]) / "data"
    source.write_bytes(data)
    command = [str(SCRIPT), "--nics", "0", "--", "cat", str(source)]
    done = subprocess.run(command, env=private, stdout=subprocess.PIPE, check=False, timeout=120)
    assert done.returncode == 0
    assert done.stdout == data


def test_a_reader_that_leaves_ends_it(private: dict[str, str]) -> None:
    only_fast()
    command = f"{SCRIPT} --nics 0 -- yes | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], env=private, capture_output=True, check=False, timeout=60
    )
    assert done.stdout == b"y\n"
    assert done.returncode == 128 + signal.SIGPIPE


def test_delay_and_loss_are_on_the_wire_and_a_nic_goes_down(private: dict[str, str]) -> None:
    only_fast()
    script = f"""
        "$1" {WRITES} 20000 || exit 1
        tc qdisc show dev nic1 | grep -o 'delay.*'
        ip link set nic1 down
        cat /sys/class/infiniband/rxe?/ports/1/state"""
    options = ("--delay", "0,40", "--loss", "0,0.5")
    done = run_in_guest("sh", "-c", script, "sh", sys.executable, options=options, environ=private)
    assert done.returncode == 0, done.stderr
    *pairs, link, state0, state1 = done.stdout.splitlines()
    took_ms = {tuple(line.split()[:2]): float(line.split()[3]) for line in pairs}
    # There or back, one of the two NICs adds 40 ms; a device with itself sends nothing.
    assert took_ms["rxe0", "rxe1"] >= 40
    assert took_ms["rxe1", "rxe0"] >= 40
    assert took_ms["rxe0", "rxe0"] < 40
    assert (link.split(), state0, state1) == (
        ["delay", "40ms", "loss", "0.5%"], "4: ACTIVE", "1: DOWN",
    )  # fmt: skip


def test_rails_reach_only_themselves(private: dict[str, str]) -> None:
    only_fast()
    done = run_in_guest(
        "ip", "-br", "link", "show", "type", "dummy", options=("--topo", "rail"), environ=private
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["nic0", "nic1"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nics", "two", "--", "true"], "invalid int value"),
        (["--nics", "2"], "write it after --"),
        (["--nics", "2", "--delay", "1,2,3", "--", "true"], "3 values for 2 NICs"),
        (["--topo", "rail", "--loss", "1", "--", "true"], "--topo bridge"),
        (["--rw", "/no/such/folder", "--", "true"], "no such folder"),
    ],
)
def test_bad_usage(arguments: list[str], words: str) -> None:
    done = subprocess.run(
        [str(SCRIPT), *arguments], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 125
    assert words in done.stderr
