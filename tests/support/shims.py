"""`fi_shuffle.so`, which makes libfabric deliver out of order, built on first use and kept."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from support.tree import ROOT

__all__ = ["SHIMS", "compile_cpp", "fi_shuffle", "shuffled"]

SHIMS: Final = ROOT / "native/tests/shims"
CACHE: Final = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "weightsync"
# -O2: fi_shuffle passes questions on by jumping. The warnings are those of native/CMakeLists.txt.
FLAGS: Final = (
    "-std=c++20", "-O2", "-fPIC", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror",
)  # fmt: skip


def compile_cpp(source: Path, target: Path, *options: str) -> None:
    """Compile one file of C++; an `AssertionError` with the compiler's words if that fails."""
    command = ["c++", *FLAGS, str(source), "-o", str(target), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-8000:]


def fi_shuffle() -> Path:
    """The path of the library; takes seconds the first time."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for name in ("fi_abi.hpp", "fi_shuffle.hpp", "fi_shuffle.cpp"):
        digest.update((SHIMS / name).read_bytes())
    library = CACHE / f"fi_shuffle-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        fresh = library.with_suffix(f".{os.getpid()}")
        compile_cpp(SHIMS / "fi_shuffle.cpp", fresh, "-shared", "-ldl")
        fresh.rename(library)
    return library


def shuffled(
    environ: Mapping[str, str], *, window: int = 16, seed: int = 1, stats: Path | None = None
) -> dict[str, str]:
    """An environment in which libfabric's writes arrive out of order.

    Args:
        environ: The environment to start from.
        window: So many writes are held back at most, for each endpoint.
        seed: Of the order.
        stats: A file that gets a line "PID HELD REORDERED" from each process at its end.
    """
    preload = " ".join(filter(None, (str(fi_shuffle()), environ.get("LD_PRELOAD", ""))))
    return {
        **environ,
        "LD_PRELOAD": preload,
        "FI_SHUFFLE_WINDOW": str(window),
        "FI_SHUFFLE_SEED": str(seed),
        **({"FI_SHUFFLE_STATS": str(stats)} if stats else {}),
    }
