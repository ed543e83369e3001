from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.layout_oracle import TINY_DEEPSEEK_V3, TINY_GPT_OSS
from weightsync.errors import ConfigError
from weightsync.planners.rules import LatentAttention, ModelConfig, model_config

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MOE: dict[str, Any] = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "num_key_value_heads": 2,
    "moe_intermediate_size": 8,
    "num_experts": 4,
    "num_hidden_layers": 5,
}


def test_defaults_follow_the_model_type() -> None:
    llama = ModelConfig.from_dict(LLAMA)
    assert (llama.num_kv_heads, llama.head_dim, llama.qk_norm) == (4, 4, False)
    qwen3 = ModelConfig.from_dict({**LLAMA, "model_type": "qwen3"})
    assert (qwen3.head_dim, qwen3.qk_norm) == (128, True)


def test_sparse_layers_follow_step_and_exceptions() -> None:
    config = ModelConfig.from_dict({**MOE, "decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert [layer for layer in range(5) if config.is_sparse(layer)] == [1]
    assert ModelConfig.from_dict(MOE).sparse_layers == frozenset(range(5))


def test_number_of_experts_has_two_spellings() -> None:
    renamed = dict(MOE)
    renamed["num_local_experts"] = renamed.pop("num_experts")
    assert ModelConfig.from_dict(renamed) == ModelConfig.from_dict(MOE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gpt2"},
            "'gpt2' is not supported; supported are: llama, qwen3, qwen3_moe,",
        ),
        ({"vocab_size": None}, "no 'vocab_size'"),
        ({"hidden_size": "16"}, "hidden_size must be a positive integer, not '16'"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a positive integer, not True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, not 0"),
        ({"num_hidden_layers": 1 << 40}, "beyond"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
        ({"hidden_size": 18}, "no head_dim"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
    ],
)
def test_wrong_configs_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict({**LLAMA, **change})


def test_wrong_list_of_dense_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="mlp_only_layers"):
        ModelConfig.from_dict({**MOE, "mlp_only_layers": "1"})


def test_latent_attention_needs_its_widths() -> None:
    config = ModelConfig.from_dict(TINY_DEEPSEEK_V3)
    assert config.latent == LatentAttention(10, 9, 6, 4, 5)
    assert config.head_dim == 10
    assert ModelConfig.from_dict({**TINY_DEEPSEEK_V3, "q_lora_rank": None}).latent is not None
    for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        with pytest.raises(ConfigError, match=f"no '{key}'"):
            ModelConfig.from_dict({**TINY_DEEPSEEK_V3, key: None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_routed_experts": None}, "n_routed_experts"),
        ({"n_shared_experts": -1}, "n_shared_experts must be an integer from 0 on, not -1"),
        ({"n_shared_experts": 1 << 40}, "n_shared_experts .* is beyond"),
        ({"first_k_dense_replace": None}, "no 'first_k_dense_replace'"),
        ({"first_k_dense_replace": "1"}, "first_k_dense_replace must be an integer from 0 on"),
        ({"moe_layer_freq": 2}, "moe_layer_freq must be 1, not 2"),
        ({"q_lora_rank": 0}, "q_lora_rank must be a positive integer, not 0"),
    ],
)
def test_wrong_numbers_of_experts_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict({**TINY_DEEPSEEK_V3, **change})


def test_gpt_oss_has_defaults_of_its_own() -> None:
    config = {k: v for k, v in TINY_GPT_OSS.items() if k not in ("head_dim", "attention_bias")}
    made = ModelConfig.from_dict(config)
    assert (made.head_dim, made.attention_bias, made.output_bias) == (64, True, True)
    assert made.moe_intermediate_size == made.intermediate_size == 64


def test_no_more_dense_layers_than_layers() -> None:
    config = {**TINY_DEEPSEEK_V3, "first_k_dense_replace": 9}
    assert ModelConfig.from_dict(config).sparse_layers == frozenset()


def test_a_config_comes_from_a_file_a_folder_or_a_value(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    wrapped = tmp_path / "tiny.json"
    wrapped.write_text(json.dumps({"hf_id": "a/b", "config": LLAMA}))
    expected = ModelConfig.from_dict(LLAMA)
    for given in (path, str(path), tmp_path, wrapped, LLAMA, expected):
        assert model_config(given) == expected


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        model_config(tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        model_config(tmp_path / "broken.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="no JSON object"):
        model_config(tmp_path / "list.json")
