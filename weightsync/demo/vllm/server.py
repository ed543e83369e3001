"""A vLLM API server as a worker of the demo, and what its parent asks it over HTTP."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Final

from weightsync.demo.vllm.settings import engine_environment
from weightsync.demo.worker import Channel, Message
from weightsync.errors import PeerLostError
from weightsync.integrations.vllm.server import Server

__all__ = ["Api", "run"]

_START_S: Final = 240.0
_END_S: Final = 20.0
_LOOK_S: Final = 0.25


class Api(Server):
    """The routes of a vLLM server that the demo uses."""

    def generate(self, prompt: list[int], num_tokens: int, *, timeout_s: float = 60.0) -> list[int]:
        """Continue token ids greedily."""
        sampling = {"temperature": 0, "max_tokens": num_tokens, "ignore_eos": True}
        body = {"token_ids": prompt, "sampling_params": sampling, "stream": False}
        reply = self.post("/inference/v1/generate", body, timeout_s=timeout_s)
        tokens: list[int] = reply["choices"][0]["token_ids"]
        return tokens

    def weight_version(self) -> str:
        """The version as vLLM itself shows it."""
        return str(self.get("/weight_info")["weight_version"])

    def is_up(self) -> bool:
        """Whether it answers at all."""
        try:
            self.get("/health", timeout_s=2.0)
        except OSError:
            return False
        return True


def run(channel: Channel, options: Message, commands: Iterator[Message]) -> None:
    """Start the server, say where it is, end it with this process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *("vllm", "serve", options["model"], "--host", "127.0.0.1", "--port", str(port)),
        *("--tensor-parallel-size", str(options["tp"]), "--dtype", options["dtype"]),
        *("--skip-tokenizer-init", "--enforce-eager", "--enable-scale-out"),
        *("--max-model-len", "512", "--max-num-seqs", "8"),
        *("--weight-transfer-config", '{"backend": "weightsync"}'),
        *options.get("arguments", ()),
    ]
    environment = engine_environment() | {"VLLM_SERVER_DEV_MODE": "1"}
    server = subprocess.Popen(command, env={**os.environ, **environment})
    try:
        api = Api(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + _START_S
        while not api.is_up():
            if server.poll() is not None or time.monotonic() > deadline:
                raise PeerLostError(f"vllm serve did not start (status {server.poll()})")
            time.sleep(_LOOK_S)
        channel.send(event="ready", url=api.url, pid=server.pid)
        for _ in commands:
            pass
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(_END_S)
        except subprocess.TimeoutExpired:
            server.kill()
