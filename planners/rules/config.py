"""Model configurations: what a Hugging Face `config.json` says about the shapes of the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsync.errors import ConfigError

__all__ = ["SUPPORTED_MODELS", "ConfigLike", "LatentAttention", "ModelConfig", "model_config"]

SUPPORTED_MODELS = (
    "llama",
    "qwen3",
    "qwen3_moe",
    "deepseek_v3",
    "kimi_k2",
    "glm4_moe",
    "gpt_oss",
)

# More than this many layers, heads or experts is a typing error, not a model.
_MAX_COUNT = 1 << 20

# Latent attention: queries, keys and values come from low-rank projections.
_LATENT = ("deepseek_v3", "kimi_k2")
# The first layers are dense; the others have shared experts and a correction bias at the router.
_SHARED = (*_LATENT, "glm4_moe")


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Widths of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Args:
        q_rank: Width of the compressed queries; None: queries are projected directly.
        kv_rank: Width of the compressed keys and values.
        nope_dim: Width of a head's query and key that is not rotated.
        rope_dim: Width that is; one key of it serves all heads.
        v_dim: Width of a head's value.
    """

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int


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
        head_dim: Width of one head's queries.
        qk_norm: Whether queries and keys have a norm each (all Qwen3).
        attention_bias: Whether the projections into attention have biases; with latent attention
            those that read the residual stream.
        output_bias: Whether the projection out of attention has one.
        mlp_bias: Whether the three projections of a dense MLP have biases.
        tie_word_embeddings: Whether `lm_head` is the embedding itself.
        num_experts: Routed experts of a sparse layer; 0 for dense models.
        moe_intermediate_size: Width of one expert; 0 for dense models.
        sparse_layers: Indices of the layers that have experts.
        num_shared_experts: Experts that every token takes; the checkpoint holds them as one.
        correction_bias: Whether routers have an `e_score_correction_bias`.
        num_expert_groups: Groups that routers choose among before they choose experts; 1: none.
        latent: Widths of latent attention; None: queries, keys and values have a projection each.
        quantization: `quant_method` of the published checkpoint, or None.
        weight_block_size: Rows and columns that share a scale in that checkpoint, or None.
        unconverted_modules: Names or patterns of modules that it does not quantize.
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
    output_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    num_experts: int = 0
    moe_intermediate_size: int = 0
    sparse_layers: frozenset[int] = frozenset()
    num_shared_experts: int = 0
    correction_bias: bool = False
    num_expert_groups: int = 1
    latent: LatentAttention | None = None
    quantization: str | None = None
    weight_block_size: tuple[int, int] | None = None
    unconverted_modules: tuple[str, ...] = ()

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
        sparse_layers = read.sparse_layers(num_layers)
        latent = read.latent() if model_type in _LATENT else None
        # GptOssConfig alone has biases unless the file says otherwise.
        attention_bias = read.flag("attention_bias", model_type == "gpt_oss")
        made = cls(
            model_type=model_type,
            vocab_size=read.count("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=read.count("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=read.count("num_key_value_heads", num_heads),
            head_dim=(
                read.head_dim(hidden_size, num_heads)
                if latent is None
                else latent.nope_dim + latent.rope_dim
            ),
            qk_norm=read.qk_norm(),
            attention_bias=attention_bias,
            output_bias=attention_bias and model_type != "glm4_moe",
            mlp_bias=model_type == "llama" and read.flag("mlp_bias"),
            tie_word_embeddings=read.flag("tie_word_embeddings"),
            num_experts=read.num_experts() if sparse_layers is not None else 0,
            moe_intermediate_size=read.expert_width() if sparse_layers is not None else 0,
            sparse_layers=sparse_layers if sparse_layers is not None else frozenset(),
            num_shared_experts=read.num_shared_experts(),
            correction_bias=model_type in _SHARED,
            num_expert_groups=read.num_expert_groups(),
            latent=latent,
            quantization=read.quantization(),
            weight_block_size=read.weight_block_size(),
            unconverted_modules=read.unconverted_modules(),
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

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.config.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{self.model_type}: the config has no {key!r}", key=key)
        # bool is an int in Python; "true heads" is a broken file all the same.
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            kind = "a positive integer" if least else "an integer from 0 on"
            raise ConfigError(f"{self.model_type}: {key} must be {kind}, not {value!r}", key=key)
        if key.startswith(("num_", "n_", "first_")) and value > _MAX_COUNT:
            raise ConfigError(f"{self.model_type}: {key} {value} is beyond {_MAX_COUNT}", key=key)
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.config.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConfigError(
                f"{self.model_type}: {key} must be true or false, not {value!r}", key=key
            )
        return value

    def qk_norm(self) -> bool:
        if self.model_type == "glm4_moe":
            return self.flag("use_qk_norm")
        return self.model_type.startswith("qwen3")

    def latent(self) -> LatentAttention:
        has_q_rank = self.config.get("q_lora_rank") is not None
        return LatentAttention(
            q_rank=self.count("q_lora_rank") if has_q_rank else None,
            kv_rank=self.count("kv_lora_rank"),
            nope_dim=self.count("qk_nope_head_dim"),
            rope_dim=self.count("qk_rope_head_dim"),
            v_dim=self.count("v_head_dim"),
        )

    def num_experts(self) -> int:
        # Published files and transformers 5 spell it differently; the published spelling first.
        keys = {
            "qwen3_moe": ("num_experts", "num_local_experts"),
            "gpt_oss": ("num_local_experts", "num_experts"),
        }.get(self.model_type, ("n_routed_experts", "num_local_experts"))
        return self.count(keys[0] if keys[0] in self.config else keys[1])

    def expert_width(self) -> int:
        is_gpt_oss = self.model_type == "gpt_oss"
        return self.count("intermediate_size" if is_gpt_oss else "moe_intermediate_size")

    def num_shared_experts(self) -> int:
        return self.count("n_shared_experts", 0, least=0) if self.model_type in _SHARED else 0

    def num_expert_groups(self) -> int:
        return self.count("n_group", 1) if self.model_type in _SHARED else 1

    def head_dim(self, hidden_size: int, num_heads: int) -> int:
        if self.config.get("head_dim") is not None:
            return self.count("head_dim")
        # The defaults of Qwen3Config and GptOssConfig, whatever the hidden size.
        default = {"qwen3": 128, "gpt_oss": 64}.get(self.model_type)
        if default is not None and "head_dim" not in self.config:
            return default
        if hidden_size % num_heads:
            raise ConfigError(
                f"{self.model_type}: no head_dim, and hidden_size {hidden_size} is no multiple of "
                f"num_attention_heads {num_heads}",
                key="head_dim",
            )
        return hidden_size // num_heads

    def sparse_layers(self, num_layers: int) -> frozenset[int] | None:
        """Layers with experts; None for a dense model."""
        if self.model_type in _SHARED:
            if self.count("moe_layer_freq", 1) != 1:
                # transformers does not know the key, engines heed it: better no layout than two.
                raise ConfigError(
                    f"{self.model_type}: moe_layer_freq must be 1, not "
                    f"{self.config['moe_layer_freq']!r}",
                    key="moe_layer_freq",
                )
            return frozenset(range(self.count("first_k_dense_replace", least=0), num_layers))
        if self.model_type == "gpt_oss":
            return frozenset(range(num_layers))
        if self.model_type != "qwen3_moe":
            return None
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

    def _quantization_key(self, key: str) -> Any:
        value = self.config.get("quantization_config")
        return value.get(key) if isinstance(value, Mapping) else None

    def weight_block_size(self) -> tuple[int, int] | None:
        value = self._quantization_key("weight_block_size")
        if value is None:
            return None
        numbers = list(value) if isinstance(value, list | tuple) else []
        if len(numbers) != 2 or not all(type(n) is int and n > 0 for n in numbers):
            raise ConfigError(
                f"{self.model_type}: weight_block_size must be two positive integers, not "
                f"{value!r}",
                key="weight_block_size",
            )
        return (numbers[0], numbers[1])

    def unconverted_modules(self) -> tuple[str, ...]:
        value = self._quantization_key("modules_to_not_convert")
        if value is None:
            return ()
        if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
            raise ConfigError(
                f"{self.model_type}: modules_to_not_convert must be a list of names, not {value!r}",
                key="modules_to_not_convert",
            )
        return tuple(value)
