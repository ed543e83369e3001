"""Megatron-Core's sharding in plain torch: nothing here comes from the rules.

Written from its documented orders: ranks by `RankGenerator` (`tp-cp-ep-dp-pp`), `linear_qkv` as
megatron-bridge's `merge_qkv_weights` interleaves it, gate and up of `linear_fc1` cut apart and put
above each other, the experts of gpt-oss as its bridge de-interleaves and transposes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["MegatronCut"]

Named = Mapping[str, Tensor]


@dataclass(frozen=True)
class MegatronCut:
    """How ranks are cut.

    `stages` are the layers of every chunk, by stage and chunk. Padding is NaN.
    """

    stages: Sequence[Sequence[Sequence[int]]]
    tp: int = 1
    ep: int = 1
    etp: int = 1
    copies: int = 1
    te: bool = True
    experts: str = "grouped"
    vocab_multiple: int = 128

    @property
    def world_size(self) -> int:
        return len(self.stages) * self.tp * self.copies

    def tensors(self, named: Named, config: Mapping[str, Any], rank: int) -> dict[str, Tensor]:
        """Everything that a rank holds, by Megatron's names."""
        stages = len(self.stages)
        ranks = torch.arange(self.world_size)
        stage, _, tp_rank = (ranks.view(stages, self.copies, self.tp) == rank).nonzero()[0].tolist()
        expert_ranks = ranks.view(stages, -1, self.ep, self.etp)
        *_, ep_rank, etp_rank = (expert_ranks == rank).nonzero()[0].tolist()
        found: dict[str, Tensor] = {}
        chunks = self.stages[stage]
        for number, layers in enumerate(chunks):
            prefix = f"model{number}." if len(chunks) > 1 else ""
            is_first = stage == 0 and number == 0
            is_last = stage == stages - 1 and number == len(chunks) - 1
            found |= {
                prefix + name: tensor
                for name, tensor in self._ends(named, config, is_first, is_last, tp_rank)
            }
            for local, layer in enumerate(layers):
                start = f"model.layers.{layer}."
                inside = {n[len(start) :]: t for n, t in named.items() if n.startswith(start)}
                own = _Layer(self, inside, config, tp_rank, ep_rank, etp_rank)
                for name, tensor in own.tensors():
                    found[f"{prefix}decoder.layers.{local}.{name}"] = tensor
        return found

    def _ends(
        self, named: Named, config: Mapping[str, Any], is_first: bool, is_last: bool, tp_rank: int
    ) -> Iterator[tuple[str, Tensor]]:
        embedding = named["model.embed_tokens.weight"]
        head = named.get("lm_head.weight", embedding)

        def padded(tensor: Tensor) -> Tensor:
            multiple = self.vocab_multiple * self.tp
            rows = -tensor.shape[0] % multiple
            more = torch.full((rows, tensor.shape[1]), float("nan"), dtype=tensor.dtype)
            return torch.cat([tensor, more]).chunk(self.tp)[tp_rank]

        if is_first:
            yield "embedding.word_embeddings.weight", padded(embedding)
        if is_last:
            yield "decoder.final_layernorm.weight", named["model.norm.weight"]
            if head is not embedding or not is_first:
                yield "output_layer.weight", padded(head)


