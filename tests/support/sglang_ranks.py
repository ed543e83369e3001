"""SGLang's real model classes at any rank of any degrees, in one process: no peers, no devices.

A fake process group answers for the other ranks. Arguments go through SGLang's own resolution for
CUDA, so what it refuses there is refused here. What is left is what a worker does until its weights
are loaded, without the model's post-load steps.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from support.sglang_cells import Server

__all__ = ["built", "fake_rank"]

# Arguments of the rule, and what SGLang calls them.
_FLAGS = {
    "tp": "tp_size",
    "ep": "ep_size",
    "pp": "pp_size",
    "dp": "dp_size",
    "moe_dense_tp": "moe_dense_tp_size",
    "num_redundant_experts": "ep_num_redundant_experts",
}


def _server_args(folder: str, given: Mapping[str, Any]) -> Any:
    from sglang.srt.server_args import ServerArgs

    flags = {_FLAGS.get(name, name): value for name, value in given.items()}
    is_fused = flags.pop("fuse_shared_experts", None)
    if flags.get("expert_map") is not None:
        placed = {"physical_to_logical_map": flags.pop("expert_map")}
        flags["init_expert_location"] = json.dumps(placed)
    return ServerArgs(
        model_path=folder,
        skip_tokenizer_init=True,
        load_format="dummy",
        device="cuda",
        deepep_mode="normal",  # the other modes ask for kernels; the same for weights
        enforce_shared_experts_fusion=is_fused is True,
        disable_shared_experts_fusion=is_fused is False,
        **flags,
    )


@cache
def _without_devices() -> None:
    """Leave out what only talks to other ranks. Once."""
    import sglang.srt.layers.moe.fused_moe_triton.layer as moe_layer
    from sglang.srt.models.deepseek_common import deepseek_weight_loader

    logging.getLogger("sglang").setLevel(logging.ERROR)
    # Dispatchers send tokens to experts; some need the library of their backend.
    moe_layer.create_moe_dispatcher = lambda *args, **kwargs: mock.Mock(spec=())
    # Splits kv_b_proj for latent attention, from what was loaded: a step after loading.
    mixin = deepseek_weight_loader.DeepseekV2WeightLoaderMixin
    mixin.post_load_weights = lambda self, *args, **kwargs: None


@contextmanager
def fake_rank(
    config: Mapping[str, Any], server: Server, rank: int, dtype: str = "bfloat16"
) -> Iterator[Any]:
    """Be one rank of a server.

    Args:
        config: Content of the model's `config.json`.
        server: How it is started.
        rank: Its number, as the rule counts.
        dtype: Of the parameters.

    Yields:
        SGLang's configuration of the model.
    """
    os.environ["SGLANG_USE_MESSAGE_QUEUE_BROADCASTER"] = "0"  # it would ask the other ranks
    import sglang.srt.distributed.parallel_state as parallel_state
    from sglang.srt import runtime_context
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.eplb import expert_location
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.layers.rotary_embedding import factory

    _without_devices()
    new_group = dist.new_group

    def fake_group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        return new_group(ranks, backend="fake")

    world = server.flags.get("tp", 1) * server.flags.get("pp", 1)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        (Path(folder) / "config.json").write_text(json.dumps(config))
        stack.enter_context(mock.patch.object(dist, "new_group", fake_group))
        server_args = _server_args(folder, server.flags)
        try:
            ranks = runtime_context.SpawnRanks(world_rank=rank % world, gpu_id=0)
            runtime_context.publish(server_args, role="scheduler", ranks=ranks)
            initialize_moe_config()
            dist.init_process_group("fake", store=FakeStore(), rank=rank % world, world_size=world)
            parallel_state.init_distributed_environment(
                world_size=world,
                rank=rank % world,
                local_rank=0,
                backend="fake",
                distributed_init_method="fake://",
            )
            parallel_state.initialize_model_parallel(backend="fake")
            initialize_dp_attention(server_args)
            model_config = ModelConfig(folder, dtype=dtype)
            with runtime_context.get_context().config_bag("device").override(device="cpu"):
                location = expert_location.compute_initial_expert_location_metadata(
                    model_config, runtime_context.get_parallel().moe_ep_rank
                )
            expert_location.set_global_expert_location_metadata(location)
            yield model_config
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()
            runtime_context.reset_context()
            factory._ROPE_DICT.clear()


@contextmanager
def _on_nvidia() -> Iterator[None]:
    """Let models that ask whether shared experts can be fused hear what a GPU would say."""
    from sglang.srt.models import deepseek_v2, glm4_moe

    with (
        mock.patch.object(deepseek_v2, "_is_cuda", True),
        mock.patch.object(glm4_moe, "_is_cuda", True),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
    ):
        yield


def built(model_config: Any, device: str = "cpu") -> nn.Module:
    """Build the model of the current rank, before anything is loaded."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader import loader
    from sglang.srt.model_loader.utils import set_default_torch_dtype

    load_config = LoadConfig(load_format="dummy")
    resolve = loader.resolve_shared_experts_config

    def resolve_as_nvidia(*args: Any) -> Any:
        with _on_nvidia():
            return resolve(*args)

    with (
        mock.patch.object(loader, "resolve_shared_experts_config", resolve_as_nvidia),
        set_default_torch_dtype(model_config.dtype),
        torch.device(device),
    ):
        quantization = loader._get_quantization_config(model_config, load_config)
        model: nn.Module = loader._initialize_model(model_config, load_config, quantization)
    return model
