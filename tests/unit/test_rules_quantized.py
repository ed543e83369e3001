from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
from transformers.integrations.mxfp4 import dequantize_convertops

from support.layout_oracle import TINY_GPT_OSS, TINY_MODELS, build_model, piece_rows
from weightsync.errors import ConfigError
from weightsync.ir import Manifest, RowKind
from weightsync.ir.dtypes import Dtype
from weightsync.ir.recipes import EncodingTable
from weightsync.planners import rules
from weightsync.planners.planner import plan_transfer
from weightsync.planners.rules import canonical_dtypes, canonical_tensors, hf, model_config

MODELS = Path(__file__).parents[2] / "configs" / "model"
# Divides the experts, which transformers fuses, and little else: scales are rounded up.
BLOCK = [4, 5]
DTYPES = {torch.float8_e4m3fn: Dtype.F8_E4M3, torch.float32: Dtype.F32}


def fp8(config: dict[str, Any], *unconverted: str) -> dict[str, Any]:
    return {
        **config,
        "quantization_config": {
            "quant_method": "fp8",
            "weight_block_size": BLOCK,
            "modules_to_not_convert": list(unconverted) or None,
        },
    }


def mxfp4(config: dict[str, Any], *unconverted: str) -> dict[str, Any]:
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": list(unconverted)}
    return {**config, "quantization_config": quantization}