@dataclass(frozen=True)
class _Layer:
    cut: MegatronCut
    inside: Named
    config: Mapping[str, Any]
    tp_rank: int
    ep_rank: int
    etp_rank: int

    def rows(self, tensor: Tensor) -> Tensor:
        return tensor.chunk(self.cut.tp)[self.tp_rank]

    def columns(self, tensor: Tensor) -> Tensor:
        return tensor.chunk(self.cut.tp, -1)[self.tp_rank]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        inside, te = self.inside, self.cut.te
        latent = "self_attn.kv_b_proj.weight" in inside
        sparse = "mlp.gate.weight" in inside or "mlp.router.weight" in inside
        fused = te and not latent
        name = "self_attention.linear_qkv.layer_norm_weight" if fused else "input_layernorm.weight"
        yield name, inside["input_layernorm.weight"]
        fused = te and not sparse
        name = "mlp.linear_fc1.layer_norm_weight" if fused else "pre_mlp_layernorm.weight"
        yield name, inside["post_attention_layernorm.weight"]
        for name, tensor in self._latent() if latent else self._attention():
            yield "self_attention." + name, tensor
        if not sparse:
            yield from self._mlp("mlp.", "mlp.")
            return
        for theirs, own in (("gate", "router"), ("router", "router")):
            for kind in ("weight", "bias"):
                if f"mlp.{theirs}.{kind}" in inside:
                    yield f"mlp.{own}.{kind}", inside[f"mlp.{theirs}.{kind}"]
        if "mlp.gate.e_score_correction_bias" in inside:
            yield "mlp.router.expert_bias", inside["mlp.gate.e_score_correction_bias"]
        if "mlp.shared_experts.up_proj.weight" in inside:
            yield from self._mlp("mlp.shared_experts.", "mlp.shared_experts.")
        yield from self._experts()

    def _attention(self) -> Iterator[tuple[str, Tensor]]:
        groups = self.config["num_key_value_heads"]
        for kind in ("weight", "bias"):
            if f"self_attn.q_proj.{kind}" not in self.inside:
                continue
            parts = [self.inside[f"self_attn.{which}_proj.{kind}"] for which in "qkv"]
            width = parts[0].shape[1:]
            merged = torch.cat([p.view(groups, -1, *width) for p in parts], 1).view(-1, *width)
            yield f"linear_qkv.{kind}", self.rows(merged)
        yield "linear_proj.weight", self.columns(self.inside["self_attn.o_proj.weight"])
        if "self_attn.o_proj.bias" in self.inside:
            yield "linear_proj.bias", self.inside["self_attn.o_proj.bias"]
        for which in "qk":
            if f"self_attn.{which}_norm.weight" in self.inside:
                yield f"{which}_layernorm.weight", self.inside[f"self_attn.{which}_norm.weight"]
        if "self_attn.sinks" in self.inside:
            yield "core_attention.softmax_offset", self.rows(self.inside["self_attn.sinks"])

    def _latent(self) -> Iterator[tuple[str, Tensor]]:
        theirs = {n[10:]: t for n, t in self.inside.items() if n.startswith("self_attn.")}
        compressed = (lambda tensor: tensor) if self.cut.te else self.rows
        norm = "linear_{}_up_proj.layer_norm_weight" if self.cut.te else "{}_layernorm.weight"
        if "q_proj.weight" in theirs:
            yield "linear_q_proj.weight", self.rows(theirs["q_proj.weight"])
        else:
            yield "linear_q_down_proj.weight", compressed(theirs["q_a_proj.weight"])
            yield norm.format("q"), theirs["q_a_layernorm.weight"]
            yield "linear_q_up_proj.weight", self.rows(theirs["q_b_proj.weight"])
        yield "linear_kv_down_proj.weight", compressed(theirs["kv_a_proj_with_mqa.weight"])
        yield norm.format("kv"), theirs["kv_a_layernorm.weight"]
        yield "linear_kv_up_proj.weight", self.rows(theirs["kv_b_proj.weight"])
        yield "linear_proj.weight", self.columns(theirs["o_proj.weight"])

    def _mlp(self, own: str, theirs: str) -> Iterator[tuple[str, Tensor]]:
        for kind in ("weight", "bias"):
            if f"{theirs}up_proj.{kind}" in self.inside:
                gate, up = (self.inside[f"{theirs}{half}_proj.{kind}"] for half in ("gate", "up"))
                yield f"{own}linear_fc1.{kind}", torch.cat([self.rows(gate), self.rows(up)])
        yield f"{own}linear_fc2.weight", self.columns(self.inside[f"{theirs}down_proj.weight"])
        if f"{theirs}down_proj.bias" in self.inside:
            yield f"{own}linear_fc2.bias", self.inside[f"{theirs}down_proj.bias"]

    def _experts(self) -> Iterator[tuple[str, Tensor]]:
        held = list(_experts_of(self.inside))
        share = len(held) // self.cut.ep
        mine = held[self.ep_rank * share :][:share]
        etp, rank = self.cut.etp, self.etp_rank
        made: dict[str, list[Tensor]] = {}
        for expert in mine:
            for kind in ("weight", "bias"):
                if f"gate.{kind}" not in expert:
                    continue
                halves = [expert[f"{half}.{kind}"].chunk(etp)[rank] for half in ("gate", "up")]
                made.setdefault(f"linear_fc1.{kind}", []).append(torch.cat(halves))
                down = expert[f"down.{kind}"]
                if kind == "weight":
                    down = down.chunk(etp, 1)[rank]
                made.setdefault(f"linear_fc2.{kind}", []).append(down)
        for name, tensors in made.items():
            if self.cut.experts == "single" and name.endswith("weight"):
                yield f"mlp.experts.{name}", torch.stack(tensors)
                continue
            for number, tensor in enumerate(tensors):
                if self.cut.experts == "sequential":
                    yield f"mlp.experts.local_experts.{number}.{name}", tensor
                else:
                    yield f"mlp.experts.{name}{number}", tensor


def _experts_of(inside: Named) -> Iterator[dict[str, Tensor]]:
    """The experts of a layer: gate, up and down of each, as linears hold them."""
    fused = inside.get("mlp.experts.gate_up_proj")
    if fused is not None:
        for expert, gate_up in enumerate(fused):
            bias = inside["mlp.experts.gate_up_proj_bias"][expert]
            yield {
                "gate.weight": gate_up.T[::2],
                "up.weight": gate_up.T[1::2],
                "down.weight": inside["mlp.experts.down_proj"][expert].T,
                "gate.bias": bias[::2],
                "up.bias": bias[1::2],
                "down.bias": inside["mlp.experts.down_proj_bias"][expert],
            }
        return
    expert = 0
    while f"mlp.experts.{expert}.up_proj.weight" in inside:
        yield {
            f"{which}.weight": inside[f"mlp.experts.{expert}.{which}_proj.weight"]
            for which in ("gate", "up", "down")
        }
        expert += 1
