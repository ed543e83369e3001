"""vLLM 0.33: tensor-parallel fused projections; stacked experts, cut or placed whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from weightsync.errors import ConfigError
from weightsync.ir.dtypes import Dtype
from weightsync.planners.rules.canonical import EMBEDDING, LM_HEAD, canonical_tensors
from weightsync.planners.rules.config import ConfigLike, ModelConfig, model_config
from weightsync.planners.rules.layout import RuleLayout, checked_degree, named_dtype
from weightsync.planners.rules.parts import Parameter, Part, columns, rows, stacked, whole

__all__ = ["VllmLayout", "vllm"]

_MODELS = ("llama", "qwen3", "qwen3_moe")


@dataclass(frozen=True, slots=True)
class VllmLayout(RuleLayout):
    """One replica of a vLLM engine; made by `vllm`.

    Args:
        ep: Ranks that share the experts of a layer whole; 1: every expert is cut over all ranks.
        vocab_padding: Rows of the embeddings are padded to a multiple of this.
    """

    ep: int
    vocab_padding: int

    def parameters(self, rank: int) -> Iterator[Parameter]:
        """Lists vLLM's parameters; see `RuleLayout.parameters`."""
        config = self.config
        yield self._vocab(EMBEDDING, rank)
        for layer in range(config.num_layers):
            prefix = f"model.layers.{layer}."
            yield from self._attention(prefix + "self_attn.", rank)
            if config.is_sparse(layer):
                yield self._whole(prefix + "mlp.gate.weight")
                yield from self._experts(prefix + "mlp.experts.", rank)
            else:
                yield from self._mlp(prefix + "mlp.", rank)
            yield self._whole(prefix + "input_layernorm.weight")
            yield self._whole(prefix + "post_attention_layernorm.weight")
        yield self._whole("model.norm.weight")
        if not config.tie_word_embeddings:
            yield self._vocab(LM_HEAD, rank)

    def _whole(self, name: str) -> Parameter:
        return whole(name, name, canonical_tensors(self.config)[name])

    def _rows(self, name: str, start: int, count: int) -> Part:
        return rows(name, canonical_tensors(self.config)[name], start, count)

    def _vocab(self, name: str, rank: int) -> Parameter:
        """The embeddings: an even share of the padded rows; the last ranks hold the padding."""
        size, hidden = self.config.vocab_size, self.config.hidden_size
        share = _padded(size, self.vocab_padding) // self.world_size
        start = min(rank * share, size)
        held = min(start + share, size) - start
        return Parameter(
            name,
            (share, hidden),
            (self._rows(name, start, held),) if held else (),
            (((held, 0), (share - held, hidden)),) if held < share else (),
        )

    def _attention(self, prefix: str, rank: int) -> Iterator[Parameter]:
        config, tp = self.config, self.world_size
        num_q = config.num_heads // tp * config.head_dim
        num_kv = max(1, config.num_kv_heads // tp) * config.head_dim
        # With more ranks than kv heads, neighbours hold the same one.
        kv_rank = rank // max(1, tp // config.num_kv_heads)
        for kind in ("weight", "bias") if config.attention_bias else ("weight",):
            yield stacked(
                f"{prefix}qkv_proj.{kind}",
                [
                    self._rows(f"{prefix}q_proj.{kind}", rank * num_q, num_q),
                    self._rows(f"{prefix}k_proj.{kind}", kv_rank * num_kv, num_kv),
                    self._rows(f"{prefix}v_proj.{kind}", kv_rank * num_kv, num_kv),
                ],
            )
        yield self._row_parallel(prefix + "o_proj.weight", rank)
        if config.attention_bias:
            yield self._whole(prefix + "o_proj.bias")  # every rank has it, rank 0 adds it
        if config.qk_norm:
            yield self._whole(prefix + "q_norm.weight")
            yield self._whole(prefix + "k_norm.weight")

    def _row_parallel(self, name: str, rank: int) -> Parameter:
        """A matrix cut along its input: the same columns of every row."""
        shape = canonical_tensors(self.config)[name]
        share = shape[1] // self.world_size
        return stacked(name, [columns(name, shape, rank * share, share)])

    def _mlp(self, prefix: str, rank: int) -> Iterator[Parameter]:
        share = self.config.intermediate_size // self.world_size
        for kind in ("weight", "bias") if self.config.mlp_bias else ("weight",):
            yield stacked(
                f"{prefix}gate_up_proj.{kind}",
                [
                    self._rows(f"{prefix}gate_proj.{kind}", rank * share, share),
                    self._rows(f"{prefix}up_proj.{kind}", rank * share, share),
                ],
            )
        yield self._row_parallel(prefix + "down_proj.weight", rank)
        if self.config.mlp_bias:
            yield self._whole(prefix + "down_proj.bias")

    def _experts(self, prefix: str, rank: int) -> Iterator[Parameter]:
        """Experts stacked: `w13_weight` [E, 2I, H], gate above up, and `w2_weight` [E, H, I]."""
        config = self.config
        hidden = config.hidden_size
        if self.ep > 1:
            base, rest = divmod(config.num_experts, self.ep)
            first = rank * base + min(rank, rest)  # the first `rest` ranks hold one more
            held = range(first, first + base + (rank < rest))
            share, start = config.moe_intermediate_size, 0
        else:
            held = range(config.num_experts)
            share = config.moe_intermediate_size // self.world_size
            start = rank * share
        tall, wide = (config.moe_intermediate_size, hidden), (hidden, config.moe_intermediate_size)
        w13: list[Part] = []
        w2: list[Part] = []
        for slot, expert in enumerate(held):
            name = f"{prefix}{expert}."
            w13.append(rows(name + "gate_proj.weight", tall, start, share, (slot, 0, 0)))
            w13.append(rows(name + "up_proj.weight", tall, start, share, (slot, share, 0)))
            w2.append(columns(name + "down_proj.weight", wide, start, share, (slot, 0, 0)))
        routed = prefix + "routed_experts."
        yield Parameter(routed + "w13_weight", (len(held), 2 * share, hidden), tuple(w13))
        yield Parameter(routed + "w2_weight", (len(held), hidden, share), tuple(w2))


def vllm(
    config: ConfigLike,
    *,
    tp: int = 1,
    ep: bool | int = False,
    pp: int = 1,
    dtype: str | Dtype = "BF16",
    vocab_padding: int = 64,
) -> VllmLayout:
    """Lays a model out as the ranks of one vLLM replica hold it.

    Args:
        config: The model; without quantization.
        tp: Tensor-parallel ranks. More ranks than kv heads: neighbours hold the same kv head.
        ep: Whether experts are placed whole (`--enable-expert-parallel`). A number states the
            degree, which in vLLM is that of all ranks: `tp`, or 1 for none.
        pp: Pipeline stages; only 1 for now.
        dtype: Type of the parameters.
        vocab_padding: Rows of the embeddings are padded with zeros to a multiple of this.

    Returns:
        The layout of `tp` sink ranks.

    Raises:
        ConfigError: vLLM itself would refuse the model at these degrees, or it is not built yet;
            the message says which.
    """
    model = model_config(config)
    checked_degree("tp", tp)
    checked_degree("vocab_padding", vocab_padding)
    if checked_degree("pp", pp) != 1:
        raise ConfigError(f"vllm: pp={pp} is not built yet; only pp=1", key="pp")
    degree = _expert_degree(model, tp, ep)
    _check(model, tp, degree, vocab_padding)
    return VllmLayout("sink", model, named_dtype(dtype), tp, degree, vocab_padding)


def _expert_degree(model: ModelConfig, tp: int, ep: bool | int) -> int:
    degree = (tp if ep else 1) if isinstance(ep, bool) else checked_degree("ep", ep)
    if degree not in (1, tp):
        raise ConfigError(
            f"vllm: ep={degree} with tp={tp}: vLLM spreads experts over all ranks of a replica, "
            f"so ep is {tp} or 1",
            key="ep",
        )
    if degree > 1 and not model.sparse_layers:
        raise ConfigError(
            f"vllm: ep={degree}, but this {model.model_type} has no experts", key="ep"
        )
    return degree


def _check(model: ModelConfig, tp: int, ep: int, vocab_padding: int) -> None:
    """Refuses what vLLM refuses, or silently drops."""
    if model.model_type not in _MODELS:
        raise ConfigError(
            f"vllm: {model.model_type} is not built yet; built are {', '.join(_MODELS)}",
            key="model_type",
        )
    if model.quantization is not None:
        raise ConfigError(
            f"vllm: quantization {model.quantization!r} is not built yet; remove "
            "quantization_config to plan for BF16 weights",
            key="quantization_config",
        )
    if model.attention_bias and model.qk_norm:
        raise ConfigError(
            f"vllm: attention_bias on {model.model_type}: vLLM's o_proj has no bias there and "
            "would drop it",
            key="attention_bias",
        )
    kv_heads = model.num_kv_heads
    if kv_heads < tp and tp % kv_heads:
        raise ConfigError(
            f"vllm: tp={tp} is no multiple of the {kv_heads} kv heads, so they cannot be "
            "replicated evenly",
            key="tp",
        )
    divided = {"num_attention_heads": model.num_heads}
    if kv_heads >= tp:
        divided["num_key_value_heads"] = kv_heads
    if len(model.sparse_layers) < model.num_layers:
        divided["intermediate_size"] = model.intermediate_size
    if model.sparse_layers:
        if tp > model.num_experts:
            raise ConfigError(
                f"vllm: tp={tp} is more than the {model.num_experts} experts", key="tp"
            )
        if ep == 1:
            divided["moe_intermediate_size"] = model.moe_intermediate_size
    divided[f"the vocabulary padded to a multiple of {vocab_padding}"] = _padded(
        model.vocab_size, vocab_padding
    )
    for what, size in divided.items():
        if size % tp:
            raise ConfigError(f"vllm: tp={tp} does not divide {what}, {size}", key="tp")


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
