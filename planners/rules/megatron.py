"""Megatron-Core: tensor, pipeline, expert and expert tensor parallelism of its GPT model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from weightsync.ir.dtypes import Dtype
from weightsync.planners.rules.canonical import EMBEDDING, LM_HEAD
from weightsync.planners.rules.config import ConfigLike, model_config
from weightsync.planners.rules.layout import (
    Block,
    RuleLayout,
    checked_degree,
    layer_blocks,
    named_dtype,
)
from weightsync.planners.rules.megatron_parts.checks import check_model
from weightsync.planners.rules.megatron_parts.degrees import Chunk, Degrees, Place, Stages
from weightsync.planners.rules.megatron_parts.whole import (
    dense_parameters,
    expert_parameters,
    vocabulary,
)
from weightsync.planners.rules.parts import Parameter, whole

__all__ = ["MegatronLayout", "megatron"]


@dataclass(frozen=True, slots=True)
class MegatronLayout(RuleLayout):
    """A GPTModel of Megatron-Core; made by `megatron`.

    Args:
        degrees: How the model is cut.
        chunks: The layers of each chunk of each stage.
        vocab_rows: Rows of the embedding on every rank.
        experts: How experts are held.
        te: Whether modules are Transformer Engine's.
    """

    degrees: Degrees
    chunks: tuple[tuple[Chunk, ...], ...]
    vocab_rows: int
    experts: str
    te: bool

    def blocks(self, rank: int) -> Iterator[Block]:
        """Lists Megatron's parameters; see `RuleLayout.blocks`."""
        place = self.degrees.place(rank)
        for number, chunk in enumerate(self.chunks[place.pp_rank]):
            # The names that Megatron's checkpoints have for the chunks of a stage.
            prefix = f"model{number}." if self.degrees.vpp > 1 else ""
            yield Block(tuple(self._ends(prefix, chunk, place)))
            names = [f"{prefix}decoder.layers.{local}." for local in range(len(chunk.layers))]
            yield from layer_blocks(
                self.config,
                chunk.layers,
                names,
                lambda layer, name: self._layer(layer, name, place),
            )

    def _ends(self, prefix: str, chunk: Chunk, place: Place) -> Iterator[Parameter]:
        config = self.config
        if chunk.has_embedding:
            name = prefix + "embedding.word_embeddings.weight"
            yield vocabulary(config, name, EMBEDDING, self.vocab_rows, place.tp_rank)
        if chunk.has_norm:
            name = prefix + "decoder.final_layernorm.weight"
            yield whole(name, "model.norm.weight", (config.hidden_size,))
        # A tied head beside the embedding is the embedding; on another stage it is a copy.
        if chunk.has_head and not (config.tie_word_embeddings and chunk.has_embedding):
            tensor = EMBEDDING if config.tie_word_embeddings else LM_HEAD
            name = prefix + "output_layer.weight"
            yield vocabulary(config, name, tensor, self.vocab_rows, place.tp_rank)

    def _layer(self, layer: int, prefix: str, place: Place) -> Iterator[Parameter]:
        degrees, config = self.degrees, self.config
        for made in dense_parameters(config, layer, te=self.te):
            yield made.named(prefix + made.parameter.name).shard(degrees.tp, place.tp_rank)
        if not config.is_sparse(layer):
            return
        count = config.num_experts // degrees.ep
        held = range(place.ep_rank * count, (place.ep_rank + 1) * count)
        for made in expert_parameters(config, layer, self.experts, held):
            yield made.named(prefix + made.parameter.name).shard(degrees.etp, place.etp_rank)


