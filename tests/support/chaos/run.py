"""One fault run from start to end, and what came of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.chaos import world
from support.chaos.worker import FAULT_VERSION, LEASE_S, PUBLISH_TIMEOUT_S

# Where each role can be hit; the names are the fail points of docs/protocol.md.
STAGES = {
    "source": ("bind", "published", "writing", "written", "undecided", "decided"),
    "sink": (
        "bind",
        "armed",
        "filling",
        "forwarding",
        "prepared",
        "committed",
        "applying",
        "active",
    ),
    "coordinator": ("bind", "open", "writing", "voted", "recorded", "decided", "applying"),
}
ACTIONS = ("kill", "stop")
VICTIMS = {"source": "source-1", "sink": "sink-a-1", "coordinator": "coordinator"}
LABELS = {"source": "source 1", "sink": "sink a/1"}  # of the victims, in messages
# Every process must be done with a version by then, whatever happened.
DEADLINE_S = PUBLISH_TIMEOUT_S + 5.0 + 4.0


@dataclass(frozen=True)
class Fault:
    """Who is hit, where, and how; stage `flip` changes a byte on its way instead."""

    role: str
    stage: str
    action: str
    mode: str = "staged"
    fabric: str = "local"

    @property
    def name(self) -> str:
        return f"{self.role}.{self.stage}={self.action} {self.mode} {self.fabric}"


def every_fault() -> list[Fault]:
    """All roles, stages and actions, and one corrupted byte per mode.

    Sources are hit in both modes, for their faults are those that abort; the others in turn.
    """
    modes = ("staged", "in_place")
    faults = [
        Fault("source", stage, action, mode)
        for stage in STAGES["source"]
        for action in ACTIONS
        for mode in modes
    ]
    faults += [
        Fault(role, stage, action, modes[index % 2])
        for role in ("sink", "coordinator")
        for index, stage in enumerate(STAGES[role])
        for action in ACTIONS
    ]
    return [*faults, *(Fault("sink", "flip", "flip", mode) for mode in modes)]


@dataclass
class Result:
    """What one run came to. `violations` is empty when the protocol held.

    `stalled`: a process that nobody struck was silent for a lease, as it may be where the host lets
    it wait; says who, and what the host tells of it. Such a run shows nothing of its fault.
    """

    fault: Fault
    was_hit: bool = False
    decision: str = ""  # of the version that the fault met
    seconds: float = 0.0
    checks: int = 0
    why: str = ""  # of an abort
    stalled: str = ""
    violations: list[str] = field(default_factory=list)


class Zygote:
    """The process that forks workers; thread safe, so that runs can go on side by side."""

    def __init__(self) -> None:
        root = Path(__file__).resolve().parents[2]
        path = f"{root}{os.pathsep}{root.parent}"
        # A worker that crashes says where.
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.chaos.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._changed = threading.Condition()
        self.pids: dict[str, int] = {}
        self.ends: dict[str, int] = {}
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if not self._ready.wait(60):
            raise RuntimeError("the zygote did not start")

    def start(self, spec: dict[str, Any]) -> int:
        """Fork one worker; `key` must be unique. Returns its pid."""
        key = spec["key"]
        with self._changed:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(spec).encode() + b"\n")
            self._process.stdin.flush()
            if not self._changed.wait_for(lambda: key in self.pids, 30):
                raise RuntimeError(f"{key} was not started")
            return self.pids[key]

    def ended(self, name: str) -> bool:
        """Whether a worker has ended."""
        with self._changed:
            return name in self.ends

    def close(self) -> None:
        """End it and all workers."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            with self._changed:
                if message.get("event") == "ready":
                    self._ready.set()
                elif "status" in message:
                    self.ends[message["key"]] = message["status"]
                else:
                    self.pids[message["key"]] = message["pid"]
                self._changed.notify_all()


