"""vLLM's sharding in plain torch, both ways: an oracle that shares no code with the rules.

It is written from vLLM's documented behaviour with `chunk`, `split`, `cat` and `stack`, and knows
nothing of manifests or plans, so that tests and the demo can check the whole product against it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weightsync.errors import ConfigError, IntegrityError

__all__ = ["shard", "unshard"]

_VOCAB_PADDING = 64


def shard(
    named: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    tp: int = 1,
    ep: bool = False,
    rank: int = 0,
) -> dict[str, Tensor]:
    """Builds the parameters of one vLLM rank from the tensors of a checkpoint.

    Args:
        named: Tensors by canonical name, one per expert; any dtype, which is kept.
        config: Content of the `config.json`.
        tp: Tensor-parallel ranks.
        ep: Whether experts are placed whole on the ranks.
        rank: Which rank to build.

    Returns:
        Contiguous copies by vLLM's parameter name.
    """
    made: dict[str, Tensor] = {}

    def rows(name: str) -> Tensor:
        return named[name].chunk(tp)[rank]

    for name in _embeddings(config):
        padding = -named[name].shape[0] % _VOCAB_PADDING
        padded = torch.nn.functional.pad(named[name], (0, 0, 0, padding))
        made[name] = padded.chunk(tp)[rank]
    for prefix in _layers(config):
        attention = prefix + "self_attn."
        kv_heads = config["num_key_value_heads"]
        first = rank * kv_heads // tp  # with fewer heads than ranks, neighbours have the same one
        for kind in ("weight", "bias"):
            if f"{attention}q_proj.{kind}" not in named:
                continue
            parts = [rows(f"{attention}q_proj.{kind}")]
            for projection in ("k_proj", "v_proj"):
                heads = named[f"{attention}{projection}.{kind}"].chunk(kv_heads)
                mine = heads[first : first + max(1, kv_heads // tp)]
                parts.append(torch.cat(mine))
            made[f"{attention}qkv_proj.{kind}"] = torch.cat(parts)
        made[attention + "o_proj.weight"] = named[attention + "o_proj.weight"].chunk(tp, 1)[rank]
        mlp = prefix + "mlp."
        if mlp + "gate.weight" in named:
            made |= _shard_experts(named, mlp, tp, ep, rank)
        else:
            for kind in ("weight", "bias"):
                if f"{mlp}gate_proj.{kind}" in named:
                    gate, up = rows(f"{mlp}gate_proj.{kind}"), rows(f"{mlp}up_proj.{kind}")
                    made[f"{mlp}gate_up_proj.{kind}"] = torch.cat([gate, up])
            made[mlp + "down_proj.weight"] = named[mlp + "down_proj.weight"].chunk(tp, 1)[rank]
    made |= {name: tensor for name, tensor in named.items() if _is_replicated(name)}
    return {name: tensor.contiguous().clone() for name, tensor in made.items()}


def unshard(
    ranks: Sequence[Mapping[str, Tensor]],
    config: Mapping[str, Any],
    *,
    tp: int = 1,
    ep: bool = False,
) -> dict[str, Tensor]:
    """Puts the parameters of all ranks of a vLLM replica together again.

    Args:
        ranks: Parameters by vLLM's name, for every rank in order.
        config: Content of the `config.json`.
        tp: Tensor-parallel ranks.
        ep: Whether experts are placed whole on the ranks.

    Returns:
        Tensors by canonical name, one per expert.

    Raises:
        ConfigError: `ranks` are not `tp` many.
        IntegrityError: What ranks must hold alike differs, or padding is not zero.
    """
    if len(ranks) != tp:
        raise ConfigError(f"unshard needs the parameters of {tp} ranks, not {len(ranks)}")
    found: dict[str, Tensor] = {}
    for name in _embeddings(config):
        padded = torch.cat([rank[name] for rank in ranks])
        found[name] = padded[: config["vocab_size"]]
        if padded[config["vocab_size"] :].count_nonzero():
            raise IntegrityError(f"padding rows of {name} are not zero", tensor=name)
    for prefix in _layers(config):
        found |= _unshard_attention(ranks, prefix + "self_attn.", config)
        mlp = prefix + "mlp."
        if mlp + "gate.weight" in ranks[0]:
            found |= _unshard_experts(ranks, mlp + "experts.", config, ep)
        else:
            for kind in ("weight", "bias"):
                if f"{mlp}gate_up_proj.{kind}" in ranks[0]:
                    pairs = [rank[f"{mlp}gate_up_proj.{kind}"].chunk(2) for rank in ranks]
                    found[f"{mlp}gate_proj.{kind}"] = torch.cat([gate for gate, _ in pairs])
                    found[f"{mlp}up_proj.{kind}"] = torch.cat([up for _, up in pairs])
            found[mlp + "down_proj.weight"] = _columns(ranks, mlp + "down_proj.weight")
    for name in filter(_is_replicated, ranks[0]):
        found[name] = _alike(name, [rank[name] for rank in ranks])
    return found


def _embeddings(config: Mapping[str, Any]) -> list[str]:
    tied = config.get("tie_word_embeddings", False)
    return ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])


def _layers(config: Mapping[str, Any]) -> list[str]:
    return [f"model.layers.{layer}." for layer in range(config["num_hidden_layers"])]


def _is_replicated(name: str) -> bool:
    ends = ("norm.weight", "mlp.gate.weight", "o_proj.bias", "mlp.down_proj.bias")
    return name.endswith(ends)


def _shard_experts(
    named: Mapping[str, Tensor], mlp: str, tp: int, ep: bool, rank: int
) -> dict[str, Tensor]:
    num_experts = named[mlp + "gate.weight"].shape[0]
    held: Sequence[int] = range(num_experts)
    cut: Callable[[Tensor, int], Tensor] = lambda tensor, dim: tensor.chunk(tp, dim)[rank]  # noqa: E731
    if ep:
        held = torch.arange(num_experts).tensor_split(tp)[rank].tolist()
        cut = lambda tensor, dim: tensor  # noqa: E731
    w13, w2 = [], []
    for expert in held:
        prefix = f"{mlp}experts.{expert}."
        gate, up = (
            cut(named[prefix + "gate_proj.weight"], 0),
            cut(named[prefix + "up_proj.weight"], 0),
        )
        w13.append(torch.cat([gate, up]))
        w2.append(cut(named[prefix + "down_proj.weight"], 1))
    routed = mlp + "experts.routed_experts."
    return {routed + "w13_weight": torch.stack(w13), routed + "w2_weight": torch.stack(w2)}


def _unshard_attention(
    ranks: Sequence[Mapping[str, Tensor]], attention: str, config: Mapping[str, Any]
) -> dict[str, Tensor]:
    tp, heads, kv_heads = len(ranks), config["num_attention_heads"], config["num_key_value_heads"]
    num_q, num_kv = heads // tp, max(1, kv_heads // tp)
    found: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        fused = f"{attention}qkv_proj.{kind}"
        if fused not in ranks[0]:
            continue
        head_dim = ranks[0][fused].shape[0] // (num_q + 2 * num_kv)
        sizes = [num_q * head_dim, num_kv * head_dim, num_kv * head_dim]
        split = [torch.split(rank[fused], sizes) for rank in ranks]
        found[f"{attention}q_proj.{kind}"] = torch.cat([q for q, _, _ in split])
        copies = max(1, tp // kv_heads)
        for which, projection in ((1, "k_proj"), (2, "v_proj")):
            name = f"{attention}{projection}.{kind}"
            shards = [parts[which] for parts in split]
            groups = [shards[first : first + copies] for first in range(0, tp, copies)]
            found[name] = torch.cat([_alike(name, group) for group in groups])
    found[attention + "o_proj.weight"] = _columns(ranks, attention + "o_proj.weight")
    return found


def _unshard_experts(
    ranks: Sequence[Mapping[str, Tensor]], prefix: str, config: Mapping[str, Any], ep: bool
) -> dict[str, Tensor]:
    w13 = [rank[prefix + "routed_experts.w13_weight"] for rank in ranks]
    w2 = [rank[prefix + "routed_experts.w2_weight"] for rank in ranks]
    if ep:
        halves = torch.cat(w13).chunk(2, 1)
        gate, up, down = halves[0], halves[1], torch.cat(w2)
    else:
        gate = torch.cat([part.chunk(2, 1)[0] for part in w13], 1)
        up = torch.cat([part.chunk(2, 1)[1] for part in w13], 1)
        down = torch.cat(w2, 2)
    found: dict[str, Tensor] = {}
    for expert in range(gate.shape[0]):
        found[f"{prefix}{expert}.gate_proj.weight"] = gate[expert]
        found[f"{prefix}{expert}.up_proj.weight"] = up[expert]
        found[f"{prefix}{expert}.down_proj.weight"] = down[expert]
    return found


def _columns(ranks: Sequence[Mapping[str, Tensor]], name: str) -> Tensor:
    return torch.cat([rank[name] for rank in ranks], 1)


def _alike(name: str, copies: Sequence[Tensor]) -> Tensor:
    """Returns the first of several copies, which must be equal bit by bit."""
    first = copies[0].contiguous().view(torch.uint8)
    for number, copy in enumerate(copies):
        if not torch.equal(first, copy.contiguous().view(torch.uint8)):
            raise IntegrityError(f"copy {number} of {name} differs from copy 0", tensor=name)
    return copies[0]
