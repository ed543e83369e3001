"""Model configurations: what a Hugging Face `config.json` says about the shapes of the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsync.errors import ConfigError

__all__ = ["SUPPORTED_MODELS", "ConfigLike", "ModelConfig", "model_config"]

SUPPORTED_MODELS = ("llama", "qwen3", "qwen3_moe")

# More than this many layers, heads or experts is a typing error, not a model.
_MAX_COUNT = 1 << 20


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The numbers of a model that decide names and shapes of its weights; hashable.

    Args:
        model_type: One of `SUPPORTED_MODELS`.
        vocab_size: Rows of the embedding, without any padding.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of a dense MLP.
        num_layers: Decoder layers.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Width of one head.
        qk_norm: Whether queries and keys have a norm each (all Qwen3).
        attention_bias: Whether the four attention projections have biases.
        mlp_bias: Whether the three projections of a dense MLP have biases.
        tie_word_embeddings: Whether `lm_head` is the embedding itself.
        num_experts: Routed experts of a sparse layer; 0 for dense models.
        moe_intermediate_size: Width of one expert; 0 for dense models.
        sparse_layers: Indices of the layers that have experts.
        quantization: `quant_method` of the published checkpoint, or None.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    num_experts: int = 0
    moe_intermediate_size: int = 0
    sparse_layers: frozenset[int] = frozenset()
    quantization: str | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Reads a Hugging Face configuration.

        Args:
            config: The content of a `config.json`, or of a file of `configs/model/`, which holds
                the same under the key `config`.

        Returns:
            The configuration.

        Raises:
            ConfigError: The model type is not supported, or a key is missing or makes no sense.
        """
        nested = config.get("config")
        if "model_type" not in config and isinstance(nested, Mapping):
            config = nested
        model_type = config.get("model_type")
        if model_type not in SUPPORTED_MODELS:
            raise ConfigError(
                f"model_type {model_type!r} is not supported; supported are: "
                f"{', '.join(SUPPORTED_MODELS)}",
                model_type=model_type,
            )
        read = _Reader(model_type, config)
        num_heads = read.count("num_attention_heads")
        num_layers = read.count("num_hidden_layers")
        hidden_size = read.count("hidden_size")
        num_experts, moe_intermediate_size, sparse_layers = 0, 0, frozenset[int]()
        if model_type == "qwen3_moe":
            # transformers 5 writes num_local_experts, published files say num_experts.
            old = "num_experts" in config
            num_experts = read.count("num_experts" if old else "num_local_experts")
            moe_intermediate_size = read.count("moe_intermediate_size")
            sparse_layers = read.sparse_layers(num_layers)
        made = cls(
            model_type=model_type,
            vocab_size=read.count("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=read.count("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=read.count("num_key_value_heads", num_heads),
            head_dim=read.head_dim(hidden_size, num_heads),
            qk_norm=model_type != "llama",
            attention_bias=read.flag("attention_bias"),
            mlp_bias=model_type == "llama" and read.flag("mlp_bias"),
            tie_word_embeddings=read.flag("tie_word_embeddings"),
            num_experts=num_experts,
            moe_intermediate_size=moe_intermediate_size,
            sparse_layers=sparse_layers,
            quantization=read.quantization(),
        )
        if made.num_heads % made.num_kv_heads:
            raise ConfigError(
                f"{model_type}: num_attention_heads {made.num_heads} is no multiple of "
                f"num_key_value_heads {made.num_kv_heads}"
            )
        return made

    @classmethod
    def from_json(cls, path: str | Path) -> ModelConfig:
        """Reads a `config.json`, or a file of `configs/model/`.

        Args:
            path: The file, or a checkpoint folder that holds a `config.json`.

        Returns:
            The configuration.

        Raises:
            ConfigError: The file cannot be read, is no JSON object, or `from_dict` refuses it.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"model config {path} cannot be read: {error}", path=path) from error
        if not isinstance(content, dict):
            raise ConfigError(f"model config {path} is no JSON object", path=path)
        return cls.from_dict(content)

    def is_sparse(self, layer: int) -> bool:
        """Tells whether a layer has experts instead of a dense MLP."""
        return layer in self.sparse_layers


ConfigLike = ModelConfig | Mapping[str, Any] | str | Path


def model_config(config: ConfigLike) -> ModelConfig:
    """Makes a `ModelConfig` of anything that describes one.

    Args:
        config: A `ModelConfig`, the content of a `config.json`, or the path of one.

    Returns:
        The configuration.

    Raises:
        ConfigError: It describes no supported model.
    """
    if isinstance(config, ModelConfig):
        return config
    if isinstance(config, Mapping):
        return ModelConfig.from_dict(config)
    return ModelConfig.from_json(config)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Typed access to the keys of a configuration, with errors that name the key."""

    model_type: str
    config: Mapping[str, Any]

    def count(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{self.model_type}: the config has no {key!r}", key=key)
        # bool is an int in Python; "true heads" is a broken file all the same.
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(
                f"{self.model_type}: {key} must be a positive integer, not {value!r}", key=key
            )
        if key.startswith("num_") and value > _MAX_COUNT:
            raise ConfigError(f"{self.model_type}: {key} {value} is beyond {_MAX_COUNT}", key=key)
        return value

    def flag(self, key: str) -> bool:
        value = self.config.get(key, False)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise ConfigError(
                f"{self.model_type}: {key} must be true or false, not {value!r}", key=key
            )
        return value

    def head_dim(self, hidden_size: int, num_heads: int) -> int:
        if self.config.get("head_dim") is not None:
            return self.count("head_dim")
        if self.model_type == "qwen3" and "head_dim" not in self.config:
            return 128  # the default of Qwen3Config, whatever the hidden size
        if hidden_size % num_heads:
            raise ConfigError(
                f"{self.model_type}: no head_dim, and hidden_size {hidden_size} is no multiple of "
                f"num_attention_heads {num_heads}",
                key="head_dim",
            )
        return hidden_size // num_heads

    def sparse_layers(self, num_layers: int) -> frozenset[int]:
        step = self.count("decoder_sparse_step", 1)
        dense = self.config.get("mlp_only_layers")
        if dense is None:
            dense = []
        if not isinstance(dense, list | tuple) or not all(isinstance(i, int) for i in dense):
            raise ConfigError(
                f"{self.model_type}: mlp_only_layers must be a list of layer numbers, not {dense!r}"
            )
        return frozenset(i for i in range(num_layers) if i not in dense and (i + 1) % step == 0)

    def quantization(self) -> str | None:
        value = self.config.get("quantization_config")
        if not isinstance(value, Mapping):
            return None
        return str(value.get("quant_method", "unknown"))
