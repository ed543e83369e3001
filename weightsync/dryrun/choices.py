"""Choices of `weightsync plan`: Hydra's config groups and overrides, through its Compose API.

Options are files in `configs/<group>/`; a folder of the user is searched first. Nothing below this
module sees Hydra: it gives plain values.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from weightsync.errors import ConfigError

__all__ = ["GROUPS", "choose", "preset"]

GROUPS: Final = ("model", "trainer", "rollout", "cluster", "transport")

_ROOT: Final = "weightsync.configs"
_FOLDER: Final = Path(__file__).parents[1] / "configs"
_PRIMARY: Final = "weightsync_plan"
_DEFAULTS: Final = {"cluster": "h100_cx7", "transport": "default"}
_OVERRIDE: Final = re.compile(r"(\+{0,2}|~)[\w./@]+=|~[\w.]+$")
_UNKNOWN_KEY: Final = re.compile(r"Could not override '([^']*)'")
_UNKNOWN_OPTION: Final = re.compile(r"Could not find '(\w+)/([^']*)'")

Values = dict[str, Any]


def choose(overrides: Sequence[str], config_dir: Path | None = None) -> dict[str, Values]:
    """Compose the groups.

    Args:
        overrides: As on Hydra's command line: `trainer=fsdp2`, `trainer.fsdp=16`.
        config_dir: A folder with groups of the user, such as `DIR/cluster/ours.yaml`; an option
            that is in it hides ours of the same name.

    Returns:
        The values of each group.

    Raises:
        ConfigError: An override that there is not, with those that there are, or a group without
            a choice.
    """
    with _hydra(config_dir):
        config = _compose(overrides)
        for group in ("trainer", "rollout"):
            if not config.get(group):
                raise ConfigError(_no_choice(group))
        try:
            values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{error.full_key}: {_first_line(error)}") from error
        assert isinstance(values, dict)
        for group in GROUPS:
            if not isinstance(values.get(group), dict):
                raise ConfigError(f"{group} must be a group of keys, not {values.get(group)!r}")
        if values["model"].get("config") is None and values["model"].get("preset") is None:
            raise ConfigError(_no_choice("model"))
    return {group: values[group] for group in GROUPS}


def preset(group: str, name: str, read: Callable[[Path], Any], suffix: str = ".yaml") -> Any:
    """Read a file of `configs/`, without Hydra.

    Args:
        group: Its folder.
        name: Its name without the suffix.
        read: Gets the path.
        suffix: Of the file.

    Raises:
        ConfigError: There is none; names those that there are.
    """
    found = {path.stem: path for path in (_FOLDER / group).glob(f"*{suffix}")}
    if name not in found:
        raise ConfigError(f"no {group} is named {name!r}; there are: {', '.join(sorted(found))}")
    return read(found[name])


@contextlib.contextmanager
def _hydra(config_dir: Path | None) -> Iterator[None]:
    """Have Hydra search the user's folder, if any, before ours."""
    if GlobalHydra.instance().is_initialized():
        raise ConfigError("weightsync plan composes its own configuration: call it outside Hydra")
    # The search path can be changed by an override only where the primary config does not come
    # from it; so that is stored, not read.
    primary = {
        "defaults": ["_self_", *({group: _DEFAULTS.get(group)} for group in GROUPS)],
        "model": {"name": None, "preset": None, "config": None},
    }
    ConfigStore.instance().store(_PRIMARY, primary)
    if config_dir is None:
        with initialize_config_module(_ROOT, version_base=None):
            yield
        return
    if not config_dir.is_dir():
        raise ConfigError(f"--config-dir {config_dir} is no folder")
    _check_folder(config_dir)
    with initialize_config_dir(str(config_dir.absolute()), version_base=None):
        yield


def _check_folder(folder: Path) -> None:
    """A folder whose groups have other names would be searched in vain, and silently."""
    if not any((folder / group).is_dir() for group in GROUPS):
        raise ConfigError(
            f"--config-dir {folder} has none of the folders {', '.join(GROUPS)}; put for example a "
            f"cluster into {folder / 'cluster' / 'NAME.yaml'}"
        )


def _compose(overrides: Sequence[str]) -> DictConfig:
    for text in overrides:
        if not _OVERRIDE.match(text) or text.lstrip("+~").startswith("hydra"):
            raise ConfigError(
                f"{text!r} is no override; write GROUP=OPTION or GROUP.KEY=VALUE, with groups "
                f"{', '.join(GROUPS)}"
            )
    try:
        return _composed(overrides)
    except OverrideParseException as error:
        raise ConfigError(
            f"{error.override} cannot be read as GROUP.KEY=VALUE: {_first_line(error)}; close "
            "brackets and quotes"
        ) from error
    except YAMLError as error:  # OmegaConf lets these through
        found = " ".join(str(error).split())
        raise ConfigError(f"a file of --config-dir is no YAML: {found}") from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_explain(str(error), overrides)) from error


def _composed(overrides: Sequence[str]) -> DictConfig:
    return compose(_PRIMARY, overrides=[f"hydra.searchpath=[pkg://{_ROOT}]", *overrides])


def _explain(message: str, overrides: Sequence[str]) -> str:
    """Say which options or keys there are instead of the one that is not."""
    option = _UNKNOWN_OPTION.search(message)
    if option is not None and option[1] in GROUPS:
        group, name = option[1], option[2]
        return f"{group}={name}: no such option; there are: {', '.join(_options(group))}"
    key = _UNKNOWN_KEY.search(message)
    if key is None:
        also = f"; in {' '.join(overrides)}, GROUP=VALUE needs the name of an option"
        return _first_line(message) + (also if "Config group" in message else "")
    group, _, name = key[1].partition(".")
    if group not in GROUPS:
        return f"there is no group {group!r}; there are: {', '.join(GROUPS)}"
    if not name:
        return f"{group} takes the name of an option: {', '.join(_options(group))}"
    # What the choices alone make of the group; one that is wrong was found before.
    found = _composed([text for text in overrides if re.fullmatch(r"\w+=\w+", text)]).get(group)
    if not found:
        return f"{key[1]}: {_no_choice(group)}"
    return f"{group} has no key {name!r}; it has: {', '.join(_keys(found))}"


def _keys(values: DictConfig, prefix: str = "") -> Iterator[str]:
    for key, value in ((str(k), v) for k, v in values.items()):
        if isinstance(value, DictConfig):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _options(group: str) -> list[str]:
    loader = GlobalHydra.instance().config_loader()
    names: list[str] = loader.get_group_options(group, ObjectType.CONFIG)
    if group != "model":  # of a JSON file only the option beside it counts
        return names
    return [name for name in names if not name.endswith(".json")]


def _no_choice(group: str) -> str:
    also = ", or model.config=PATH of a config.json" if group == "model" else ""
    return f"choose a {group}: {group}=NAME of {', '.join(_options(group))}{also}"


def _first_line(error: object) -> str:
    return str(error).partition("\n")[0]
