"""What the processes of a fleet are told: a layout as JSON, and how to reach the job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weightsync.errors import ConfigError
from weightsync.ir.layout import Layout, SourceLayout
from weightsync.planners import rules
from weightsync.service.credentials import MemberCredentials, load_member
from weightsync.settings import Settings

__all__ = ["credentials_of", "layout_of"]


def layout_of(side: str, spec: dict[str, Any]) -> Layout:
    """Return the layout that a description means.

    Args:
        side: "source" or "sink".
        spec: `rule`, the name of a function of `planners.rules`; `model`, a `config.json`'s
            content; `degrees`, its arguments. An engine's layout may be a source, too.

    Raises:
        ConfigError: There is no such rule, or it refuses.
    """
    rule = getattr(rules, spec["rule"], None) if spec["rule"] in rules.__all__ else None
    if rule is None:
        raise ConfigError(f"no rule {spec['rule']!r}; rules are {', '.join(rules.__all__)}")
    layout: Layout = rule(spec["model"], **spec["degrees"])
    return SourceLayout(layout) if side == "source" else layout


def credentials_of(url: str, token_file: str | None) -> MemberCredentials | None:
    """Return what a member shows to the coordinator at `url`; None on a Unix socket."""
    if token_file is None:
        return None
    return load_member(Settings.resolve(job=url, token_file=Path(token_file)))
