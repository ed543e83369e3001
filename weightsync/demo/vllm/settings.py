"""What vLLM needs in its environment to run small models on a few cores."""

from __future__ import annotations

__all__ = ["engine_environment"]


def engine_environment() -> dict[str, str]:
    """Variables for engines: little memory, no network, workers that share cores."""
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # more workers than NUMA nodes
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
