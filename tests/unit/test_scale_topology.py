"""The network of the scale model on paper: links, shapes, addresses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.clusters import cluster
from weightsync.errors import ConfigError
from weightsync.planners.cluster import Cluster
from weightsync.scale.layouts import LAYOUTS, Counts, limit_s, plan_options, sized
from weightsync.scale.run import ScaleOptions, run_scale
from weightsync.scale.topology import Network, Shape


def test_every_rail_of_every_host_is_a_shaped_link_in_a_namespace() -> None:
    network = Network(3, 2, Shape(mbit_per_s=50, latency_ms=7, burst_bytes=65536))
    links, queues = network.links(), network.queues()
    assert set(links) == set(queues) == {"wsm-switch", "wsm-0", "wsm-1", "wsm-2"}
    joined = "\n".join(links["wsm-switch"])
    for host in range(3):
        for rail in range(2):
            port = f"p{host}r{rail}"
            assert f"link add {port} mtu 9000 type veth peer name rail{rail}" in joined
            assert f"link set {port} master br{rail} up" in joined
            assert f"addr add 10.{81 + rail}.0.{host + 1}/24 dev rail{rail}" in links[f"wsm-{host}"]
        assert f"link set p{host}ctl master brctl up" in joined
        assert f"addr add 10.80.0.{host + 1}/24 dev ctl" in links[f"wsm-{host}"]
    shaped = [line for lines in queues.values() for line in lines]
    assert len(shaped) == 3 * 2 * 2  # both ends; the links for messages are not shaped
    for line in shaped:
        assert re.fullmatch(
            r"qdisc replace dev (rail\d|p\dr\d) root handle 1: "
            r"tbf rate 50mbit burst 65536 latency 7ms",
            line,
        )
    # Nothing is made outside: both ends of a link are in namespaces.
    assert all("netns wsm-" in line for line in links["wsm-switch"] if "veth" in line)


def test_hosts_of_a_node_reach_each_other_beside_their_rails() -> None:
    links = Network(4, 2, Shape(), ((1, 2),)).links()
    assert "link set p1node master brn0 up" in links["wsm-switch"]
    for own, other in ((1, 2), (2, 1)):
        for rail in range(2):
            route = f"route add 10.{81 + rail}.0.{other + 1}/32 dev node"
            assert route in links[f"wsm-{own}"]
    assert not any("node" in line for host in (0, 3) for line in links[f"wsm-{host}"])
    shaped = Network(4, 2, Shape(), ((1, 2),)).queues()
    assert not any("node" in line for lines in shaped.values() for line in lines)


def test_no_host_has_to_ask_for_another() -> None:
    network = Network(4, 2, Shape(), ((1, 2),))
    links = network.links()
    known = {
        host: {tuple(line.split()[2:7:2]) for line in links[f"wsm-{host}"] if "neigh" in line}
        for host in range(4)
    }
    of_host_3 = {
        ("10.81.0.4", "02:00:0a:51:00:04", "rail0"),
        ("10.82.0.4", "02:00:0a:52:00:04", "rail1"),
        ("10.80.0.4", "02:00:0a:50:00:04", "ctl"),
    }
    assert all(of_host_3 <= known[host] for host in range(3))
    assert "link set rail0 address 02:00:0a:51:00:04 up" in links["wsm-3"]
    assert [len(known[host]) for host in range(4)] == [9, 12, 12, 9]
    # What goes to a rail of a node's other host takes the node's own link.
    for address in ("10.79.0.3", "10.81.0.3", "10.82.0.3"):
        assert (address, "02:00:0a:4f:00:03", "node") in known[1]


def test_addresses_are_all_different() -> None:
    network = Network(25, 3, Shape())
    found = [a for host in range(25) for a in (*network.addresses(host), network.control(host))]
    assert len(set(found)) == 25 * 4


@pytest.mark.parametrize(("hosts", "rails"), [(0, 1), (251, 1), (4, 0), (4, 9)])
def test_sizes_that_cannot_be_are_refused(hosts: int, rails: int) -> None:
    with pytest.raises(ConfigError, match="1 to 250 hosts, 1 to 8 rails"):
        Network(hosts, rails, Shape())


@pytest.mark.parametrize("name", ["mbit_per_s", "latency_ms", "burst_bytes", "mtu"])
def test_a_link_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=0: at least 1"):
        Shape(**{name: 0})


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"rails: [1"])
def test_a_calibration_is_read_before_anything_is_built(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "cluster.yaml"
    if content is not None:
        path.write_bytes(content)
    steps: list[str] = []
    with pytest.raises(ConfigError, match=r"cluster\.yaml cannot be read"):
        run_scale(ScaleOptions(counts=Counts(4, 2, 1), calibration=path), steps.append)
    assert steps == []


def test_payload_of_a_frame() -> None:
    assert Shape(mtu=9000).payload_fraction == pytest.approx(8948 / 9014)
    assert Shape(mtu=1500).payload_fraction == pytest.approx(1448 / 1514)


def _links() -> Cluster:
    return cluster(
        gpus_per_node=2,
        nics_per_node=4,
        nic_gbit_per_s={"nominal": 0.1, "attainable": 0.1},
    )


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("counts", [Counts(16, 8, 4), Counts(4, 2, 1)])
def test_layouts_are_sized_to_the_seconds_asked_for(name: str, counts: Counts) -> None:
    _, plan = sized(LAYOUTS[name], counts, 4.0, _links(), plan_options())
    assert 4.0 <= limit_s(plan, _links()) < 4.9
    # Two rails of 100 Mbit/s for each rank, whichever side limits.
    most = max(
        max(plan.buckets.nbytes[ranks == rank].sum() for rank in set(ranks.tolist()))
        for ranks in (plan.buckets.src_rank, plan.buckets.dst_rank)
    )
    assert limit_s(plan, _links()) == pytest.approx(most * 8 / 200e6, rel=0.02)


def test_a_model_that_is_too_large_is_refused() -> None:
    with pytest.raises(ConfigError, match="smallest model takes"):
        sized(LAYOUTS["whole"], Counts(2, 2, 2), 0.1, _links(), plan_options())


def test_counts_must_fit() -> None:
    with pytest.raises(ConfigError, match="a divisor of sinks"):
        Counts(4, 3, 2)
