"""Descriptions of clusters: presets, ports, and errors that name file and key."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from support.clusters import PRESETS, cluster, preset_values
from weightsync.errors import ConfigError
from weightsync.planners.cluster import Cluster

NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))
PLAIN = {"name", "gpus_per_node", "nics_per_node", "is_full_duplex", "posting_threads"}


def test_every_cluster_of_the_field_has_a_preset() -> None:
    wanted = {"h100_cx7", "h200_cx7", "b200_cx7", "p5en_efa", "roce_ecmp"}
    assert wanted | {"eth_10g", "eth_25g", "eth_100g"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_complete_and_says_where_each_number_comes_from(name: str) -> None:
    assert Cluster.from_mapping(preset_values(name), where=name).name == name
    lines = (PRESETS / f"{name}.yaml").read_text().splitlines()
    for before, line in itertools.pairwise(lines):
        key = line.partition(":")[0]
        if not line.startswith("#") and key not in PLAIN:
            assert before.startswith("# "), f"{key} has no source"


@pytest.mark.parametrize(
    ("name", "nominal", "attainable"),
    [
        ("h100_cx7", 50e9, 47.25e9),
        ("p5en_efa", 50e9, 45.5e9),  # two NICs a GPU
        ("eth_10g", 1.25e9, 1.19375e9),  # eight GPUs share one
        ("roce_ecmp", 50e9, 33.5475e9),
    ],
)
def test_the_rate_of_a_port(name: str, nominal: float, attainable: float) -> None:
    found = Cluster.from_mapping(preset_values(name), where=name)
    assert found.port_bytes_per_s("nominal") == pytest.approx(nominal)
    assert found.port_bytes_per_s("attainable") == pytest.approx(attainable)


@pytest.mark.parametrize(
    ("gpus", "nics", "ports", "rails"),
    [
        (2, 2, [0, 1, 2, 3, 4], 1),
        (2, 4, [0, 1, 2, 3, 4], 2),
        (2, 1, [0, 0, 1, 1, 2], 1),
        (4, 2, [0, 0, 1, 1, 2], 1),
    ],
)
def test_ranks_fill_nodes_in_order(gpus: int, nics: int, ports: list[int], rails: int) -> None:
    found = cluster(gpus_per_node=gpus, nics_per_node=nics)
    assert found.port_of(5).tolist() == ports
    assert found.node_of(5).tolist() == [rank // gpus for rank in range(5)]
    assert found.rails_per_port == rails


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"nic_gbit_per_s": {"nominal": 1, "attainable": 2}}, "nic_gbit_per_s"),
        ({"nic_gbit_per_s": {"nominal": 1}}, "nic_gbit_per_s.attainable"),
        ({"nic_gbit_per_s": 5}, "nic_gbit_per_s"),
        ({"latency_s": -1.0}, "latency_s"),
        ({"latency_s": "6e-6"}, "latency_s"),
        ({"latency_s": True}, "latency_s"),
        ({"posting_threads": 0}, "posting_threads"),
        ({"posting_threads": 1.5}, "posting_threads"),
        ({"is_gpu_direct": 1}, "is_gpu_direct"),
        ({"colour": "red"}, "colour"),
        ({"name": ""}, "name"),
    ],
)
def test_a_wrong_value_names_file_and_key(change: dict[str, Any], named: str) -> None:
    values = preset_values("h100_cx7") | change
    with pytest.raises(ConfigError, match=rf"mine\.yaml: .*{named}"):
        Cluster.from_mapping(values, where="mine.yaml")


def test_a_missing_key_is_named() -> None:
    values = preset_values("h100_cx7")
    del values["latency_s"]
    with pytest.raises(ConfigError, match=r"mine\.yaml: missing key latency_s"):
        Cluster.from_mapping(values, where="mine.yaml")


def test_shapes_that_no_rank_can_be_placed_in_are_refused() -> None:
    with pytest.raises(ConfigError, match="one must be a multiple of the other"):
        cluster(gpus_per_node=3, nics_per_node=2)
    for fraction in (0.0, 1.5):
        with pytest.raises(ConfigError, match="ecmp_fraction"):
            cluster(ecmp_fraction=fraction)


def test_writes_are_as_fast_as_the_slower_of_threads_and_rails() -> None:
    by_thread = cluster(write_overhead_s=6.0, posting_threads=3, message_gap_s=1.0)
    assert by_thread.write_gap_s == 2
    assert cluster(write_overhead_s=1.0, message_gap_s=6.0, nics_per_node=2).write_gap_s == 3
