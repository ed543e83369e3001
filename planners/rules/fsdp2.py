"""PyTorch's FSDP2: every parameter cut along one dimension, over tensor and expert parallelism."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from weightsync.errors import ConfigError
from weightsync.ir.dtypes import Dtype
from weightsync.planners.rules.config import ConfigLike, ModelConfig, model_config
from weightsync.planners.rules.layout import Block, RuleLayout, checked_degree, named_dtype
from weightsync.planners.rules.parts import Box, Parameter
from weightsync.planners.rules.transformers import transformers_blocks

__all__ = ["Fsdp2Layout", "fsdp2"]

# The tensor-parallel plans of transformers 5 (`base_model_tp_plan`, `_tp_plan`); DeepSeek-V3 has
# none for its attention, gpt-oss none at all.
_ROWS = re.compile(
    r"(lm_head|model\.embed_tokens)\.weight|.*\.self_attn\.[qkv]_proj\.(weight|bias)"
    r"|.*\.mlp\.(shared_experts\.)?(gate|up)_proj\.(weight|bias)"
)
_COLUMNS = re.compile(r".*\.(self_attn\.o|mlp\.(shared_experts\.|experts\.)?down)_proj(\.weight)?")
_HALVES = re.compile(r".*\.mlp\.experts\.gate_up_proj")
_EXPERTS = re.compile(r".*\.mlp\.experts\..+")


@dataclass(frozen=True, slots=True)
class Fsdp2Layout(RuleLayout):
    """A transformers model under `fully_shard`; made by `fsdp2`.

    Args:
        fsdp: Ranks that cut the experts of one expert-parallel rank.
        replicate: Copies of the parameters.
        tp: Tensor-parallel ranks.
        pp: Pipeline stages.
        ep: Ranks that share the experts of a layer whole.
        dense_replicate: Copies, among the ranks of one of these, of what has no experts.
    """

    fsdp: int
    replicate: int
    tp: int
    pp: int
    ep: int
    dense_replicate: int

    def blocks(self, rank: int) -> Iterator[Block]:
        """Cuts parameters into chunks; see `RuleLayout.blocks`."""
        stage, inside = divmod(rank, self.world_size // self.pp)
        # Meshes are row-major: neighbours share a copy.
        copy = self.world_size // (self.pp * self.replicate)
        shard, tp_rank = divmod(inside % copy // self.dense_replicate, self.tp)
        expert_shard, ep_rank = divmod(inside % copy, self.ep)

        def cut(whole: Parameter) -> Parameter:
            piece = _Piece(whole)
            if self.ep > 1 and _EXPERTS.fullmatch(whole.name):
                piece.chunk(0, self.ep, ep_rank)
                # torchtitan cuts inside experts once it has more ranks than experts.
                piece.chunk(int(copy > self.config.num_experts), self.fsdp, expert_shard)
                return piece.cut()
            if self.tp > 1:
                self._cut_tensor_parallel(whole, piece, tp_rank)
            piece.chunk(0, copy // self.dense_replicate // self.tp, shard)
            return piece.cut()

        return transformers_blocks(
            self.config,
            cut,
            _layers(self.config.num_layers, self.pp, stage),
            is_first=stage == 0,
            is_last=stage == self.pp - 1,
        )

    def _cut_tensor_parallel(self, whole: Parameter, piece: _Piece, tp_rank: int) -> None:
        if self.config.latent is not None and ".self_attn." in whole.name:
            return
        if _HALVES.fullmatch(whole.name):
            piece.chunk_halves(1, self.tp, tp_rank)
        elif _ROWS.fullmatch(whole.name):
            piece.chunk(0, self.tp, tp_rank)
        elif _COLUMNS.fullmatch(whole.name):
            piece.chunk(len(whole.shape) - 1, self.tp, tp_rank)


class _Piece:
    """Ranges of a parameter along each dimension, as one axis of a mesh after the other cuts it."""

    def __init__(self, whole: Parameter) -> None:
        self._whole = whole
        self._ranges = [[(0, size)] for size in whole.shape]

    def chunk(self, dim: int, num_chunks: int, index: int) -> None:
        """Takes a chunk of what is left of a dimension, as `torch.chunk` cuts: ceil(n / chunks)."""
        size = sum(count for _, count in self._ranges[dim])
        share = -(-size // num_chunks)
        first, left, found = index * share, share, []
        for start, count in self._ranges[dim]:
            skipped = min(first, count)
            taken = min(count - skipped, left)
            first, left = first - skipped, left - taken
            if taken:
                found.append((start + skipped, taken))
        self._ranges[dim] = found

    def chunk_halves(self, dim: int, num_chunks: int, index: int) -> None:
        """Takes a chunk of the first half of a dimension, and the same one of the second half."""
        [(start, size)] = self._ranges[dim]
        self._ranges[dim] = [(start, size // 2)]
        self.chunk(dim, num_chunks, index)
        self._ranges[dim] += [(start + size // 2, count) for start, count in self._ranges[dim]]

    def cut(self) -> Parameter:
        """Cuts the ranges out of the parameter and joins them."""
        shape = tuple(sum(count for _, count in ranges) for ranges in self._ranges)
        boxes = [Box((), (), ())]
        for ranges in self._ranges:
            longer = []
            for box in boxes:
                at = 0
                for start, count in ranges:
                    longer.append(Box((*box.lo, start), (*box.n, count), (*box.at, at)))
                    at += count
            boxes = longer
        return self._whole.collected(shape, boxes)


def _layers(num_layers: int, pp: int, stage: int) -> range:
    """Layers of a stage, where embedding and head count as a layer each.

    `_generate_llm_fqn_per_model_part` in torchtitan/distributed/pipeline_parallel.py.
    """
    if pp == 1:
        return range(num_layers)
    share, rest = divmod(num_layers + 2, pp)
    first, stop = (share * s + min(s, rest) - 1 for s in (stage, stage + 1))
    return range(max(first, 0), min(stop, num_layers))


def fsdp2(
    config: ConfigLike,
    *,
    fsdp: int,
    replicate: int = 1,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    dense_replicate: int = 1,
    dtype: str | Dtype = "F32",
) -> Fsdp2Layout:
    """Lays a transformers 5 model out as FSDP2 trainers hold it.

    `fsdp` counts the ranks that cut the experts of one expert-parallel rank, and there are
    `pp * replicate * fsdp * ep` ranks; tensor parallelism is carved out of them. Without `ep` there
    are `pp * replicate * fsdp * tp`. torchtitan and transformers carve expert parallelism out of
    the others instead, and count the ranks that cut what has no experts: `fsdp=16, ep=8` here is
    `data_parallel_shard_degree=128`, or `fsdp_size=128`, with an expert-parallel degree of 8 there.
    Ranks are numbered as they do.

    * Experts, with `ep`: mesh (pp, replicate, fsdp, ep). Each expert-parallel rank has
      `num_experts / ep` whole ones, which FSDP2 cuts along dimension 0, or along dimension 1 if
      `fsdp * ep` is more than the experts (`apply_fsdp_to_decoder` in
      torchtitan/distributed/fsdp.py; transformers has dimension 0 only).
    * All else: mesh (pp, replicate, fsdp * ep / tp, tp), without `ep` (pp, replicate, fsdp, tp).
      Tensor parallelism cuts first, as the plans of transformers say, then FSDP2 along dimension 0.
      With `dense_replicate` neighbours hold the same, mesh (pp, replicate, fsdp * ep / tp /
      dense_replicate, tp, dense_replicate): at `dense_replicate=ep` FSDP cuts everything over the
      same `fsdp` ranks, and the expert-parallel ranks beside each have copies (HSDP).
    * Pipeline stages are torchtitan's: embedding and head count as one layer each, and the first
      stages have more where it does not divide. The embedding is on the first stage, the last norm
      and the head are on the last one, which holds the embedding as well if it is the head.

    Args:
        config: The model.
        fsdp: Ranks that cut the experts of one expert-parallel rank; without `ep`, all parameters.
        replicate: Number of copies; more than one is HSDP.
        tp: Tensor-parallel ranks of what has no experts; without `ep`, of the experts as well.
        pp: Pipeline stages.
        ep: Ranks that share the experts of a layer whole.
        dense_replicate: Copies of what has no experts, among the `fsdp * ep` ranks.
        dtype: Type of the sharded parameters: `F32`, or `BF16` where the trainer keeps no masters.
            Buffers keep their own: `e_score_correction_bias` is F32 and whole on every rank.

    Returns:
        The layout of the source ranks.

    Raises:
        ConfigError: The model is not supported, or the trainer would refuse the degrees.
    """
    model = model_config(config)
    degrees = {"fsdp": fsdp, "replicate": replicate, "tp": tp, "pp": pp, "ep": ep}
    degrees["dense_replicate"] = dense_replicate
    for name, degree in degrees.items():
        checked_degree(name, degree)
    _check(model, fsdp=fsdp, tp=tp, pp=pp, ep=ep, dense_replicate=dense_replicate)
    world_size = pp * replicate * fsdp * (ep if ep > 1 else tp)
    return Fsdp2Layout("source", model, named_dtype(dtype), world_size, **degrees)


def _check(
    model: ModelConfig, *, fsdp: int, tp: int, pp: int, ep: int, dense_replicate: int
) -> None:
    if dense_replicate > 1 and (ep == 1 or ep % dense_replicate):
        raise ConfigError(
            f"fsdp2: dense_replicate={dense_replicate} does not divide ep={ep}; without expert "
            "parallelism copies are counted by replicate",
            key="dense_replicate",
        )
    dense = fsdp * ep // dense_replicate
    if ep > 1 and dense % tp:
        raise ConfigError(
            f"fsdp2: tp={tp} does not divide the {dense} ranks that share what has no experts "
            f"(fsdp={fsdp}, ep={ep}); tensor parallelism is carved out of them",
            key="tp",
        )
    if ep > 1 and (not model.num_experts or model.num_experts % ep):
        raise ConfigError(
            f"fsdp2: ep={ep} does not divide the {model.num_experts} experts", key="ep"
        )
    if pp > model.num_layers + 2:
        raise ConfigError(
            f"fsdp2: pp={pp} is more than the {model.num_layers} layers, embedding and head",
            key="pp",
        )
    if tp > 1 and model.model_type == "gpt_oss":
        raise ConfigError(
            "fsdp2: transformers has no tensor-parallel plan for gpt_oss; use fsdp or ep", key="tp"
        )
    heads = () if model.latent is not None else (model.num_heads, model.num_kv_heads)
    for count in heads:
        if count % tp:
            raise ConfigError(f"fsdp2: tp={tp} does not divide the {count} heads", key="tp")
