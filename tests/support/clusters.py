"""Clusters for tests: plain numbers, so that expected times can be worked out by hand; a model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from weightsync.planners.cluster import Cluster

PRESETS = Path(__file__).parents[2] / "configs" / "cluster"

SMALL_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_experts": 8,
    "tie_word_embeddings": False,
}
"""A `config.json` whose shards can be encoded in blocks of 128 x 128."""


def preset_values(name: str) -> dict[str, Any]:
    """Return the content of a preset file as the command line reads it."""
    values = OmegaConf.to_container(OmegaConf.load(PRESETS / f"{name}.yaml"))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def cluster(**changes: Any) -> Cluster:
    """Return a cluster in which only NICs cost time: 1 GB/s each, one GPU and NIC a node."""
    fast = {"nominal": 1e9, "attainable": 1e9}
    values: dict[str, Any] = {
        "name": "test",
        "gpus_per_node": 1,
        "nics_per_node": 1,
        "nic_gbit_per_s": {"nominal": 8, "attainable": 8},
        "ecmp_fraction": 1.0,
        "is_full_duplex": True,
        "is_gpu_direct": True,
        "cut_gbit_per_s": None,
        "write_overhead_s": 0.0,
        "posting_threads": 1,
        "message_gap_s": 0.0,
        "bucket_overhead_s": 0.0,
        "latency_s": 0.0,
        "control_round_trip_s": 0.0,
        "control_message_s": 0.0,
        "control_core_s": 0.0,
        "journal_s": 0.0,
        "gpu_memory_bytes": 1 << 30,
    }
    for rate in ("h2d", "host_memory", "nvlink", "hbm", "encode", "digest"):
        values[f"{rate}_gb_per_s"] = fast
    return Cluster.from_mapping(values | changes, where="test")


def random_cluster(rng: random.Random) -> Cluster:
    """Return a cluster of random shape in which everything costs time."""

    def rate(most: float) -> dict[str, float]:
        nominal = rng.uniform(most / 10, most)
        return {"nominal": nominal, "attainable": nominal * rng.uniform(0.5, 1)}

    gpus, nics = rng.choice([(1, 1), (2, 2), (2, 1), (4, 2), (2, 4), (1, 2), (3, 3)])
    return cluster(
        gpus_per_node=gpus,
        nics_per_node=nics,
        nic_gbit_per_s=rate(8),
        ecmp_fraction=rng.uniform(0.5, 1),
        is_gpu_direct=rng.random() < 0.5,
        cut_gbit_per_s=rate(8) if rng.random() < 0.5 else None,
        write_overhead_s=rng.uniform(0, 1e-7),
        posting_threads=rng.randint(1, 3),
        message_gap_s=rng.uniform(0, 1e-7),
        bucket_overhead_s=rng.uniform(0, 1e-7),
        latency_s=rng.uniform(0, 1e-7),
        control_round_trip_s=rng.uniform(0, 1e-7),
        control_message_s=rng.uniform(0, 1e-8),
        control_core_s=rng.uniform(0, 1e-8),
        journal_s=rng.uniform(0, 1e-7),
        **{
            f"{key}_gb_per_s": rate(4)
            for key in ("h2d", "host_memory", "nvlink", "hbm", "encode", "digest")
        },
    )
