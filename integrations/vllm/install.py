"""Makes staged weights live in a vLLM worker, as vLLM itself would after loading them.

Bytes are staged in the format that vLLM's loader writes. Many layers change that format afterwards
(`process_weights_after_loading`): they pack, swizzle, quantize, or derive other tensors. A layer
that does not is written in place. Any other is taken through vLLM's own reload helpers, one layer
at a time: its parameters get the loader's format again, the staged bytes go in, the post-load step
runs, and what it made is copied over the tensors that kernels and CUDA graphs know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import MLAAttention, is_deferred_attention_layer
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload.layerwise import (
    _copy_and_restore_kernel_tensors,
    _place_kernel_tensors,
    get_layerwise_info,
)
from vllm.model_executor.model_loader.reload.meta import materialize_layer, restore_layer_on_meta
from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers
from vllm.platforms import current_platform

from weightsync.errors import LayoutError
from weightsync.integrations.recording import Recording

__all__ = ["Installer"]

# Backends whose experts keep the loader's format.
_PLAIN_EXPERTS = {UnquantizedMoeBackend.TRITON, UnquantizedMoeBackend.BATCHED_TRITON}
# These make a layout that spans ranks, or leave the post-load step to others; vLLM cannot redo it.
_HOPELESS_EXPERTS = {
    UnquantizedMoeBackend.MOONEP,
    UnquantizedMoeBackend.OOT,
    UnquantizedMoeBackend.TPU,
}
# Whose post-load steps are known to give the same again from newly loaded weights.
_KNOWN_METHODS = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod, UnquantizedFusedMoEMethod)
_ALREADY_PROCESSED = "_already_called_process_weights_after_loading"


class Installer:
    """Knows how to make each layer of one worker's model live.

    Args:
        model: The live model.
        recording: What its parameters hold in the loader's format.
        vllm_config: The worker's.

    Raises:
        LayoutError: The live model is not the one that was recorded, or a layer has a kernel
            layout that cannot be made anew from loaded weights; names the layer.
    """

    def __init__(self, model: nn.Module, recording: Recording, vllm_config: VllmConfig) -> None:
        self._model = model
        self._recording = recording
        self._dtype = vllm_config.model_config.dtype
        self._sites: dict[str, dict[str, str]] = {}  # by module, the parameter behind each name
        for path, attribute, name in recording.sites:
            self._sites.setdefault(path, {})[attribute] = name
        self._plain = {path for path in self._sites if self._check(path)}
        for path, module in model.named_modules():
            _refuse_unless_known(path, module)

    @property
    def num_plain(self) -> int:
        """Modules that are written in place."""
        return len(self._plain)

    @property
    def num_processed(self) -> int:
        """Modules that are taken through the engine's reload."""
        return len(self._sites) - len(self._plain)

    @torch.no_grad()
    def install(self, staged: Mapping[str, Tensor]) -> None:
        """Make a whole version live. Blocks; call between steps of the engine.

        Args:
            staged: Flat tensors in the loader's format, by parameter.

        Raises:
            Whatever a post-load step raises; the model then holds mixed weights.
        """
        for path, names in self._sites.items():
            module = self._model.get_submodule(path)
            if path in self._plain:
                for attribute, name in names.items():
                    _write(getattr(module, attribute), staged[name])
            else:
                self._reload(path, module, staged)
        for module in self._model.modules():
            if is_deferred_attention_layer(module):
                _after_loading(module)(self._dtype)  # derived from other layers
        if hasattr(self._model, "process_weights_after_loading"):
            _after_loading(self._model)()

    def _reload(self, path: str, module: nn.Module, staged: Mapping[str, Tensor]) -> None:
        """One layer: back to the loader's format, staged bytes in, post-load step, copy over."""
        info = get_layerwise_info(module)
        info.kernel_tensors = get_layer_params_buffers(module)
        info.kernel_non_persistent_buffers = set(module._non_persistent_buffers_set)
        try:
            self._make_anew(path, module, staged)
            _copy_and_restore_kernel_tensors(module, info)
        except BaseException:
            # Whatever is in them: the tensors that kernels know stay attached for the next version.
            _place_kernel_tensors(module, info)
            raise
        finally:
            info.reset()

    def _make_anew(self, path: str, module: nn.Module, staged: Mapping[str, Tensor]) -> None:
        info = get_layerwise_info(module)
        restore_layer_on_meta(module, info)
        materialize_layer(module, info)
        names = self._sites[path]
        for attribute in _restored(module):
            if attribute not in names:
                value = self._recording.constants[f"{path}.{attribute}"]
                getattr(module, attribute).data.fill_(value)
        for attribute, name in names.items():
            _write(getattr(module, attribute), staged[name])
        method: Any = module.quant_method
        if isinstance(method, UnquantizedFusedMoEMethod) and not _keeps_kernel(method.moe_kernel):
            # vLLM takes a kernel that is there for a sign that only its weights change, and leaves
            # out what the experts do for themselves after loading: wrong tokens on CPUs, whose
            # experts pack there.
            method.moe_kernel = None
        if hasattr(module, _ALREADY_PROCESSED):
            delattr(module, _ALREADY_PROCESSED)
        method.process_weights_after_loading(module)
        update: Any = getattr(module, "update_param_tp_status", None)
        if update is not None:
            update()

    def _check(self, path: str) -> bool:
        """Whether a layer is written in place; raises if it cannot be made live at all."""
        module = self._model.get_submodule(path)
        loaded = _loaded_form(module)
        for attribute, name in self._sites[path].items():
            recorded, form = self._recording.parameters[name], loaded.get(attribute)
            if form is None or (form.shape, form.dtype) != (recorded.shape, recorded.dtype):
                found = None if form is None else (tuple(form.shape), form.dtype)
                raise LayoutError(
                    f"{path}.{attribute} is loaded as {(recorded.shape, recorded.dtype)} by this "
                    f"vLLM, but its worker has {found}; restart the engine",
                    tensor=name,
                )
        _refuse_unless_known(path, module)
        if _keeps_format(module):
            changed = [name for name in self._sites[path] if not _is_alike(module, name, loaded)]
            if changed:
                raise LayoutError(
                    f"{path}.{changed[0]} was changed after loading by nobody that weightsync "
                    "knows; this engine cannot be fed",
                    tensor=f"{path}.{changed[0]}",
                )
            return True
        for attribute in _restored(module):
            name = f"{path}.{attribute}"
            if attribute not in self._sites[path] and name not in self._recording.constants:
                raise LayoutError(
                    f"no checkpoint fills {name}, and its value before loading is not known; this "
                    "quantization cannot be fed by weightsync",
                    tensor=name,
                )
        return False


