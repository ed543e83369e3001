"""The report as a page and as a trace: complete, self-contained, and what it draws is right."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import weightsync
from support.clusters import cluster
from weightsync.cli import app
from weightsync.dryrun import PlanReport
from weightsync.dryrun.page import render_page
from weightsync.dryrun.timeline import panels
from weightsync.errors import ConfigError
from weightsync.planners import rules
from weightsync.planners.predict import STAGES

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


def make(*, fsdp: int = 3, tp: int = 2, replicas: int = 2, **hops: Any) -> PlanReport:
    return weightsync.plan(
        model=CONFIG,
        trainer=rules.fsdp2(CONFIG, fsdp=fsdp, dtype="F32"),
        rollout=rules.vllm(CONFIG, tp=tp),
        replicas=replicas,
        **hops,
    )


@pytest.fixture(scope="module")
def report() -> PlanReport:
    return make()


class Page(HTMLParser):
    """Text, tags that must be closed, and whatever would be loaded from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.canvases = 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.canvases += tag == "canvas"
        self.loaded += [str(v) for k, v in attrs if k in ("src", "href", "data", "srcset")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def heats(text: str) -> dict[str, Any]:
    """The heat maps in the page's script."""
    body = re.search(r"const heats = \{\n(.*?)\n\};", text, re.DOTALL)
    assert body is not None
    found = {}
    for line in body[1].splitlines():
        name, _, value = line.strip().removesuffix(",").partition(": ")
        found[name] = json.loads(value)
    return found


def cells(heat: dict[str, Any]) -> np.ndarray:
    flat = np.frombuffer(base64.b64decode(heat["cells"]), np.uint8)
    return flat.reshape(heat["height"], heat["width"]) / 255 * heat["top"]


def test_the_page_is_whole_and_loads_nothing(report: PlanReport) -> None:
    text = render_page(report)
    page = Page(text)
    assert page.open == []
    assert page.loaded == []
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in text
    assert page.canvases == len(heats(text))
    for words in ("prediction", "not from a measurement", "Memory of one rank", "physical limit"):
        assert words in text
    for name in report.limits.by_name():
        assert name.removesuffix("_s") in text


def test_the_matrix_shows_what_the_plan_sends(report: PlanReport) -> None:
    plan = report.plan
    sent = np.zeros((3, 4))
    for bucket in range(len(plan.buckets)):
        sent[plan.buckets.src_rank[bucket], plan.buckets.dst_rank[bucket]] += plan.buckets.nbytes[
            bucket
        ]
    matrix = heats(render_page(report))["matrix"]
    assert (matrix["rows"], matrix["columns"]) == (list(plan.source.ranks), list(plan.sink.ranks))
    assert cells(matrix) == pytest.approx(sent, abs=sent.max() / 255)


def test_busy_time_is_the_time_that_was_spent(report: PlanReport) -> None:
    """Summed over the time steps, each rank was busy as long as its buckets took."""
    prediction = report.prediction
    for panel in panels(report):
        step_s = prediction.predicted_s / panel.busy.shape[1]
        rank = prediction.source if panel.side == "source" else prediction.sink
        number = STAGES.index("wire" if panel.stage == "receive" else panel.stage)
        spent = (prediction.end_s - prediction.start_s)[:, number]
        if panel.stage in ("wire", "receive"):
            rate = report.cluster.port_bytes_per_s("attainable")
            spent = report.plan.buckets.nbytes / rate
        for one, busy in enumerate(panel.busy):
            assert busy.sum() * step_s == pytest.approx(spent[rank == one].sum(), rel=1e-6)
        if panel.stage in ("read", "cast", "write", "verify"):  # one bucket at a time
            assert panel.busy.max() <= 1 + 1e-9
    assert {panel.stage for panel in panels(report)} >= {"cast", "write", "wire", "verify"}


def test_what_sinks_pass_on_has_a_picture_of_its_own() -> None:
    where = cluster(
        gpus_per_node=2, nics_per_node=2, nvlink_gb_per_s={"nominal": 1, "attainable": 1}
    )
    report = make(node_dedup="on", relays="on", cluster=where)
    plan, prediction = report.plan, report.prediction
    found = {panel.stage: panel for panel in panels(report)}
    num_sources, num_sinks = len(plan.source.ranks), len(plan.sink.ranks)
    for stage, chosen, rank in (
        ("wire", prediction.source < num_sources, prediction.source),
        ("pass_on", prediction.source >= num_sources, prediction.source - num_sources),
        ("receive", ~prediction.is_local, prediction.sink),
    ):
        panel = found[stage]
        step_s = prediction.predicted_s / panel.busy.shape[1]
        spent = [plan.buckets.nbytes[chosen & (rank == r)].sum() / 1e9 for r in range(num_sinks)]
        assert panel.busy.sum(axis=1) * step_s == pytest.approx(spent[: len(panel.busy)], rel=1e-6)
    assert prediction.is_local.any()
    assert prediction.relay_port_bytes.sum() + prediction.link_bytes.sum() == (
        plan.bytes_per_forwarder().sum()
    )
    text = render_page(report)
    assert "Rollout NICs: bytes passed on to other nodes" in text
    assert "pass on: sinks send" in text


def test_many_ranks_share_lines(report: PlanReport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightsync.dryrun.page._MAX_ROWS", 2)
    found = heats(render_page(report))
    matrix, sent = found["matrix"], report.traffic.pair_bytes
    assert matrix["rows"] == ["source 0 to source 1", "source 2"]
    assert matrix["columns"] == ["sink 0/0 to sink 0/1", "sink 1/0 to sink 1/1"]
    joined = np.array(
        [
            [sent[rows, columns].sum() for columns in (slice(2), slice(2, 4))]
            for rows in (slice(2), 2)
        ]
    )
    assert cells(matrix) == pytest.approx(joined, abs=joined.max() / 255)
    for panel in panels(report):
        name = next(key for key, heat in found.items() if heat.get("title") == panel.title)
        mean = panel.busy[:2].mean(axis=0)
        assert cells(found[name])[0] == pytest.approx(np.minimum(mean, 1), abs=1 / 255)


def test_names_are_escaped(report: PlanReport) -> None:
    text = render_page(dataclasses.replace(report, model="<script>alert(1)</script>"))
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text


def test_a_trace_has_each_bucket_in_each_stage(report: PlanReport, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    report.write_trace(path)
    events = json.loads(path.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    for stage in ("cast", "write", "send", "receive", "verify"):
        mine = [event for event in spans if event["cat"].split()[0] == stage]
        assert {event["name"] for event in mine} == {
            f"bucket {number}" for number in range(len(report.plan.buckets))
        }
        nbytes = sum(event["args"]["bytes"] for event in mine)
        assert nbytes == int(report.plan.buckets.nbytes.sum())
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in spans:
        place = event["pid"], event["tid"]
        tracks.setdefault(place, []).append((event["ts"], event["ts"] + event["dur"]))
    for times in tracks.values():
        times.sort()
        assert all(a[1] <= b[0] + 0.002 for a, b in itertools.pairwise(times))
    whole = [event for event in spans if event["cat"] == "update"]
    assert [event["name"] for event in whole] == ["open", "transfer", "votes and decision"]
    assert whole[0]["ts"] == 0
    assert {event["args"]["ranks_shown"] for event in whole} == {"7 of 7"}
    last = max(event["ts"] + event["dur"] for event in spans)
    assert last == pytest.approx(1e6 * report.prediction.predicted_s, abs=0.002)
    first = min(event["ts"] for event in spans if event["cat"] != "update")
    assert first >= whole[0]["dur"]


def test_a_trace_of_a_large_plan_keeps_whole_ranks(
    report: PlanReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightsync.dryrun.timeline._MAX_SPANS", 20)
    report.write_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    names.remove("update (predicted)")
    kept = {name.partition(" ")[0] for name in names}
    assert kept == {"source", "sink"}
    assert len(names) < 7
    shown = {e["args"].get("ranks_shown") for e in events if e.get("cat") == "update"}
    assert shown == {f"{len(names)} of 7"}
    for name in names:
        label = name.removesuffix(" (predicted)")
        pid = next(e["pid"] for e in events if e["args"].get("name") == name)
        stage, labels, rank = (
            ("send", report.plan.source.ranks, report.prediction.source)
            if label.startswith("source")
            else ("receive", report.plan.sink.ranks, report.prediction.sink)
        )
        mine = [e for e in events if e["pid"] == pid and e.get("cat", "").startswith(stage)]
        assert len(mine) == np.count_nonzero(rank == labels.index(label))


def test_the_command_writes_page_and_trace(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    files = {name: tmp_path / name for name in ("x.parquet", "x.html", "x.json")}
    arguments = ["plan", f"model.config={config}", "trainer=fsdp8", "rollout=tp1", "--json"]
    for flag, path in zip(("--out", "--report", "--trace"), files.values(), strict=True):
        arguments += [flag, str(path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("\n") == 1
    for path in files.values():
        assert path.stat().st_size > 1000
        assert str(path) in done.stderr.replace("\n", "")
    gone = str(tmp_path / "gone" / "x")
    for flag in ("--out", "--report", "--trace"):
        done = CliRunner().invoke(app, [*arguments[:5], flag, gone])
        assert done.exit_code == 2
        assert f"{flag} {gone} lies in a folder that does not" in json.loads(done.stdout)["message"]
    done = CliRunner().invoke(app, [*arguments[:-1], str(files["x.html"])])
    assert done.exit_code == 2
    assert "the same file" in json.loads(done.stdout)["message"]


def test_a_page_needs_jinja2(
    report: PlanReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'weightsync\[plan\]'"):
        report.write_page(tmp_path / "x.html")


needs_browser = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="no chromium: apt install chromium"
)


def dom_of(path: Path, profile: Path, width: int = 1200) -> str:
    """What a page is after its scripts ran."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync"]
    options = [f"--user-data-dir={profile}", f"--window-size={width},900", "--dump-dom"]
    done = subprocess.run(
        [*command, *options, "--virtual-time-budget=5000", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_browser
def test_a_browser_draws_every_picture(report: PlanReport, tmp_path: Path) -> None:
    path = tmp_path / "plan.html"
    report.write_page(path)
    found = dom_of(path, tmp_path / "profile")
    drawn = re.findall(r'<canvas [^>]*width="(\d+)" height="(\d+)" data-drawn="yes"', found)
    wanted = [(str(h["width"]), str(h["height"])) for h in heats(path.read_text()).values()]
    assert sorted(drawn) == sorted(wanted)


@needs_browser
def test_a_narrow_window_shows_all(report: PlanReport, tmp_path: Path) -> None:
    path = tmp_path / "plan.html"
    ask = "<script>document.title = document.documentElement.scrollWidth</script>"
    path.write_text(render_page(report).replace("</body>", ask + "</body>"))
    found = re.search(r"<title>(\d+)</title>", dom_of(path, tmp_path / "profile", 500))
    assert found is not None
    assert int(found[1]) <= 500
