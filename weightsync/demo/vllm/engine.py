"""A vLLM engine inside a worker's own process: `vllm.LLM`, which adopts versions when told to."""

from __future__ import annotations

import os
from collections.abc import Iterator

from weightsync.demo.vllm.settings import engine_environment
from weightsync.demo.worker import Channel, Message
from weightsync.errors import WeightSyncError

__all__ = ["run"]


def run(channel: Channel, options: Message, commands: Iterator[Message]) -> None:
    """The life of one engine."""
    # With one rank everything runs in this process; more ranks are processes of vLLM's own.
    os.environ.update(engine_environment())
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if options["tp"] == 1 else "1"
    from vllm import LLM, SamplingParams

    from weightsync.integrations.vllm import attach, refit

    llm = LLM(
        options["model"],
        tensor_parallel_size=options["tp"],
        dtype=options["dtype"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=8,
        weight_transfer_config={"backend": "weightsync"},
    )
    channel.send(event="ready")
    for command in commands:
        try:
            if command["do"] == "attach":
                attach([llm], job=command["job"], fabric=command["fabric"])
                channel.send(event="attached")
            elif command["do"] == "refit":
                version = refit(llm, command.get("version"), timeout_s=command["timeout_s"])
                shown = llm.llm_engine.get_weight_version()
                channel.send(event="refitted", version=version, shown=shown)
            elif command["do"] == "generate":
                sampling = SamplingParams(
                    temperature=0,
                    max_tokens=command["num_tokens"],
                    ignore_eos=True,
                    detokenize=False,
                )
                prompts = [{"prompt_token_ids": prompt} for prompt in command["prompts"]]
                made = llm.generate(prompts, sampling, use_tqdm=False)
                tokens = [list(output.outputs[0].token_ids) for output in made]
                channel.send(event="generated", tokens=tokens)
        except WeightSyncError as error:
            why = {"error": type(error).__name__, "message": str(error)}
            channel.send(event="refused", **why)
    os._exit(0)  # vLLM's own end waits for processes that the parent ends anyway
