"""Tiny models, and reading a manifest by plain indexing: nothing here comes from the rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from weightsync.ir.manifest import Manifest

TINY_QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "attention_bias": False,
    "tie_word_embeddings": True,
}
TINY_QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 70,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "attention_bias": False,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
    "tie_word_embeddings": False,
}
TINY_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 130,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": False,
}
TINY_DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 90,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 10,
    "kv_lora_rank": 9,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1,
}
# No compressed queries, biases where the real files have none, every layer sparse.
TINY_KIMI_K2: dict[str, Any] = {
    **TINY_DEEPSEEK_V3,
    "model_type": "kimi_k2",
    "num_hidden_layers": 1,
    "q_lora_rank": None,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "attention_bias": True,
    "num_nextn_predict_layers": 0,
}
TINY_GLM4_MOE: dict[str, Any] = {
    "model_type": "glm4_moe",
    "vocab_size": 80,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "n_routed_experts": 5,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "attention_bias": True,
    "use_qk_norm": True,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1,
}
TINY_GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss",
    "vocab_size": 110,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "attention_bias": True,
    "tie_word_embeddings": False,
}
TINY_MODELS = {
    "qwen3": TINY_QWEN3,
    "qwen3_moe": TINY_QWEN3_MOE,
    "llama": TINY_LLAMA,
    "deepseek_v3": TINY_DEEPSEEK_V3,
    "kimi_k2": TINY_KIMI_K2,
    "glm4_moe": TINY_GLM4_MOE,
    "gpt_oss": TINY_GPT_OSS,
}


def build_model(config: Mapping[str, Any], device: str = "cpu") -> torch.nn.Module:
    """Builds the real transformers class of a configuration, with seeded weights."""
    keys = {key: value for key, value in config.items() if key != "quantization_config"}
    kind = keys.pop("model_type")
    # Kimi-K2 is a DeepSeek-V3 by another name, which transformers does not know.
    kind = "deepseek_v3" if kind == "kimi_k2" else kind
    made = transformers.AutoConfig.for_model(kind, **keys)
    torch.manual_seed(7)
    with torch.device(device):
        model: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(made)
    if device != "meta":
        # Norms start as ones and biases as zeros; a mix-up among equal values would go unseen.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.normal_()
    return model


def checkpoint(model: torch.nn.Module, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Unfuses a transformers 5 state dict to the names on disk: three tensors per expert."""
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings", False):
            continue
        if config["model_type"] == "gpt_oss":
            found[name] = tensor
        elif name.endswith("mlp.experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            for expert, gate_up in enumerate(tensor):
                gate, up = gate_up.chunk(2)
                found[f"{prefix}{expert}.gate_proj.weight"] = gate
                found[f"{prefix}{expert}.up_proj.weight"] = up
        elif name.endswith("mlp.experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            for expert, down in enumerate(tensor):
                found[f"{prefix}{expert}.down_proj.weight"] = down
        else:
            found[name] = tensor
    return found


@dataclass(frozen=True)
class PieceRow:
    """One piece of a manifest, as numbers of its tensor's own dims."""

    tensor: str | None
    buffer: str
    lo: tuple[int, ...]
    n: tuple[int, ...]
    step: tuple[int, ...]
    offset: int
    stride: tuple[int, ...]
    fill: float


def piece_rows(manifest: Manifest) -> list[PieceRow]:
    """Lists the pieces of a manifest as plain Python values."""
    rows = []
    tensors, buffers, pieces = manifest.tensors, manifest.buffers, manifest.pieces
    for p in range(len(pieces.tensor)):
        tensor = int(pieces.tensor[p])
        # Columns are padded in front to four dims; a constant has no tensor and keeps all four.
        front = 0 if tensor < 0 else 4 - int(tensors.ndim[tensor])
        rows.append(
            PieceRow(
                tensor=None if tensor < 0 else tensors.names[tensor],
                buffer=buffers.names[int(pieces.buffer[p])],
                lo=tuple(pieces.lo[p, front:].tolist()),
                n=tuple(pieces.n[p, front:].tolist()),
                step=tuple(pieces.step[p, front:].tolist()),
                offset=int(pieces.offset[p]),
                stride=tuple(pieces.stride[p, front:].tolist()),
                fill=float(pieces.fill[p]),
            )
        )
    return rows


def read_buffers(
    manifest: Manifest,
    named: Mapping[str, Tensor],
    rows: Sequence[PieceRow] | None = None,
    *,
    has_gaps: bool = False,
) -> dict[str, Tensor]:
    """Fills flat buffers from canonical tensors, as the pieces say; each element exactly once.

    With `has_gaps`, as sources may have where they hold padding, at most once; the rest is NaN.
    """
    numel = dict(zip(manifest.buffers.names, (int(n) for n in manifest.buffers.numel), strict=True))
    dtype = next(iter(named.values())).dtype
    filled = {name: torch.full((size,), float("nan"), dtype=dtype) for name, size in numel.items()}
    times = {name: torch.zeros(size, dtype=torch.int32) for name, size in numel.items()}
    for row in piece_rows(manifest) if rows is None else rows:
        sites = filled[row.buffer].as_strided(row.n, row.stride, row.offset)
        if row.tensor is None:
            sites.fill_(row.fill)
        else:
            box = tuple(
                slice(lo, lo + step * (n - 1) + 1, step)
                for lo, n, step in zip(row.lo, row.n, row.step, strict=True)
            )
            sites.copy_(named[row.tensor][box])
        times[row.buffer].as_strided(row.n, row.stride, row.offset).add_(1)
    for name, count in times.items():
        is_right = count.le(1) if has_gaps else count.eq(1)
        assert is_right.all(), f"{name}: elements written other than once"
    return filled


def assert_holds(
    tensors: Mapping[str, Tensor], manifest: Manifest, named: Mapping[str, Tensor]
) -> None:
    """The memory behind a manifest holds what the manifest says, element by element."""
    assert set(tensors) == set(manifest.buffers.names)
    for row in piece_rows(manifest):
        assert row.tensor is not None
        box = tuple(
            slice(lo, lo + step * (n - 1) + 1, step)
            for lo, n, step in zip(row.lo, row.n, row.step, strict=True)
        )
        memory = tensors[row.buffer]
        held = memory.as_strided(row.n, row.stride, memory.storage_offset() + row.offset)
        assert torch.equal(held, named[row.tensor][box]), row


def number_elements(model: torch.nn.Module) -> None:
    """Fills a model so that no two elements are equal, and each says where it belongs."""
    next_code = 1
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                codes = torch.arange(next_code, next_code + tensor.numel(), dtype=torch.float32)
                tensor.copy_(codes.reshape(tensor.shape))
                next_code += tensor.numel()
    assert next_code < 1 << 24, "more elements than float32 can number"
