"""What the control plane of a large fleet takes: real coordinator, real gRPC, members of a script.

Usage: python scripts/bench/control.py [--sources N] [--replicas N] [--ranks N] [--gateways N]

The coordinator has one core, all members in one process have another, and gateways if there are
any; each member has a TLS connection of its own. Members answer at once and move no bytes, so that
what is left is the protocol. Per version: `to_write_s` from the moment in which all sources publish
until the last of them is told to write, `to_decide_s` from the first report of writes until the
last source knows the decision, and CPU seconds over messages taken and sent: of the coordinator,
and of all gateways together. Without gateways the former is what a cluster calls
`control_message_s`; with them it is `control_core_s`, and the latter `control_message_s`. Wall
times are upper bounds: one process makes all members, and gateways would have a core each.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from weightsync.certs import make_certs
from weightsync.ir import Manifest, ManifestBuilder
from weightsync.service import weightsync_pb2 as pb
from weightsync.service import weightsync_pb2_grpc as rpc
from weightsync.service.coordinator import Coordinator
from weightsync.service.core_types import WIRE_VERSION
from weightsync.service.credentials import load_member, load_server
from weightsync.service.digests import pack_digests
from weightsync.service.manifests import deflate
from weightsync.settings import Settings

ANYWHERE = "grpcs://127.0.0.1:0"
TIMEOUT_S = 300.0
COLUMNS = 8
BUCKETS_A_PAIR = 4  # Kimi-K2: 128,000 buckets of 32,768 pairs


def manifest(side: str, label: str, row: int, num_rows: int, all_rows: int) -> bytes:
    """Rows `row .. row + num_rows` of the one tensor."""
    builder = ManifestBuilder(side, label)
    builder.tensor("w", (all_rows, COLUMNS))
    builder.buffer("w", "BF16", num_rows * COLUMNS)
    shape = (num_rows, COLUMNS)
    builder.place("w", "w", shape, lo=(row, 0), n=shape)
    built: Manifest = builder.build()
    return deflate(built.to_bytes())


class Fleet:
    """All members, on one loop."""

    def __init__(self, url: str, folder: Path, sources: int, replicas: int, ranks: int) -> None:
        settings = Settings.resolve(job=url, token_file=folder / "token")
        self.credentials = load_member(settings).channel_credentials()
        self.target = url.removeprefix("grpcs://")
        self.num_sources, self.num_sinks = sources, replicas * ranks
        self.hellos = [
            pb.Hello(
                role=pb.SOURCE,
                rank=rank,
                world_size=sources,
                wire_version=WIRE_VERSION,
                manifest=manifest("source", f"source {rank}", rank, 1, sources),
            )
            for rank in range(sources)
        ] + [
            pb.Hello(
                role=pb.SINK,
                replica=f"r{replica}",
                rank=rank,
                world_size=ranks,
                wire_version=WIRE_VERSION,
                manifest=manifest("sink", f"sink r{replica}.{rank}", 0, sources, sources),
            )
            for replica in range(replicas)
            for rank in range(ranks)
        ]
        self.outboxes: list[asyncio.Queue[pb.MemberMessage]] = [
            asyncio.Queue() for _ in self.hellos
        ]
        self.num_messages = 0
        self.waiting = {"bound": 0, "write": 0, "decide": 0, "adopted": 0}
        self.changed = asyncio.Event()
        of_sinks = {sink: np.arange(BUCKETS_A_PAIR) for sink in range(self.num_sinks)}
        self.digests = pack_digests({k: v.astype(np.uint64) for k, v in of_sinks.items()})

    async def join(self, member: int) -> None:
        """One member's stream, until it is cancelled."""
        options = [("grpc.use_local_subchannel_pool", 1)]

        async def outgoing() -> Any:
            while True:
                yield await self.outboxes[member].get()

        async with grpc.aio.secure_channel(
            self.target, self.credentials, options=options
        ) as channel:
            self.say(member, hello=self.hellos[member])
            async for message in rpc.CoordinatorStub(channel).Join(outgoing()):
                self.num_messages += 1
                self.answer(member, message)

    def say(self, member: int, **kind: object) -> None:
        """Queue one message."""
        self.num_messages += 1
        self.outboxes[member].put_nowait(pb.MemberMessage(**kind))  # type: ignore[arg-type]

    def answer(self, member: int, message: pb.CoordinatorMessage) -> None:
        """What the protocol demands at once; docs/protocol.md."""
        kind = message.WhichOneof("kind")
        is_source = member < self.num_sources
        if kind == "bind":
            ready = pb.BindReady(epoch=message.bind.epoch, plan_digest=message.bind.plan_digest)
            if not is_source:
                ready.export_descriptor = b"descriptor"
            self.say(member, bind_ready=ready)
        elif kind == "exports":
            self.say(member, connected=pb.Connected(epoch=message.exports.epoch))
        elif kind == "arm":
            self.say(member, armed=pb.Armed(version=message.arm.version))
        elif kind == "expect":
            self.say(member, vote=pb.Vote(version=message.expect.version, prepared=True))
        elif kind == "decide" and not is_source:
            self.say(member, ready_to_apply=pb.ReadyToApply(version=message.decide.version))
        elif kind == "apply":
            self.say(member, applied=pb.Applied(version=message.apply.version, ok=True))
        elif kind == "refused":
            raise SystemExit(f"control: {message.refused.problem.message}")
        if kind in self.waiting and (is_source or kind == "bound"):
            self.waiting[kind] += 1
            self.changed.set()

    async def all_heard(self, kind: str, num: int) -> float:
        """Wait until so many have heard a message; when the last one did."""
        async with asyncio.timeout(TIMEOUT_S):
            while self.waiting[kind] < num:
                self.changed.clear()
                await self.changed.wait()
        self.waiting[kind] = 0
        return time.perf_counter()

    async def run(self, num_versions: int, pids: list[int]) -> list[dict[str, float]]:
        """Join, then publish versions one after the other."""
        tasks = [asyncio.create_task(self.join(member)) for member in range(len(self.hellos))]
        await self.all_heard("bound", len(self.hellos))
        found = []
        for version in range(1, num_versions + 1):
            self.num_messages, spent, began = 0, [cpu_s(pid) for pid in pids], time.perf_counter()
            for source in range(self.num_sources):
                self.say(source, publish=pb.Publish(version=version, timeout_s=TIMEOUT_S))
            written = await self.all_heard("write", self.num_sources)
            for source in range(self.num_sources):
                done = pb.WritesDone(version=version, digests=self.digests)
                self.say(source, writes_done=done)
            decided = await self.all_heard("decide", self.num_sources)
            await self.all_heard("adopted", self.num_sources)
            cpu = [cpu_s(pid) - before for pid, before in zip(pids, spent, strict=True)]
            found.append(
                {
                    "to_write_s": written - began,
                    "to_decide_s": decided - written,
                    "messages": self.num_messages,
                    "coordinator_message_s": cpu[0] / self.num_messages,
                    "gateways_message_s": sum(cpu[1:]) / self.num_messages,
                }
            )
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return found[1:]  # the first warms up


