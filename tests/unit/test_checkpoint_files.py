"""Checkpoint folders: what is found, what is refused, how readers and writers share them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from support.layout_oracle import TINY_MODELS, TINY_QWEN3, build_model, checkpoint
from weightsync.checkpoint.files import read_checkpoint
from weightsync.checkpoint.header import StoredTensor
from weightsync.checkpoint.model import ModelFiles
from weightsync.checkpoint.side import INDEX_NAME
from weightsync.checkpoint.source import ReadersLayout
from weightsync.errors import CheckpointError, ConfigError
from weightsync.ir.dtypes import Dtype

NAMED = checkpoint(build_model(TINY_QWEN3), TINY_QWEN3)


def store(folder: Path, tensors: dict[str, Any], num_files: int = 2) -> dict[str, str]:
    """A sharded checkpoint of TINY_QWEN3; returns its weight_map."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY_QWEN3))
    weight_map = {}
    names = list(tensors)
    for index in range(num_files):
        file = f"model-{index + 1:05d}-of-{num_files:05d}.safetensors"
        held = {n: tensors[n].contiguous() for n in names[index::num_files]}
        save_file(held, folder / file)
        weight_map |= dict.fromkeys(held, file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("model", TINY_MODELS)
def test_what_transformers_saves_is_one(tmp_path: Path, model: str) -> None:
    config = TINY_MODELS[model]
    made = build_model(config)
    made.save_pretrained(tmp_path, max_shard_size="8KB")  # type: ignore[operator]
    stored = read_checkpoint(tmp_path)
    assert len(stored.files) > 1
    known = stored.known_config()
    found, skipped = stored.canonical(known)
    named = checkpoint(made, config)
    assert skipped == []
    assert {n: t.shape for n, t in found.items()} == {n: tuple(t.shape) for n, t in named.items()}
    assert stored.nbytes == sum(tensor.nbytes for tensor in named.values())
    for name, tensor in found.items():
        blob = tensor.path.read_bytes()[tensor.offset_bytes :][: tensor.nbytes]
        assert blob == named[name].contiguous().numpy().tobytes()


@pytest.mark.parametrize("how", ["model.safetensors", "other.safetensors", "file"])
def test_a_single_file(tmp_path: Path, how: str) -> None:
    name = "model.safetensors" if how == "file" else how
    save_file({"a": torch.zeros(3)}, tmp_path / name)
    stored = read_checkpoint(tmp_path / name if how == "file" else tmp_path)
    assert list(stored.tensors) == ["a"]
    assert stored.known_config() is None
    assert stored.canonical(None) == (stored.tensors, [])


def test_what_need_not_be_moved_is_skipped(tmp_path: Path) -> None:
    extra = {"lm_head.weight": NAMED["model.embed_tokens.weight"].clone()}
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    store(tmp_path, {**NAMED, **extra})
    stored = read_checkpoint(tmp_path)
    found, skipped = stored.canonical(stored.known_config())
    assert found.keys() == NAMED.keys()
    assert sorted(skipped) == sorted(extra)


def test_layers_of_multi_token_prediction_are_skipped(tmp_path: Path) -> None:
    config = TINY_MODELS["deepseek_v3"]
    made = build_model(config)
    made.save_pretrained(tmp_path)  # type: ignore[operator]
    named = checkpoint(made, config)
    extra = {f"model.layers.{config['num_hidden_layers']}.eh_proj.weight": torch.zeros(2, 2)}
    save_file(
        {n: t.contiguous() for n, t in {**named, **extra}.items()}, tmp_path / "model.safetensors"
    )
    content = json.loads((tmp_path / "config.json").read_text())
    for count, skipped in ((1, list(extra)), (0, None)):
        (tmp_path / "config.json").write_text(
            json.dumps({**content, "num_nextn_predict_layers": count})
        )
        stored = read_checkpoint(tmp_path)
        if skipped is None:
            refused(tmp_path, "is not part of the deepseek_v3", tensor=next(iter(extra)))
        else:
            assert stored.canonical(stored.known_config())[1] == skipped


def refused(path: Path, message: str, *, tensor: str | None = None) -> None:
    def read() -> None:
        stored = read_checkpoint(path)
        stored.canonical(stored.known_config())

    with pytest.raises(CheckpointError, match=message) as caught:
        read()
    if tensor is not None:
        assert caught.value.tensor == tensor
        assert tensor in str(caught.value)


def test_folders_that_are_none(tmp_path: Path) -> None:
    refused(tmp_path, "no model.safetensors.index.json and no")
    refused(tmp_path / "gone", "No such file")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, "pickled weights only")
    for name in ("a", "b"):
        save_file({"a": torch.zeros(3)}, tmp_path / f"{name}.safetensors")
    refused(tmp_path, "2 safetensors files but no")


