"""`weightsync plan`: from overrides to a report, its files and its errors."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from weightsync.dryrun import page, rows
from weightsync.dryrun.choices import Values, choose, preset
from weightsync.dryrun.planning import HOP_KEYS, DryRun, read_model, with_hops
from weightsync.dryrun.sides import make_layout
from weightsync.errors import (
    ConfigError,
    CoverageError,
    DtypeMismatchError,
    LayoutError,
    PlanBudgetError,
    UnknownTensorError,
    WeightSyncError,
)
from weightsync.ir import PlanOptions
from weightsync.outputs import check_output
from weightsync.planners.cluster import Cluster
from weightsync.planners.rules import ModelConfig
from weightsync.units import parse_bytes

__all__ = ["PlanCommand", "run_plan"]


@dataclasses.dataclass(frozen=True)
class PlanCommand:
    """Of `weightsync plan`.

    Args:
        overrides: Of the groups, as Hydra writes them.
        config_dir: A folder with groups of the user.
        out: Parquet file for the rows of the plan.
        page: HTML file for the report.
        trace: JSON file for the predicted timeline.
    """

    overrides: Sequence[str]
    config_dir: Path | None = None
    out: Path | None = None
    page: Path | None = None
    trace: Path | None = None


def run_plan(command: PlanCommand, console: Console) -> dict[str, Any]:
    """Plan, print and write what was asked for.

    Args:
        command: What to do.
        console: Takes the tables; progress goes to stderr.

    Returns:
        The report's JSON object.

    Raises:
        ConfigError: Bad overrides; names what there is instead.
        LayoutError, PlanBudgetError: The choices do not fit together; names the override to change.
    """
    if command.out is not None:
        rows.check_target(command.out)
    if command.page is not None:
        page.check_page_target(command.page)
    if command.trace is not None:
        check_output("--trace", command.trace, "plan.json")
    targets = [path.resolve() for path in (command.out, command.page, command.trace) if path]
    if len(set(targets)) < len(targets):
        raise ConfigError("--out, --report and --trace name the same file; give each its own")
    stderr = Console(stderr=True)
    with uncollected():
        dry_run = read_choices(choose(command.overrides, command.config_dir))
    with stderr.status("planning") as status, _overrides_named(), uncollected():
        report = dry_run.run(status.update)
        files: tuple[tuple[str, Path | None, Callable[[Path], None]], ...] = (
            ("rows of the plan", command.out, report.write_rows),
            ("report", command.page, report.write_page),
            ("predicted timeline", command.trace, report.write_trace),
        )
        for what, path, write in files:
            if path is not None:
                status.update(f"writing {what}")
                write(path)
    report.print(console)
    for what, path, _ in files:
        if path is not None:
            stderr.print(f"{what}: {path}", soft_wrap=True, highlight=False)
    return report.to_json()


@contextmanager
def uncollected() -> Iterator[None]:
    """Let no garbage be looked for: what a plan is made of stays, and looking takes a tenth."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def read_choices(groups: Mapping[str, Values]) -> DryRun:
    """Make layouts, cluster and options of the groups' values.

    Raises:
        ConfigError: A value that makes no sense; names the override.
    """
    chosen = groups["model"]
    if chosen["config"] is not None:
        config, name = _read_config(chosen["config"])
    else:
        config = preset("model", Path(chosen["preset"]).stem, ModelConfig.from_json, ".json")
        name = str(chosen["name"])
    trainer, rollout = dict(groups["trainer"]), dict(groups["rollout"])
    transport, options = dict(groups["transport"]), {}
    for key in [field.name for field in dataclasses.fields(PlanOptions)]:
        if key in transport:
            options[key] = _option(key, transport.pop(key))
    staging = transport.pop("staging_bytes", None)
    gateways = transport.pop("gateways", None)
    for key in transport:
        raise ConfigError(f"transport.{key}: no such budget")
    hops = {key: _rule(key, rollout[key]) for key in HOP_KEYS if key in rollout}
    cluster = Cluster.from_mapping(groups["cluster"], where="cluster")
    sides = [
        make_layout(group, values, config)
        for group, values in (("trainer", trainer), ("rollout", rollout))
    ]
    try:
        return DryRun(
            model=name,
            trainer=sides[0],
            rollout=sides[1],
            cluster=cluster,
            replicas=rollout.get("replicas", 1),
            options=with_hops(PlanOptions(**options), cluster, **hops),
            mode=rollout.get("mode", "staged"),
            is_offloaded=trainer.get("offloaded", False),
            staging_bytes=None if staging is None else _option("staging_bytes", staging),
            gateways=gateways,
            trainer_keys=trainer,
            rollout_keys=rollout,
        )
    except ConfigError as error:
        if error.key is None:
            raise
        group = {"offloaded": "trainer", "gateways": "transport"}.get(error.key, "rollout")
        raise ConfigError(f"{error}; change {group}.{error.key}", **error.context) from error


def _read_config(path: Any) -> tuple[ModelConfig, str]:
    if not isinstance(path, str):
        raise ConfigError(f"model.config={path!r}: it is the path of a config.json, or its folder")
    try:
        return read_model(Path(path))
    except ConfigError as error:
        raise ConfigError(f"{error}; change model.config", **error.context) from error


def _rule(key: str, value: Any) -> Any:
    """Return auto, on or off; YAML reads the last two as booleans."""
    named = {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
    if named not in ("auto", "on", "off"):
        raise ConfigError(f"rollout.{key}={value!r}: it is one of auto, on, off")
    return named


def _option(key: str, value: Any) -> Any:
    if key == "ignore_extra":
        return tuple(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ConfigError(f"transport.{key}={value!r} is neither a number nor a size like 64MiB")
    try:
        return parse_bytes(value)
    except ConfigError as error:
        raise ConfigError(f"transport.{key}: {error}") from error


@contextmanager
def _overrides_named() -> Iterator[None]:
    """Add to an error of the planner which override would mend it."""
    try:
        yield
    except (LayoutError, PlanBudgetError) as error:
        raise type(error)(f"{error}. To change: {_way_out(error)}", **error.context) from error


def _way_out(error: WeightSyncError) -> str:
    if isinstance(error, PlanBudgetError):
        budgets = [*(field.name for field in dataclasses.fields(PlanOptions)), "staging_bytes"]
        named = [name for name in budgets if name in str(error)]
        return ", ".join(f"transport.{name}" for name in named or budgets)
    if isinstance(error, UnknownTensorError):
        if any(name.endswith(("_scale_inv", "_blocks", "_scales")) for name in error.missing or ()):
            return (
                "rollout.quantized=false, or rollout.encoding (fp8_block, mxfp4), by which sources "
                "encode BF16"
            )
        return "model.config (of both sides), or transport.ignore_extra for tensors to leave out"
    if isinstance(error, DtypeMismatchError):
        return "trainer.dtype, rollout.dtype or rollout.encoding"
    if isinstance(error, CoverageError) or error.side == "source":
        return "the degrees of the trainer, such as trainer.fsdp, trainer.tp and trainer.ep"
    return "the degrees of the rollout, such as rollout.tp and rollout.ep, or rollout.encoding"
