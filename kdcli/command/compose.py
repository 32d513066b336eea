"""Hydra, driven: where configs come from, one composed config, and its errors in plain words."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import xxhash
import yaml
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from kdcli.command import catalog, control, guard
from kdcli.config import schema
from kdcli.config.nearest import suggest
from kdcli.config.schema import SECTIONS
from kdcli.errors import ConfigError
from kdcli.store import paths

version.setbase("1.3")

MODELS = ("teacher", "student")  # of a distillation


class RecipeSource(FileConfigSource):
    """A folder of recipes as the config group `recipe`; what a recipe says, it says of the whole config."""

    @staticmethod
    def scheme() -> str:
        return "recipes"

    def load_config(self, config_path: str) -> ConfigResult:
        result = super().load_config(_inside(config_path))
        result.header["package"] = result.header.get("package") or "_global_"
        return result

    def is_group(self, config_path: str) -> bool:
        return config_path == "" or (_is_recipe(config_path) and self._has_recipes(_inside(config_path)))

    def is_config(self, config_path: str) -> bool:
        return _is_recipe(config_path) and super().is_config(_inside(config_path))

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if config_path == "":
            return ["recipe"] if results_filter in (None, ObjectType.GROUP) else []
        folder = Path(self.path, _inside(config_path))
        files = [f.stem for f in folder.glob("*.yaml")] if results_filter in (None, ObjectType.CONFIG) else []
        groups = [f.name for f in folder.iterdir() if f.is_dir()] if results_filter in (None, ObjectType.GROUP) else []
        return sorted({*files, *(g for g in groups if self._has_recipes(f"{_inside(config_path)}/{g}".lstrip("/")))})

    def _has_recipes(self, folder: str) -> bool:
        return next(Path(self.path, folder).rglob("*.yaml"), None) is not None


def _is_recipe(config_path: str) -> bool:
    return config_path == "recipe" or config_path.startswith("recipe/")


def _inside(config_path: str) -> str:
    return config_path.removeprefix("recipe").lstrip("/")


class Loader(ConfigLoaderImpl):
    """Hydra's loader, with two changes: a composed config that would run code is refused before anything acts on it,
    and a schedule that is typed (`objective.kd.t={schedule: linear, …}`) replaces what is there, as a number does,
    where Hydra would merge it into a schedule of another kind."""

    _replaced: Sequence[str] = ()

    def load_configuration(
        self, config_name: str | None, overrides: list[str], *args: Any, **kwargs: Any
    ) -> DictConfig:
        self._replaced = [place for one in overrides if (place := _place_of_schedule(one))]
        config = super().load_configuration(config_name, overrides, *args, **kwargs)
        _drop_leftovers(config)
        _drop_of_other_schedules(config)
        guard.refuse_code(OmegaConf.to_container(config, resolve=False))  # type: ignore[arg-type]
        if config_name == "augment":
            _drop_of_training(config)
        return config

    def _compose_config_from_defaults_list(self, *args: Any, **kwargs: Any) -> DictConfig:
        """The config before what was typed is applied."""
        config = super()._compose_config_from_defaults_list(*args, **kwargs)
        for place in self._replaced:
            if isinstance(OmegaConf.select(config, place), DictConfig):
                OmegaConf.update(config, place, None)
        return config


@contextmanager
def hydra(arguments: Namespace | None = None) -> Iterator[Hydra]:
    """Hydra with kdcli's search path: the user's ./configs and ./recipes, ours, then --config-dir."""
    SourcesRegistry.instance().register(RecipeSource)
    GlobalHydra.instance().clear()
    app = Hydra(task_name="kdcli", config_loader=Loader(_search_path(arguments)))
    GlobalHydra.instance().initialize(app)
    try:
        yield app
    finally:
        GlobalHydra.instance().clear()


def compose(app: Hydra, verb: str, overrides: Sequence[str], mode: RunMode = RunMode.RUN) -> DictConfig:
    """The composed config with its `hydra` node. Raises ConfigError for what Hydra refuses."""
    try:
        config = app.config_loader.load_configuration(verb, list(overrides), run_mode=mode)
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, app, verb, overrides) from error
    except ValueError as error:  # of Hydra's, for a number where the name of an option belongs
        raise ConfigError(_unnamed(overrides) or " ".join(str(error).split())) from error
    HydraConfig.instance().set_config(config)
    return config


def plain(config: DictConfig, verb: str) -> dict[str, Any]:
    """The config as plain resolved values, with its verb, without Hydra's node, the control applied;
    `${oc.env:NAME}` stays a reference.

    Raises ConfigError for an interpolation that leads nowhere.
    """
    try:
        own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        values: Any = OmegaConf.to_container(own, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise ConfigError(_interpolation(error)) from error
    if verb == "augment":
        values = {key: value for key, value in values.items() if key not in MODELS}
    return {"verb": verb, **control.applied(values)}


def explain(error: BaseException, app: Hydra, verb: str, overrides: Sequence[str]) -> ConfigError:
    """What Hydra or OmegaConf refused, as a sentence with the nearest valid word."""
    if isinstance(error, MissingConfigException):
        return ConfigError(_missing(error))
    if isinstance(error, OverrideParseException):
        return ConfigError(
            f"{error.override}: is not KEY=VALUE as Hydra writes it; quote special characters: KEY='VALUE'"
        )
    cause = error if isinstance(error, InterpolationResolutionError) else error.__cause__
    if isinstance(cause, InterpolationResolutionError):
        return ConfigError(_interpolation(cause, overrides))
    text = str(error) or str(error.__cause__ or "")
    if found := re.match(r"Could not override '([^']+)'", text):
        return ConfigError(_unknown_key(found[1], app, verb, overrides))
    if found := re.match(r"Ambiguous value for argument '([^']+)'", text):
        return ConfigError(f"{found[1]}: is several values; add -m to run one job for each, or write [a,b] for a list")
    if found := re.match(r"Override (\S+) looks like a config group override, but config group '(.+)' does", text):
        return ConfigError(f"{found[1]}: there is no group {found[2]}; {suggest(found[2], catalog.GROUPS, limit=20)}")
    if "requires --multirun" in text:
        return ConfigError(f"{text.rstrip('.')}; add -m")
    if isinstance(error.__cause__, OmegaConfBaseException):
        text = f"{text} {error.__cause__}" if str(error.__cause__) not in text else text
    return ConfigError(" ".join(line.strip() for line in text.splitlines() if "object_type" not in line))


def _drop_leftovers(config: DictConfig) -> None:
    """Where the command chooses another option than the recipe (`teacher=none`), the settings that the recipe gave its
    own option go with it; what the command itself sets stays, to be checked."""
    overrides = [one.lstrip("+").partition("=") for one in config.hydra.overrides.task]
    typed = {key for key, _, _ in overrides}
    for key, _, option in overrides:
        group, _, place = key.lstrip("~").partition("@")
        if key.startswith("~") and group in catalog.GROUPS:
            _drop(config, place or group)
            continue
        node = OmegaConf.select(config, place or group) if group in catalog.GROUPS else None
        file = catalog.options(group).get(option) if isinstance(node, DictConfig) else None
        known = yaml.safe_load(file.read_text("utf-8")) if file else None
        if node is None or known is None:
            continue
        known = {*known, *(str(key).partition("@")[2] for one in known.get("defaults", []) for key in one)}
        with open_dict(config):
            for name in [str(name) for name in node if name not in known]:
                if not any(
                    one == f"{place or group}.{name}" or one.startswith(f"{place or group}.{name}.") for one in typed
                ):
                    del node[name]


def _drop_of_training(config: DictConfig) -> None:
    """Take out of an augmentation what only a distillation has: a recipe is of both. The models' sections stay until
    everything is resolved, since writers may be told their paths (`${student.path}`)."""
    of_both, own = {*SECTIONS["augment"], *MODELS, "hydra"}, {f.name for f in fields(schema.AugmentRun)}
    with open_dict(config):
        for section in [*SECTIONS["distill"], control.GROUP]:
            if section in config and section not in of_both:
                del config[section]
        for key in [f.name for f in fields(schema.Run) if f.name in config.run and f.name not in own]:
            del config.run[key]
        if config.run.get("resume") not in ("auto", "never"):  # a checkpoint of the training
            config.run.resume = "auto"
        config.report = {name: node for name, node in config.report.items() if not _shows_training(node)}


def _shows_training(node: Any) -> bool:
    return node is not None and str(node.get("_target_", "")).startswith("kdcli.report.console.")


def _place_of_schedule(override: str) -> str | None:
    """The setting of an objective that is given a schedule, if `override` does that."""
    if not override.startswith("objective.") or "schedule" not in override:
        return None
    parsed = OverridesParser.create().parse_override(override)
    value = None if parsed.is_sweep_override() else parsed.value()
    return parsed.key_or_group if isinstance(value, dict) and "schedule" in value else None


def _drop_of_other_schedules(config: DictConfig) -> None:
    """Where a recipe or the command chooses another kind of schedule than the option's file
    (`objective.kd.t.schedule=linear`), the settings that the file gave its own kind go with it."""
    typed = {one.lstrip("+").partition("=")[0] for one in config.hydra.overrides.task}
    terms: Any = OmegaConf.to_container(config, resolve=False).get("objective")  # type: ignore[union-attr]
    for term, component in (terms if isinstance(terms, dict) else {}).items():
        for key, node in (component if isinstance(component, dict) else {}).items():
            place = f"objective.{term}.{key}"
            if isinstance(node, dict) and "schedule" in node and place not in typed:
                for name in _told_by_option(str(component.get("_target_")), key, node):
                    if f"{place}.{name}" not in typed:
                        _delete(config, f"{place}.{name}")


def _told_by_option(target: str, key: str, node: Mapping[str, Any]) -> list[str]:
    """What an option's file says of its own kind of schedule, and the kind that was chosen instead does not know."""
    file = catalog.options("objective").get(target.rpartition(".")[0].rpartition(".")[2])
    default = (yaml.safe_load(file.read_text("utf-8")) if file else {}).get(key)
    if not isinstance(default, dict) or default.get("schedule") == node["schedule"]:
        return []
    from kdcli.config.signature import settings
    from kdcli.train.schedule import KINDS  # here, because it imports torch

    kind = KINDS.get(str(node["schedule"]))
    known = settings(kind) or {} if kind else default
    return [name for name in node if name not in ("schedule", *known) and default.get(name) == node[name]]


