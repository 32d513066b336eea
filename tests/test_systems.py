"""Every recipe of a published system runs: its pipeline with a real model as every writer, then steps of its objective.

What comes of a system's recipe at its own size is nobody's claim here; that it composes, that its blocks fit each
other, that every row says where it is from, and that its objective learns from these rows, is.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from docs.systems import PAGE, ROOT, matches, page, systems
from kdcli.api import Answer, Data, Example, Request, Transform, Writer
from kdcli.command.catalog import recipes
from kdcli.command.compose import compose, hydra, plain
from kdcli.config.build import build, build_terms
from kdcli.pipeline.pipeline import Pipeline
from kdcli.store.examples import load_example
from kdcli.writer.hf import HFWriter

TINY = "recipes://data/tiny_teacher"
NAMES = sorted(name.removeprefix("systems/") for name in recipes() if name.startswith("systems/"))
ROWS = 2  # seeds
SMALL = {"n": 2, "count": 3, "rounds": 1, "turns": 1, "max_steps": 2, "demos": 2, "k": 2, "attempts": 1, "max_calls": 4}
TOKENS = 64  # of an answer
SEED = 1
STUDENT = {  # of some 140,000 parameters
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}

# A model of 4 million parameters writes nonsense, which filters rightly drop. These settings, and no others, let enough
# of it pass that the steps behind have rows: a bound is lowered, or a check marks what it would drop.
RELAXED: dict[str, dict[str, Any]] = {
    "agenttuning": {"act.keep": "all"},
    "autoact": {"act.keep": "all"},
    "c_icl": {"right.mark": True},
    "code_clean": {"passes.mark": True},
    "code_llama_instruct": {"pass.mark": True},
    "dialogue_cot": {"consistent.threshold": 0.0, "helps.min": None},
    "fine_tune_cot": {"right.mark": True},
    "fireact": {"act.keep": "all"},
    "genie": {"borne_out.threshold": 0.0},
    "humback": {"best.threshold": 1.0},
    "impossible_distillation": {"kept.threshold": 0.0, "rules.min_words": 1},
    "kard": {"right.mark": True},
    "kard_reranker": {"right.mark": True},
    "lion": {"hard.gap": -10.0},
    "mammoth": {"right.threshold": 0},
    "mixed_distillation": {"right.threshold": 0},
    "pad": {"right.mark": True},
    "persd": {"passes.mark": True},
    "phi": {"good.threshold": 0.0},
    "promptagator": {"round_trip.mark": True},
    "recomp": {"helps.min": None},
    "reflection_tuning": {"hard.max": None},
    "rest": {"improve.rising": [0.0]},
    "rewrite_retrieve_read": {"found.threshold": 0},
    "sciglm": {"good.threshold": 0.0},
    "rlaif": {"pair.keep_ties": True},
    "self_rewarding": {"pair.keep_ties": True},
    "socratic_cot": {"right.mark": True},
    "star": {"right.mark": True},
    "symbolic_kd": {"critic.threshold": 0.0},
    "toolalpaca": {"play.keep": "all"},
    "toolformer": {"unchanged.mark": True, "helps.min": None},
    "tora": {"solve.keep": "all"},
    "tora_shaping": {"right.mark": True},
    "ultrafeedback": {"pair.keep_ties": True},
    "wavecoder": {"good.threshold": 0.0},
    "zephyr": {"pair.keep_ties": True},
}


class Shared(Writer):
    """One loaded model for all writers of all recipes; closing it is the process's business."""

    def __init__(self) -> None:
        self.inner = HFWriter(
            path=TINY, max_tokens=TOKENS, batch=16, chat_template="none", closed=True, license="Apache-2.0"
        )
        self.batch, self.license = self.inner.batch, self.inner.license

    def write(self, requests: list[Request]) -> list[Answer]:  # type: ignore[override]
        return self.inner.write(requests)

    def identity(self) -> Mapping[str, Any]:
        return self.inner.identity()

    def count_tokens(self, messages: Any) -> int:
        return self.inner.count_tokens(messages)

    @property
    def endpoint(self) -> str:
        return self.inner.endpoint

    @property
    def model(self) -> str:
        return self.inner.model


@pytest.fixture(scope="session")
def shared() -> Shared:
    return Shared()