class Run:
    """One fault run: three versions, the fault in the second (in the first for `bind`)."""

    def __init__(self, zygote: Zygote, fault: Fault, *, bug: str = "", seed: int = 0) -> None:
        # With a bug planted, waiting for a recovery that never comes is no use.
        self.rounds = 2 if bug else 12
        self.zygote, self.fault, self.bug, self.seed = zygote, fault, bug, seed
        self.folder = Path(tempfile.mkdtemp(prefix="weightsync-chaos-"))
        self.result = Result(fault)
        self._names: list[str] = []  # as the zygote knows them
        self._latest: dict[str, str] = {}  # process name -> newest of these
        self._specs: dict[str, dict[str, Any]] = {}

    def execute(self) -> Result:
        """Do it; leaves no process and no file behind."""
        started = time.monotonic()
        try:
            self._run()
        except _GiveUpError:
            pass  # its violation is recorded
        finally:
            self.result.seconds = time.monotonic() - started
            if self.result.violations:
                self.result.violations += self._stalls()
            if self.result.violations and os.environ.get("WEIGHTSYNC_CHAOS_KEEP"):
                self.result.violations.append(f"kept {self.folder}")
            self._end()
        return self.result

    # ---- the script ----

    def _run(self) -> None:
        for replica, size in world.REPLICAS.items():
            for rank in range(size):
                world.SinkMemory(self.folder, replica, rank, create=True)
        fault_version = 1 if self.fault.stage == "bind" else FAULT_VERSION
        victim = VICTIMS[self.fault.role]
        # Only where somebody is to fall while it passes on: the others test plans of every day.
        hops = self.fault.stage == "forwarding"
        self._start("coordinator", role="coordinator", hops=hops)
        self._until(
            lambda: bool(world.notes(self.folder, "coordinator")), "the coordinator starts", 10
        )
        for rank in range(world.NUM_SOURCES):
            self._start(f"source-{rank}", role="source", rank=rank)
        for replica, size in world.REPLICAS.items():
            for rank in range(size):
                self._start(f"sink-{replica}-{rank}", role="sink", replica=replica, rank=rank)
        self._start("watcher", role="watcher")
        everybody = [name for name in self._latest if name != "watcher"]
        if self.fault.stage != "bind":
            self._until(
                lambda: all(world.notes(self.folder, name) for name in everybody), "all join", 15
            )
        version = 0
        while version < fault_version:
            version += 1
            world.set_goal(self.folder, version)
            if version < fault_version:
                self._until(
                    lambda v=version: self._all_adopted(v) or self._silent(v),
                    f"version {version} is adopted",
                )
                if why := self._silent(version):
                    self._note_stall(why)
                    raise _GiveUpError
        self._until(
            lambda: self._is_hit(victim) or self._is_over(fault_version), "the fault is hit"
        )
        if self.fault.action == "flip":
            self.result.was_hit = True
        else:
            # A fault after the decision of a version may be passed a moment later.
            self._until(lambda: self._is_hit(victim), "the fault is hit", 4, must=False)
            self.result.was_hit = self._is_hit(victim)
        zombie = self.zygote.pids.get(self._latest[victim], 0)
        if self.result.was_hit and self.fault.role == "coordinator" and self.fault.action == "stop":
            time.sleep(LEASE_S * (0.5 + self.seed % 2))
            _thaw(zombie)
        elif self.result.was_hit and self.fault.action == "kill":
            self._start(victim, restarted=True)
        self._until(lambda: self._is_over(fault_version), f"version {fault_version} is over")
        self.result.why = self._why(fault_version)
        # Members may well be silent to a coordinator that was struck.
        struck = LABELS.get(self.fault.role)
        if struck and (why := self._silent(fault_version, struck=struck)):
            self._note_stall(why)
        # No record means abort: that is what everybody is told.
        self.result.decision = self._decision(fault_version) or "abort"
        if self.result.was_hit and self.fault.role == "source" and self.fault.action == "stop":
            # Somebody takes its place; the zombie wakes later, with writes still on its mind.
            self._start(victim, restarted=True)
        version = self._next(fault_version)
        if self.result.was_hit and self.fault.role != "coordinator" and self.fault.action == "stop":
            self._until(lambda: self._decision(version) != "", "the next version is decided")
            time.sleep(0.002 * (self.seed % 5))
            _thaw(zombie)
        self._until(lambda: self._is_over(version), f"version {version} is over")
        # Whatever happened, the fleet must be able to go on, all replicas together.
        for _ in range(self.rounds):
            version = self._next(version)
            self._until(lambda v=version: self._is_over(v), f"version {version} is over")
            if not self.result.was_hit and self._is_hit(victim):
                # Late: its replica had no part in the fault version, as it was silent for a lease.
                self.result.was_hit = True
                if self.fault.action == "kill":
                    self._start(victim, restarted=True)
                else:
                    _thaw(zombie)
            if self._until(lambda v=version: self._all_adopted(v), "all adopt", 1, must=False):
                break
        else:
            self._violate(f"no version was adopted by all after the fault: {self._tails()}")
        time.sleep(0.02)
        world.set_goal(self.folder, -1)
        self._until(lambda: self._ended("watcher"), "the watcher ends", 10)
        for line in world.notes(self.folder, "watcher"):
            if line["event"] == "end":
                self.result.checks = int(str(line["checks"]))
            else:
                self._violate(f"watcher: {line}")
        if self.result.checks == 0:
            self._violate("the watcher saw no serving replica")
        for name in [*self._latest]:
            for line in world.notes(self.folder, name):
                if line["event"] == "publish" and float(str(line["seconds"])) > DEADLINE_S:
                    self._violate(f"{name} was stuck: {line}")
                if "IntegrityError" in str(line.get("why")) and self.fault.action != "flip":
                    self._violate(f"bytes were wrong without a cause: {line}")

    def _next(self, version: int) -> int:
        world.set_goal(self.folder, version + 1)
        return version + 1

    # ---- looking ----

    def _is_hit(self, victim: str) -> bool:
        if self.fault.action == "kill":
            return self._ended(victim)
        try:
            stat = Path(f"/proc/{self._pid(victim)}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] == "T"

    def _decision(self, version: int) -> str:
        with contextlib.suppress(sqlite3.Error):
            database = sqlite3.connect(f"file:{self.folder}/job.db?mode=ro", uri=True, timeout=1.0)
            with contextlib.closing(database):
                row = database.execute(
                    "SELECT is_commit FROM decision WHERE version = ?", (version,)
                ).fetchone()
            if row is not None:
                return "commit" if row[0] else "abort"
        return ""

    def _why(self, version: int) -> str:
        lines = world.notes(self.folder, "source-0")
        return next((str(line["why"]) for line in lines if line.get("version") == version), "")

    def _silent(self, version: int, *, struck: str = "") -> str:
        """Why a version was given up, if that is for the silence of a member but the one struck."""
        for rank in range(world.NUM_SOURCES):
            for line in world.notes(self.folder, f"source-{rank}"):
                why = str(line.get("why", ""))
                if line.get("version") == version and "silent for" in why:
                    return "" if struck and struck in why else why
        return ""

    def _note_stall(self, why: str) -> None:
        self.result.stalled = "\n".join([why, *self._stalls()])

    def _is_over(self, version: int) -> bool:
        """Every living source has heard the outcome of a version."""
        for rank in range(world.NUM_SOURCES):
            name = f"source-{rank}"
            if self._ended(name) or self._is_stopped(name):
                continue
            lines = world.notes(self.folder, name)
            done = [
                line for line in lines if line["event"] == "publish" and line["version"] == version
            ]
            restarted = sum(1 for line in lines if line["event"] == "ready") > 1
            if not done and not (restarted and self._decision(version)):
                return False
        return True

    def _all_adopted(self, version: int) -> bool:
        for replica, size in world.REPLICAS.items():
            for rank in range(size):
                if world.SinkMemory(self.folder, replica, rank).serving != version:
                    return False
        return True

    def _until(
        self, condition: Any, what: str, seconds: float = DEADLINE_S, *, must: bool = True
    ) -> bool:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                if must:
                    self._violate(f"deadline passed before {what}: {self._tails()}")
                    raise _GiveUpError
                return False
            time.sleep(0.004)
        return True

    def _tails(self) -> str:
        last = [
            f"{name}: {lines[-1]}"
            for name in self._latest
            if (lines := world.notes(self.folder, name))
        ]
        with self.zygote._changed:
            ended = {k: self.zygote.ends[k] for k in self._latest.values() if k in self.zygote.ends}
        return "; ".join([*last, f"ended, with their statuses: {ended}"])

    def _stalls(self) -> list[str]:
        """What workers said of time in which they could not run."""
        logs = {name: self.folder / f"out-{name}" for name in self._latest}
        said = {name: log.read_text()[:8000] for name, log in logs.items() if log.exists()}
        return [
            *(f"{name} printed: {text}" for name, text in said.items() if text),
            *(f"{name}: {_host_time(self._pid(name))}" for name in self._latest),
            *(
                f"pressure of {what}: {_read(f'/proc/pressure/{what}')}"
                for what in ("cpu", "io", "memory")
            ),
        ]

    def _violate(self, text: str) -> None:
        self.result.violations.append(text)

    # ---- processes ----

    def _start(self, name: str, *, restarted: bool = False, **spec: Any) -> None:
        if restarted:
            spec = dict(self._specs[name])
            spec["done"] = world.goal(self.folder)
        else:
            self._specs[name] = dict(spec)
            if name == VICTIMS[self.fault.role] and self.fault.action != "flip":
                count = (
                    "@2"
                    if self.fault.stage in ("writing", "filling")
                    and self.fault.role != "coordinator"
                    else ""
                )
                spec["failpoint"] = (
                    f"{self.fault.role}.{self.fault.stage}{count}={self.fault.action}"
                )
            if name == VICTIMS[self.fault.role] and self.fault.action == "flip":
                spec["flip"] = FAULT_VERSION
        spec["hurry"] = self.fault.stage == "bind"
        spec |= {"name": name, "folder": str(self.folder), "mode": self.fault.mode, "bug": self.bug}
        spec["fabric"] = self.fault.fabric
        unique = f"{self.folder.name}/{name}/{len(self._names)}"
        self._names.append(unique)
        self._latest[name] = unique
        self.zygote.start({**spec, "key": unique})

    def _pid(self, name: str) -> int:
        return self.zygote.pids[self._latest[name]]

    def _ended(self, name: str) -> bool:
        return self.zygote.ended(self._latest[name])

    def _is_stopped(self, name: str) -> bool:
        try:
            stat = Path(f"/proc/{self._pid(name)}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] == "T"

    def _end(self) -> None:
        world.set_goal(self.folder, -1)
        for name in self._names:
            if not self.zygote.ended(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.zygote.pids[name], signal.SIGKILL)
        deadline = time.monotonic() + 10
        while (
            any(not self.zygote.ended(name) for name in self._names) and time.monotonic() < deadline
        ):
            time.sleep(0.005)
        shutil.rmtree(self.folder, ignore_errors=True)


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _host_time(pid: int) -> str:
    """How long a process ran, and waited for a core and for the disk, as far as the host tells."""
    stat = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if len(stat) < 40:
        return "has ended"
    tasks = [_read(str(t)).split() for t in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    ran, waited = (sum(int(t[i]) for t in tasks if t) / 1e9 for i in (0, 1))
    return (
        f"ran {ran:.2f} s, waited {waited:.2f} s for a core, {int(stat[39]) / 100:.2f} s for the "
        f"disk; {stat[9]} major page faults"
    )


def _thaw(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


class _GiveUpError(Exception):
    """The run cannot go on; its violation is recorded."""