def unfused(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A parameter of transformers' quantized modules under its names on disk."""
    for fused in ("gate_up", "down"):
        for kind in ("", "_scale_inv"):
            end = f"mlp.experts.{fused}_proj{kind}"
            if not name.endswith(end):
                continue
            found = {}
            for expert, rows in enumerate(tensor):
                prefix = f"{name.removesuffix(end)}mlp.experts.{expert}."
                names = ["gate", "up"] if fused == "gate_up" else ["down"]
                for which, part in zip(names, rows.chunk(len(names)), strict=True):
                    found[f"{prefix}{which}_proj.weight{kind}"] = part
            return found
    return {name: tensor}


@pytest.mark.parametrize("name", ["deepseek_v3", "kimi_k2", "qwen3", "qwen3_moe", "llama"])
@pytest.mark.parametrize("unconverted", [(), ("o_proj", "model.layers.0.self_attn")])
def test_block_fp8_equals_the_quantizer_of_transformers(
    name: str, unconverted: tuple[str, ...]
) -> None:
    config = TINY_MODELS[name]
    model = build_model(config, "meta")
    rule = FineGrainedFP8Config(weight_block_size=(BLOCK[0], BLOCK[1]))
    replace_with_fp8_linear(model, ["lm_head", *unconverted], rule, pre_quantized=True)
    expected = {}
    for parameter_name, parameter in model.state_dict().items():
        if parameter_name != "lm_head.weight" or not config["tie_word_embeddings"]:
            expected |= unfused(parameter_name, parameter)
    quantized = fp8(config, *unconverted)
    assert canonical_tensors(quantized, quantized=True) == {
        tensor: tuple(parameter.shape) for tensor, parameter in expected.items()
    }
    dtypes = canonical_dtypes(quantized, quantized=True)
    scales = {tensor for tensor in expected if tensor.endswith("_scale_inv")}
    assert scales
    for tensor, parameter in expected.items():
        if parameter.dtype == torch.float8_e4m3fn or tensor in scales:
            assert dtypes[tensor] == DTYPES[parameter.dtype], tensor
        else:
            own = Dtype.F32 if tensor.endswith("e_score_correction_bias") else None
            assert dtypes.get(tensor) == own, tensor
    # Nobody asked for it: the names stay those of the BF16 checkpoint.
    assert canonical_tensors(quantized) == canonical_tensors(config)


def test_mxfp4_dequantizes_to_the_plain_tensors() -> None:
    skipped = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head")
    config = mxfp4(TINY_GPT_OSS, *skipped)
    plain = canonical_tensors(config)
    shapes = dict(canonical_tensors(config, quantized=True))
    dtypes = canonical_dtypes(config, quantized=True)
    for end in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{end}"
        blocks, scales = f"{name}_blocks", f"{name}_scales"
        assert dtypes[blocks] == dtypes[scales] == Dtype.U8
        whole = dequantize_convertops(
            torch.zeros(shapes.pop(blocks), dtype=torch.uint8),
            torch.zeros(shapes.pop(scales), dtype=torch.uint8),
            torch.bfloat16,
        )
        assert tuple(whole.shape) == plain[name]
    rest = {name: shape for name, shape in plain.items() if not name.endswith("_proj")}
    assert shapes == rest
    assert len(dtypes) == 4


def test_experts_may_be_left_out_of_mxfp4() -> None:
    config = mxfp4(TINY_GPT_OSS, "model.layers.*.mlp.experts")
    assert canonical_tensors(config, quantized=True) == canonical_tensors(config)


@pytest.mark.parametrize(
    ("name", "num_tensors", "num_elements"),
    # Of the published files: the index's entries, and what the Hub counts. DeepSeek-V3's has 1564
    # more, those of its layer of multi-token prediction.
    [
        ("kimi-k2", 139_583, 1_026_470_727_640),
        ("deepseek-v3", 91_991 - 1_564, None),
        ("gpt-oss-120b", 687, None),
    ],
)
def test_published_checkpoints_have_that_many_tensors(
    name: str, num_tensors: int, num_elements: int | None
) -> None:
    config = json.loads((MODELS / f"{name}.json").read_text())
    shapes = canonical_tensors(config, quantized=True)
    assert len(shapes) == num_tensors
    if num_elements is not None:
        assert sum(math.prod(shape) for shape in shapes.values()) == num_elements


def test_excluded_modules_are_whole_words() -> None:
    quantized = fp8(TINY_MODELS["qwen3"], "mlp.gate", "model.layers.1", "up_proj")
    converted = {
        name
        for name, dtype in canonical_dtypes(quantized, quantized=True).items()
        if dtype == Dtype.F8_E4M3
    }
    assert "model.layers.0.mlp.gate_proj.weight" in converted
    assert "model.layers.0.mlp.up_proj.weight" not in converted
    assert not any(name.startswith("model.layers.1.") for name in converted)


def test_a_quantized_checkpoint_is_a_layout() -> None:
    config = fp8(TINY_MODELS["deepseek_v3"])
    manifest = hf(config, quantized=True).manifest(0)
    dtypes = canonical_dtypes(config, quantized=True)
    buffers = zip(manifest.buffers.names, manifest.buffers.dtype, strict=True)
    assert {name: Dtype(int(code)) for name, code in buffers} == {
        name: dtypes.get(name, Dtype.BF16) for name in canonical_tensors(config, quantized=True)
    }
    assert all(row.tensor == row.buffer for row in piece_rows(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "has no quantization_config"),
        ({"quant_method": "fp8"}, "fp8 without a weight_block_size"),
        ({"quant_method": "awq"}, "quant_method 'awq'"),
        ({"quant_method": "mxfp4"}, "quant_method 'mxfp4'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size must be two"),
        ({"quant_method": "fp8", "modules_to_not_convert": "a"}, "modules_to_not_convert must be"),
    ],
)
def test_unknown_quantizations_are_refused(change: dict[str, Any] | None, message: str) -> None:
    config = {**TINY_MODELS["qwen3"], "quantization_config": change}
    with pytest.raises(ConfigError, match=message):
        hf(config, quantized=True)


def test_mxfp4_needs_whole_blocks() -> None:
    with pytest.raises(ConfigError, match=r"multiple of 32, but .*down_proj has 40"):
        canonical_tensors(mxfp4({**TINY_GPT_OSS, "intermediate_size": 40}), quantized=True)


