"""A control: vLLM engines that are started from a checkpoint, each in a process of its own.

Run as a script in vLLM's environment it imports vLLM once and forks for every engine, so that a
restart costs seconds; `RestartedEngine` drives it from any other environment. Both speak JSON
lines over pipes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weightsync.demo.vllm.settings import engine_environment

__all__ = ["ENGINE", "RestartedEngine"]

ROOT = Path(__file__).resolve().parents[2]
ANSWER_S = 120.0
# Else every process compiles its sampler at the first request: ten seconds, for the same tokens.
ENGINE = {**engine_environment(), "TORCHDYNAMO_DISABLE": "1"}

Request = tuple[list[int], dict[str, Any]]


class RestartedEngine:
    """One engine at a time, of whatever checkpoint. Context manager; ends every process.

    Args:
        folder: Takes what vLLM prints and leaves behind.
    """

    def __init__(self, folder: Path) -> None:
        environment = {"TMPDIR": str(folder), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        self._log = folder / "restarts.log"
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                [ROOT / "scripts" / "stack", "vllm", "--", "python", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env={**os.environ, **ENGINE, **environment},
            )
        self._is_running = False
        self.pids: list[int] = []

    def restart(self, model: Path) -> None:
        """End the engine, and start another one from a checkpoint."""
        if self._is_running:
            self._ask(do="end")
        self.pids.append(self._ask(do="start", model=str(model))["pid"])
        self._is_running = True

    def complete(self, requests: Sequence[Request]) -> list[Any]:
        """As `Engine.complete` of scripts/examples/grpo_vllm.py."""
        choices: list[Any] = self._ask(do="complete", requests=list(requests))["choices"]
        return choices

    def _ask(self, **message: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        killer = threading.Timer(ANSWER_S, self._process.kill)
        killer.start()
        line = b""
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            pass  # told below
        finally:
            killer.cancel()
        assert line, f"it ended with {self._process.wait(10)}:\n{self._log.read_text()[-3000:]}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> RestartedEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # gone already; whoever asked has heard it
            self._process.stdin.close()  # both processes end when nobody asks any more
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def _serve() -> None:
    """The script: `start` forks, `end` ends the fork, and the end of the input ends both."""
    # Most of what an engine imports, once for all that are forked. None of it starts a thread.
    for name in ("entrypoints.llm", "v1.worker.cpu_worker", "model_executor.models.qwen3"):
        importlib.import_module(f"vllm.{name}")

    out = os.dup(1)
    os.dup2(2, 1)  # whatever vLLM prints is no answer
    lines = os.fdopen(0, "rb", buffering=0)  # nothing may be read ahead: forks read on

    def answer(**message: Any) -> None:
        os.write(out, json.dumps(message).encode() + b"\n")

    while line := lines.readline():
        message = json.loads(line)
        if message["do"] != "start":
            raise SystemExit(f"no engine runs: {message}")
        pid = os.fork()
        if pid == 0:
            _run_engine(message["model"], lines, answer)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status != 0:
            raise SystemExit(status)


def _run_engine(model: str, lines: Any, answer: Any) -> None:
    try:
        from vllm import LLM, SamplingParams

        engine = LLM(
            model=model,
            dtype="float32",
            enforce_eager=True,
            max_model_len=512,
            max_num_seqs=64,
            skip_tokenizer_init=True,
            disable_log_stats=True,
        )
        answer(pid=os.getpid())
        while line := lines.readline():
            message = json.loads(line)
            if message["do"] == "end":
                answer()
                os._exit(0)  # vLLM takes seconds to tidy up what goes with the process anyway
            requests = message["requests"]
            outputs = engine.generate(
                [{"prompt_token_ids": prompt} for prompt, _ in requests],
                [SamplingParams(**sampling) for _, sampling in requests],
                use_tqdm=False,
            )
            answer(choices=[[_choice(made) for made in output.outputs] for output in outputs])
        os._exit(0)
    except BaseException:  # noqa: BLE001 - the fork must not go on in the loop above
        import traceback

        traceback.print_exc()
        os._exit(1)


def _choice(made: Any) -> dict[str, Any]:
    """A completion as the server's JSON has it."""
    content = [
        {"token_id": token, "logprob": place[token].logprob}
        for token, place in zip(made.token_ids, made.logprobs or [], strict=False)
    ]
    tokens = list(made.token_ids)
    return {"index": made.index, "token_ids": tokens, "logprobs": {"content": content}}


if __name__ == "__main__":
    _serve()