def test_index_and_files_that_disagree(tmp_path: Path) -> None:
    weight_map = store(tmp_path, NAMED)
    first, second = sorted(set(weight_map.values()))
    inside_first = next(n for n, file in weight_map.items() if file == first)
    write_index(tmp_path, {**weight_map, inside_first: second})
    refused(tmp_path, f"is not in {second}", tensor=inside_first)
    write_index(tmp_path, {n: file for n, file in weight_map.items() if n != inside_first})
    refused(tmp_path, "the index does not know", tensor=inside_first)
    write_index(tmp_path, {**weight_map, "ghost": first})
    refused(tmp_path, f"is not in {first}", tensor="ghost")
    write_index(tmp_path, {**weight_map, "ghost": "model-00003.safetensors"})
    refused(tmp_path, "names model-00003.safetensors, which is not there")
    for outside in ("../x.safetensors", "/etc/passwd", "", ".", "..", 7):
        write_index(tmp_path, {**weight_map, "ghost": outside})
        refused(tmp_path, "no name of a file", tensor="ghost")
    for broken in ({}, [], "x"):
        write_index(tmp_path, broken)
        refused(tmp_path, "no weight_map")
    (tmp_path / INDEX_NAME).write_text("{")
    refused(tmp_path, "is no JSON")
    write_index(tmp_path, weight_map)
    (tmp_path / second).write_bytes((tmp_path / second).read_bytes()[:-1])
    refused(tmp_path, rf"{second}: tensor .* truncated")
    save_file({inside_first: torch.zeros(1)}, tmp_path / second)
    refused(tmp_path, "is in model-00001-of-00002.safetensors as well", tensor=inside_first)


def test_a_checkpoint_that_is_not_the_model_of_its_config(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    store(tmp_path, {n: t for n, t in NAMED.items() if n != name})
    refused(tmp_path, "lacks", tensor=name)
    store(tmp_path, {**NAMED, "surplus": torch.zeros(3)})
    refused(tmp_path, "is not part of the qwen3", tensor="surplus")
    store(tmp_path, {**NAMED, name: torch.zeros(3, 3)})
    refused(tmp_path, r"has shape \(3, 3\), by its config \(24, 16\)", tensor=name)
    store(tmp_path, NAMED)
    (tmp_path / "config.json").write_text(json.dumps({**TINY_QWEN3, "hidden_size": -1}))
    refused(tmp_path, "hidden_size must be a positive integer")


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 50])
def test_readers_share_every_row_once_and_evenly(world_size: int) -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "a": (100, 8), "b": (7,), "c": (), "d": (3, 5, 2), "e": (1, 64), "f": (333, 4), "g": (0, 2),
    }  # fmt: skip
    tensors = {
        n: StoredTensor(n, Dtype.F32, s, Path("x"), 0, 4 * math.prod(s)) for n, s in shapes.items()
    }
    layout = ReadersLayout(tensors, world_size)
    held: dict[str, list[int]] = {name: [] for name in shapes}
    for rank in range(world_size):
        num_bytes = 0
        for name, (first, count) in layout.rows(rank).items():
            held[name] += range(first, first + count)
            num_bytes += tensors[name].nbytes // tensors[name].num_rows * count
        total = sum(tensor.nbytes for tensor in tensors.values())
        assert abs(num_bytes - total / world_size) <= 256  # the longest row
    for name, rows in held.items():
        assert rows == list(range(tensors[name].num_rows)) or not tensors[name].nbytes


