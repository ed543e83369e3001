"""vLLM's real model classes at any rank of any degrees, in one process: no peers, no devices.

A fake process group answers for the other ranks, and kernels that this machine does not have are
chosen but never run. What is left is what a worker does until its weights are loaded.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

__all__ = ["Degrees", "built", "fake_rank"]


@dataclass(frozen=True)
class Degrees:
    """How one replica of an engine is cut, and what is special about it."""

    tp: int = 1
    dp: int = 1
    pp: int = 1
    ep: bool = False
    placement: str = "linear"
    num_redundant: int = 0

    @property
    def world_size(self) -> int:
        """Ranks of the replica; rank = (dp * PP + pp) * TP + tp."""
        return self.tp * self.dp * self.pp

    @property
    def shown(self) -> str:
        """The degrees in words."""
        shown = [f"TP {self.tp}"]
        shown += [f"PP {self.pp}"] * (self.pp > 1)
        shown += [f"DP {self.dp}"] * (self.dp > 1)
        shown += [f"EP {self.tp * self.dp}"] * self.ep
        shown += [f"{self.num_redundant} redundant experts"] * (self.num_redundant > 0)
        return ", ".join(shown)


class _NoKernel:
    """A linear kernel that changes nothing after loading and never runs."""

    marlin_input_dtype = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        pass


@cache
def _without_devices() -> None:
    """Choose kernels of GPUs: Triton for FP8 and plain experts, Marlin for MXFP4. Once."""
    import vllm.distributed.device_communicators.cpu_communicator as cpu_communicator
    import vllm.distributed.device_communicators.shm_broadcast as shm_broadcast
    import vllm.distributed.parallel_state as parallel_state
    from vllm.distributed.device_communicators.base_device_communicator import (
        DeviceCommunicatorBase,
    )
    from vllm.model_executor.layers.fused_moe import (
        expert_map_manager,
        unquantized_fused_moe_method,
    )
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
    from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import Mxfp4MoeBackend
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
    from vllm.model_executor.layers.quantization import fp8, mxfp4

    logging.getLogger("vllm").setLevel(logging.ERROR)
    fp8.init_fp8_linear_kernel = lambda *args, **kwargs: _NoKernel()
    fp8.select_fp8_moe_backend = lambda **kwargs: (Fp8MoeBackend.TRITON, None)
    unquantized_fused_moe_method.select_unquantized_moe_backend = lambda moe_config: (
        UnquantizedMoeBackend.TRITON,
        None,
    )
    mxfp4.select_mxfp4_moe_backend = lambda *args, **kwargs: (Mxfp4MoeBackend.MARLIN, None)
    expert_map_manager.ExpertMapManager.get_compressed_map_string = lambda self: ""
    cpu_communicator.CpuCommunicator.__init__ = lambda self, *args, **kwargs: (
        DeviceCommunicatorBase.__init__(self, *args, **kwargs)
    )
    cpu_communicator.CpuCommunicator.supports_tensor_dict = False
    shm_broadcast.MessageQueue.create_from_process_group = staticmethod(lambda *a, **k: None)
    parallel_state.in_the_same_node_as = lambda group, *args, **kwargs: (
        [True] * dist.get_world_size()
    )


@contextmanager
def fake_rank(
    config: Mapping[str, Any], degrees: Degrees, rank: int, dtype: str = "bfloat16"
) -> Iterator[Any]:
    """Be one rank of a replica. Yields its VllmConfig, which is the current one inside."""
    import vllm.distributed.parallel_state as parallel_state
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers import rotary_embedding
    from vllm.model_executor.models import utils as model_utils

    _without_devices()
    vllm_config = _vllm_config(config, degrees, rank, dtype)
    new_group = dist.new_group

    def fake_group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        return new_group(ranks, backend="fake")

    inner = degrees.tp * degrees.pp
    with (
        set_current_vllm_config(vllm_config),
        mock.patch.object(dist, "new_group", fake_group),
        mock.patch.object(torch.distributed, "new_group", fake_group),
    ):
        try:
            dist.init_process_group(
                "fake", store=FakeStore(), rank=rank, world_size=degrees.world_size
            )
            parallel_state.init_distributed_environment(
                world_size=inner,
                rank=rank % inner,
                local_rank=0,
                backend="fake",
                distributed_init_method="fake://",
            )
            parallel_state.initialize_model_parallel(degrees.tp, degrees.pp, backend="fake")
            yield vllm_config
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()
            rotary_embedding._ROPE_DICT.clear()
            model_utils._model_to_pp_missing_layer_names.clear()  # by the id of a model


def built(vllm_config: Any, device: str = "cpu") -> nn.Module:
    """Build the model of the current rank, before anything is loaded."""
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    model_config = vllm_config.model_config
    vllm_config.compilation_config.static_forward_context.clear()
    vllm_config.compilation_config.static_all_moe_layers.clear()
    with set_default_torch_dtype(model_config.dtype), torch.device(device):
        model: nn.Module = initialize_model(vllm_config=vllm_config, model_config=model_config)
    return model


def _vllm_config(config: Mapping[str, Any], degrees: Degrees, rank: int, dtype: str) -> Any:
    from vllm.config import (
        CacheConfig,
        CompilationConfig,
        DeviceConfig,
        LoadConfig,
        ModelConfig,
        ParallelConfig,
        VllmConfig,
    )

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        model = ModelConfig(
            model=folder,
            tokenizer=folder,
            skip_tokenizer_init=True,
            dtype=dtype,
            enforce_eager=True,
            max_model_len=64,
        )
    # The degrees are set afterwards: a real configuration counts this machine's devices.
    parallel = ParallelConfig(
        enable_expert_parallel=degrees.ep, expert_placement_strategy=degrees.placement
    )
    inner = degrees.tp * degrees.pp
    parallel.tensor_parallel_size = degrees.tp
    parallel.pipeline_parallel_size = degrees.pp
    parallel.world_size = inner
    parallel.rank = rank % inner
    parallel.data_parallel_size = degrees.dp
    parallel.data_parallel_rank = rank // inner
    made = VllmConfig(
        model_config=model,
        parallel_config=parallel,
        load_config=LoadConfig(load_format="dummy"),
        device_config=DeviceConfig("cpu"),
        cache_config=CacheConfig(block_size=16),
        compilation_config=CompilationConfig(mode=0),
    )
    if degrees.num_redundant:  # refused on CPUs, whose loader and placement are the same
        made.parallel_config.enable_eplb = True
        made.parallel_config.eplb_config.num_redundant_experts = degrees.num_redundant
    return made
