"""vLLM 0.32 and 0.33: tensor-parallel fused projections; stacked experts, cut or placed whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from weightsync.ir.dtypes import Dtype
from weightsync.planners.rules.canonical import EMBEDDING, LM_HEAD
from weightsync.planners.rules.config import ConfigLike, model_config
from weightsync.planners.rules.engine_parts.attention import attention, latent_attention
from weightsync.planners.rules.engine_parts.experts import mlp
from weightsync.planners.rules.engine_parts.layout import EngineLayout
from weightsync.planners.rules.engine_parts.linears import Checkpoint
from weightsync.planners.rules.engine_parts.vocab import vocab_rows
from weightsync.planners.rules.layout import Block, checked_degree, named_dtype
from weightsync.planners.rules.parts import Parameter
from weightsync.planners.rules.quantized import encoded_config
from weightsync.planners.rules.vllm_parts.checks import check_model, checked_degrees
from weightsync.planners.rules.vllm_parts.degrees import Degrees, Place
from weightsync.planners.rules.vllm_parts.experts import sparse_mlp
from weightsync.planners.rules.vllm_parts.gpt_oss import gpt_oss_mlp

__all__ = ["VllmLayout", "vllm"]

# Classes of vLLM whose embedding, last norm and head are on every pipeline stage.
_NOT_STAGED = ("qwen3_moe", "gpt_oss")


@dataclass(frozen=True, slots=True)
class VllmLayout(EngineLayout):
    """One replica of a vLLM engine; made by `vllm`.

    Args:
        degrees: How the replica is cut.
        mxfp4_padding: Multiples that a rank's width of experts and the hidden size are padded to.
    """

    degrees: Degrees
    mxfp4_padding: tuple[int, int]

    @property
    def ep(self) -> int:
        """Ranks that share the experts of a layer whole; 1: every expert is cut over all ranks."""
        return self.degrees.moe_ranks if self.degrees.is_ep else 1

    def blocks(self, rank: int) -> Iterator[Block]:
        """Lists vLLM's parameters; see `RuleLayout.blocks`."""
        config, degrees = self.config, self.degrees
        place = degrees.place(config, rank)
        checkpoint = self._checkpoint("vLLM")
        cut = (self.vocab_padding, degrees.tp, place.tp_rank)
        holds_all = config.model_type in _NOT_STAGED
        outer: list[Parameter] = []
        # A tied head is the embedding itself, so the last stage holds that, too.
        if place.is_first or (place.is_last and config.tie_word_embeddings) or holds_all:
            is_gpt_oss = config.model_type == "gpt_oss"
            name = "model.embedding.weight" if is_gpt_oss else EMBEDDING
            outer.append(vocab_rows(checkpoint, EMBEDDING, name, *cut))
        if place.is_last or holds_all:
            outer.append(checkpoint.whole("model.norm.weight"))
            if not config.tie_word_embeddings:
                outer.append(vocab_rows(checkpoint, LM_HEAD, LM_HEAD, *cut))
        yield Block(tuple(outer))

        def layer(number: int, prefix: str) -> Iterator[Parameter]:
            return self._layer(checkpoint, place, number, prefix)

        # Experts that were moved lie elsewhere in each layer.
        yield from self._layers(place.layers, layer, are_alike=not place.moved)

    def _layer(
        self, checkpoint: Checkpoint, place: Place, layer: int, prefix: str
    ) -> Iterator[Parameter]:
        config, degrees = self.config, self.degrees
        tp, tp_rank = degrees.tp, place.tp_rank
        is_gpt_oss = config.model_type == "gpt_oss"
        if config.latent is None:
            module = "attn." if is_gpt_oss else "self_attn."
            yield from attention(checkpoint, prefix, tp, tp_rank, module)
        else:
            yield from latent_attention(checkpoint, prefix, tp, tp_rank, "fused_qkv_a_proj")
        if is_gpt_oss:
            yield from gpt_oss_mlp(checkpoint, prefix, degrees, place, self.mxfp4_padding)
        elif config.is_sparse(layer):
            yield from sparse_mlp(checkpoint, layer, degrees, place)
        else:
            yield from mlp(checkpoint, prefix + "mlp.", config.intermediate_size, tp, tp_rank)
        yield checkpoint.whole(prefix + "input_layernorm.weight")
        yield checkpoint.whole(prefix + "post_attention_layernorm.weight")