def test_files_are_cut_and_shared() -> None:
    def of(**options: Any) -> ModelFiles:
        chosen = {"dtype": None, "world_size": 1, "max_file_bytes": 1 << 30, **options}
        return ModelFiles.of(TINY_QWEN3, None, **chosen)

    assert [file.name for file in of().files] == ["model.safetensors"]
    total = sum(tensor.numel() * 2 for tensor in NAMED.values())
    several = of(max_file_bytes=total // 4).files
    assert [f.name for f in several][:2] == [
        f"model-00001-of-{len(several):05d}.safetensors",
        f"model-00002-of-{len(several):05d}.safetensors",
    ]
    assert all(sum(e.nbytes for e in file.entries) <= total // 4 for file in several)
    assert [e.name for f in several for e in f.entries] == list(
        of().expected
    )  # in order, each once
    assert all(entry.dtype is Dtype.BF16 for entry in of().expected.values())
    shared = of(world_size=3)
    assert {file.rank for file in shared.files} == {0, 1, 2}
    with pytest.raises(ConfigError, match="100 ranks cannot share"):
        of(world_size=100)


def test_a_new_checkpoint_needs_one_description() -> None:
    for config, like in ((None, None), (TINY_QWEN3, "folder")):
        with pytest.raises(ConfigError, match="either config or like"):
            ModelFiles.of(config, like, None, 1, 1 << 30)


@pytest.mark.parametrize(
    "file", ["x" * 300, "\u00e9" * 200, "\ud800.safetensors", "a\0b", "a\nb"], ids=ascii
)
def test_names_that_no_file_has_are_refused_and_can_be_printed(tmp_path: Path, file: str) -> None:
    write_index(tmp_path, {"a": file})
    with pytest.raises(CheckpointError, match=r"tensor a lies in .*, which is no name") as caught:
        read_checkpoint(tmp_path)
    assert len(str(caught.value).encode()) < 500
    write_index(tmp_path, {"a": "b", file: 1})
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path)
    assert str(caught.value).encode()


def test_folders_that_cannot_be_looked_at(tmp_path: Path) -> None:
    refused(tmp_path / ("x" * 300), "File name too long")
    (tmp_path / INDEX_NAME).symlink_to("x" * 300)
    refused(tmp_path, "File name too long")
    (tmp_path / INDEX_NAME).unlink()
    write_index(tmp_path, {"a": "a.safetensors"})
    (tmp_path / "a.safetensors").symlink_to("x" * 300)
    refused(tmp_path, "File name too long", tensor=None)


def test_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    """Opened to read, it would wait for a writer for ever."""
    os.mkfifo(tmp_path / "x.safetensors")
    refused(tmp_path, "x.safetensors is no regular file")
    refused(tmp_path / "x.safetensors", "is no regular file")
    write_index(tmp_path, {"a": "x.safetensors"})
    refused(tmp_path, "which is not there")


def test_json_is_read_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightsync.checkpoint.side.MAX_JSON_BYTES", 50)
    write_index(tmp_path, {"a": "x" * 50})
    refused(tmp_path, "more than 50 bytes")
    monkeypatch.undo()
    (tmp_path / "config.json").write_text("[" * 200_000)
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    (tmp_path / INDEX_NAME).unlink()
    refused(tmp_path, "is no JSON")

    def of(config: Path) -> None:
        ModelFiles.of(config, None, None, 1, 1 << 30)

    for content in (None, "[]", "[" * 200_000, b"\xff"):
        path = tmp_path / "given.json"
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ConfigError, match=r"given\.json (cannot be read|is no JSON)"):
            of(path)


SIDE = ["config.json", "tokenizer.json", "merges.txt", "chat_template.jinja", "qwen.tiktoken"]
OTHERS = ["README.md", "modeling_own.py", "LICENSE.txt", "results.json"]


def test_small_files_that_are_copied(tmp_path: Path) -> None:
    """Of a folder all but a trainer's; beside a file may lie anything, so only known names."""
    store(tmp_path, NAMED, num_files=1)
    file = tmp_path / "model-00001-of-00001.safetensors"
    for name in (*SIDE[1:], *OTHERS, "trainer_state.json", "all_results.json", "optimizer.pt"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "more").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    for like, expected in ((tmp_path, SIDE + OTHERS), (tmp_path / INDEX_NAME, SIDE + OTHERS),
                           (file, SIDE)):  # fmt: skip
        model = ModelFiles.of(None, like, None, 1, 1 << 30)
        out = tmp_path / "more" / str(len(list((tmp_path / "more").iterdir())))
        out.mkdir()
        model.write_side_files(out)
        assert sorted(path.name for path in out.iterdir()) == sorted(expected)
        assert model.side_names() == set(expected)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"small files .* cannot be written"):
        model.write_side_files(out)