def cpu_s(pid: int) -> float:
    """CPU seconds of all threads of a process."""
    fields = Path(f"/proc/{pid}/schedstat").read_text().split()
    total = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        total += int((thread / "schedstat").read_text().split()[0])
    return max(total, int(fields[0])) / 1e9


def serve(folder: Path, gateways: int) -> None:
    """The coordinator, until its input ends."""
    credentials = load_server(Settings.resolve(job=ANYWHERE, token_file=folder / "token"))
    with Coordinator(ANYWHERE, credentials=credentials, num_gateways=gateways) as coordinator:
        print(coordinator.url, flush=True)
        sys.stdin.read()


def children(pid: int) -> list[int]:
    """Processes that it started."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.name))
    return found


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", type=int, default=256)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=32, help="of a replica")
    parser.add_argument("--versions", type=int, default=6)
    parser.add_argument("--gateways", type=int, default=0)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, [cores[-1] if args.serve else cores[0]])
    if args.serve:
        serve(args.serve, args.gateways)
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [
                *(sys.executable, __file__),
                *("--serve", str(make_certs(Path(folder) / "job", ["one"]).folder)),
                *("--gateways", str(args.gateways)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        url = child.stdout.readline().strip()
        fleet = Fleet(url, Path(folder) / "job", args.sources, args.replicas, args.ranks)
        gateways = children(child.pid)
        for pid in gateways:
            for thread in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), [cores[0]])
        found = asyncio.run(fleet.run(args.versions, [child.pid, *gateways]))
        child.stdin.close()
    medians = {name: statistics.median(one[name] for one in found) for name in found[0]}
    fleet_of = {name: value for name, value in vars(args).items() if name != "serve"}
    print(json.dumps({**fleet_of, **medians}, indent=1))


if __name__ == "__main__":
    main()
