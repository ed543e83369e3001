"""What the demo trains: small models of real architectures, and text that ships with Python.

Everything here is plain data, so that sinks need no transformers and the parent no torch;
`build_model` alone imports them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from weightsync.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["MODELS", "PROMPT", "build_model", "greedy", "model_config", "readable", "text"]

# One token per byte and a few spare ones: no multiple of the 64 rows that engines pad to.
_VOCAB: Final = 261
_SHARED: Final[dict[str, Any]] = {
    "vocab_size": _VOCAB,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    # Plain loops: the same operations in the same order wherever the model runs.
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}
MODELS: Final[dict[str, dict[str, Any]]] = {
    # Two kv heads: a replica of four ranks holds each of them twice.
    "qwen3": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    # One kv head: every rank of a replica holds it. The first layer is dense.
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 128,
        "intermediate_size": 384,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
        "decoder_sparse_step": 1,
        "tie_word_embeddings": False,
    },
}
PROMPT: Final = b"The value of "


def model_config(model: str) -> dict[str, Any]:
    """The `config.json` of a model of the demo.

    Raises:
        ConfigError: There is no such model.
    """
    if model not in MODELS:
        raise ConfigError(f"model {model!r}: choose one of {', '.join(MODELS)}")
    return {**_SHARED, **MODELS[model]}


def text() -> bytes:
    """About 700 KB of English: the help topics of Python itself."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def readable(tokens: list[int]) -> str:
    """Tokens of the demo as one line of text; what is no printable ASCII becomes a dot."""
    return "".join(chr(token) if 32 <= token < 127 else "." for token in tokens)


def build_model(config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """The transformers class for a config, unsharded, with random weights.

    Args:
        config: From `model_config`.
        dtype: Of the parameters; rotary frequencies stay fp32, as when a checkpoint is loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    made = AutoConfig.for_model(config["model_type"], **keys)
    factory: Any = AutoModelForCausalLM
    model: nn.Module = factory.from_config(made, dtype=dtype)
    return model


def greedy(model: nn.Module, num_tokens: int) -> tuple[list[int], torch.Tensor]:
    """Continue `PROMPT` with the most likely tokens.

    Returns:
        The new tokens, and the logits of the whole sequence, `(1, length, vocabulary)`.
    """
    import torch

    ids = torch.tensor([list(PROMPT)])
    with torch.no_grad():
        for _ in range(num_tokens):
            logits = model(input_ids=ids, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        return ids[0, len(PROMPT) :].tolist(), model(input_ids=ids, use_cache=False).logits
