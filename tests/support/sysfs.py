"""A folder like /sys with RDMA devices and GPUs in it, for tests of what is read there."""

from __future__ import annotations

from pathlib import Path
from typing import Final

__all__ = ["FakeSysfs"]

_NVIDIA: Final = "0x10de"
_3D_CONTROLLER: Final = "0x030200"


class FakeSysfs:
    """Devices at places of a PCI tree.

    Args:
        root: An empty folder; it becomes /sys.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def _write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")

    def _link(self, path: str, target: str) -> None:
        link = self.root / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(self.root / target)

    def pci(self, place: str, numa_node: int = -1, kind: str = "0x020000") -> str:
        """A PCI device at, for example, "pci0000:16/0000:16:01.0/0000:17:00.0"; its folder."""
        folder = f"devices/{place}"
        self._write(f"{folder}/numa_node", str(numa_node))
        self._write(f"{folder}/class", kind)
        self._write(f"{folder}/vendor", _NVIDIA)  # Mellanox is theirs, but the class tells
        self._link(f"bus/pci/devices/{Path(place).name}", folder)
        return folder

    def gpu(self, place: str, numa_node: int = -1) -> None:
        self.pci(place, numa_node, _3D_CONTROLLER)

    def nic(self, name: str, place: str | None, numa_node: int = -1) -> None:
        """An RDMA device; without a place one of software."""
        if place is None:
            self._write(f"class/infiniband/{name}/node_type", "1: CA")
        else:
            self._link(f"class/infiniband/{name}/device", self.pci(place, numa_node))

    def port(
        self,
        nic: str,
        number: int = 1,
        *,
        state: str = "4: ACTIVE",
        rate: str = "400 Gb/sec (4X NDR)",
        link_layer: str = "Ethernet",
        gids: tuple[tuple[str, str], ...] = (),
        interface: str = "",
    ) -> None:
        """A port; `gids` are texts and types, from index 0 on."""
        folder = f"class/infiniband/{nic}/ports/{number}"
        self._write(f"{folder}/state", state)
        self._write(f"{folder}/rate", rate)
        self._write(f"{folder}/link_layer", link_layer)
        for index, (text, kind) in enumerate(gids):
            self._write(f"{folder}/gids/{index}", text)
            self._write(f"{folder}/gid_attrs/types/{index}", kind)
        if interface:
            self._write(f"{folder}/gid_attrs/ndevs/0", interface)
