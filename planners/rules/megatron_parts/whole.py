"""Parameters of Megatron-Core before they are cut, by their own names, and how they are cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from weightsync.ir.dtypes import Dtype
from weightsync.planners.rules.canonical import canonical_tensors
from weightsync.planners.rules.config import ModelConfig
from weightsync.planners.rules.parts import Box, Parameter, Part, rows, stacked, whole

__all__ = ["EXPERT_FORMS", "Whole", "dense_parameters", "expert_parameters", "vocabulary"]

# How modules hold their experts: `SequentialMLP`; `TEGroupedMLP`, a parameter for each expert; the
# same with `moe_single_grouped_weight`.
EXPERT_FORMS = ("sequential", "grouped", "single")


@dataclass(frozen=True, slots=True)
class Whole:
    """A parameter before it is cut.

    Args:
        parameter: The parameter; experts have one dimension more than in Megatron, of their number.
        dim: The dimension that tensor parallelism cuts; None: every rank has all of it.
        is_halved: Whether gate and up, its halves along `dim`, are cut apart.
        is_expert: Whether expert tensor parallelism cuts it.
    """

    parameter: Parameter
    dim: int | None = None
    is_halved: bool = False
    is_expert: bool = False

    def shard(self, size: int, rank: int) -> Parameter:
        """Cuts out what a rank holds.

        Args:
            size: Ranks that share the parameter.
            rank: This one.

        Returns:
            The shard.
        """
        dim, whole = self.dim, self.parameter
        if dim is None or size == 1:
            return whole
        num_parts = 2 if self.is_halved else 1
        share = whole.shape[dim] // (size * num_parts)
        boxes = []
        for part in range(num_parts):
            lo, at = [0] * len(whole.shape), [0] * len(whole.shape)
            lo[dim], at[dim] = (part * size + rank) * share, part * share
            n = (*whole.shape[:dim], share, *whole.shape[dim + 1 :])
            boxes.append(Box(tuple(lo), n, tuple(at)))
        shape = (*whole.shape[:dim], num_parts * share, *whole.shape[dim + 1 :])
        return whole.collected(shape, boxes)

    def named(self, name: str) -> Whole:
        """The same parameter by another name."""
        return replace(self, parameter=replace(self.parameter, name=name))


def vocabulary(config: ModelConfig, name: str, tensor: str, share: int, tp_rank: int) -> Parameter:
    """Embedding or head of a rank: a share of the padded rows, the padding in the last ranks.

    Args:
        config: The model.
        name: Name of the parameter.
        tensor: Canonical name.
        share: Rows of every rank.
        tp_rank: This rank.

    Returns:
        The parameter; padding is part of no tensor.
    """
    size, hidden = config.vocab_size, config.hidden_size
    start = min(tp_rank * share, size)
    held = min(start + share, size) - start
    parts = (rows(tensor, (size, hidden), start, held),) if held else ()
    return Parameter(name, (share, hidden), parts)


def dense_parameters(config: ModelConfig, layer: int, *, te: bool) -> Iterator[Whole]:
    """Describes all of a layer but its routed experts.

    Args:
        config: The model.
        layer: Its number.
        te: Whether modules are Transformer Engine's: norms are part of the projection behind them,
            and latent attention has its compressions whole on every rank. Else they are
            Megatron-Core's own, and cut the compressions.

    Yields:
        Parameters, named below `decoder.layers.N.`.
    """
    model = _Layer(config, layer)
    attend = _attention if config.latent is None else _latent_attention
    yield from attend(model, te)
    norm = "post_attention_layernorm.weight"
    if not config.is_sparse(layer):
        yield model.whole(
            "mlp.linear_fc1.layer_norm_weight" if te else "pre_mlp_layernorm.weight", norm
        )
        yield from _mlp(model, "mlp.", "mlp.", bias=config.mlp_bias)
        return
    yield model.whole("pre_mlp_layernorm.weight", norm)
    gate = "mlp.router" if config.model_type == "gpt_oss" else "mlp.gate"
    yield model.whole("mlp.router.weight", gate + ".weight")
    if config.model_type == "gpt_oss":
        yield model.whole("mlp.router.bias", gate + ".bias")
    if config.correction_bias:
        bias = model.whole("mlp.router.expert_bias", gate + ".e_score_correction_bias")
        yield replace(bias, parameter=replace(bias.parameter, dtype=Dtype.F32))
    if config.num_shared_experts:
        yield from _mlp(model, "mlp.shared_experts.", "mlp.shared_experts.", bias=False)


def expert_parameters(
    config: ModelConfig, layer: int, form: str, experts: Sequence[int]
) -> Iterator[Whole]:
    """Describes routed experts of a layer.

    Args:
        config: The model.
        layer: Its number.
        form: One of `EXPERT_FORMS`.
        experts: The experts of a rank, in order.

    Yields:
        Parameters, named below `decoder.layers.N.`.
    """
    describe = _fused_experts if config.model_type == "gpt_oss" else _experts
    for kind in ("weight", "bias"):
        single = form == "single" and kind == "weight"
        for first, held in enumerate([experts] if single else [[expert] for expert in experts]):
            for linear, made in describe(_Layer(config, layer), kind, held):
                name = f"{linear}.{kind}" + ("" if single else str(first))
                if form == "sequential":
                    name = f"local_experts.{first}.{linear}.{kind}"
                yield made.named("mlp.experts." + name)


@dataclass(frozen=True, slots=True)
class _Layer:
    """Canonical tensors of a layer."""

    config: ModelConfig
    layer: int

    def name(self, tensor: str) -> str:
        return f"model.layers.{self.layer}.{tensor}"

    def shape(self, tensor: str) -> tuple[int, ...]:
        return canonical_tensors(self.config)[self.name(tensor)]

    def rows(self, tensor: str, start: int = 0, count: int | None = None) -> Part:
        shape = self.shape(tensor)
        return rows(self.name(tensor), shape, start, shape[0] if count is None else count)

    def whole(self, name: str, tensor: str, dim: int | None = None) -> Whole:
        return Whole(whole(name, self.name(tensor), self.shape(tensor)), dim)


def _attention(model: _Layer, te: bool) -> Iterator[Whole]:
    """Queries, keys and values in one projection: of every kv head its queries, key, value."""
    config, own, norm = model.config, "self_attention.", "input_layernorm.weight"
    yield model.whole(own + "linear_qkv.layer_norm_weight" if te else norm, norm)
    dim, share = config.head_dim, config.num_heads // config.num_kv_heads
    for kind in ("weight", "bias") if config.attention_bias else ("weight",):
        parts = []
        for group in range(config.num_kv_heads):
            parts.append(model.rows(f"self_attn.q_proj.{kind}", group * share * dim, share * dim))
            parts.append(model.rows(f"self_attn.k_proj.{kind}", group * dim, dim))
            parts.append(model.rows(f"self_attn.v_proj.{kind}", group * dim, dim))
        yield Whole(stacked(f"{own}linear_qkv.{kind}", parts), dim=0)
    if config.qk_norm:
        yield model.whole(own + "q_layernorm.weight", "self_attn.q_norm.weight")
        yield model.whole(own + "k_layernorm.weight", "self_attn.k_norm.weight")
    if config.model_type == "gpt_oss":
        yield model.whole(own + "core_attention.softmax_offset", "self_attn.sinks", 0)
    yield model.whole(own + "linear_proj.weight", "self_attn.o_proj.weight", 1)
    if config.output_bias:
        yield model.whole(own + "linear_proj.bias", "self_attn.o_proj.bias")


def _latent_attention(model: _Layer, te: bool) -> Iterator[Whole]:
    config, own, hf = model.config, "self_attention.", "self_attn."
    assert config.latent is not None
    yield model.whole("input_layernorm.weight", "input_layernorm.weight")
    compressed = None if te else 0
    if config.latent.q_rank is None:
        yield model.whole(own + "linear_q_proj.weight", hf + "q_proj.weight", 0)
    else:
        norm = "linear_q_up_proj.layer_norm_weight" if te else "q_layernorm.weight"
        yield model.whole(own + "linear_q_down_proj.weight", hf + "q_a_proj.weight", compressed)
        yield model.whole(own + norm, hf + "q_a_layernorm.weight")
        yield model.whole(own + "linear_q_up_proj.weight", hf + "q_b_proj.weight", 0)
    norm = "linear_kv_up_proj.layer_norm_weight" if te else "kv_layernorm.weight"
    yield model.whole(
        own + "linear_kv_down_proj.weight", hf + "kv_a_proj_with_mqa.weight", compressed
    )
    yield model.whole(own + norm, hf + "kv_a_layernorm.weight")
    yield model.whole(own + "linear_kv_up_proj.weight", hf + "kv_b_proj.weight", 0)
    yield model.whole(own + "linear_proj.weight", hf + "o_proj.weight", 1)


def _mlp(model: _Layer, name: str, hf: str, *, bias: bool) -> Iterator[Whole]:
    for kind in ("weight", "bias") if bias else ("weight",):
        halves = [model.rows(f"{hf}{half}_proj.{kind}") for half in ("gate", "up")]
        yield Whole(stacked(f"{name}linear_fc1.{kind}", halves), dim=0, is_halved=True)
    yield model.whole(name + "linear_fc2.weight", hf + "down_proj.weight", 1)
    if bias:
        yield model.whole(name + "linear_fc2.bias", hf + "down_proj.bias")


def _experts(model: _Layer, kind: str, experts: Sequence[int]) -> Iterator[tuple[str, Whole]]:
    """Stacks [E, 2I, H], gate above up, and [E, H, I]."""
    if kind == "bias":
        return
    config, count = model.config, len(experts)
    hidden, width = config.hidden_size, config.moe_intermediate_size
    fc1, fc2 = [], []
    for slot, expert in enumerate(experts):
        name = model.name(f"mlp.experts.{expert}.")
        for half, which in enumerate(("gate", "up")):
            at = (slot, half * width, 0)
            fc1.append(rows(f"{name}{which}_proj.weight", (width, hidden), 0, width, at))
        fc2.append(rows(f"{name}down_proj.weight", (hidden, width), 0, hidden, (slot, 0, 0)))
    gate_up = Parameter("", (count, 2 * width, hidden), tuple(fc1))
    yield "linear_fc1", Whole(gate_up, dim=1, is_halved=True, is_expert=True)
    down = Parameter("", (count, hidden, width), tuple(fc2))
    yield "linear_fc2", Whole(down, dim=2, is_expert=True)


def _fused_experts(model: _Layer, kind: str, experts: Sequence[int]) -> Iterator[tuple[str, Whole]]:
    """The same of gpt-oss, whose checkpoint has the transposes, gate in the even columns."""
    config, first, count = model.config, experts[0], len(experts)
    hidden, width = config.hidden_size, config.moe_intermediate_size
    is_bias = kind == "bias"
    up, down = (
        model.name(f"mlp.experts.{which}_proj" + ("_bias" if is_bias else ""))
        for which in ("gate_up", "down")
    )
    inner = () if is_bias else (hidden,)  # the dimension that bias has not
    ones, zeros = (1,) * len(inner), (0,) * len(inner)
    axes = (0, 1) if is_bias else (0, 2, 1)
    halves = tuple(
        Part(
            up,
            lo=(first, *zeros, half),
            n=(count, *inner, width),
            step=(1, *ones, 2),
            at=(0, half * width, *zeros),
            axes=axes,
            jump=(1, 1, *ones),
        )
        for half in range(2)
    )
    gate_up = Parameter("", (count, 2 * width, *inner), halves)
    yield "linear_fc1", Whole(gate_up, dim=1, is_halved=True, is_expert=True)
    n = (count, hidden) if is_bias else (count, width, hidden)
    part = Part(
        down, (first, *(0,) * (len(n) - 1)), n, (1,) * len(n), (0,) * len(n), axes, (1,) * len(n)
    )
    shape = (count, hidden) if is_bias else (count, hidden, width)
    made = Parameter("", shape, (part,))
    yield "linear_fc2", Whole(made, dim=None if is_bias else 2, is_expert=True)
