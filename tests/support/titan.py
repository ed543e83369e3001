"""Tiny torchtitan models by plain tensor operations: nothing here comes from the rules.

The operations are those of torchtitan 0.3: `_reverse_permute` and the name maps of
torchtitan/models/*/state_dict_adapter.py, `FusedQKVLinear._merge_qkv_on_load` of
torchtitan/models/common/attention.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["titan_module", "titan_tensors"]

_ATTENTION = {
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "self_attn.q_a_proj": "attention.wq_a",
    "self_attn.q_a_layernorm": "attention.q_norm",
    "self_attn.q_b_proj": "attention.wq_b",
    "self_attn.kv_a_proj_with_mqa": "attention.wkv_a",
    "self_attn.kv_a_layernorm": "attention.kv_norm",
    "self_attn.kv_b_proj": "attention.wkv_b",
}
_REST = {
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.gate": "moe.router.gate",
    "mlp.shared_experts.gate_proj": "moe.shared_experts.w1",
    "mlp.shared_experts.up_proj": "moe.shared_experts.w3",
    "mlp.shared_experts.down_proj": "moe.shared_experts.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _reverse_permute(weight: Tensor, num_heads: int) -> Tensor:
    rows, width = weight.shape
    split = weight.view(num_heads, 2, rows // num_heads // 2, width)
    return split.transpose(1, 2).reshape(rows, width)


def titan_tensors(
    named: Mapping[str, Tensor], config: Mapping[str, Any], *, release: str = "0.3"
) -> dict[str, Tensor]:
    """Makes torchtitan's parameters and buffers of a checkpoint.

    `release` is "0.3", "0.3 separate" (queries, keys and values apart) or "0.2".
    """
    found: dict[str, Tensor] = {"tok_embeddings.weight": named["model.embed_tokens.weight"]}
    found["norm.weight"] = named["model.norm.weight"]
    if not config["tie_word_embeddings"]:
        head = "output.weight" if release == "0.2" else "lm_head.weight"
        found[head] = named["lm_head.weight"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        inside = {n.removeprefix(prefix): t for n, t in named.items() if n.startswith(prefix)}
        own = f"layers.{layer}."
        for canonical, name in {**_ATTENTION, **_REST}.items():
            if f"{canonical}.weight" in inside:
                found[f"{own}{name}.weight"] = inside[f"{canonical}.weight"]
        found |= _projections(inside, config, own + "attention.", release)
        if "mlp.gate.weight" in inside:
            found |= _experts(inside, config, own + "moe.", release)
    return found


def _projections(
    inside: Mapping[str, Tensor], config: Mapping[str, Any], prefix: str, release: str
) -> dict[str, Tensor]:
    if "self_attn.k_proj.weight" not in inside:
        whole = inside.get("self_attn.q_proj.weight")
        return {} if whole is None else {prefix + "wq.weight": whole}
    q, k, v = (inside[f"self_attn.{kind}_proj.weight"] for kind in "qkv")
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if config["model_type"] == "llama":
        q, k = _reverse_permute(q, num_heads), _reverse_permute(k, num_kv_heads)
    if release != "0.3":
        middle = "" if release == "0.2" else "qkv_linear."
        kinds = zip("qkv", (q, k, v), strict=True)
        return {f"{prefix}{middle}w{kind}.weight": weight for kind, weight in kinds}
    width = q.shape[1]
    groups = [t.reshape(num_kv_heads, -1, width) for t in (q, k, v)]
    return {prefix + "qkv_linear.wqkv.weight": torch.cat(groups, dim=1).reshape(-1, width)}


def _experts(
    inside: Mapping[str, Tensor], config: Mapping[str, Any], prefix: str, release: str
) -> dict[str, Tensor]:
    count = config.get("num_experts", config.get("n_routed_experts"))
    found: dict[str, Tensor] = {}
    for which, old, new in (
        ("gate", "w1", "w1_EFD"),
        ("up", "w3", "w3_EFD"),
        ("down", "w2", "w2_EDF"),
    ):
        stacked = torch.stack(
            [inside[f"mlp.experts.{e}.{which}_proj.weight"] for e in range(count)]
        )
        name = f"experts.{old}" if release == "0.2" else f"routed_experts.inner_experts.{new}"
        found[prefix + name] = stacked
    bias = inside.get("mlp.gate.e_score_correction_bias")
    name = "expert_bias" if release == "0.2" else "expert_bias_E"
    # Every router has the bias, also where the checkpoint has no place for it.
    found[prefix + name] = torch.zeros(count) if bias is None else bias
    return found


def titan_module(
    named: Mapping[str, Tensor], config: Mapping[str, Any], *, release: str = "0.3"
) -> nn.Module:
    """Makes a tree of modules that holds these tensors under torchtitan's names."""
    root = nn.Module()
    for name, tensor in titan_tensors(named, config, release=release).items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        if last.startswith("expert_bias"):
            module.register_buffer(last, tensor.detach().clone())
        else:
            module.register_parameter(last, nn.Parameter(tensor.detach().clone()))
    if config["tie_word_embeddings"]:
        root.add_module("output" if release == "0.2" else "lm_head", nn.Module())
        head = root.get_submodule("output" if release == "0.2" else "lm_head")
        head.register_parameter("weight", root.get_submodule("tok_embeddings").weight)
    return root
