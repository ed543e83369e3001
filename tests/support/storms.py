"""Seeded faults on real transports: a writer in a process of its own, faults around it, versions.

A run makes a few versions over one fabric. Each either commits, then the sink's memory holds
exactly its bytes and goes on doing so, or ends in a typed error on both sides within a deadline.
"""

from __future__ import annotations

import json
import random
import select
import socket
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

import weightsync.errors as errors
from support.fabrics import RAILS, Bytes, address_of, ofi_problem, random_bytes
from support.peers import Peer
from support.proxy import Rail, endpoints
from weightsync.errors import TransferTimeoutError, WeightSyncError
from weightsync.transport.base import Engine, Lease, Memory, Target
from weightsync.transport.fabrics import open_fabric
from weightsync.transport.native import live_object_count, live_objects
from weightsync.transport.verbs import verbs_problem

__all__ = ["FAULTS", "FAULTS_EACH", "Outcome", "Run", "fabrics_here"]

NBYTES: Final = 16 << 20
CHUNKS: Final = 64
FAULTS_EACH: Final = 3  # between a first and a last version without a fault
# What a version may take that only rails hinder; those that a writer will never finish are given up
# after a moment.
PATIENCE_S: Final = 20.0
GIVE_UP_S: Final = 0.15
# Everybody knows the outcome by then.
DEADLINE_S: Final = 15.0

_ANY: Final = ("writer_kill", "writer_freeze", "sink_fence", "sink_close")
_RAILS: Final = ("rail_cut", "rail_hold", "rail_slow", "all_rails_cut", "stranger")
FAULTS: Final = {
    "local-push": _ANY,
    "local-pull": _ANY,
    "tcp": (*_ANY, *_RAILS),
    "ofi:tcp": _ANY,
    "ofi:shm": _ANY,
    "verbs": _ANY,
}


def fabrics_here() -> list[str]:
    """Those of `FAULTS` that this machine can run."""
    here = ["local-push", "local-pull", "tcp"]
    here += ["ofi:tcp", "ofi:shm"] if ofi_problem() is None else []
    return here + (["verbs"] if verbs_problem() is None else [])


@dataclass
class Outcome:
    """What one version came to."""

    fault: str
    commit: bool
    error: str = ""  # class of the writer's error