def _after_loading(module: Any) -> Callable[..., None]:
    step: Callable[..., None] = module.process_weights_after_loading
    return step


def _write(live: Tensor, staged: Tensor) -> None:
    live.data.copy_(staged.view(live.shape))


def _restored(module: nn.Module) -> list[str]:
    """Names that the reload gives the loader's format again, without content."""
    parameters, buffers = get_layerwise_info(module).restore_metadata
    return [*parameters, *buffers]


def _loaded_form(module: nn.Module) -> dict[str, Tensor]:
    """Shape and dtype of a layer's tensors as the loader writes them."""
    live = {**module._parameters, **module._buffers}
    parameters, buffers = get_layerwise_info(module).restore_metadata
    return {**{n: t for n, t in live.items() if t is not None}, **parameters, **buffers}


def _is_alike(module: nn.Module, attribute: str, loaded: Mapping[str, Tensor]) -> bool:
    live, form = getattr(module, attribute), loaded[attribute]
    return (live.shape, live.stride(), live.dtype) == (form.shape, form.stride(), form.dtype)


def _keeps_format(module: nn.Module) -> bool:
    """Whether a layer's tensors after its post-load step are those that the loader wrote."""
    method: Any = getattr(module, "quant_method", None)
    if not isinstance(method, QuantizeMethodBase):
        return True
    if (
        type(method).process_weights_after_loading
        is QuantizeMethodBase.process_weights_after_loading
    ):
        return True
    if type(method) is UnquantizedFusedMoEMethod:
        return method.unquantized_backend in _PLAIN_EXPERTS and current_platform.is_cuda()
    if type(method) in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
        return current_platform.is_cuda() or getattr(module, "_cpu_skip_gemm_dispatch", False)
    return False


def _refuse_unless_known(path: str, module: nn.Module) -> None:
    method: Any = getattr(module, "quant_method", None)
    why = ""
    if isinstance(method, QuantizeMethodBase) and type(method) not in _KNOWN_METHODS:
        why = f"is quantized by {type(method).__name__}; weightsync feeds unquantized layers"
    elif (
        type(method) is UnquantizedFusedMoEMethod
        and method.unquantized_backend in _HOPELESS_EXPERTS
    ):
        why = (
            f"uses the {method.unquantized_backend.value} experts, whose layout cannot be made "
            "anew; start vLLM with another --moe-backend"
        )
    elif isinstance(module, MLAAttention) and getattr(module, "is_amx_bmm_enabled", False):
        why = "drops kv_b_proj after loading (AMX); start vLLM with another attention backend"
    if why:
        raise LayoutError(f"{path} {why}", tensor=path)


def _keeps_kernel(kernel: Any) -> bool:
    """Whether a kernel can stay: its experts have no post-load step of their own."""
    if kernel is None:
        return True
    step = type(kernel.fused_experts).process_weights_after_loading
    return step is FusedMoEExperts.process_weights_after_loading