def composed(name: str, verb: str = "distill", *overrides: str) -> dict[str, Any]:
    """A recipe's config, with small models where it leaves the choice to the user."""
    text = recipes()[f"systems/{name}"].read_text("utf-8")
    given = [f"student.path={TINY}"] if re.search(r"^student:\n  path: \?\?\?", text, re.MULTILINE) else []
    given += [f"teacher.path={TINY}"] if re.search(r"^teacher:\n  path: \?\?\?", text, re.MULTILINE) else []
    with hydra() as app:
        return plain(compose(app, verb, [f"+recipe=systems/{name}", *given, *overrides]), verb)


def shrunk(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """At a test's size: fewer and shorter answers, and what RELAXED says."""
    for step in config["augmentation"].values():
        keys = SMALL if "writer" in step else {"k": SMALL["k"]}
        step |= {key: min(step[key], keys[key]) for key in keys if isinstance(step.get(key), int)}
        if "allow_truncated" in step:  # free text has no form that would end it in time
            step |= {"allow_truncated": True, "max_tokens": TOKENS}
    for place, value in RELAXED.get(name, {}).items():
        step, key = place.split(".")
        assert key in config["augmentation"][step], f"{place} is no setting any more"
        config["augmentation"][step][key] = value
    for source in [config["data"], *config["data"].get("domains", {}).values()]:
        if "domains" not in source:
            source["limit"] = ROWS
    return config


def ran(name: str, config: dict[str, Any], writer: Writer, folder: Path) -> list[Example]:
    """The rows that come out of a recipe's pipeline."""
    steps = build_terms(config["augmentation"], Transform)
    pipeline = Pipeline(
        data=build(config["data"], Data),
        steps=steps,
        writers=dict.fromkeys(config["writer"], writer),
        settings=config["augmentation"],
        folder=folder,
        answers=folder / "answers.sqlite",
        seed=SEED,
        max_failed_fraction=1.0,
    )
    outcome = pipeline.run()
    told = "; ".join(f"{s.name}: {s.rows_in} -> {s.rows_out} {dict(s.aside)}" for s in outcome.steps)
    assert outcome.count, f"{name}: no row is left; {told}"
    assert not outcome.unreadable, outcome.unreadable
    with outcome.rows.open("rb") as lines:
        return [load_example(line) for line in lines]


CHAT = "{% for one in messages %}{{ one.role }}: {{ one.content }}\n{% endfor %}"  # the tiny model's tokenizer has none


def trained(config: dict[str, Any], rows: Path, folder: Path) -> list[float]:
    """The losses of two steps on a file of rows."""
    from kdcli.store import metrics
    from kdcli.worker import main

    config |= {"augmentation": {}, "writer": {}, "report": {}, "evaluation": {}, "verb": "distill"}
    config["data"] = {"_target_": "kdcli.data.jsonl.Jsonl", "path": str(rows)}
    config["domain_scheduler"] = {"_target_": "kdcli.domain_scheduler.natural.Natural"}
    config["run"] |= {"dir": str(folder), "steps": 2, "log_every": 1, "save_every": 0, "eval_every": 0}
    config["batch"] |= {"size": 2, "micro_size": 2, "max_length": 512}
    config["student"] |= {"path": None, "tokenizer": TINY}
    if "chat_template" in config["student"]:
        config["student"]["chat_template"] = CHAT
    config["student_init"] = {"_target_": "kdcli.student_init.from_config.FromConfig", "config": STUDENT}
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(folder) == 0, (folder / "status.json").read_text()
    return [line["loss/total"] for line in metrics.read(folder) if "loss/total" in line]


@pytest.mark.parametrize("name", NAMES)
def test_a_system_composes_and_runs_from_its_seeds_to_two_steps_of_its_objective(
    name: str, shared: Shared, tmp_path: Path
) -> None:
    config = composed(name)
    if name in NAMES[::8]:  # composing is what costs here
        assert composed(name, "augment")["augmentation"] == config["augmentation"], "both verbs have the same steps"
    shrunk(name, config)
    rows = ran(name, config, shared, tmp_path / "augment")
    asked = {n for n, step in config["augmentation"].items() if "writer" in step and not step.get("oracle")}
    for row in rows:
        assert row.kind != "prompt", f"{name}: a row has nothing to learn"
        assert row.meta.get("source"), row.meta
        assert row.meta.get("license") == "CC0-1.0", row.meta
        for entry in row.meta.get("written", ()):
            assert entry["step"] in config["augmentation"]
            assert {"by", "teacher", "endpoint", "date", "template", "terms"} <= entry.keys()
    if asked:
        assert any(row.meta.get("written") for row in rows), f"{name}: no row says who wrote it"
    losses = trained(config, tmp_path / "augment/rows.jsonl", tmp_path / "run")
    assert len(losses) == 2
    assert all(torch.isfinite(torch.tensor(losses)))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_of_a_system_names_its_paper_and_every_choice_that_is_left(name: str) -> None:
    text = recipes()[f"systems/{name}"].read_text("utf-8")
    head = text.partition("defaults:")[0]
    assert re.search(r"(19|20)\d\d", head), "the paper and its year stand above the defaults"
    content = yaml.safe_load(text)
    assert content["run"]["name"] == name.replace("_", "-")
    assert "_target_" not in json.dumps({k: v for k, v in content.items() if k != "data"}), "a recipe chooses options"
    left = re.findall(r"^ *(\w+): \?\?\? *(#.*)?$", text, re.MULTILINE)
    assert all(comment for _, comment in left), f"{name}: say what to put where ??? stands"


def test_the_page_is_what_systems_yaml_and_the_repository_say() -> None:
    assert PAGE.read_text("utf-8") == page(), "docs/systems.md is old: make docs"


def test_every_system_that_runs_has_a_recipe_that_is_tested_here_and_every_recipe_a_system() -> None:
    named = {recipe for row in systems() for recipe in row.recipe}
    assert set(NAMES) == {one for one in named if "/" not in one}
    assert all(one in recipes() for one in named if "/" in one)
    for row in systems():
        if row.state == "runs":
            assert row.recipe and not row.without, row.name


def test_what_is_called_expressible_leads_to_options_that_exist() -> None:
    from docs.systems import BLOCKS

    rows = [row for row in systems() if row.state == "expressible"]
    assert rows
    for row in rows:
        for kind, blocks in row.blocks.items():
            for block in blocks:
                for pattern in BLOCKS[kind][block][1]:
                    assert list(matches(pattern)), f"{row.name}: {kind} {block}: {pattern}"


def test_what_is_not_true_is_refused() -> None:
    from docs.systems import System, wrong

    base = {"name": "X", "leaf": "Y", "paper": [], "unverified": True}
    invented = System(**base, blocks={"elicit": ["telepathy"]})
    without = System(**base, blocks={"elicit": ["label"]}, recipe=["no_such_recipe"])
    stages = System(**base, blocks={"other": ["loop.stages"]}, recipe=["alpaca"])
    assert [len(list(wrong(one))) for one in (invented, without, stages)] == [1, 1, 1]
    art = {"blocks": {"elicit": ["retrieve", "judge"]}, "recipe": ["art"]}
    for stands_for in (
        {"judge": {"by": "no_such_step", "why": "z"}},
        {"retrieve": {"by": "lm", "why": "the recipe has it"}},
        {"judge": {"by": "lm"}},
    ):
        assert len(list(wrong(System(**base, **art, stands_for=stands_for)))) == 1
    told = System(**base, **art, stands_for={"judge": {"by": "lm", "why": "z"}})
    assert (list(wrong(told)), told.state, told.without) == ([], "runs", [])
    bare = System(**base, **art)
    assert (bare.state, bare.without) == ("expressible", ["judge"])
    assert System(**base, blocks={"other": ["student.vlm"]}).state == "needs"


def test_all_leaves_that_text_reaches_have_a_recipe_that_runs() -> None:
    runs = {row.leaf for row in systems() if row.recipe}
    leaves = dict.fromkeys(row.leaf for row in systems())
    beyond = {leaf for leaf in leaves if leaf.startswith(("White-box", "Several", "Multimodal", "Other"))}
    assert set(leaves) - beyond <= runs


def test_recipes_read_seeds_of_ours() -> None:
    text = (ROOT / "recipes/data/LICENSES.md").read_text("utf-8")
    assert "seeds/*.jsonl" in text
    for file in (ROOT / "recipes/data/seeds").glob("*.jsonl"):
        for line in file.read_text("utf-8").splitlines():
            row = json.loads(line)
            assert (row["source"], row["license"]) == ("kdcli seeds", "CC0-1.0")


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No logs of a hundred runs, and files in the test's folder."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.ERROR)
