"""SGLang 0.5.23: fused projections, attention in groups of ranks, experts placed and cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from weightsync.errors import ConfigError
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
from weightsync.planners.rules.sglang_parts.checks import (
    check_degrees,
    check_model,
    fuses_shared_experts,
)
from weightsync.planners.rules.sglang_parts.degrees import Cut, Degrees, Place
from weightsync.planners.rules.sglang_parts.experts import gpt_oss_mlp, sparse_mlp

__all__ = ["SglangLayout", "sglang"]

# Classes of SGLang that hold a head on the last pipeline stage only; the others on every one.
_HEAD_AT_END = ("qwen3", "deepseek_v3", "kimi_k2")


@dataclass(frozen=True, slots=True)
class SglangLayout(EngineLayout):
    """The ranks of one SGLang server; made by `sglang`.

    Args:
        degrees: How the server is cut.
        runner: Name of the kernels that run the experts.
        is_shared_fused: Whether the shared expert is in the last slot of the routed ones.
    """

    degrees: Degrees
    runner: str
    is_shared_fused: bool

    def blocks(self, rank: int) -> Iterator[Block]:
        """Lists SGLang's parameters; see `RuleLayout.blocks`."""
        config = self.config
        place = self.degrees.place(config, rank)
        checkpoint = self._checkpoint("SGLang")
        outer: list[Parameter] = []
        if place.is_first:
            outer.append(self._vocab(checkpoint, EMBEDDING, EMBEDDING, place.attention))
        if place.is_last:
            outer.append(checkpoint.whole("model.norm.weight"))
        is_tied = config.tie_word_embeddings
        # A tied head is the embedding itself, but a stage of its own needs a copy.
        if (place.is_last or config.model_type not in _HEAD_AT_END) and (
            not is_tied or not place.is_first
        ):
            tensor = EMBEDDING if is_tied else LM_HEAD
            outer.append(self._vocab(checkpoint, tensor, LM_HEAD, place.head))
        yield Block(tuple(outer))

        def layer(number: int, prefix: str) -> Iterator[Parameter]:
            return self._layer(checkpoint, place, number, prefix)

        # Experts that were moved lie elsewhere in each layer.
        yield from self._layers(place.layers, layer, are_alike=not self.degrees.expert_map)

    def _layer(
        self, checkpoint: Checkpoint, place: Place, layer: int, prefix: str
    ) -> Iterator[Parameter]:
        config = self.config
        if config.latent is None:
            yield from attention(checkpoint, prefix, *place.attention)
        else:
            compression = "fused_qkv_a_proj_with_mqa"
            yield from latent_attention(checkpoint, prefix, *place.attention, compression)
        if config.model_type == "gpt_oss":
            yield from gpt_oss_mlp(checkpoint, layer, place, self.runner)
        elif config.is_sparse(layer):
            fused = self.is_shared_fused
            yield from sparse_mlp(
                checkpoint, layer, self.degrees, place, self.runner, is_shared_fused=fused
            )
        else:
            width = config.intermediate_size
            yield from mlp(checkpoint, prefix + "mlp.", width, *place.dense)
        yield checkpoint.whole(prefix + "input_layernorm.weight")
        yield checkpoint.whole(prefix + "post_attention_layernorm.weight")

    def _vocab(self, checkpoint: Checkpoint, tensor: str, name: str, cut: Cut) -> Parameter:
        """Rows of vocabulary; their padding grows where the ranks do not divide it."""
        multiple = self.vocab_padding
        if -(-self.config.vocab_size // multiple) * multiple % cut.size:
            multiple *= cut.size
        return vocab_rows(checkpoint, tensor, name, multiple, *cut)


def sglang(
    config: ConfigLike,
    *,
    tp: int = 1,
    ep: int = 1,
    pp: int = 1,
    dp: int = 1,
    enable_dp_attention: bool = False,
    moe_dense_tp: int | None = None,
    enable_dp_lm_head: bool = False,
    dtype: str | Dtype = "BF16",
    vocab_padding: int = 64,
    quantized: bool | None = None,
    encoding: str | None = None,
    num_redundant_experts: int = 0,
    expert_map: Sequence[Sequence[int]] | None = None,
    fuse_shared_experts: bool | None = None,
    moe_a2a_backend: str = "none",
    moe_runner_backend: str = "triton",
) -> SglangLayout:
    """Lays a model out as the ranks of one SGLang server hold it before post-load steps.

    Ranks are numbered `(dp_rank * pp + pp_rank) * tp + tp_rank`. Arguments are SGLang's own.

    Args:
        config: The model.
        tp: Tensor-parallel ranks (`--tp-size`), which the other degrees but `pp` share out. More
            ranks of attention than kv heads: neighbours hold the same kv head.
        ep: Groups of these ranks that experts are placed on (`--ep-size`), contiguously; each
            expert is cut over the `tp / ep` ranks of its group.
        pp: Pipeline stages. Layers that they do not divide go to the last ones, one each.
        dp: `--dp-size`: replicas, each with `pp * tp` ranks of its own; with `enable_dp_attention`
            groups of the `tp` ranks that each hold all of attention and of the embedding, cut over
            `tp / dp` ranks (`--attn-dp-size`).
        enable_dp_attention: See `dp`.
        moe_dense_tp: 1: dense MLPs of models with experts are whole on every rank
            (`--moe-dense-tp-size`). None: they are cut over `tp` ranks.
        enable_dp_lm_head: Whether the head is cut over the ranks of one group of attention only.
        dtype: Type of the parameters that have none of their own.
        vocab_padding: Rows of the embeddings are padded with zeros to a multiple of this; where the
            ranks do not divide that, to a multiple of this times their number.
        quantized: Whether the engine holds the checkpoint that `quantization_config` describes
            (block FP8); sources must hold its tensors. False: BF16, whatever the config says.
            None: as the config says.
        encoding: Recipe (`fp8_block`) that the engine stores weights by and that sources of BF16
            weights are to encode them by; implies `quantized`.
        num_redundant_experts: Copies of experts for balance (`--ep-num-redundant-experts`).
        expert_map: Where SGLang's balancer (EPLB) has moved experts: its
            `physical_to_logical_map`, `[decoder layers, slots of all ranks]`. None: the placement
            that SGLang starts with.
        fuse_shared_experts: Whether the shared expert lies in a slot behind the routed ones
            (`--enforce-` and `--disable-shared-experts-fusion`). None: as SGLang decides on NVIDIA
            GPUs for kernels of Triton: DeepSeek-V3 with 256 experts and GLM, without expert
            parallelism.
        moe_a2a_backend: `--moe-a2a-backend`; all but `none` need `ep` equal to `tp` and keep shared
            experts whole on every rank.
        moe_runner_backend: Kernels of the experts (`--moe-runner-backend`), which decide how the
            loader writes them: `triton` and `deep_gemm` gate above up, `flashinfer_cutlass` up
            above gate, `triton_kernel` transposed. What SGLang chooses by itself depends on GPU
            and model.

    Returns:
        The layout of the server's sink ranks.

    Raises:
        ConfigError: SGLang itself would refuse the model at these degrees, or would drop some of
            its weights; the message says which.
    """
    model = model_config(config)
    checked_degree("vocab_padding", vocab_padding)
    if moe_dense_tp not in (None, 1):
        raise ConfigError(
            f"sglang: moe_dense_tp must be 1 or None, not {moe_dense_tp!r}: SGLang knows no other",
            key="moe_dense_tp",
        )
    checked_degree("dp", dp)
    degrees = Degrees(
        tp=checked_degree("tp", tp),
        pp=checked_degree("pp", pp),
        dp=1 if enable_dp_attention else dp,
        attention_dp=dp if enable_dp_attention else 1,
        ep=checked_degree("ep", ep),
        is_dense_whole=moe_dense_tp == 1,
        is_head_in_group=enable_dp_lm_head and dp > 1,
        num_redundant=num_redundant_experts,
        a2a=moe_a2a_backend,
        expert_map=tuple(tuple(int(expert) for expert in row) for row in expert_map or ()),
    )
    check_degrees(model, degrees)
    if encoding is not None:
        model, quantized = encoded_config(model, encoding), True
    is_quantized = model.quantization is not None if quantized is None else quantized
    check_model(model, degrees, moe_runner_backend, quantized=is_quantized)
    layout = SglangLayout(
        "sink",
        model,
        named_dtype(dtype),
        degrees.world_size,
        vocab_padding,
        is_quantized,
        encoding,
        degrees,
        moe_runner_backend,
        fuses_shared_experts(model, degrees, fuse_shared_experts),
    )
    layout.check_scales(range(0, pp * tp, tp))  # ranks of tp are alike
    return layout
