"""Config path = module path: every option is one YAML file and one class, with the same settings."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import kdcli.api as api
from kdcli.command.catalog import GROUPS, first_comment, recipes
from kdcli.config.schema import COMPONENTS, SCHEMAS, SECTIONS, TERMS, THIRD_PARTY
from kdcli.config.signature import component_in, settings
from kdcli.config.target import locate
from kdcli.config.values import problems_of
from kdcli.store import paths
from kdcli.train.schedule import start_values

CONFIGS = paths.configs()
OPTIONS = sorted(file for group in GROUPS for file in (CONFIGS / group).glob("*.yaml"))
PACKAGE = paths.PACKAGE


def ids(file: Path) -> str:
    return file.relative_to(CONFIGS).with_suffix("").as_posix()


def own_keys(content: dict[str, Any]) -> dict[str, Any]:
    """Settings of an option, with those that its defaults list brings (`/data@data: jsonl`); a schedule counts as its
    first value."""
    nested = {str(key).partition("@")[2]: {} for one in content.get("defaults", []) for key in one if "@" in str(key)}
    return nested | {key: value for key, value in start_values(content).items() if key not in ("defaults", "_target_")}


@pytest.mark.parametrize("file", OPTIONS, ids=ids)
def test_an_option_names_a_class_of_its_group(file: Path) -> None:
    content = yaml.safe_load(file.read_text())
    group = file.parent.name
    found = locate(content["_target_"], group)
    if group in COMPONENTS:
        assert issubclass(found, getattr(api, COMPONENTS[group]))


@pytest.mark.parametrize("file", OPTIONS, ids=ids)
def test_settings_are_the_constructors(file: Path) -> None:
    content = yaml.safe_load(file.read_text())
    group = file.parent.name
    third = group in THIRD_PARTY
    known = settings(locate(content["_target_"], group), skip=1 if third else 0)
    given = own_keys(content)
    assert known is not None
    if third:
        assert given.keys() <= known.keys()
    else:
        assert given.keys() == known.keys()
    for key, value in given.items():
        if value != "???" and not str(value).startswith("${") and not component_in(known[key].annotation):
            assert problems_of(value, known[key].annotation, key) == []


@pytest.mark.parametrize("file", [f for f in OPTIONS if f.parent.name in COMPONENTS], ids=ids)
def test_defaults_in_yaml_are_the_constructors(file: Path) -> None:
    """Else the same class would behave differently from Python and from the command line. Variants such as zero3 differ
    in the setting that they are named for."""
    content = yaml.safe_load(file.read_text())
    cls = locate(content["_target_"], file.parent.name)
    module = content["_target_"].rsplit(".", 2)[1]
    different = [
        key
        for key, setting in (settings(cls) or {}).items()
        if not setting.required
        and own_keys(content).get(key) != (list(d) if isinstance(d := setting.default, tuple) else d)
    ]
    assert different == [] or file.stem != module, different


@pytest.mark.parametrize("file", [*OPTIONS, *CONFIGS.glob("*.yaml"), *recipes().values()], ids=lambda f: f.stem)
def test_the_first_line_says_what_choosing_it_gives(file: Path) -> None:
    line = first_comment(file)
    assert 10 <= len(line) <= 110, line
    assert not line.endswith(".")


@pytest.mark.parametrize("file", OPTIONS, ids=ids)
def test_every_setting_is_explained(file: Path) -> None:
    lines = file.read_text().splitlines()
    bare = [
        line for line in lines if re.match(r"[a-z_]\w*:", line) and "#" not in line and not line.startswith("defaults:")
    ]
    assert [line for line in bare if not line.startswith("_target_")] == []


@pytest.mark.parametrize("group", COMPONENTS)
def test_every_module_of_a_group_has_its_yaml(group: str) -> None:
    modules = {file.stem for file in (PACKAGE / group).glob("[a-z]*.py")}
    targets = {yaml.safe_load(file.read_text())["_target_"] for file in (CONFIGS / group).glob("*.yaml")}
    assert modules == {target.rsplit(".", 2)[1] for target in targets}
    for file in (CONFIGS / group).glob("*.yaml"):
        assert file.stem.startswith(yaml.safe_load(file.read_text())["_target_"].rsplit(".", 2)[1])


def test_every_interface_has_a_group_and_a_package() -> None:
    for group, interface in COMPONENTS.items():
        assert inspect.isclass(getattr(api, interface))
        assert importlib.import_module(f"kdcli.{group}")


@pytest.mark.parametrize("verb", SECTIONS)
def test_root_configs_have_the_sections_and_keys_of_their_schema(verb: str) -> None:
    content = yaml.safe_load((CONFIGS / f"{verb}.yaml").read_text())
    for section, schema in SCHEMAS[verb].items():
        known = settings(schema)
        assert known is not None
        assert content[section].keys() == known.keys()
        for key, value in content[section].items():
            default = getattr(schema, key, None)
            default = list(default) if isinstance(default, tuple) else default
            assert "${" in str(value) or key == "name" or value == default, (key, value, default)
    chosen = {str(key).partition("@")[0] for one in content["defaults"] if isinstance(one, dict) for key in one}
    sections = chosen | content.keys()
    assert set(SECTIONS[verb]) <= sections, set(SECTIONS[verb]) - sections
    assert set(TERMS) <= set(COMPONENTS)
