"""Writes the tables of docs/augmentation.md from the configs: `make docs`, or `python docs/augmentation.py`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import yaml

from kdcli.command.catalog import first_comment
from kdcli.text.parse import SETTINGS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/augmentation.md"
OF_ASKING = {"writer", "temperature", "max_tokens", "allow_truncated", "attempts", "only"}  # told once, in the prose


def page(text: str) -> str:
    """The page's text with its tables as the configs have them now."""
    for kind, rows in {"steps": steps(), "prompts": prompts(), "parsers": parsers()}.items():
        before, begin, rest = text.partition(f"<!-- {kind}: written by `make docs` -->\n")
        _, end, after = rest.partition(f"<!-- end of {kind} -->\n")
        assert begin and end, f"{PAGE.name} has lost the place of its table of {kind}"
        text = f"{before}{begin}\n" + "\n".join(rows) + f"\n\n{end}{after}"
    return text


def steps() -> list[str]:
    """Those that ask a writer first."""
    asking, others = [], []
    for file in sorted((ROOT / "configs/augmentation").glob("*.yaml")):
        content = yaml.safe_load(file.read_text("utf-8"))
        names = [f"`{key}`" for key in content if key != "_target_" and key not in OF_ASKING]
        module = content["_target_"].rsplit(".", 2)[1]
        row = f"| [{file.stem}](../kdcli/augmentation/{module}.py) | {cell(first_comment(file))} | {', '.join(names)} |"
        (asking if any(key.startswith("writer") for key in content) else others).append(row)
    head = "| step | what it gives | settings of its own |"
    return [head, "|---|---|---|", *asking, *others]


def prompts() -> list[str]:
    """Of each step, how many and which."""
    rows = ["| step | prompts |", "|---|---|"]
    for folder in sorted((ROOT / "configs/prompt").iterdir()):
        names = sorted(file.stem for file in folder.glob("*.yaml"))
        rows += [f"| {folder.name} | {', '.join(names)} |"] if names else []
    return rows


def parsers() -> list[str]:
    """Kinds of `parse`, with their settings and defaults."""
    rows = ["| kind | settings |", "|---|---|"]
    for kind, settings in SETTINGS.items():
        told = [f"`{key}`" if value is ... else f"`{key}: {shown(value)}`" for key, value in settings.items()]
        rows.append(f"| {kind} | {', '.join(told)} |")
    return rows


def shown(value: object) -> str:
    """As YAML writes it."""
    return "null" if value is None else re.sub(r"\n.*", "", yaml.safe_dump(value, default_flow_style=True)).strip()


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
