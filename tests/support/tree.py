"""The source tree as the repository's own tests see it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

__all__ = ["MOUNTED", "PACKAGE", "ROOT", "is_generated", "module_name", "package_files"]

ROOT: Final = Path(__file__).resolve().parents[2]
PACKAGE: Final = ROOT / "weightsync"
# Folders at the top that are sub-packages through a link.
MOUNTED: Final = ("planners", "integrations", "configs")


def package_files(package: Path = PACKAGE, suffix: str = ".py") -> Iterator[Path]:
    """Files of the import package, through the links, in a fixed order."""
    for folder, subfolders, names in os.walk(package, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if name != "__pycache__")
        for name in sorted(names):
            if name.endswith(suffix):
                yield Path(folder, name)


def module_name(path: Path, package: Path = PACKAGE) -> str:
    """`weightsync/ir/plan.py` -> `weightsync.ir.plan`."""
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_generated(path: Path) -> bool:
    """True for what protoc wrote."""
    return path.stem.endswith(("_pb2", "_pb2_grpc"))
