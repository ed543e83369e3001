"""`weightsync plan`: choices, errors that name the override, one line of JSON, no torch."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from hydra.core.global_hydra import GlobalHydra
from typer.testing import CliRunner

from support.clusters import SMALL_MOE, preset_values
from support.interpreter import run_fresh
from weightsync.cli import app
from weightsync.dryrun.choices import GROUPS, choose
from weightsync.dryrun.command import read_choices
from weightsync.dryrun.sides import KINDS
from weightsync.errors import ConfigError
from weightsync.planners import rules

CONFIGS = Path(__file__).parents[2] / "configs"
LIMITS = {
    "receiver_s", "receiver_dedup_s", "source_s", "cut_s", "h2d_s", "host_memory_s", "nvlink_s",
    "encode_s", "digest_s", "message_s", "sender_s", "unique_s",
}  # fmt: skip
KEYS = {
    "schema", "model", "trainer", "rollout", "cluster", "num_tensors", "num_regions", "num_writes",
    "bytes_total", "bytes_per_source", "bytes_per_sink", "plan_seconds", "limits",
    "physical_limit_s", "limiting", "predicted_s", "commit_s", "pause_s", "efficiency",
    "memory_per_rank", "peak_staging_bytes", "digest", "strategy", "bytes_passed_on",
    "gateways",
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(SMALL_MOE))
    return f"model.config={tmp_path / 'tiny'}"


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


def refused(*arguments: str) -> str:
    done = plan(*arguments, "--json")
    assert done.exit_code == 2, done.output
    found = json.loads(done.stdout)
    assert found["schema"] == "weightsync.plan/1"
    assert found["ok"] is False
    return str(found["message"])


def test_one_line_of_json_with_all_keys(tiny: str) -> None:
    done = plan(
        tiny, "trainer=fsdp2", "trainer.fsdp=3", "rollout=vllm", "rollout.tp=2", "rollout.ep=2",
        "rollout.replicas=2", "rollout.encoding=fp8_block", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)
    assert set(found) == KEYS
    assert set(found["limits"]) == LIMITS
    assert found["model"] == "tiny"
    assert (found["trainer"]["kind"], found["trainer"]["ranks"]) == ("fsdp2", 3)
    assert (found["rollout"]["replicas"], found["rollout"]["ranks"]) == (2, 2)
    assert found["cluster"] == "h100_cx7"
    for side, ranks in (("bytes_per_source", 3), ("bytes_per_sink", 4)):
        spread = found[side]
        assert spread["min"] <= spread["mean"] <= spread["max"]
        assert spread["mean"] * ranks == found["bytes_total"]
    assert found["physical_limit_s"] == found["limits"][f"{found['limiting']}_s"]
    assert found["physical_limit_s"] < found["predicted_s"]
    assert found["efficiency"] == found["physical_limit_s"] / found["predicted_s"]
    sink = found["memory_per_rank"]["sink"]
    assert sink["weights_bytes"] == sink["in_place_bytes"] < sink["staged_bytes"]
    assert len(found["digest"]) == 64


def test_sinks_pass_on_where_it_is_asked_for(tiny: str, tmp_path: Path) -> None:
    nodes = ("cluster.gpus_per_node=2", "cluster.nics_per_node=2")
    common = (tiny, "trainer=fsdp8", "rollout=vllm", "rollout.tp=2", "rollout.replicas=2", *nodes)
    found = {}
    for way in ("auto", "on", "off"):
        arguments = (*common, f"rollout.node_dedup={way}", f"rollout.relays={way}", "--json")
        done = plan(*arguments, "--report", str(tmp_path / "plan.html"))
        assert done.exit_code == 0, done.output
        found[way] = json.loads(done.stdout)
    own = {key: found["auto"][key] for key in ("plan_seconds", "rollout")}
    assert found["auto"] == found["off"] | own  # so small a model is sent before it is passed on
    assert [found[way]["strategy"] for way in ("on", "off")] == ["relay", "direct"]
    assert found["on"]["bytes_passed_on"] > found["off"]["bytes_passed_on"] == 0
    assert found["on"]["bytes_per_source"]["max"] < found["off"]["bytes_per_source"]["max"]
    assert found["on"]["bytes_per_sink"] == found["off"]["bytes_per_sink"]
    done = plan(*common, "rollout.relays=sometimes")
    assert done.exit_code == 2
    assert "rollout.relays='sometimes': it is one of auto, on, off" in done.stderr


def test_people_get_tables_with_units_and_what_to_change(tiny: str) -> None:
    done = plan(tiny, "trainer=fsdp8", "rollout=vllm", "rollout.tp=2")
    assert done.exit_code == 0, done.output
    for text in ("not a measurement", "> receiver", "Memory of one rank", "plan digest", "MiB"):
        assert text in done.stdout
    assert "not bandwidth" in done.stdout  # so small a model is all overhead
    assert "NICs at the rollouts" not in done.stdout  # hence these do little
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(done.stdout)


def test_every_option_composes_and_is_understood() -> None:
    names = {g: sorted(path.stem for path in (CONFIGS / g).glob("*.yaml")) for g in GROUPS}
    for number in range(max(len(found) for found in names.values())):
        chosen = {group: found[number % len(found)] for group, found in names.items()}
        groups = choose([f"{group}={name}" for group, name in chosen.items()])
        assert groups["model"]["name"] == chosen["model"]
        assert groups["cluster"]["name"] == chosen["cluster"]
        for group, kinds in KINDS.items():
            assert groups[group]["kind"] in kinds


def test_every_model_that_ships_has_an_option_of_its_name() -> None:
    for path in (CONFIGS / "model").glob("*.json"):
        name = path.stem.replace("-", "_").replace(".", "_")
        groups = choose([f"model={name}", "trainer=fsdp2", "rollout=vllm"])
        assert groups["model"] == {"name": name, "preset": path.name, "config": None}
        dry_run = read_choices(groups)
        assert dry_run.model == name
        assert dry_run.trainer.config == rules.model_config(path)  # type: ignore[attr-defined]


def test_every_argument_of_a_rule_is_a_key_of_its_kind() -> None:
    """With the same default, but for what the command line decides otherwise."""
    decided = {"dtype": "BF16", "quantized": False, "ep": 1, "fsdp": 1, "dp": 1}
    for group, kinds in KINDS.items():
        for kind in kinds:
            values = choose(["model=kimi_k2", "trainer=fsdp2", "rollout=vllm", f"{group}={kind}"])
            if not hasattr(rules, kind):
                continue
            arguments = dict(inspect.signature(getattr(rules, kind)).parameters)
            del arguments["config"]
            for key, parameter in arguments.items():
                default = decided.get(key, parameter.default)
                wanted = list(default) if isinstance(default, tuple) else default
                assert values[group][key] == wanted, f"{group}={kind} {key}"


def test_the_headline_preset_says_what_the_field_runs() -> None:
    groups = choose(["model=kimi_k2", "trainer=fsdp16_pp2_ep8", "rollout=ep32_x4"])
    trainer, rollout = groups["trainer"], groups["rollout"]
    degrees = {key: trainer[key] for key in ("fsdp", "tp", "pp", "ep", "dtype")}
    assert degrees == {"fsdp": 16, "tp": 1, "pp": 2, "ep": 8, "dtype": "BF16"}
    degrees = {key: rollout[key] for key in ("dp", "tp", "ep", "replicas", "encoding")}
    assert degrees == {"dp": 4, "tp": 8, "ep": 32, "replicas": 4, "encoding": "fp8_block"}
    model = rules.model_config(CONFIGS / "model" / "kimi-k2.json")
    layout = rules.vllm(
        model, dp=4, tp=8, ep=32, encoding="fp8_block", all2all_backend=rollout["all2all_backend"]
    )
    shared = "model.layers.1.mlp.shared_experts.gate_up_proj.weight"
    shapes = [p.shape for p in layout.parameters(5) if p.name == shared]
    assert shapes == [(2 * 2048, 7168)]  # whole


BASE = ("model=qwen3_0_6b", "trainer=fsdp8", "rollout=vllm")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("trainer=fsdp8", "rollout=tp1"), ("model=NAME", "kimi_k2", "model.config=PATH")),
        (("model=qwen3_0_6b", "rollout=tp1"), ("trainer=NAME", "fsdp16_pp2_ep8")),
        ((*BASE, "model=qwen4"), ("model=qwen4", "qwen3_30b_a3b")),
        ((*BASE, "cluster=moon"), ("cluster=moon", "h100_cx7", "eth_10g")),
        ((*BASE, "rollout.ttp=2"), ("'ttp'", "tp, pp, dp, ep", "encoding")),
        ((*BASE, "rolout.tp=2"), ("'rolout'", "rollout, cluster")),
        ((*BASE, "cluster.nic_gbit_per_s.nom=2"), ("nic_gbit_per_s.nominal",)),
        ((*BASE, "rollout.tp=3"), ("tp=3", "num_key_value_heads", "change rollout.tp")),
        ((*BASE, "rollout.encoding=fp9"), ("fp8_block, mxfp4", "change rollout.encoding")),
        ((*BASE, "rollout.replicas=0"), ("replicas", "change rollout.replicas")),
        ((*BASE, "rollout.mode=hot"), ("staged or in_place", "change rollout.mode")),
        ((*BASE, "trainer.offloaded=3"), ("true or false", "change trainer.offloaded")),
        ((*BASE, "trainer.kind=fsdp3"), ("trainer.kind=fsdp3", "megatron, zero3")),
        ((*BASE, "trainer.fsdp=0"), ("positive integer", "change trainer.fsdp")),
        ((*BASE, "~trainer.fsdp"), ("needs trainer.fsdp",)),
        ((*BASE, "+trainer.bright=true"), ("trainer.bright=True",)),
        ((*BASE, "+trainer.colour=5"), ("trainer.colour=5", "fsdp, replicate")),
        ((*BASE, "cluster.latency_s=fast"), ("latency_s='fast'",)),
        ((*BASE, "transport.bucket_bytes=8Mi"), ("transport.bucket_bytes", "MiB")),
        ((*BASE, "transport.max_rows=10"), ("transport.max_rows",)),
        ((*BASE, "rollout.encoding=fp8_block", "transport.staging_bytes=64"),
         ("transport.staging_bytes",)),
        ((*BASE, "transport.slot_bytes=???"), ("transport.slot_bytes",)),
        ((*BASE, "model.config=/nowhere.json"), ("/nowhere.json", "change model.config")),
        ((*BASE, "model.config=3"), ("model.config=3", "path")),
        ((*BASE, "transport.gateways=1000"), ("0 to 64", "change transport.gateways")),
        ((*BASE, "rollout.replicas=100000"), ("100,000 rollout ranks", "rollout.replicas")),
        ((*BASE, "trainer.fsdp=100000000"), ("100,000,000 trainer ranks", "degrees")),
        ((*BASE, "trainer.fsdp=[1"), ("trainer.fsdp=[1", "close brackets")),
        ((*BASE, "cluster.nic_gbit_per_s=-5"), ("{nominal: RATE, attainable: RATE}", "-5")),
        ((*BASE, "trainer.fsdp=1,2"), ("Ambiguous",)),
        ((*BASE, "trainer=3"), ("name of an option", "trainer=3")),
        ((*BASE, "fast"), ("GROUP=OPTION",)),
        ((*BASE, "hydra.run.dir=x"), ("GROUP=OPTION",)),
    ],
)  # fmt: skip
def test_a_bad_override_is_named_with_what_there_is(
    overrides: tuple[str, ...], named: tuple[str, ...]
) -> None:
    message = refused(*overrides)
    for text in named:
        assert text in message


def test_sides_that_do_not_fit_name_tensor_and_override(tiny: str, tmp_path: Path) -> None:
    sides = "trainer=fsdp8", "rollout=vllm", "rollout.quantized=true"
    assert "quantization_config" in refused(tiny, *sides)
    quantized = SMALL_MOE | {
        "quantization_config": {
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["mlp.gate", "lm_head"],
        }
    }
    path = tmp_path / "fp8.json"
    path.write_text(json.dumps(quantized))
    message = refused(f"model.config={path}", *sides)
    assert "weight_scale_inv" in message
    assert "rollout.encoding" in message


def test_options_of_the_user_are_found_first(tiny: str, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    for group in ("cluster", "trainer"):
        (ours / group).mkdir(parents=True)
    mine = preset_values("h100_cx7") | {"name": "mine"}
    (ours / "cluster" / "h100_cx7.yaml").write_text(json.dumps(mine))
    (ours / "trainer" / "five.yaml").write_text("defaults: [fsdp2, _self_]\nfsdp: 5\n")
    arguments = (tiny, "trainer=five", "rollout=tp1", "--config-dir", str(ours), "--json")
    done = plan(*arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["cluster"], found["trainer"]["fsdp"]) == ("mine", 5)
    assert "five" in refused("trainer=six", *arguments[2:-1])
    assert "no folder" in refused(*BASE, "--config-dir", str(tmp_path / "gone"))
    (tmp_path / "empty").mkdir()
    assert "none of the folders" in refused(*BASE, "--config-dir", str(tmp_path / "empty"))
    (ours / "trainer" / "bad.yaml").write_text("fsdp: [1")
    assert "bad.yaml" in refused("trainer=bad", *arguments[2:-1])
    assert not GlobalHydra.instance().is_initialized()


def test_a_plan_needs_no_torch(tiny: str) -> None:
    """Neither torch nor the extension is loaded, whatever is installed."""
    arguments = ["plan", tiny, "trainer=fsdp8", "rollout=tp1", "--json"]
    code = f"""
import sys
from weightsync.cli import app
status = app({arguments!r}, standalone_mode=False)
print(status, *sorted({{"torch", "ray", "transformers", "grpc"}} & set(sys.modules)))
print("weightsync._native" in sys.modules)
"""
    first, *last = run_fresh(code).splitlines()
    assert json.loads(first)["num_tensors"] > 0
    assert last == ["0", "False"]


def test_an_interrupt_is_status_130(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("weightsync.dryrun.planning.plan_transfer", interrupt)
    done = plan(tiny, "trainer=fsdp8", "rollout=tp1", "--json")
    assert done.exit_code == 130
    assert json.loads(done.stdout)["error"] == "interrupted"


def test_choices_are_not_made_inside_another_hydra() -> None:
    from hydra import initialize_config_module

    with (
        initialize_config_module("weightsync.configs", version_base=None),
        pytest.raises(ConfigError, match="outside Hydra"),
    ):
        choose(BASE)