def megatron(
    config: ConfigLike,
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    dp: int = 1,
    cp: int = 1,
    dtype: str | Dtype = "BF16",
    transformer_engine: bool = True,
    experts: str | None = None,
    vocab_divisible_by: int = 128,
    first_layers: int | None = None,
    last_layers: int | None = None,
    account_for_embedding: bool = False,
    account_for_loss: bool = False,
    pipeline_layout: str | None = None,
) -> MegatronLayout:
    """Lays a model out as the ranks of Megatron-Core 0.16 to 0.19 hold its GPTModel.

    There are `tp * cp * dp * pp` ranks in Megatron's default order `tp-cp-ep-dp-pp`. Experts are on
    the same ranks in the order `etp-ep-copies-pp`. Parameters of the distributed optimizer are
    whole on every data-parallel rank, as without it; where it gathers them during the next forward
    pass (`overlap_param_gather`), publish after that.

    * `linear_qkv` has for every kv head its query heads, then its key, then its value. More ranks
      than kv heads cut inside a head's group.
    * `linear_fc1` of a rank is its part of gate above its part of up.
    * Embedding and head are padded to a multiple of `vocab_divisible_by * tp` rows. The padding is
      in no piece, so it is never sent.
    * A tied head is a copy of the embedding where the last stage is not the first.
    * Buffers have Megatron's names, which count the layers of a chunk from 0; with `vpp` they begin
      with `model0.`, `model1.` and so on.

    Not described: `moe_mlp_glu_interleave_size`, `mla_down_proj_fusion`, layers of multi-token
    prediction, and the order of ranks with pipeline before data parallelism.

    Args:
        config: The model.
        tp: Tensor-parallel ranks.
        pp: Pipeline stages.
        vpp: Chunks of every stage (virtual pipeline); layers go around the stages once for each.
        ep: Ranks that share the experts of a layer whole.
        etp: Ranks that cut an expert; None: `tp`.
        dp: Data-parallel ranks.
        cp: Context-parallel ranks.
        dtype: Type of the parameters; `expert_bias` of routers is F32.
        transformer_engine: Whether modules are Transformer Engine's, which hold a norm together
            with the projection behind it, and the compressions of latent attention whole on every
            rank. Megatron-Core's own modules cut the compressions.
        experts: `grouped`: a parameter for every expert (`experts.linear_fc1.weight0`); `single`:
            one for all (`moe_single_grouped_weight`), their biases apart; `sequential`: a module
            for each (`experts.local_experts.0`). None: `grouped`, or `sequential` without
            `transformer_engine`.
        vocab_divisible_by: Megatron's `make_vocab_size_divisible_by`; 1: no more than `tp` needs.
        first_layers: `num_layers_in_first_pipeline_stage`.
        last_layers: `num_layers_in_last_pipeline_stage`.
        account_for_embedding: `account_for_embedding_in_pipeline_split`.
        account_for_loss: `account_for_loss_in_pipeline_split`.
        pipeline_layout: `pipeline_model_parallel_layout` as Megatron writes it, for instance
            `Et*3|(tt|)*28ttL`.

    Returns:
        The layout of `tp * cp * dp * pp` source ranks.

    Raises:
        ConfigError: Megatron-Core would refuse the model at these degrees, or has no place for some
            of its weights; the message says which.
    """
    model = model_config(config)
    named = {"tp": tp, "cp": cp, "dp": dp, "pp": pp, "vpp": vpp, "ep": ep}
    named["etp"] = tp if etp is None else etp
    for name, degree in named.items():
        checked_degree(name, degree)
    degrees = Degrees(**named)
    if experts is None:
        experts = "grouped" if transformer_engine else "sequential"
    check_model(model, degrees, experts, te=transformer_engine)
    stages = Stages(
        first_layers, last_layers, account_for_embedding, account_for_loss, pipeline_layout
    )
    multiple = checked_degree("vocab_divisible_by", vocab_divisible_by) * tp
    return MegatronLayout(
        "source",
        model,
        named_dtype(dtype),
        degrees.stage_size * pp,
        degrees,
        stages.chunks(model.num_layers, pp, vpp),
        -(-model.vocab_size // multiple) * multiple // tp,
        experts,
        transformer_engine,
    )
