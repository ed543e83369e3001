"""Constants from times: the solver, the file, and that a prediction with them gives the times."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from rich.console import Console

from support.clusters import cluster
from weightsync.calibrate.command import CalibrateOptions, run_calibrate
from weightsync.calibrate.constants import Calibration, solve
from weightsync.calibrate.rates import copy_rate, digest_rate, journal_s, pack_rate
from weightsync.calibrate.stored import store
from weightsync.dryrun.planning import read_cluster
from weightsync.errors import ConfigError
from weightsync.planners.cluster import Cluster, Rate


def test_the_constant_is_the_one_that_explains_the_time() -> None:
    assert solve(lambda x: 0.25 + 40 * x, 0.35) == pytest.approx(0.0025, abs=1e-6)
    assert solve(lambda x: max(0.1, 3 * x), 0.6) == pytest.approx(0.2, abs=1e-6)


def test_a_time_below_what_is_free_gives_zero() -> None:
    assert solve(lambda x: 0.5 + x, 0.4) == 0.0


def test_a_time_that_nothing_explains_is_refused() -> None:
    with pytest.raises(ConfigError, match="busy with other work"):
        solve(lambda x: x / 10, 1.0)


def _calibration() -> Calibration:
    made = dataclasses.replace(
        cluster(nic_gbit_per_s={"nominal": 0.1, "attainable": 0.0991}),
        name="shelf_3",
        control_message_s=3.25e-5,
        latency_s=0.0001,
        journal_s=0.25,
    )
    return Calibration(made, {f.name: f"as {f.name}" for f in dataclasses.fields(Cluster)})


def test_a_stored_calibration_is_a_cluster_of_the_dry_run(tmp_path: Path) -> None:
    calibration, path = _calibration(), tmp_path / "cluster" / "shelf_3.yaml"
    store(calibration, path)
    assert read_cluster(path) == calibration.cluster
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        if not line.startswith("#"):  # each has its source
            assert lines[number - 1].startswith(f"# as {line.partition(':')[0]}")
    assert list(path.parent.iterdir()) == [path]


def test_rates_of_this_host_are_rates() -> None:
    for rate in (copy_rate(), pack_rate(), digest_rate()):
        assert isinstance(rate, Rate)
        assert 0.05 < rate.attainable <= rate.nominal < 10_000


def test_a_decision_takes_time(tmp_path: Path) -> None:
    assert 0 < journal_s(tmp_path) < 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a b"}, "letters, digits"),
        ({"sources": 0}, "sources=0"),
        ({"addresses": ("somewhere",)}, "somewhere"),
        ({"nic_gbit_per_s": 0.0}, "above 0"),
        ({"nic_gbit_per_s": float("inf")}, "above 0, and a number"),
    ],
)
def test_options_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CalibrateOptions(**changes)  # type: ignore[arg-type]


def test_a_file_that_cannot_be_written_is_known_before_anything_is_measured(tmp_path: Path) -> None:
    options = CalibrateOptions(out=tmp_path)
    with pytest.raises(ConfigError, match=r"--out .* is a folder; name a file such as cluster/"):
        run_calibrate(options, Console())


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path: Path) -> None:
    target = tmp_path / "cluster.yaml"
    (target / "inside").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"cluster\.yaml cannot be written"):
        store(_calibration(), target)
    assert [path.name for path in tmp_path.iterdir()] == ["cluster.yaml"]
