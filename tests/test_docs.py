"""The README's commands run, in order, as they stand there; its promises about files hold."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
SHORT = ["run.steps=2", "evaluation.heldout.rows=1"]  # what CI adds to a command that trains


def commands() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")]


@pytest.mark.slow
def test_the_commands_of_the_readme_run_in_order(kdcli, tmp_path: Path) -> None:
    """The first that trains in a process of its own, the others in this one, which has imported everything."""
    assert len(commands()) > 5
    alone = [command for command in commands() if " distill " in command][:1]
    for command in commands():
        program, *arguments = shlex.split(command)
        assert program == "kdcli"
        if arguments[0] == "distill":
            arguments += SHORT
        if arguments[0] == "evaluate":
            arguments += SHORT[1:]
        if command in alone:
            words = [sys.executable, "-m", "kdcli", *arguments]
            done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        else:
            result = kdcli(*arguments)
            assert result.code == 0, f"{command}\n{result.out[-2000:]}\n{result.err[-2000:]}"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    student = AutoModelForCausalLM.from_pretrained(tmp_path / "runs/first/student")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "runs/first/student")
    written = student.generate(**tokenizer("The law says", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert written.shape[-1] > 4


def test_the_tables_of_objectives_are_what_the_code_says() -> None:
    from docs.objectives import PAGE, page

    text = PAGE.read_text("utf-8")
    assert page(text) == text, "docs/objectives.md is old: make docs"
    options = {file.stem for file in (ROOT / "configs/objective").glob("*.yaml")}
    assert set(re.findall(r"^\| \[(\w+)\]", text, re.MULTILINE)) == options


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_to_files_of_the_project_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text("utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES[:-1], ids=lambda p: p.name)  # CONTRIBUTING's example does not exist yet
def test_options_named_in_the_docs_exist(page: Path) -> None:
    groups = {folder.name for folder in (ROOT / "configs").iterdir() if folder.is_dir()}
    for group, option in re.findall(r"(?<![\w./@])(\w+)(?:@[\w.]+)?=(\w+)", page.read_text("utf-8")):
        if group in groups and option not in ("NAME", "OPTION") and not option.startswith("zeroN"):
            assert (ROOT / f"configs/{group}/{option}.yaml").exists(), f"{page.name}: {group}={option}"
