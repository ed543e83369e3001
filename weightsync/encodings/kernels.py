"""The compiled kernels, imported when first used so that planning needs no extension.

`weightsync/_native.pyi` describes their tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightsync.errors import NativeUnavailableError

if TYPE_CHECKING:
    from weightsync._native import check_fill, digest, fill, kernel_info, pack, pack_digest

__all__ = ["check_fill", "digest", "fill", "kernel_info", "pack", "pack_digest"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from weightsync import _native
    except ImportError as error:
        raise NativeUnavailableError(
            f"weightsync._native is not built ({error}); run make setup or pip install -e ."
        ) from error
    found = getattr(_native, name)
    globals()[name] = found
    return found
