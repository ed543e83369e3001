"""RDMA ports of hosts that tests made up, and how the doctor shows them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from support.sysfs import FakeSysfs
from weightsync.doctor import _port_table
from weightsync.transport.verbs import RdmaPort, rdma_ports

LINK_LOCAL = ("fe80:0000:0000:0000:0e42:a1ff:fe00:0001", "IB/RoCE v1")
ROUTABLE_V1 = ("0000:0000:0000:0000:0000:ffff:0a00:0007", "IB/RoCE v1")
ROUTABLE_V2 = ("0000:0000:0000:0000:0000:ffff:0a00:0007", "RoCE v2")

SWITCH = "pci0000:16/0000:16:01.0/0000:17:00.0"


@pytest.fixture
def ports(tmp_path: Path) -> dict[str, RdmaPort]:
    """A server with a GPU beside one NIC, GPUs elsewhere, and all kinds of ports."""
    sysfs = FakeSysfs(tmp_path)
    sysfs.nic("mlx5_0", f"{SWITCH}/0000:18:00.0/0000:19:00.0", numa_node=0)
    gids = (LINK_LOCAL, ROUTABLE_V1, ROUTABLE_V2)
    sysfs.port("mlx5_0", gids=gids, interface="eth2")
    sysfs.port("mlx5_0", 2, state="1: DOWN", rate="40 Gb/sec (4X QDR)", gids=(LINK_LOCAL,))
    sysfs.nic("mlx5_1", "pci0000:80/0000:80:01.0/0000:81:00.0", numa_node=1)
    infiniband = ("fe80:0000:0000:0000:0e42:a1ff:fe00:0002", "IB/RoCE v1")
    sysfs.port("mlx5_1", link_layer="InfiniBand", rate="2.5 Gb/sec (1X SDR)", gids=(infiniband,))
    sysfs.nic("rxe0", None)
    sysfs.port("rxe0", rate="unknown", gids=(ROUTABLE_V1,), interface="nic0")
    sysfs.gpu(f"{SWITCH}/0000:18:01.0/0000:1a:00.0", numa_node=0)
    sysfs.gpu(f"{SWITCH}/0000:18:02.0/0000:1b:00.0/0000:1c:00.0/0000:1d:00.0", numa_node=0)
    sysfs.gpu("pci0000:16/0000:16:02.0/0000:1e:00.0", numa_node=0)
    sysfs.gpu("pci0000:30/0000:30:01.0/0000:31:00.0", numa_node=0)
    sysfs.pci("pci0000:30/0000:30:01.0/0000:32:00.0", numa_node=0)  # no GPU
    return {port.name: port for port in rdma_ports(str(tmp_path))}


def test_every_port_is_found_with_its_facts(ports: dict[str, RdmaPort]) -> None:
    assert list(ports) == ["mlx5_0:1", "mlx5_0:2", "mlx5_1:1", "rxe0:1"]
    first, second = ports["mlx5_0:1"], ports["mlx5_0:2"]
    assert (first.is_active, first.state, first.gbit_per_s) == (True, "ACTIVE", 400.0)
    assert (first.numa_node, first.interface, first.pci_address) == (0, "eth2", "0000:19:00.0")
    assert (second.is_active, second.state, second.gbit_per_s) == (False, "DOWN", 40.0)
    assert (ports["mlx5_1:1"].link_layer, ports["mlx5_1:1"].gbit_per_s) == ("InfiniBand", 2.5)
    software = ports["rxe0:1"]
    assert (software.numa_node, software.pci_address, software.gpus) == (-1, "", ())
    assert software.gbit_per_s == 0


def test_gids_are_chosen_from_the_table(ports: dict[str, RdmaPort]) -> None:
    assert ports["mlx5_0:1"].gid_index == 2
    assert ports["mlx5_0:1"].gids[2] == (2, "10.0.0.7", "RoCE v2")
    assert ports["mlx5_0:2"].gid_index == -1  # RoCEv1 only
    assert ports["mlx5_1:1"].gid_index == 0
    assert ports["rxe0:1"].gid_index == -1


def test_gpus_have_the_distances_of_the_pci_tree(ports: dict[str, RdmaPort]) -> None:
    assert ports["mlx5_0:1"].gpus == (
        ("0000:1a:00.0", "PIX"),  # another port of the same switch
        ("0000:1d:00.0", "PXB"),  # behind a second one
        ("0000:1e:00.0", "PHB"),
        ("0000:31:00.0", "NODE"),
    )
    assert {distance for _, distance in ports["mlx5_1:1"].gpus} == {"SYS"}


def shown(ports: list[RdmaPort]) -> str:
    text = io.StringIO()
    Console(file=text, width=160).print(_port_table(ports))
    return text.getvalue()


def test_the_table_names_what_to_choose_and_what_is_missing(ports: dict[str, RdmaPort]) -> None:
    lines = {
        line.split()[0]: line for line in shown(list(ports.values())).splitlines() if line.strip()
    }
    for word in ("ACTIVE", "Ethernet", "400", "eth2", "10.0.0.7 (RoCE v2)", "PIX 0000:1a:00.0"):
        assert word in lines["mlx5_0:1"]
    assert "DOWN" in lines["mlx5_0:2"]
    assert "none fits" in lines["mlx5_0:2"]
    assert "give its interface an IP address" in lines["rxe0:1"]
    assert "SYS 0000:1a:00.0 0000:1d:00.0" in lines["mlx5_1:1"]


def test_without_gpus_there_is_no_column_for_them(ports: dict[str, RdmaPort]) -> None:
    assert "nearest GPUs" in shown(list(ports.values()))
    assert "nearest GPUs" not in shown([ports["rxe0:1"]])
