"""What a rank of an SGLang server holds, by plain slicing: nothing here comes from the rules.

Written from what SGLang's classes do with the names and shapes of a checkpoint; contents of
canonical tensors are those of `support.oracle`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support.oracle import tensor_codes
from weightsync.ir import Dtype

__all__ = ["held_by"]

Codes = NDArray[Any]


def held_by(config: Mapping[str, Any], flags: Mapping[str, Any], rank: int) -> dict[str, Codes]:
    """The bits of every parameter of one rank, by name.

    Args:
        config: Content of a `config.json`.
        flags: Arguments of `rules.sglang`.
        rank: The rank.
    """
    return _Rank(config, flags, rank).parameters()


def _share(codes: Codes, axis: int, parts: int, part: int) -> Codes:
    return np.split(codes, parts, axis)[part]


class _Rank:
    def __init__(self, config: Mapping[str, Any], flags: Mapping[str, Any], rank: int) -> None:
        self.config, self.flags = config, flags
        self.kind = config["model_type"]
        self.tp, self.pp = flags.get("tp", 1), flags.get("pp", 1)
        self.ep = flags.get("ep", 1)
        self.stage, self.rank = divmod(rank % (self.tp * self.pp), self.tp)
        groups = flags["dp"] if flags.get("enable_dp_attention") else 1
        self.attn_tp = self.tp // groups
        self.attn_rank = self.rank % self.attn_tp
        self.hidden = config["hidden_size"]

    def parameters(self) -> dict[str, Codes]:
        found: dict[str, Codes] = {}
        num_layers = self.config["num_hidden_layers"]
        # np.array_split gives the first ones more, SGLang the last ones.
        sizes = sorted(len(part) for part in np.array_split(np.arange(num_layers), self.pp))
        first = sum(sizes[: self.stage])
        if self.stage == 0:
            found["model.embed_tokens.weight"] = self._vocabulary("model.embed_tokens.weight", True)
        for layer in range(first, first + sizes[self.stage]):
            prefix = f"model.layers.{layer}."
            latent = "kv_lora_rank" in self.config
            found |= self._latent(prefix) if latent else self._attention(prefix)
            found |= self._mlps(prefix, layer)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found[f"{prefix}{norm}.weight"] = self._tensor(
                    f"{prefix}{norm}.weight", self.hidden
                )
        is_last = self.stage == self.pp - 1
        if is_last:
            found["model.norm.weight"] = self._tensor("model.norm.weight", self.hidden)
        tied, head = self.config["tie_word_embeddings"], "lm_head.weight"
        in_group = bool(self.flags.get("enable_dp_lm_head"))
        if not tied and (is_last or self.kind in ("llama", "qwen3_moe", "glm4_moe", "gpt_oss")):
            found[head] = self._vocabulary(head, in_group)
        elif tied and is_last and self.pp > 1:
            found[head] = self._vocabulary("model.embed_tokens.weight", in_group)
        return found

    def _tensor(self, name: str, *shape: int, dtype: Dtype = Dtype.BF16) -> Codes:
        return tensor_codes(name, shape, dtype)

    def _vocabulary(self, name: str, in_group: bool) -> Codes:
        parts, part = (self.attn_tp, self.attn_rank) if in_group else (self.tp, self.rank)
        rows = self.config["vocab_size"]
        step = 64 if -(-rows // 64) * 64 % parts == 0 else 64 * parts
        codes = self._tensor(name, rows, self.hidden)
        padded = np.zeros((-(-rows // step) * step, self.hidden), codes.dtype)
        padded[:rows] = codes
        return _share(padded, 0, parts, part)

    def _attention(self, prefix: str) -> dict[str, Codes]:
        config, name = self.config, prefix + "self_attn."
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        width = config.get("head_dim") or self.hidden // heads
        has_bias = config.get("attention_bias", self.kind == "gpt_oss")
        found = {}
        for kind, shape in (("weight", (self.hidden,)), ("bias", ())):
            if kind == "bias" and not has_bias:
                continue
            parts = [
                self._heads(self._tensor(f"{name}q_proj.{kind}", heads * width, *shape), heads)
            ]
            for which in ("k_proj", "v_proj"):
                codes = self._tensor(f"{name}{which}.{kind}", kv_heads * width, *shape)
                parts.append(self._heads(codes, kv_heads))
            found[f"{name}qkv_proj.{kind}"] = np.concatenate(parts)
        out = self._tensor(name + "o_proj.weight", self.hidden, heads * width)
        found[name + "o_proj.weight"] = _share(out, 1, self.attn_tp, self.attn_rank)
        if has_bias and self.kind != "glm4_moe":
            found[name + "o_proj.bias"] = self._tensor(name + "o_proj.bias", self.hidden)
        if self.kind.startswith("qwen3") or config.get("use_qk_norm"):
            for norm in ("q_norm", "k_norm"):
                found[f"{name}{norm}.weight"] = self._tensor(f"{name}{norm}.weight", width)
        if self.kind == "gpt_oss":
            found[name + "sinks"] = self._heads(self._tensor(name + "sinks", heads), heads)
        return found

    def _heads(self, codes: Codes, count: int) -> Codes:
        """The heads of this rank: an even share, or one that neighbours hold, too."""
        by_head = codes.reshape(count, -1, *codes.shape[1:])
        copies = max(1, self.attn_tp // count)
        mine = _share(by_head, 0, self.attn_tp // copies, self.attn_rank // copies)
        return mine.reshape(-1, *codes.shape[1:])

    def _latent(self, prefix: str) -> dict[str, Codes]:
        config, name = self.config, prefix + "self_attn."
        heads, q_rank, kv_rank = (
            config[key] for key in ("num_attention_heads", "q_lora_rank", "kv_lora_rank")
        )
        nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
        values, hidden = config["v_head_dim"], self.hidden
        keys = self._tensor(name + "kv_a_proj_with_mqa.weight", kv_rank + rope, hidden)
        norm = "kv_a_layernorm.weight"
        expand = self._tensor(name + "kv_b_proj.weight", heads * (nope + values), kv_rank)
        out = self._tensor(name + "o_proj.weight", hidden, heads * values)
        found = {
            name + norm: self._tensor(name + norm, kv_rank),
            name + "kv_b_proj.weight": self._heads(expand, heads),
            name + "o_proj.weight": _share(out, 1, self.attn_tp, self.attn_rank),
        }
        if q_rank is None:
            queries = self._tensor(name + "q_proj.weight", heads * (nope + rope), hidden)
            found[name + "kv_a_proj_with_mqa.weight"] = keys
            found[name + "q_proj.weight"] = self._heads(queries, heads)
            return found
        compress = self._tensor(name + "q_a_proj.weight", q_rank, hidden)
        queries = self._tensor(name + "q_b_proj.weight", heads * (nope + rope), q_rank)
        found[name + "fused_qkv_a_proj_with_mqa.weight"] = np.concatenate([compress, keys])
        found[name + "q_a_layernorm.weight"] = self._tensor(name + "q_a_layernorm.weight", q_rank)
        found[name + "q_b_proj.weight"] = self._heads(queries, heads)
        return found

    def _mlps(self, prefix: str, layer: int) -> dict[str, Codes]:
        config, name = self.config, prefix + "mlp."
        if self.kind == "gpt_oss":
            return self._gpt_oss(name)
        is_shared = "first_k_dense_replace" in config
        if self.kind != "qwen3_moe" and not (
            is_shared and layer >= config["first_k_dense_replace"]
        ):
            parts = 1 if self.flags.get("moe_dense_tp") else self.tp
            return self._gated(name, config["intermediate_size"], parts, self.rank % parts)
        experts = config["n_routed_experts" if is_shared else "num_experts"]
        router = Dtype.F32 if self.kind == "glm4_moe" else Dtype.BF16
        gate = self._tensor(name + "gate.weight", experts, self.hidden)
        if router is Dtype.F32:  # a cast from the trainer's BF16, which is exact
            gate = gate.astype(np.uint32) << 16
        found = {name + "gate.weight": gate}
        width = config["moe_intermediate_size"]
        groups = self.tp // self.ep  # ranks that share an expert
        slots = self.flags.get("expert_map")
        count = experts + self.flags.get("num_redundant_experts", 0)
        row = slots[layer] if slots else [slot % experts for slot in range(count)]
        mine = np.split(np.array(row), self.ep)[self.rank // groups]
        names = [f"{name}experts.{expert}." for expert in mine]
        if is_shared:
            bias = name + "gate.e_score_correction_bias"
            found[bias] = self._tensor(bias, experts, dtype=Dtype.F32)
            shared = name + "shared_experts."
            if self.flags.get("fuse_shared_experts"):
                names.append(shared)
            else:
                parts = 1 if self.flags.get("moe_a2a_backend", "none") != "none" else self.tp
                wide = width * config["n_shared_experts"]
                found |= self._gated(shared, wide, parts, self.rank % parts)
        cut = [self._gated(source, width, groups, self.rank % groups) for source in names]
        # Each is gate above up, and down.
        w13, w2 = (np.stack(stack) for stack in zip(*(part.values() for part in cut), strict=True))
        runner = self.flags.get("moe_runner_backend")
        if runner == "flashinfer_cutlass":
            w13 = np.concatenate(np.split(w13, 2, 1)[::-1], 1)
        if runner == "triton_kernel":
            w13, w2 = w13.swapaxes(1, 2), w2.swapaxes(1, 2)
        found[name + "experts.w13_weight"] = w13
        found[name + "experts.w2_weight"] = w2
        return found

    def _gated(self, name: str, width: int, parts: int, part: int) -> dict[str, Codes]:
        gate, up = (
            _share(self._tensor(f"{name}{which}.weight", width, self.hidden), 0, parts, part)
            for which in ("gate_proj", "up_proj")
        )
        down = self._tensor(name + "down_proj.weight", self.hidden, width)
        return {
            name + "gate_up_proj.weight": np.concatenate([gate, up]),
            name + "down_proj.weight": _share(down, 1, parts, part),
        }

    def _gpt_oss(self, name: str) -> dict[str, Codes]:
        config, hidden = self.config, self.hidden
        experts, width = config["num_local_experts"], config["intermediate_size"]
        source = name + "experts."
        gate_up = self._tensor(source + "gate_up_proj", experts, hidden, 2 * width)
        down = self._tensor(source + "down_proj", experts, width, hidden)
        # BF16 as F32: the same bits above zeros.
        biases = [
            self._tensor(f"{source}{which}_bias", experts, size).astype(np.uint32) << 16
            for which, size in (("gate_up_proj", 2 * width), ("down_proj", hidden))
        ]
        w13 = _share(gate_up, 2, self.tp, self.rank)
        w2 = _share(down, 1, self.tp, self.rank)
        if self.flags.get("moe_runner_backend") != "triton_kernel":
            w13, w2 = w13.swapaxes(1, 2), w2.swapaxes(1, 2)
        return {
            name + "router.weight": self._tensor(name + "router.weight", experts, hidden),
            name + "router.bias": self._tensor(name + "router.bias", experts),
            source + "w13_weight": w13,
            source + "w2_weight": w2,
            source + "w13_weight_bias": _share(biases[0], 1, self.tp, self.rank),
            source + "w2_weight_bias": biases[1] if self.rank == 0 else biases[1] * 0,
        }
