"""torchtitan 0.3: its names and its orders of rows, as parts of the checkpoint's tensors.

A torchtitan `state_dict` is not what its modules hold: hooks split the fused projection, and gather
it for that. Live parameters are what this module describes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

from weightsync.errors import ConfigError
from weightsync.planners.rules.canonical import (
    CORRECTION_BIAS,
    EMBEDDING,
    LM_HEAD,
    canonical_dtypes,
    canonical_tensors,
)
from weightsync.planners.rules.config import ConfigLike, ModelConfig, model_config
from weightsync.planners.rules.parts import Parameter, Part, rows, stacked, whole

__all__ = [
    "torchtitan_aliases",
    "torchtitan_buffers",
    "torchtitan_parameter",
    "torchtitan_parameters",
    "torchtitan_skips",
]

_MODELS = ("llama", "qwen3", "qwen3_moe", "deepseek_v3")

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
_QKV = re.compile(r"self_attn\.([qkv])_proj\.weight")

# `from_hf_map` of Llama3StateDictAdapter, Qwen3StateDictAdapter and DeepSeekV3StateDictAdapter in
# torchtitan/models/*/state_dict_adapter.py; below `model.layers.N.` here, `layers.N.` there.
_NAMES = {
    "self_attn.o_proj.weight": "attention.wo.weight",
    "self_attn.q_norm.weight": "attention.q_norm.weight",
    "self_attn.k_norm.weight": "attention.k_norm.weight",
    "self_attn.q_a_proj.weight": "attention.wq_a.weight",
    "self_attn.q_a_layernorm.weight": "attention.q_norm.weight",
    "self_attn.q_b_proj.weight": "attention.wq_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attention.wkv_a.weight",
    "self_attn.kv_a_layernorm.weight": "attention.kv_norm.weight",
    "self_attn.kv_b_proj.weight": "attention.wkv_b.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.gate.weight": "moe.router.gate.weight",
    "mlp.gate.e_score_correction_bias": "moe.expert_bias_E",
    "mlp.shared_experts.gate_proj.weight": "moe.shared_experts.w1.weight",
    "mlp.shared_experts.up_proj.weight": "moe.shared_experts.w3.weight",
    "mlp.shared_experts.down_proj.weight": "moe.shared_experts.w2.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}
_TOP = {
    EMBEDDING: "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    LM_HEAD: LM_HEAD,
}
_EXPERTS = {"gate": "w1_EFD", "up": "w3_EFD", "down": "w2_EDF"}

# What torchtitan 0.2 calls them; where queries are compressed, `attention.wq` is right as it is.
_OLD_NAMES = (
    (re.compile(r"output\.weight"), LM_HEAD),
    (
        re.compile(r"(layers\.\d+\.moe)\.experts\.(w[13])"),
        r"\1.routed_experts.inner_experts.\2_EFD",
    ),
    (re.compile(r"(layers\.\d+\.moe)\.experts\.w2"), r"\1.routed_experts.inner_experts.w2_EDF"),
    (re.compile(r"(layers\.\d+\.moe\.expert_bias)"), r"\1_E"),
)
_OLD_QKV = re.compile(r"(layers\.\d+\.attention)\.(w[qkv]\.weight)")

_BIAS = re.compile(r"layers\.\d+\.moe\.expert_bias(_E)?")
_MTP = re.compile(r"mtp_layers\..+")


def torchtitan_parameters(config: ConfigLike, *, fused_qkv: bool = True) -> Mapping[str, Parameter]:
    """Describes the parameters of a torchtitan 0.3 model, whole.

    The experts of a layer are three parameters, `moe.routed_experts.inner_experts.w1_EFD` (gate),
    `w3_EFD` (up), both [E, I, H], and `w2_EDF` (down) [E, H, I]
    (`GroupedExperts` in torchtitan/models/common/moe.py).

    `attention.qkv_linear.wqkv` has, for every kv head, its query heads, then its key, then its
    value (`FusedQKVLinear` in torchtitan/models/common/attention.py).

    Llama rotates neighbouring elements where Hugging Face rotates the two halves of a head, so a
    head's query and key rows 0, 1, 2, ... are there rows 0, d/2, 1, d/2 + 1, ...
    (`Llama3StateDictAdapter._reverse_permute`). Qwen3 and DeepSeek-V3 rotate as Hugging Face does.

    Args:
        config: The model: Llama, Qwen3, Qwen3-MoE or DeepSeek-V3.
        fused_qkv: Whether queries, keys and values are one projection, torchtitan's default;
            latent attention has none of them.

    Returns:
        Parameters by name; each once, tied weights included. Layers of multi-token prediction are
        left out, as in `canonical_tensors`.

    Raises:
        ConfigError: torchtitan has no such model, or `config` describes none.
    """
    return _parameters(_checked(model_config(config)), fused_qkv)


def torchtitan_buffers(config: ConfigLike) -> Mapping[str, Parameter]:
    """Describes the persistent buffers of a torchtitan 0.3 model that its checkpoint has.

    Args:
        config: The model.

    Returns:
        Buffers by name: `moe.expert_bias_E` of a DeepSeek-V3.

    Raises:
        ConfigError: torchtitan has no such model, or `config` describes none.
    """
    return _buffers(_checked(model_config(config)))


def torchtitan_aliases(config: ConfigLike) -> dict[str, str]:
    """Names parameters that are another parameter's memory (`Decoder.enable_weight_tying`).

    Args:
        config: The model.

    Returns:
        The name that `torchtitan_parameters` uses, by alias.

    Raises:
        ConfigError: `config` describes no supported model.
    """
    return {LM_HEAD: _TOP[EMBEDDING]} if model_config(config).tie_word_embeddings else {}


def torchtitan_parameter(config: ConfigLike, name: str) -> Parameter | None:
    """Describes a parameter or buffer by the name it has in torchtitan 0.2 or 0.3.

    Args:
        config: The model.
        name: A live name, such as `layers.0.moe.experts.w1` (0.2).

    Returns:
        The parameter under its name in 0.3; None: torchtitan has no such model or name.

    Raises:
        ConfigError: `config` describes no supported model.
    """
    model = model_config(config)
    if model.model_type not in _MODELS or model.attention_bias or model.mlp_bias:
        return None
    for old, new in _OLD_NAMES:
        name = old.sub(new, name) if old.fullmatch(name) else name
    if model.latent is None:
        name = _OLD_QKV.sub(r"\1.qkv_linear.\2", name)
    name = torchtitan_aliases(model).get(name, name)
    is_separate = re.fullmatch(r".*\.qkv_linear\.w[qkv]\.weight", name) is not None
    found = _parameters(model, not is_separate).get(name)
    return _buffers(model).get(name) if found is None else found


def torchtitan_skips(config: ConfigLike, name: str) -> bool:
    """Tells tensors of torchtitan apart that the checkpoint has no place for.

    They are the layers of multi-token prediction, and the balancing bias of routers in models such
    as Qwen3-MoE, which `Qwen3StateDictAdapter.to_hf` drops as well.

    Args:
        config: The model.
        name: A live name.

    Returns:
        Whether it is such a tensor.

    Raises:
        ConfigError: `config` describes no supported model.
    """
    model = model_config(config)
    if model.model_type not in _MODELS:
        return False
    has_place = model.correction_bias
    return bool(_MTP.fullmatch(name)) or (not has_place and bool(_BIAS.fullmatch(name)))


def _checked(config: ModelConfig) -> ModelConfig:
    if config.model_type not in _MODELS:
        raise ConfigError(
            f"torchtitan: {config.model_type} is not known; known are {', '.join(_MODELS)}",
            key="model_type",
        )
    for key, value in (("attention_bias", config.attention_bias), ("mlp_bias", config.mlp_bias)):
        if value:
            raise ConfigError(
                f"torchtitan: {key} on {config.model_type}: torchtitan's projections have none",
                key=key,
            )
    return config


@lru_cache(maxsize=8)
def _buffers(config: ModelConfig) -> Mapping[str, Parameter]:
    dtypes = canonical_dtypes(config)
    return MappingProxyType(
        {
            own: whole(own, name, shape, dtypes.get(name))
            for name, shape in canonical_tensors(config).items()
            if name.endswith(CORRECTION_BIAS)
            for own in [_plain_name(name)]
        }
    )


@lru_cache(maxsize=8)
def _parameters(config: ModelConfig, fused_qkv: bool) -> Mapping[str, Parameter]:
    found = dict(_common(config))
    for layer in range(config.num_layers if config.latent is None else 0):
        own = f"layers.{layer}.attention.qkv_linear."
        if fused_qkv:
            share = config.num_heads // config.num_kv_heads
            blocks: list[Parameter] = []
            for group in range(config.num_kv_heads):
                blocks.append(_heads(config, layer, "q", group * share, share))
                blocks += (_heads(config, layer, kind, group, 1) for kind in "kv")
            found[own + "wqkv.weight"] = _below(own + "wqkv.weight", blocks)
            continue
        for kind in "qkv":
            count = config.num_heads if kind == "q" else config.num_kv_heads
            name = f"{own}w{kind}.weight"
            found[name] = _below(name, [_heads(config, layer, kind, 0, count)])
    return MappingProxyType(found)


def _heads(config: ModelConfig, layer: int, kind: str, first: int, count: int) -> Parameter:
    """Some heads of a projection, in torchtitan's order of rows."""
    name = f"model.layers.{layer}.self_attn.{kind}_proj.weight"
    shape, dim = canonical_tensors(config)[name], config.head_dim
    if kind == "v" or config.model_type != "llama":
        return stacked("", [rows(name, shape, first * dim, count * dim)])
    half = dim // 2
    parts = (
        # Row 2 j + i of a head is the checkpoint's row i * d/2 + j.
        Part(
            name,
            lo=((first + head) * dim + i * half, 0),
            n=(half, shape[1]),
            step=(1, 1),
            at=(head * dim + i, 0),
            axes=(0, 1),
            jump=(2, 1),
        )
        for head in range(count)
        for i in range(2)
    )
    return Parameter("", (count * dim, shape[1]), tuple(parts))