@dataclass
class Run:
    """One run on `fabric`; `outcomes` and `violations` tell what happened."""

    fabric: str
    seed: int
    outcomes: list[Outcome] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    num_locked: int = 0  # engines that were given up because of a provider's lock

    def execute(self) -> Run:
        """Do it; leaves no process behind."""
        before = live_object_count()
        self._random = random.Random(f"{self.fabric} {self.seed}")
        self._kind = self.fabric.partition("-")[0]
        self._is_private = self.fabric == "local-pull" or (
            self.fabric in ("tcp", "ofi:tcp", "verbs") and self._random.random() < 0.5
        )
        with ExitStack() as stack:
            self._stack = stack
            self._open_engine()
            self._target: Target | None = None
            self._view: Bytes | None = None
            self._zombies: list[Peer] = []
            self._writer: Peer | None = None
            for version, fault in enumerate(["none", *_faults(self.fabric, self.seed), "none"], 1):
                self._one(version, fault)
            if self._target is not None:
                self._target.close()
                self._target = None
            self._view = None
        del self._engine, self._stack
        if live_object_count() > before and not self.num_locked:
            self.violations.append(f"left behind: {live_objects()}")
        return self

    # ---- one version

    def _one(self, version: int, fault: str) -> None:
        with ExitStack() as rails:
            try:
                proxies = self._prepare(version, fault, rails)
            except _RefusedError as error:
                if self.fabric != "ofi:shm" or "does not answer over shm" not in str(error):
                    raise
                self._begin_anew(version)
                proxies = self._prepare(version, fault, rails)
            assert self._target is not None
            assert self._view is not None
            assert self._writer is not None
            writer, target, view = self._writer, self._target, self._view
            seed = self.seed * 100 + version
            self._ask(writer, "load", nbytes=NBYTES, seed=seed)
            size = NBYTES // CHUNKS
            table = [[i * size, i * size, size, i] for i in range(CHUNKS)]
            writer.start("transfer", table=table, timeout_s=PATIENCE_S)
            self._strike(fault, writer, target, proxies)
            is_lost = fault in ("writer_kill", "writer_freeze")
            is_over = fault in ("sink_fence", "sink_close")
            patience_s = GIVE_UP_S if is_lost or fault == "all_rails_cut" else PATIENCE_S
            commit = not is_over and self._wait(target, patience_s)
            expected = random_bytes(NBYTES, seed)
            if commit:
                target.flush()
                if not np.array_equal(view, expected):
                    self.violations.append(f"version {version} ({fault}) committed other bytes")
            elif fault in ("none", "rail_cut", "rail_hold", "rail_slow", "stranger"):
                self.violations.append(f"version {version} ({fault}) did not arrive")
            if not commit:
                self._fence(target)
            error = self._end_of(writer, fault)
            self.outcomes.append(Outcome(fault, commit, error))
            if self._zombies and fault != "writer_freeze":
                self._thaw(view, expected if commit else None, version)
            if error or not commit or is_lost:
                self._retire(writer, keep=fault == "writer_freeze")

    def _prepare(self, version: int, fault: str, rails: ExitStack) -> list[Rail]:
        """A target and a writer that is connected to it, through proxies if rails are to fail."""
        needs_proxies = fault in ("rail_cut", "rail_hold", "rail_slow", "all_rails_cut")
        if self._target is not None and self._writer is not None and not needs_proxies:
            self._target.reset([0])
            return []
        if self._target is None:
            if self._is_private:
                self._view = np.zeros(NBYTES, np.uint8)
                memory: Lease | Memory = self._engine.register(
                    address_of(self._view), NBYTES, self._view
                )
            else:
                memory = self._engine.allocate(NBYTES)
                self._view = np.frombuffer(memory, np.uint8)
            self._target = self._engine.export([(0, memory, 0, NBYTES)], [CHUNKS], 8, version)
        else:
            self._target.reset([0])
        descriptor, proxies = self._target.descriptor, []
        if needs_proxies:
            for index in range(len(endpoints(descriptor)) if fault == "all_rails_cut" else 1):
                # Rail 0 carries the control connection: another one, unless all fail.
                number = index if fault == "all_rails_cut" else self._random.choice((1, 2))
                proxies.append(rails.enter_context(Rail(descriptor, number)))
                proxies[-1].limit(150e6)
                descriptor = proxies[-1].descriptor
        if self._writer is None:
            self._writer = self._stack.enter_context(Peer(self._kind, **self._options))
        self._ask(self._writer, "connect", descriptor=descriptor.hex())
        return proxies

    def _begin_anew(self, version: int) -> None:
        """Another engine, where a lost writer has taken a lock of the provider with it.

        See docs/fabrics/ofi.md; the old engine may leave a thread behind.
        """
        assert self._target is not None
        assert self._view is not None
        assert self._writer is not None
        self._thaw(self._view, None, version)
        self._fence(self._target)
        self._retire(self._writer, keep=False)
        self._open_engine()
        self.num_locked += 1

    def _open_engine(self) -> None:
        options: Any = {"addresses": RAILS} if self._kind == "tcp" else {}
        self._options = options
        self._engine: Engine = self._stack.enter_context(
            open_fabric(self._kind, name=f"sink{self.num_locked}", **options)
        )

    def _strike(self, fault: str, writer: Peer, target: Target, proxies: list[Rail]) -> None:
        time.sleep(self._random.random() * 0.004)
        actions: dict[str, Callable[[], None]] = {
            "none": lambda: None,
            "writer_kill": writer.kill,
            "writer_freeze": writer.stop,
            "sink_fence": lambda: target.fence(discard=True),
            "sink_close": target.close,
            "rail_cut": lambda: proxies[0].cut(),
            "rail_hold": lambda: proxies[0].hold(),
            "rail_slow": lambda: proxies[0].limit(5e6),
            "all_rails_cut": lambda: [proxy.cut() for proxy in proxies] and None,
            "stranger": lambda: _annoy(target.descriptor, self._random),
        }
        actions[fault]()

    def _wait(self, target: Target, timeout_s: float) -> bool:
        try:
            target.wait([0], timeout_s)
        except WeightSyncError:
            return False
        return True

    def _fence(self, target: Target) -> None:
        if target.is_open:
            target.fence(discard=True)
        target.close()
        self._target = None

    def _end_of(self, writer: Peer, fault: str) -> str:
        """The class of the writer's error, if it lives and has one."""
        if fault in ("writer_kill", "writer_freeze"):
            return ""
        try:
            answer = _result(writer, DEADLINE_S + PATIENCE_S)
        except TransferTimeoutError:
            self.violations.append(f"{fault}: the writer hangs")
            return "hung"
        kind, value = answer
        if kind == "ok":
            return ""
        name = str(value).partition(":")[0]
        found = getattr(errors, name, None)
        if found is None or not issubclass(found, WeightSyncError) or name == "InternalError":
            self.violations.append(f"{fault}: the writer's error is {value}")
        return name

    def _thaw(self, view: Bytes, expected: Bytes | None, version: int) -> None:
        """Writers that were frozen go on, with writes still on their mind."""
        for zombie in self._zombies:
            zombie.go_on()
        time.sleep(0.05)
        if expected is not None and not np.array_equal(view, expected):
            self.violations.append(f"version {version} was changed by a frozen writer")
        for zombie in self._zombies:
            zombie.kill()
        self._zombies.clear()

    def _retire(self, writer: Peer, *, keep: bool) -> None:
        if keep:
            self._zombies.append(writer)
        else:
            writer.kill()
        self._writer = None

    def _ask(self, writer: Peer, name: str, **arguments: Any) -> None:
        writer.start(name, **arguments)
        kind, value = _result(writer, DEADLINE_S)
        if kind != "ok":
            raise _RefusedError(f"{name} of a healthy writer failed: {value}")


class _RefusedError(AssertionError):
    """A writer that nothing was done to could not do what it was asked."""


def _faults(fabric: str, seed: int) -> list[str]:
    """In turn, so that a few seeds meet all; in another order each time round."""
    found = []
    for number in range(seed * FAULTS_EACH, (seed + 1) * FAULTS_EACH):
        cycle, at = divmod(number, len(FAULTS[fabric]))
        order = list(FAULTS[fabric])
        random.Random(f"{fabric} {cycle}").shuffle(order)
        found.append(order[at])
    return found


def _result(writer: Peer, timeout_s: float) -> tuple[str, Any]:
    output, poll = writer.output, select.poll()
    poll.register(output, select.POLLIN)
    if not poll.poll(timeout_s * 1000):
        raise TransferTimeoutError(f"no answer after {timeout_s} s")
    kind, value = json.loads(output.readline())
    return str(kind), value


def _annoy(descriptor: bytes, draw: random.Random) -> None:
    """Connect where the sink listens, and talk nonsense."""
    for host, port in endpoints(descriptor):
        with socket.create_connection((host, port), 5) as stream:
            if draw.random() < 0.5:
                linger = struct.pack("ii", 1, 0)
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            stream.sendall(draw.randbytes(draw.randrange(1, 4096)))