def _drop(config: DictConfig, place: str) -> None:
    """Remove what a recipe says of a component that the command has removed (`~objective@objective.ce`)."""
    node = OmegaConf.select(config, place)
    if isinstance(node, DictConfig) and "_target_" not in node:
        _delete(config, place)


def _delete(config: DictConfig, place: str) -> None:
    parent, _, last = place.rpartition(".")
    with open_dict(config):
        del (OmegaConf.select(config, parent) if parent else config)[last]


def _job_folder(override_dirname: str) -> str:
    """A job's folder in its sweep: the same overrides, the same folder. Never the overrides themselves."""
    return f"job-{xxhash.xxh3_64_hexdigest(override_dirname.encode())[:8]}"


def _reference(name: str, *default: str) -> str:
    """Environment variables are read where the value is used, and are never written to disk."""
    return "${oc.env:" + ",".join([name, *map(str, default)]) + "}"


def _search_path(arguments: Namespace | None) -> ConfigSearchPathImpl:
    path = ConfigSearchPathImpl()
    path.append("hydra", "pkg://hydra.conf")
    own_configs, own_recipes = Path("configs").resolve(), Path("recipes").resolve()
    if own_configs.is_dir() and own_configs != paths.configs().resolve():
        path.append("user", f"file://{own_configs}")
    path.append("main", f"file://{paths.configs()}")
    for folder in getattr(arguments, "recipe_folders", []):
        path.append("recipe file", f"recipes://{folder}")
    if own_recipes.is_dir() and own_recipes != paths.recipes().resolve():
        path.append("user recipes", f"recipes://{own_recipes}")
    path.append("recipes", f"recipes://{paths.recipes()}")
    if extra := getattr(arguments, "config_dir", None):
        if not Path(extra).is_dir():
            raise ConfigError(f"--config-dir {extra}: there is no such folder")
        path.append("command-line", f"file://{Path(extra).resolve()}")
    for found in Plugins.instance().discover(SearchPathPlugin):
        plugin = found()
        assert isinstance(plugin, SearchPathPlugin)
        plugin.manipulate_search_path(path)
    path.append("schema", "structured://")
    return path