def vllm(
    config: ConfigLike,
    *,
    tp: int = 1,
    ep: bool | int = False,
    pp: int = 1,
    dp: int = 1,
    dtype: str | Dtype = "BF16",
    vocab_padding: int = 64,
    quantized: bool | None = None,
    encoding: str | None = None,
    expert_placement: str = "linear",
    num_redundant_experts: int = 0,
    expert_map: Sequence[Sequence[int]] | None = None,
    all2all_backend: str = "allgather_reducescatter",
    mxfp4_padding: tuple[int, int] = (128, 256),
) -> VllmLayout:
    """Lays a model out as the ranks of one vLLM replica hold it before post-load processing.

    Ranks are numbered `(dp_rank * pp + pp_rank) * tp + tp_rank`.

    Args:
        config: The model.
        tp: Tensor-parallel ranks. More ranks than kv heads: neighbours hold the same kv head.
        ep: Whether experts are placed whole (`--enable-expert-parallel`). A number states the
            degree, which in vLLM is that of all ranks of a stage: `dp * tp`, or 1 for none.
        pp: Pipeline stages. Layers that they do not divide go to the stages from the last but one
            down, one each.
        dp: Data-parallel ranks. Attention is the same on each; experts are cut over, or placed on,
            `dp * tp` ranks.
        dtype: Type of the parameters that have none of their own.
        vocab_padding: Rows of the embeddings are padded with zeros to a multiple of this.
        quantized: Whether the engine holds the checkpoint that `quantization_config` describes
            (block FP8, or MXFP4 of gpt-oss); sources must hold its tensors. False: BF16, whatever
            the config says. None: as the config says.
        encoding: Recipe (`fp8_block`, or `mxfp4` of gpt-oss) that the engine stores weights by and
            that sources of BF16 weights are to encode them by; implies `quantized`.
        expert_placement: `linear` or `round_robin` (`--expert-placement-strategy`). As in vLLM the
            latter falls back to the former without groups of experts, with redundant experts, and
            with dp over backends that cannot route so.
        num_redundant_experts: Copies of experts for balance; needs `ep`.
        expert_map: Where vLLM's balancer (EPLB) has moved experts: its `physical_to_logical_map`,
            `[sparse layers, slots of all ranks]`. None: the placement that vLLM starts with.
        all2all_backend: `--all2all-backend`; some make shared experts whole on every rank when
            `ep`, `dp` and `tp` are used together.
        mxfp4_padding: Multiples that vLLM pads a rank's width of an expert and the hidden size to
            in MXFP4; the default is that of its Marlin and TRT-LLM kernels.

    Returns:
        The layout of `dp * pp * tp` sink ranks.

    Raises:
        ConfigError: vLLM itself would refuse the model at these degrees, or would drop some of its
            weights; the message says which.
    """
    model = model_config(config)
    checked_degree("vocab_padding", vocab_padding)
    degrees = checked_degrees(
        model,
        Degrees(
            checked_degree("tp", tp),
            checked_degree("pp", pp),
            checked_degree("dp", dp),
            False,
            expert_placement,
            num_redundant_experts,
            all2all_backend,
            tuple(tuple(int(expert) for expert in row) for row in expert_map or ()),
        ),
        ep,
    )
    if encoding is not None:
        model, quantized = encoded_config(model, encoding), True
    is_quantized = model.quantization is not None if quantized is None else quantized
    check_model(model, degrees, vocab_padding, mxfp4_padding, quantized=is_quantized)
    layout = VllmLayout(
        "sink",
        model,
        named_dtype(dtype),
        degrees.world_size,
        vocab_padding,
        is_quantized,
        encoding,
        degrees,
        mxfp4_padding,
    )
    layout.check_scales(range(0, pp * tp, tp))  # ranks of tp are alike
    return layout
