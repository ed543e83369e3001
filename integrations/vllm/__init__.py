r"""vLLM as a sink: its workers join a job, and generate from what trainers publish.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --host 127.0.0.1 \
        --weight-transfer-config '{"backend": "weightsync"}'

    job = weightsync.integrations.vllm.attach(["http://127.0.0.1:8000"])
    source = weightsync.Source(model, job=job)          # on every trainer rank
    source.publish(until="adopted")                     # after every step

`register` is what vLLM calls by the entry point `vllm.general_plugins`. Importing this module
imports neither vLLM nor torch.
"""

from __future__ import annotations

from weightsync.integrations.vllm.attach import attach, refit
from weightsync.integrations.vllm.plugin import register

__all__ = ["attach", "refit", "register"]
