"""The examples of scripts/examples as processes, and a real `vllm serve` in its own environment."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from support.vllm_restarts import ENGINE
from weightsync.demo.vllm.server import Api

__all__ = ["ROOT", "Server", "example", "is_long", "run_example"]

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "scripts" / "examples"
START_S = 240.0
RUN_S = 300.0
# Trainers of every run get the same, else sums are added up in another order.
TRAINER = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}


def is_long() -> bool:
    """Whether the long tier runs."""
    return os.environ.get("WEIGHTSYNC_TEST_TIER") == "long"


class Server:
    """A `vllm serve` that can follow jobs. Context manager; starts at once, ready after `wait`.

    Args:
        model: Folder with its first weights.
        folder: Takes its log and what it leaves behind.
    """

    def __init__(self, model: Path, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.api = Api(f"http://127.0.0.1:{port}")
        self._log = folder / "server.log"
        command = [
            *(ROOT / "scripts" / "stack", "vllm", "--", "vllm", "serve", model),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--dtype", "float32", "--enforce-eager", "--skip-tokenizer-init"),
            *("--enable-scale-out", "--max-model-len", "512", "--max-num-seqs", "64"),
            *("--weight-transfer-config", '{"backend": "weightsync"}'),
        ]
        settings = {"VLLM_SERVER_DEV_MODE": "1", "TMPDIR": str(folder)}
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENGINE, **settings},
                start_new_session=True,
            )

    def wait(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + START_S
        while not self.api.is_up():
            status = self._process.poll()
            assert status is None, f"vllm serve ended with status {status}:\n{self._tail()}"
            assert time.monotonic() < deadline, f"vllm serve is late:\n{self._tail()}"
            time.sleep(0.25)

    def _tail(self) -> str:
        return self._log.read_bytes()[-3000:].decode(errors="replace")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)  # the session that was made for it
            self._process.wait()


def example(name: str) -> ModuleType:
    """A script of scripts/examples as a module; its main function does not run."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_example(name: str, folder: Path, *arguments: object) -> dict[str, Any]:
    """Run a script as a user would; what it writes with `--json`, or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "result.json"
    options = [] if name == "tiny_model" else ["--json", result, "--output", folder / "trainer"]
    command = [sys.executable, EXAMPLES / f"{name}.py", *arguments, *options]
    done = subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **TRAINER, "TMPDIR": str(folder)},
        timeout=RUN_S,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{name} ended with {done.returncode}:\n{done.stdout[-4000:]}"
    return dict(json.loads(result.read_text())) if result.exists() else {}
