"""Brings vLLM engines into a job: over HTTP, or engines of this process."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from weightsync.client import Job
from weightsync.errors import ConfigError, PeerLostError
from weightsync.integrations.vllm.plugin import SERVE
from weightsync.integrations.vllm.server import Server, StatusError
from weightsync.integrations.vllm.wire import decoded

if TYPE_CHECKING:
    from vllm import LLM

__all__ = ["attach", "refit"]

_log = logging.getLogger(__name__)

_INIT_S = 600.0  # recording a layout and joining, for the largest models

Pause = Literal["keep", "wait", "abort"]


def attach(
    urls: Iterable[str | LLM],
    *,
    job: Job | str | None = None,
    pause: Pause = "keep",
    clear_cache: bool = True,
    fabric: str = "local",
    fabric_options: Mapping[str, Any] | None = None,
    timeout_s: float = 120.0,
) -> Job:
    """Let vLLM engines follow a job. Call once, in any process; blocks until all have joined.

    Servers are asked at the same time. If one refuses, others may have joined all the same.

    Each engine becomes a replica of its own. From then on engines behind a URL adopt every version
    by themselves: one of their workers pauses generation, has all ranks adopt it, and resumes.
    `LLM` objects of this process adopt when `refit` is called.

    Args:
        urls: Base URLs of API servers, `http://HOST:PORT`, or `vllm.LLM` objects; or several.
        job: The job to follow; None: $WEIGHTSYNC_JOB, else a new one is started in this process.
        pause: What happens to requests in flight: `keep` freezes them, `wait` lets them finish
            first, `abort` ends them. Servers only.
        clear_cache: Whether what older weights computed is dropped: cached prefixes, and the caches
            of frozen requests, which are computed anew by the new weights.
        fabric: As `Sink`; sources must use the same.
        fabric_options: As `Sink`.
        timeout_s: Longest time that ranks of an engine wait for each other.

    Returns:
        The job; closing it ends one that was started here.

    Raises:
        PeerLostError: An engine does not answer.
        ConfigError: It was not started with this backend, or without the development routes.
        LayoutError: It holds a model or a kernel layout that cannot be fed; nothing was written.
    """
    engines = list(urls) if not isinstance(urls, str) else [urls]
    if pause not in ("keep", "wait", "abort"):
        raise ConfigError(f"pause={pause!r}: 'keep', 'wait' or 'abort'")
    started = None
    if isinstance(job, Job):
        joined = job
    elif job is None and "WEIGHTSYNC_JOB" not in os.environ:
        joined = started = Job.start()
    else:
        joined = Job.connect(job)
    info: dict[str, Any] = {
        "job": joined.url,
        "pause": pause,
        "clear_cache": clear_cache,
        "fabric": fabric,
        "fabric_options": dict(fabric_options or {}),
        "timeout_s": timeout_s,
    }
    try:
        _attach_servers([Server(engine) for engine in engines if isinstance(engine, str)], info)
        for engine in engines:
            if not isinstance(engine, str):
                _attach_object(engine, info)
    except BaseException:
        if started is not None:
            started.close()
        raise
    return joined


def refit(llm: LLM, version: int | None = None, *, timeout_s: float = 120.0) -> int:
    """Have an engine of this process adopt what its job has committed. Blocks.

    Call it between calls of `llm.generate`.

    Args:
        llm: An engine that was given to `attach`.
        version: Smallest version to accept; None: the next one.
        timeout_s: Longest time to wait for it.

    Returns:
        The version that the engine now generates from.

    Raises:
        TornError: The engine holds mixed weights and computes nothing until a later version.
        TransferTimeoutError: Nothing was committed in time; the old version goes on serving.
    """
    known = _attached.get(llm)
    if known is None:
        raise ConfigError("this engine has joined no job: call weightsync.integrations.vllm.attach")
    job, replica = known
    engine = llm.llm_engine
    info = {"version": version, "timeout_s": timeout_s}
    engine.collective_rpc("start_weight_update")
    try:
        engine.collective_rpc("update_weights", kwargs={"update_info": info})
    except BaseException as error:
        # Ranks that did not fail take the update for open, and would refuse the next.
        with contextlib.suppress(Exception):
            engine.collective_rpc("finish_weight_update")
        # vLLM passes texts on, no classes.
        raise decoded(str(error)) or error from error
    engine.collective_rpc("finish_weight_update")
    engine.reset_prefix_cache()
    adopted = int(job.status()["replicas"][replica]["version"])
    engine.set_weight_version(str(adopted))
    return adopted


# Engines of this process: their job, and their name in it.
_attached: WeakKeyDictionary[Any, tuple[Job, str]] = WeakKeyDictionary()


def _attach_object(llm: LLM, info: Mapping[str, Any]) -> None:
    replica = f"vllm-{os.getpid()}-{secrets.token_hex(3)}"
    call = {"init_info": {**info, "replica": replica, "server": None}}
    try:
        llm.llm_engine.collective_rpc("init_weight_transfer_engine", kwargs=call)
    except Exception as error:  # vLLM passes texts on, no classes
        raise decoded(str(error)) or _explained(str(error), "this engine") or error from error
    _attached[llm] = (Job.connect(info["job"]), replica)


def _attach_servers(servers: Sequence[Server], info: Mapping[str, Any]) -> None:
    """All at once; the first refusal is raised without waiting for the others."""
    answers: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def ask(server: Server) -> None:
        try:
            _attach_server(server, info)
        except Exception as error:  # noqa: BLE001 - raised by the thread that waits
            answers.put(error)
        else:
            answers.put(None)

    for server in servers:
        threading.Thread(target=ask, args=(server,), name="weightsync-attach", daemon=True).start()
    deadline = time.monotonic() + _INIT_S
    for _ in servers:
        try:
            error = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            urls = ", ".join(server.url for server in servers)
            raise PeerLostError(f"not all of {urls} answered within {_INIT_S:.0f} s") from None
        if error is not None:
            raise error


def _attach_server(server: Server, info: Mapping[str, Any]) -> None:
    body = {"init_info": {**info, "replica": server.name, "server": server.url}}
    try:
        server.post("/init_weight_transfer_engine", body, timeout_s=_INIT_S)
    except StatusError as error:
        if error.status == 404:
            raise ConfigError(
                f"{server.url} has no development routes; start it with: {SERVE}"
            ) from error
        raise (
            decoded(error.text) or _explained(error.text, server.url) or PeerLostError(str(error))
        ) from error
    except OSError as error:
        raise PeerLostError(
            f"no vLLM server answers at {server.url}: {error}; start it with: {SERVE}"
        ) from error


def _explained(text: str, engine: str) -> ConfigError | None:
    """What vLLM itself says to an engine that was not started for this."""
    if "Weight transfer not configured" in text or "Invalid init_info" in text:
        return ConfigError(f"{engine} was not started with this backend; start it with: {SERVE}")
    return None
