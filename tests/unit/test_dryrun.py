"""`weightsync.plan`: what a report says, against numbers worked out by other means."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

import weightsync
from support.clusters import PRESETS, SMALL_MOE, cluster, preset_values
from support.oracle import memory_of
from support.plan_rows import COLUMNS, carry_out, metadata_of
from weightsync.dryrun import PlanReport
from weightsync.dryrun.advice import advice
from weightsync.errors import ConfigError, LayoutError
from weightsync.ir import Arena, Manifest, PlanOptions
from weightsync.planners import rules
from weightsync.planners.planner import plan_transfer


def report(
    *, fsdp: int = 3, dtype: str = "BF16", replicas: int = 2, vllm: Any = None, **keywords: Any
) -> PlanReport:
    degrees = {"tp": 2, "ep": 2} if vllm is None else vllm
    return weightsync.plan(
        model=SMALL_MOE,
        trainer=rules.fsdp2(SMALL_MOE, fsdp=fsdp, dtype=dtype),
        rollout=rules.vllm(SMALL_MOE, **degrees),
        replicas=replicas,
        **keywords,
    )


def test_the_plan_is_the_one_that_a_job_makes() -> None:
    found = report()
    trainer, rollout = (
        rules.fsdp2(SMALL_MOE, fsdp=3, dtype="BF16"),
        rules.vllm(SMALL_MOE, tp=2, ep=2),
    )
    source = Manifest.merge("source", [trainer.manifest(rank) for rank in range(3)])
    sinks = [
        dataclasses.replace(rollout.manifest(rank), ranks=(f"sink {replica}/{rank}",))
        for replica in range(2)
        for rank in range(2)
    ]
    assert found.plan.digest == plan_transfer(source, Manifest.merge("sink", sinks)).digest


def test_bytes_and_memory_are_those_of_the_model() -> None:
    found = report(fsdp=2).to_json()
    total = sum(math.prod(shape) for shape in rules.canonical_tensors(SMALL_MOE).values())
    assert found["memory_per_rank"]["source"]["weights_bytes"] == 2 * total // 2  # BF16, 2 ranks
    # Each of two ranks: all but what tensor parallelism copies, and the padded vocabulary.
    cut = [
        math.prod(shape)
        for name, shape in rules.canonical_tensors(SMALL_MOE).items()
        if not name.endswith(("norm.weight", "mlp.gate.weight"))
    ]
    copied = total - sum(cut)
    need = 2 * (sum(cut) // 2 + copied)
    assert found["bytes_per_sink"]["min"] + found["bytes_per_sink"]["max"] == 2 * need
    assert found["bytes_total"] == 4 * need
    padding = 2 * 2 * 24 * 256 // 2  # two tables of 1000 rows, padded to 1024
    sink = found["memory_per_rank"]["sink"]
    assert sink["weights_bytes"] == need + padding
    assert sink["in_place_bytes"] == sink["weights_bytes"]
    assert sink["staged_bytes"] >= 2 * sink["weights_bytes"]
    assert found["num_tensors"] == len(rules.canonical_tensors(SMALL_MOE))


def test_limits_are_worked_out_by_hand() -> None:
    """Sinks of 1 GB/s: the busiest needs its bytes; all others are a billion GB/s."""
    plain = cluster()
    found = report(fsdp=8, cluster=plain)
    json_found = found.to_json()
    assert found.limits.limiting == "receiver"
    assert json_found["physical_limit_s"] == json_found["bytes_per_sink"]["max"] / 1e9
    assert json_found["predicted_s"] >= json_found["physical_limit_s"]
    # In a world where bytes are free and nothing else costs anything, nothing takes time.
    assert found.fixed_s == pytest.approx(0, abs=1e-6)
    slow = dataclasses.replace(plain, control_round_trip_s=1.0)
    fixed = report(fsdp=8, cluster=slow)
    assert fixed.fixed_s is not None
    assert fixed.fixed_s == pytest.approx(fixed.prediction.predicted_s, rel=0.01)


def test_clusters_are_taken_in_every_form(tmp_path: Path) -> None:
    path = PRESETS / "eth_25g.yaml"
    values = preset_values("eth_25g")
    names = {report(cluster=form).cluster.name for form in ("eth_25g", path, values)}
    assert names == {"eth_25g"}
    with pytest.raises(ConfigError, match=r"no cluster is named 'moon'.*h100_cx7"):
        report(cluster="moon")
    for content in ("- 1\n", "a: [\n"):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(ConfigError, match=r"bad\.yaml"):
            report(cluster=tmp_path / "bad.yaml")


def test_models_are_taken_in_every_form(tmp_path: Path) -> None:
    folder = tmp_path / "Some-Model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL_MOE))
    layouts = {"trainer": rules.fsdp2(SMALL_MOE, fsdp=2), "rollout": rules.vllm(SMALL_MOE, tp=1)}
    for model, name in (
        (folder, "Some-Model"),
        (str(folder / "config.json"), "Some-Model"),
        (SMALL_MOE, "qwen3_moe"),
        (rules.model_config(SMALL_MOE), "qwen3_moe"),
    ):
        assert weightsync.plan(model=model, **layouts).model == name
    with pytest.raises(ConfigError, match="trainer is a layout of another model"):
        weightsync.plan(model="qwen3_0_6b", **layouts)
    with pytest.raises(ConfigError, match="no model is named 'qwen9'"):
        weightsync.plan(model="qwen9", **layouts)


def test_what_is_no_layout_is_refused() -> None:
    layout = rules.fsdp2(SMALL_MOE, fsdp=2)
    with pytest.raises(ConfigError, match="rollout must be a layout with a world_size"):
        weightsync.plan(model=SMALL_MOE, trainer=layout, rollout=object())  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match="not a sink"):
        weightsync.plan(model=SMALL_MOE, trainer=layout, rollout=layout)
    with pytest.raises(ConfigError, match="replicas"):
        report(replicas=0)


def test_a_description_has_kind_ranks_and_degrees() -> None:
    found = report(vllm={"tp": 2, "dp": 2, "ep": 4})
    assert {
        "kind": "fsdp2",
        "ranks": 3,
        "fsdp": 3,
        "dtype": "BF16",
    }.items() <= found.trainer.items()
    wanted = {"kind": "vllm", "ranks": 4, "tp": 2, "dp": 2, "ep": 4, "replicas": 2}
    assert wanted.items() <= found.rollout.items()


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_a_terminal_and_mark_predictions(width: int) -> None:
    text = io.StringIO()
    report().print(Console(file=text, width=width))
    lines = text.getvalue().splitlines()
    tables = [line for line in lines if not line.startswith(("- ", "trainer", "rollout", "plan"))]
    assert max(len(line) for line in tables) <= width
    assert any("Prediction of a model, not a measurement" in line for line in lines)


def limited_by(found: PlanReport, name: str) -> PlanReport:
    """The report as if one limit counted and nothing else."""
    others = dict.fromkeys(found.limits.by_name(), 0.0)
    limits = dataclasses.replace(found.limits, **others | {f"{name}_s": 1.0})
    assert limits.limiting == name
    return dataclasses.replace(found, fixed_s=0.0, limits=limits)


@pytest.mark.parametrize(("rule", "times"), [("auto", 0), ("off", 1)])
def test_node_dedup_is_advised_where_the_plan_could_not_choose_it(rule: Any, times: int) -> None:
    found = limited_by(report(node_dedup=rule), "receiver")
    assert sum("rollout.node_dedup=auto" in line for line in advice(found)) == times


@pytest.mark.parametrize(
    ("trainer", "named"),
    [({"kind": "fsdp2", "replicate": 1}, "(trainer.replicate)"),
     ({"kind": "megatron", "dp": 2}, "(trainer.dp)"), ({"kind": "zero3", "dp": 2}, "")],
)  # fmt: skip
def test_advice_names_keys_that_the_trainer_has(trainer: dict[str, Any], named: str) -> None:
    found = dataclasses.replace(limited_by(report(), "sender"), trainer=trainer | {"offloaded": 0})
    text = " ".join(advice(found))
    assert f"more ranks that hold the same {named} or more".replace("  ", " ") in text


def test_in_place_pauses_for_the_whole_update() -> None:
    staged, in_place = (report(mode=mode) for mode in ("staged", "in_place"))
    assert in_place.prediction.pause_s == in_place.prediction.predicted_s
    assert staged.prediction.pause_s < staged.prediction.predicted_s


def test_rows_of_real_layouts_carry_the_weights(tmp_path: Path) -> None:
    """F32 to BF16, fused projections, padded vocabulary, two replicas: from the file alone."""
    found = report(dtype="F32")
    path = tmp_path / "plan.parquet"
    found.write_rows(path)
    assert pq.read_schema(path).names == COLUMNS
    assert pq.read_table(path).num_rows == len(found.plan.rows)
    shapes = dict(rules.canonical_tensors(SMALL_MOE))
    carried = carry_out(path, shapes)
    sink = found.plan.sink
    memory = memory_of(sink)
    for rank in range(len(sink.ranks)):
        arena = Arena(sink, rank)
        for buffer, offset in zip(arena.buffers.tolist(), arena.offset_bytes.tolist(), strict=True):
            content = memory[buffer].view(np.uint8)
            at = slice(offset, offset + len(content))
            assert np.array_equal(carried.sinks[rank][at], content)
            assert (carried.written[rank][at] == 1).all()
        assert int(carried.written[rank].sum()) == sum(
            len(memory[b].view(np.uint8)) for b in arena.buffers
        )
    metadata = metadata_of(path)
    assert (metadata["replicas"], metadata["ranks_per_replica"]) == (2, 2)
    assert metadata["digest"] == found.plan.digest


def test_rows_that_encode_go_by_the_name_of_the_values(tmp_path: Path) -> None:
    # 5 sources: rows of experts are cut inside cells of 128, so maxima are exchanged.
    found = report(fsdp=5, vllm={"tp": 2, "encoding": "fp8_block"})
    path = tmp_path / "plan.parquet"
    found.write_rows(path)
    rows = pq.read_table(path).to_pylist()
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_kind.setdefault(row["kind"], []).append(row)
    assert set(by_kind) == {"max", "copy", "encode", "const"}
    shapes = rules.canonical_tensors(SMALL_MOE)
    scales = rules.canonical_tensors(found_config(), quantized=True)
    assert {row["tensor"] for row in rows} - {None} == set(shapes)
    for row in by_kind["encode"] + by_kind["copy"]:
        shape = shapes[row["tensor"]]
        if row["part"] == "scale":
            assert row["kind"] == "encode"
            shape = scales[row["tensor"] + "_scale_inv"]
        box = list(zip(row["box_start"], row["box_stop"], row["box_step"], strict=True))
        assert len(box) == len(shape)
        assert all(0 <= a < b <= size for (a, b, _), size in zip(box, shape, strict=True))
        num = math.prod(len(range(*dim)) for dim in box)
        size = {"weight": 1, "scale": 4}[row["part"]] if row["kind"] == "encode" else 2
        assert row["nbytes"] == num * size == row["inner_bytes"] * math.prod(row["counts"])
    for row in by_kind["max"]:
        assert row["part"] == "scale"
        assert row["source_rank"] != row["sink_rank"]
        assert (row["bucket"], row["round"], row["source_offset_bytes"]) == (None, None, None)
        box = zip(row["box_start"], row["box_stop"], row["box_step"], strict=True)
        assert row["nbytes"] == 4 * math.prod(len(range(*dim)) for dim in box)
    assert [row["kind"] for row in rows[: len(by_kind["max"])]] == ["max"] * len(by_kind["max"])
    dtypes = metadata_of(path)["sink_dtypes"]
    assert (dtypes["weight"]["default"], dtypes["scale"]["default"]) == ("F8_E4M3", "F32")
    assert "model.norm.weight" in dtypes["weight"]["other"]["BF16"]
    sent = [row for row in rows if row["kind"] in ("copy", "encode")]
    order = [(row["source_rank"], row["round"]) for row in sent]
    assert order == sorted(order)
    assert all(row["rail"] == row["source_rank"] % 8 for row in sent)


def found_config() -> dict[str, Any]:
    quantization = {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["mlp.gate", "lm_head"],
    }
    return SMALL_MOE | {"quantization_config": quantization}


def test_rows_need_pyarrow_and_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = report()
    with pytest.raises(ConfigError, match="is a folder"):
        found.write_rows(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        found.write_rows(tmp_path / "gone" / "x.parquet")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'weightsync\[plan\]'"):
        found.write_rows(tmp_path / "x.parquet")
    assert list(tmp_path.iterdir()) == []


def test_budgets_of_jobs_are_budgets_here() -> None:
    found = report(options=PlanOptions(bucket_bytes=64 << 10, chunk_bytes=16 << 10))
    assert found.plan.chunks.nbytes.max() <= 16 << 10
    assert found.plan.buckets.nbytes.max() <= 64 << 10