def _below(name: str, blocks: list[Parameter]) -> Parameter:
    """Blocks of rows below each other."""
    parts: list[Part] = []
    row = 0
    for block in blocks:
        parts += (part.moved((row + part.at[0], *part.at[1:])) for part in block.parts)
        row += block.shape[0]
    return Parameter(name, (row, *blocks[0].shape[1:]), tuple(parts))


@lru_cache(maxsize=8)
def _common(config: ModelConfig) -> Mapping[str, Parameter]:
    """All but the projections to queries, keys and values."""
    experts, width, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size
    found: dict[str, Parameter] = {}
    stacks: dict[str, list[Part]] = {}
    for name, shape in canonical_tensors(config).items():
        match = _LAYER.fullmatch(name)
        layer, rest = match.groups() if match else ("", "")
        expert = _EXPERT.fullmatch(rest)
        if expert is not None:
            own = f"layers.{layer}.moe.routed_experts.inner_experts.{_EXPERTS[expert[2]]}"
            at = (int(expert[1]), 0, 0)
            stacks.setdefault(own, []).append(rows(name, shape, 0, shape[0], at))
        elif not name.endswith(CORRECTION_BIAS) and not _QKV.fullmatch(rest):
            own = _plain_name(name)
            found[own] = whole(own, name, shape)
        elif config.latent is not None and _QKV.fullmatch(rest):
            own = f"layers.{layer}.attention.wq.weight"
            found[own] = whole(own, name, shape)
    for own, parts in stacks.items():
        is_down = own.endswith("w2_EDF")
        shape = (experts, hidden, width) if is_down else (experts, width, hidden)
        found[own] = Parameter(own, shape, tuple(parts))
    return MappingProxyType(found)


def _plain_name(name: str) -> str:
    match = _LAYER.fullmatch(name)
    return _TOP[name] if match is None else f"layers.{match[1]}.{_NAMES[match[2]]}"
