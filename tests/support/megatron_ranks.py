"""Real GPT models of Megatron-Core on CPUs over gloo, filled by megatron-bridge's own conversion.

Only in the environment of `scripts/stack trainers`. Without Transformer Engine, which needs GPUs:
modules are Megatron-Core's own.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from support.trainer_cells import MegatronCell

__all__ = ["bridge", "load", "megatron_model"]

_BRIDGE = "megatron.bridge.models.conversion"
# Names of megatron-bridge's registries (models/*/*_bridge.py), as modules without Transformer
# Engine have them; below `decoder.layers.N.` and `model.layers.N.`.
_NAMES = {
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "self_attention.linear_proj": "self_attn.o_proj",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "self_attention.linear_q_proj": "self_attn.q_proj",
    "self_attention.linear_q_down_proj": "self_attn.q_a_proj",
    "self_attention.linear_q_up_proj": "self_attn.q_b_proj",
    "self_attention.linear_kv_down_proj": "self_attn.kv_a_proj_with_mqa",
    "self_attention.linear_kv_up_proj": "self_attn.kv_b_proj",
    "self_attention.kv_layernorm": "self_attn.kv_a_layernorm",
    "mlp.linear_fc2": "mlp.down_proj",
    "mlp.shared_experts.linear_fc2": "mlp.shared_experts.down_proj",
}
_TOP = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.linear_fc([12])\.(weight|bias)")


@cache
def bridge() -> Any:
    """The module of megatron-bridge that converts parameters.

    The packages around it import Transformer Engine, so they are passed over.
    """
    import megatron

    root = next(p for p in megatron.__path__ if Path(p, "bridge").is_dir())
    name = "megatron.bridge"
    for part in ("", ".models", ".models.conversion"):
        if name + part not in sys.modules:
            package = types.ModuleType(name + part)
            package.__path__ = [str(Path(root, "bridge", *part.split(".")))]
            sys.modules[name + part] = package
    module = importlib.import_module(f"{_BRIDGE}.param_mapping")
    scatter = module.MegatronParamMapping.scatter_to_tp_ranks

    def contiguous(self: Any, splits: list[Tensor] | None, *args: Any, **how: Any) -> Tensor:
        # Over gloo, scattering columns sends the memory that they are views of.
        made: Tensor = scatter(self, splits and [s.contiguous() for s in splits], *args, **how)
        return made

    module.MegatronParamMapping.scatter_to_tp_ranks = contiguous
    return module


@cache
def _for_cpus() -> None:
    """What Megatron-Core 0.16.1 asks of CUDA without need, and what its local modules lack."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer import dot_product_attention, multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.Tensor.cuda = lambda self: self  # type: ignore[assignment, method-assign, misc]
    CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()
    multi_latent_attention.HAVE_TE = False  # it looks for classes that are None
    moe_utils.te_general_gemm = None  # it is asked for, and not defined without that
    made = dot_product_attention.DotProductAttention.__init__

    def without_channels(self: Any, *args: Any, **how: Any) -> None:
        # Latent attention passes widths that only Transformer Engine's attention takes.
        made(self, *args, **{k: v for k, v in how.items() if k not in ("k_channels", "v_channels")})

    dot_product_attention.DotProductAttention.__init__ = without_channels


