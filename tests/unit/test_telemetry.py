from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from weightsync.errors import ConfigError
from weightsync.telemetry.progress import STAGES, LiveProgress, VersionRow, stage_table
from weightsync.telemetry.trace import Trace


def printed(rows: list[VersionRow]) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(stage_table(rows))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_spans_of_several_processes_share_one_clock(tmp_path: Path) -> None:
    trace = Trace()
    trace.add("trainer 0", "write", "bucket 1", 100.5, 100.75, version=3)
    trace.add("sink a/0", "fill", "fill", 100.0, 101.0)
    trace.add("trainer 0", "write", "bucket 2", 100.75, 100.8)
    trace.add("trainer 0", "cast", "bucket 1", 100.25, 100.5)
    path = tmp_path / "new" / "trace.json"
    trace.write(path)
    events = json.loads(path.read_text())["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    assert [(e["name"], e["ts"], e["dur"]) for e in spans] == [
        ("bucket 1", 500_000, 250_000),
        ("fill", 0, 1_000_000),
        ("bucket 2", 750_000, 50_000),
        ("bucket 1", 250_000, 250_000),
    ]
    assert spans[0]["args"] == {"version": 3}
    assert len({(e["pid"], e["tid"]) for e in spans}) == 3
    assert spans[0]["tid"] == spans[2]["tid"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert sorted(names.values()) == ["sink a/0", "trainer 0"]


def test_a_trace_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the trace"):
        Trace().write(tmp_path / "file" / "trace.json")


def test_table_has_a_row_per_stage_in_order_and_fits_a_terminal() -> None:
    rows = [
        VersionRow(version, 0.04, 12_000_000, 2, dict.fromkeys(STAGES, 0.001 * version), True)
        for version in range(1, 9)
    ]
    text = printed([*rows, VersionRow(9, is_committed=False)])
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    first = [line.split()[0] for line in text.splitlines() if line.split()]
    assert [name for name in first if name in STAGES] == list(STAGES)
    lines = {line.split()[0]: line for line in text.splitlines() if line.split()}
    assert lines["stage"].split()[1:4] == ["v7", "v8", "v9"]
    assert lines["cast"].split()[1:8] == ["7.00", "ms", "8.00", "ms", "-", "4.50", "ms"]
    assert "0.30" in lines["GB/s"]
    assert "aborted" in lines["verified"]


def test_table_says_what_was_not_verified() -> None:
    assert "NO" in printed([VersionRow(1, 0.1, 1, 1, {}, False)])
    assert "NO" not in printed([VersionRow(1, 0.1, 1, 1, {}, True)])


def test_lines_reach_a_console_that_is_no_terminal() -> None:
    console = Console(file=io.StringIO(), width=20)
    with LiveProgress(console, 2) as progress:
        progress.now("working")
        progress.say("a line of more than twenty characters [not markup]")
        progress.advance()
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert text == "a line of more than twenty characters [not markup]\n"
