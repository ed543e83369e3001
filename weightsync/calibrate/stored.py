"""Calibrations as files: in the form of `configs/cluster`, with the source of every number."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from weightsync.calibrate.constants import Calibration
from weightsync.errors import ConfigError
from weightsync.outputs import check_output
from weightsync.planners.cluster import Cluster, Rate

__all__ = ["prepare", "store", "to_yaml"]


def prepare(path: Path, example: str) -> None:
    """Make the folder of a calibration's file, before anything is measured.

    Args:
        path: The file.
        example: A name that would do.

    Raises:
        ConfigError: It cannot be made, or as `check_output`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {path}: its folder cannot be made: {error}", path=path) from error
    check_output("--out", path, example)


def store(calibration: Calibration, path: Path) -> None:
    """Write a calibration as a cluster of `weightsync plan`, making its folder if need be.

    Raises:
        ConfigError: The file cannot be written; nothing is left of it.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(to_yaml(calibration), encoding="ascii")
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}", path=path) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def to_yaml(calibration: Calibration) -> str:
    """Return a calibration in the form of the files of `configs/cluster`."""
    lines = [
        "# Measured by `weightsync calibrate`. Rates in 10^9 bits or bytes a second, times in s.",
    ]
    for field in dataclasses.fields(Cluster):
        value = getattr(calibration.cluster, field.name)
        if isinstance(value, Rate):
            text = f"{{nominal: {value.nominal:.6g}, attainable: {value.attainable:.6g}}}"
        elif isinstance(value, bool):
            text = str(value).lower()
        elif value is None:
            text = "null"
        elif isinstance(value, float):
            text = f"{value:.6e}" if 0 < abs(value) < 0.01 else f"{value:.6g}"
            text = text if "." in text else f"{text}.0"
        else:
            text = str(value)
        lines += [f"# {calibration.how[field.name]}", f"{field.name}: {text}"]
    return "\n".join(lines) + "\n"