def _missing(error: MissingConfigException) -> str:
    name = error.missing_cfg_file or ""
    group, _, option = name.rpartition("/")
    if group == "recipe" or name.startswith("recipe/"):
        return f"+recipe={name.removeprefix('recipe/')}: there is no such recipe; {suggest(option, catalog.recipes())}"
    return f"{group}={option}: the group {group} has no such option; {suggest(option, error.options or [])}"


def _unnamed(overrides: Sequence[str]) -> str:
    """The choice in a group that is no name, in words."""
    for one in OverridesParser.create().parse_overrides(list(overrides)):
        group = one.key_or_group
        if group in _choices() and not one.is_sweep_override() and not isinstance(one.value(), str | list | None):
            known = catalog.options(group) if group in catalog.GROUPS else catalog.recipes()
            return f"{group}={one.value()}: is not the name of an option; {suggest(str(one.value()), known)}"
    return ""


def _unknown_key(key: str, app: Hydra, verb: str, overrides: Sequence[str]) -> str:
    if "@" in key or "/" in key:
        group, _, place = key.partition("@")
        name = place.rpartition(".")[2] or "NAME"
        if group in catalog.GROUPS:
            return f"{key}: the config has no term {name} yet; write +{key}=… to add it, see `kdcli ls {group}`"
        return f"{key}: there is no group {group}; {suggest(group, catalog.GROUPS)}"
    chosen = [
        one for one in overrides if "@" in one.partition("=")[0] or one.lstrip("+~").partition("=")[0] in _choices()
    ]
    try:
        config = app.config_loader.load_configuration(verb, chosen, run_mode=RunMode.MULTIRUN)
    except (HydraException, OmegaConfBaseException, ConfigError):
        return f"{key}: there is no such key; `kdcli {verb} --cfg job` shows those that there are"
    keys = _keys(OmegaConf.to_container(config, resolve=False))
    parent, _, _ = key.rpartition(".")
    siblings = [k for k in keys if k.rpartition(".")[0] == parent]
    hint = suggest(key, siblings or keys)
    if not hint.startswith("did"):
        known = f"{hint}; " if siblings else ""
        hint = f"{known}`kdcli {verb} --cfg job` shows all, and +{key}=… adds a new one"
    return f"{key}: there is no such key; {hint}"


def _choices() -> tuple[str, ...]:
    return ("recipe", *catalog.CHOICES)


def _keys(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, Mapping):
        return []
    own = [f"{prefix}{key}" for key in node if not str(key).startswith("_") and (prefix or key != "hydra")]
    return own + [k for key, value in node.items() if prefix or key != "hydra" for k in _keys(value, f"{prefix}{key}.")]


def _interpolation(error: BaseException, overrides: Sequence[str] = ()) -> str:
    text = next(iter(str(getattr(error, "msg", None) or error).splitlines()), "")
    missing = text.split("'")[1] if text.count("'") > 1 else text
    place = getattr(error, "full_key", None) or next((one for one in overrides if missing in one), "config")
    return f"{place}: {text}; write ${{path.of.a.key}} with a key that exists"


# At import, because the processes of a parallel sweep import this module and nothing else of kdcli.command.
OmegaConf.register_new_resolver("oc.env", _reference, replace=True)
OmegaConf.register_new_resolver("kdcli.job", _job_folder, replace=True)