def test_the_quantization_is_part_of_the_config() -> None:
    config = model_config(MODELS / "deepseek-v3.json")
    assert (config.quantization, config.weight_block_size) == ("fp8", (128, 128))
    assert model_config(MODELS / "gpt-oss-120b.json").unconverted_modules[-1] == "lm_head"


# Few layers and experts at true widths, which block scales need; nothing is allocated.
@pytest.mark.parametrize(
    ("name", "encoding", "degrees", "fsdp"),
    [
        ("kimi-k2", "fp8_block", {"tp": 2, "dp": 2, "ep": True}, 3),
        ("qwen3-30b-a3b", "fp8_block", {"tp": 4}, 3),
        ("glm-4.5", "fp8_block", {"tp": 4, "ep": True}, 5),
        ("gpt-oss-120b", "mxfp4", {"tp": 2}, 3),
    ],
)
def test_sources_encode_what_the_quantized_checkpoint_holds(
    name: str, encoding: str, degrees: dict[str, Any], fsdp: int
) -> None:
    config = json.loads((MODELS / f"{name}.json").read_text())["config"]
    config |= {"num_hidden_layers": 2}
    experts = ("n_routed_experts", "num_experts", "num_local_experts")
    config |= {key: 8 for key in experts if key in config}
    config |= {"first_k_dense_replace": 1} if "first_k_dense_replace" in config else {}
    layout = rules.vllm(config, encoding=encoding, **degrees)
    block = [128, 128] if encoding == "fp8_block" else None
    quantized = {**config, "quantization_config": {
        **config.get("quantization_config", {}),
        "quant_method": "fp8" if block else "mxfp4", "weight_block_size": block,
        "modules_to_not_convert": ["mlp.gate", "lm_head"] if block else
        config.get("quantization_config", {}).get("modules_to_not_convert"),
    }}  # fmt: skip
    like = rules.vllm(quantized, quantized=True, **degrees)
    ranks = [layout.manifest(rank) for rank in range(layout.world_size)]
    for rank, manifest in enumerate(ranks):
        plain = dataclasses.replace(manifest, encodings=EncodingTable.empty())
        wanted = like.manifest(rank)
        for column in ("names", "dtype", "numel"):
            assert np.array_equal(getattr(plain.buffers, column), getattr(wanted.buffers, column))
        for column in ("buffer", "lo", "n", "step", "offset", "stride"):
            # Numbers of tensors differ: values of mxfp4 are named beside codes.
            of = (
                np.argsort(plain.pieces.buffer, kind="stable"),
                np.argsort(wanted.pieces.buffer, kind="stable"),
            )
            a, b = getattr(plain.pieces, column)[of[0]], getattr(wanted.pieces, column)[of[1]]
            assert np.array_equal(a, b), column
    trainer = rules.fsdp2(config, fsdp=fsdp, dtype="BF16")
    source = Manifest.merge("source", [trainer.manifest(rank) for rank in range(fsdp)])
    plan = plan_transfer(source, Manifest.merge("sink", ranks))
    made = plan.rows.take(plan.rows.kind == RowKind.ENCODE)
    assert set(made.tensor.tolist()) == {*plan.encoded.table.codes, *plan.encoded.table.scales}
    assert (len(plan.maxima) > 0) == (encoding == "fp8_block")


def test_encodings_that_no_engine_has_are_refused() -> None:
    kimi, gpt_oss = (
        json.loads((MODELS / f"{n}.json").read_text()) for n in ("kimi-k2", "gpt-oss-120b")
    )
    for config, encoding in (
        (kimi, "mxfp4"),
        (gpt_oss, "fp8_block"),
        (fp8(TINY_MODELS["qwen3"]), "fp8_block"),
    ):
        with pytest.raises(ConfigError, match="is none that engines have for it"):
            rules.vllm(config, encoding=encoding)
    with pytest.raises(ConfigError, match="no encoding is named 'fp3'"):
        rules.vllm(kimi, encoding="fp3")
