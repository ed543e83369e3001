"""The process that hosts the jobs of a fleet, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from weightsync.demo.worker import Channel, Message
from weightsync.errors import ConfigError
from weightsync.ir.plan import PlanOptions
from weightsync.service.coordinator import Coordinator
from weightsync.service.core_types import CoreOptions
from weightsync.service.credentials import load_server
from weightsync.settings import Settings

__all__ = ["run"]


def run(channel: Channel, options: Message, commands: Iterator[Message]) -> None:
    """Host what is asked for until the parent says "leave"."""
    channel.send(event="ready")
    job: Coordinator | None = None
    try:
        for command in commands:
            do = str(command["do"])
            if job is not None:
                job.close()
                job = None
            if do == "host":
                job = _host(options, command)
            elif do != "close":
                raise ConfigError(f"no command {do!r}")
            channel.send(event=do, url=None if job is None else job.url)
    finally:
        if job is not None:
            job.close()


def _host(options: Message, command: Message) -> Coordinator:
    token_file = options["token_file"]
    credentials = None
    if token_file is not None:
        settings = Settings.resolve(job=options["url"], token_file=Path(token_file))
        credentials = load_server(settings)
    return Coordinator(
        options["url"],
        credentials=credentials,
        journal=Path(command["journal"]),
        options=CoreOptions(
            min_replicas=int(command["replicas"]), lease_s=float(command["lease_s"])
        ),
        plan_options=PlanOptions(**command["plan"]),
    )