def _transformer_config(hf: Mapping[str, Any], degrees: Mapping[str, Any]) -> Any:
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    kind, tp = hf["model_type"], degrees.get("tp", 1)
    heads = hf["num_attention_heads"]
    is_latent, is_oss = "kv_lora_rank" in hf, kind == "gpt_oss"
    experts = hf.get("num_experts", hf.get("n_routed_experts", hf.get("num_local_experts")))
    options: dict[str, Any] = {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": heads,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": is_oss or hf.get("mlp_bias", False),
        "add_qkv_bias": hf.get("attention_bias", False) and not is_latent,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-6,
        "qk_layernorm": is_latent or kind.startswith("qwen3") or hf.get("use_qk_norm", False),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": degrees.get("pp", 1),
        "expert_model_parallel_size": degrees.get("ep", 1),
        "expert_tensor_parallel_size": degrees.get("etp", tp),
        "num_layers_in_first_pipeline_stage": degrees.get("first_layers"),
        "num_layers_in_last_pipeline_stage": degrees.get("last_layers"),
        "account_for_embedding_in_pipeline_split": degrees.get("account_for_embedding", False),
        "account_for_loss_in_pipeline_split": degrees.get("account_for_loss", False),
        "pipeline_model_parallel_layout": degrees.get("pipeline_layout"),
        "use_cpu_initialization": True,
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
    }
    if degrees.get("vpp", 1) > 1:
        options["virtual_pipeline_model_parallel_size"] = degrees["vpp"]
    if not is_latent:
        options["num_query_groups"] = hf["num_key_value_heads"]
        options["kv_channels"] = hf.get("head_dim", hf["hidden_size"] // heads)
    if is_oss:
        options |= {"softmax_type": "learnable", "perform_initialization": False}
    if experts is not None:
        dense = set(hf.get("mlp_only_layers", range(hf.get("first_k_dense_replace", 0))))
        width = hf.get("moe_intermediate_size", hf["intermediate_size"])
        options |= {
            "num_moe_experts": experts,
            "moe_ffn_hidden_size": width,
            "moe_layer_freq": [int(n not in dense) for n in range(hf["num_hidden_layers"])],
            "moe_router_topk": 2,
            "moe_grouped_gemm": False,
            "moe_token_dispatcher_type": "allgather",
            "moe_router_pre_softmax": not hf.get("norm_topk_prob", False),
        }
        if hf.get("n_shared_experts"):
            options["moe_shared_expert_intermediate_size"] = width * hf["n_shared_experts"]
        if "n_routed_experts" in hf:
            options["moe_router_enable_expert_bias"] = True
            options["moe_router_score_function"] = "sigmoid"
    if not is_latent:
        return TransformerConfig(**options)
    return MLATransformerConfig(
        **options,
        multi_latent_attention=True,
        q_lora_rank=hf["q_lora_rank"],
        kv_lora_rank=hf["kv_lora_rank"],
        qk_head_dim=hf["qk_nope_head_dim"],
        qk_pos_emb_head_dim=hf["qk_rope_head_dim"],
        v_head_dim=hf["v_head_dim"],
        rope_type="rope",
    )


@contextmanager
def megatron_model(cell: MegatronCell) -> Iterator[list[Any]]:
    """This rank's chunks of the real model of a cell, among all ranks of torch.distributed."""
    _for_cpus()
    from megatron.core import parallel_state as mpu
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    hf, degrees = cell.config, cell.degrees
    tp, vpp = degrees.get("tp", 1), degrees.get("vpp", 1)
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=degrees.get("pp", 1),
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        context_parallel_size=degrees.get("cp", 1),
        expert_model_parallel_size=degrees.get("ep", 1),
        expert_tensor_parallel_size=degrees.get("etp"),
        create_gloo_process_groups=False,  # all are over gloo
    )
    try:
        config = _transformer_config(hf, degrees)
        multiple = degrees.get("vocab_divisible_by", 128) * tp
        chunks = []
        for number in range(vpp):
            stage = number if vpp > 1 else None
            first = mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage)
            last = mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
            chunks.append(
                GPTModel(
                    config=config,
                    transformer_layer_spec=get_gpt_decoder_block_spec(
                        config,
                        use_transformer_engine=False,
                        normalization="RMSNorm",
                        vp_stage=stage,
                    ),
                    vocab_size=-(-hf["vocab_size"] // multiple) * multiple,
                    max_sequence_length=64,
                    pre_process=first,
                    post_process=last,
                    share_embeddings_and_output_weights=hf["tie_word_embeddings"],
                    position_embedding_type="rope",
                    rotary_base=hf.get("rope_theta", 10000),
                    vp_stage=stage,
                )
            )
        yield chunks
    finally:
        mpu.destroy_model_parallel()


def load(chunks: list[Any], named: Mapping[str, Tensor], hf: Mapping[str, Any]) -> None:
    """Fills the model from a checkpoint, as megatron-bridge converts and scatters it."""
    for chunk in chunks:
        for name, parameter in (*chunk.named_parameters(), *chunk.named_buffers()):
            path, _, last = name.rpartition(".")
            if name in _TOP:
                theirs = _padded(chunk, named, name)
                value = _convert("AutoMapping", name, chunk.get_submodule(path), theirs)
            elif name.startswith("decoder.layers."):
                layer = chunk.decoder.layers[int(name.split(".")[2])]
                start = f"model.layers.{layer.layer_number - 1}."
                inside = {n[len(start) :]: t for n, t in named.items() if n.startswith(start)}
                own = name.split(".", 3)[3]
                if own.startswith("mlp.router.") and last not in ("weight", "bias", "expert_bias"):
                    continue  # counts of tokens
                value = _in_layer(chunk, chunk.get_submodule(path), name, own, inside)
            else:
                continue  # tables of positions
            with torch.no_grad():
                assert parameter.shape == value.shape, name
                parameter.copy_(value)


def _padded(chunk: Any, named: Mapping[str, Tensor], name: str) -> Tensor:
    tensor = named.get(_TOP[name], named["model.embed_tokens.weight"])
    if "layernorm" in name:
        return tensor
    rows = chunk.vocab_size - tensor.shape[0]
    return torch.nn.functional.pad(tensor, (0, 0, 0, rows), value=float("nan"))


def _convert(kind: str, name: str, module: nn.Module, theirs: Any, **names: str) -> Tensor:
    mapping = getattr(bridge(), kind)(name, **(names or {"hf_param": "any"}))
    converted: Tensor = mapping.hf_to_megatron(theirs, module)
    return converted


def _in_layer(
    chunk: Any, module: nn.Module, name: str, own: str, inside: Mapping[str, Tensor]
) -> Tensor:
    stem, _, kind = own.rpartition(".")
    expert = _EXPERT.fullmatch(own)
    if expert is not None:
        groups = chunk.pg_collection
        count = len(chunk.get_submodule(name.split(".local_experts.")[0]).local_experts)
        number = groups.ep.rank() * count + int(expert[1])
        return _expert(module, name, inside, number, expert[2], expert[3])
    if own.startswith("self_attention.linear_qkv."):
        parts = {which: inside[f"self_attn.{which}_proj.{kind}"] for which in "qkv"}
        return _convert("QKVMapping", name, module, parts, q="q", k="k", v="v")
    if stem.endswith("linear_fc1"):
        theirs = stem.removesuffix("linear_fc1")
        parts = {half: inside[f"{theirs}{half}_proj.{kind}"] for half in ("gate", "up")}
        return _convert("GatedMLPMapping", name, module, parts, gate="gate", up="up")
    if own == "mlp.router.expert_bias":
        return inside["mlp.gate.e_score_correction_bias"]
    if stem == "mlp.router":
        found = inside.get(f"mlp.gate.{kind}", inside.get(f"mlp.router.{kind}"))
    elif kind == "softmax_offset":
        found = inside["self_attn.sinks"]
    elif stem == "self_attention.q_layernorm":
        found = inside.get("self_attn.q_norm.weight", inside.get("self_attn.q_a_layernorm.weight"))
    else:
        found = inside[f"{_NAMES[stem]}.{kind}"]
    return _convert("AutoMapping", name, module, found)


def _expert(
    module: nn.Module, name: str, inside: Mapping[str, Tensor], number: int, fc: str, kind: str
) -> Tensor:
    fused = inside.get("mlp.experts.gate_up_proj")
    if fused is None:
        prefix = f"mlp.experts.{number}."
        if fc == "2":
            return _convert("AutoMapping", name, module, inside[f"{prefix}down_proj.{kind}"])
        parts = {half: inside[f"{prefix}{half}_proj.{kind}"] for half in ("gate", "up")}
        return _convert("GatedMLPMapping", name, module, parts, gate="gate", up="up")
    # `GPTOSSMLPGateUpProjMapping`, `GPTOSSMLPDownProjMapping` of models/gpt_oss/gpt_oss_bridge.py.
    suffix = "" if kind == "weight" else "_bias"
    theirs = inside[f"mlp.experts.{'gate_up' if fc == '1' else 'down'}_proj{suffix}"][number]
    if kind == "weight":
        theirs = theirs.T
    if fc == "1":
        theirs = torch.cat((theirs[::2], theirs[1::2]))
    return _convert("AutoMapping", name, module, theirs)
