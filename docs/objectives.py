"""Writes the tables of docs/objectives.md from the code: `make docs`, or `python docs/objectives.py`.

A row is a file of configs/objective: formula and paper are the docstrings' of its class and module, the rest is what
an instance with the file's settings says of itself. Prose between the tables is written by hand, in the page.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from kdcli.api import Batch, Need, Objective, Scope, StudentOutput, TeacherSignal, TopK, Unit
from kdcli.config.build import build

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/objectives.md"
LAYERS = Need.HIDDEN | Need.ATTENTION | Need.RELATIONS
KINDS = ("text", "vocabulary", "layers", "tokenizers", "answers")
PROVIDED = {  # in the order in which they are told
    Need.LOGITS: "logits",
    Need.DISTRIBUTION: "logits or top-k",
    Need.LOGPROBS: "log p of targets",
    Need.HIDDEN: "hidden states",
    Need.ATTENTION: "attention",
    Need.RELATIONS: "queries, keys, values",
    Need.REWARD: "rewards",
    Need.REFERENCE: "– (a copy of the student as it began)",
}
COLUMNS = {"rejected": "chosen, rejected", "score": "score", "group": "group"}
UNITS = {Unit.TOKEN: "target", Unit.SEQUENCE: "sequence", Unit.GROUP: "group"}
HEAD = "| objective | formula | paper | of the teacher | data | one number per | memory |"


def page(text: str) -> str:
    """The page's text with its tables as the code has them now."""
    rows: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for file in sorted((ROOT / "configs/objective").glob("*.yaml")):
        config = yaml.safe_load(file.read_text("utf-8"))
        objective = build(config, Objective)
        rows[kind_of(objective)].append(row(file.stem, config, objective))
    for kind in KINDS:
        table = "\n".join([HEAD, re.sub(r"[^|]+", "---", HEAD), *rows[kind]])
        before, begin, rest = text.partition(f"<!-- {kind}: written by `make docs` -->\n")
        _, end, after = rest.partition(f"<!-- end of {kind} -->\n")
        assert begin and end, f"{PAGE.name} has lost the place of its table of {kind}"
        text = f"{before}{begin}\n{table}\n\n{end}{after}"
    return text


def kind_of(objective: Objective) -> str:
    """Which table an objective stands in."""
    if objective.cross_tokenizer:
        return "tokenizers"
    if objective.columns or objective.scope is Scope.LOGPROBS or objective.unit is Unit.GROUP:
        return "answers"
    if objective.needs & LAYERS:
        return "layers"
    return "vocabulary" if objective.needs else "text"


def row(name: str, config: dict[str, Any], objective: Objective) -> str:
    module = inspect.getmodule(objective)
    assert module is not None and module.__file__, f"{name} has a module"
    link = Path(module.__file__).relative_to(ROOT)
    cells = (
        f"[{name}](../{link})",
        formula(name, config, objective),
        paper(module.__doc__ or ""),
        ", ".join(text for need, text in PROVIDED.items() if need in objective.needs) or "–",
        ", ".join(COLUMNS[name] for name in sorted(objective.columns)) or "–",
        UNITS[objective.unit],
        memory(objective),
    )
    return "| " + " | ".join(cells) + " |"


def formula(name: str, config: dict[str, Any], objective: Objective) -> str:
    """The first sentence of the class, or its first paragraph with the equations set below it."""
    module = type(objective).__module__.rpartition(".")[2]
    if module != name:  # the same class with other settings
        plain = yaml.safe_load((ROOT / f"configs/objective/{module}.yaml").read_text("utf-8"))
        changed = [f"`{key}={value}`" for key, value in config.items() if plain.get(key) != value]
        return f"{module} with {', '.join(changed)}".replace("|", "\\|")
    paragraphs = inspect.cleandoc(type(objective).__doc__ or "").split("\n\n")
    first = " ".join(paragraphs[0].split())
    if len(paragraphs) > 1 and paragraphs[1].startswith("  "):
        lines = inspect.cleandoc("\n" + paragraphs[1]).splitlines()
        return "<br>".join([escaped(first), *map(equation, lines)])
    sentence = re.split(r"(?<=[^.]\.)\s+(?=[A-Z`])", first, maxsplit=1)[0]
    return escaped(sentence.removesuffix("."))


def escaped(text: str) -> str:
    """Docstring text as Markdown of a table's cell; what stands in backticks stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([\\*_\[\]~|])", r"\\\1", parts[i].replace("<", "&lt;").replace(">", "&gt;"))
    for i in range(1, len(parts), 2):
        parts[i] = parts[i].replace("|", "\\|")
    return "".join(parts)


def equation(line: str) -> str:
    """A line of a block, its blanks kept."""
    text = re.sub(r" {4,}", "   ", line).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "<code>" + re.sub(r" (?= )", "&nbsp;", text.replace("|", "\\|").replace("`", "")) + "</code>"


def paper(docstring: str) -> str:
    """What stands after the colon of a module's first line, with links."""
    line = docstring.strip().splitlines()[0]
    text = re.split(r"\.\s+(?=[A-Z])", line.partition(": ")[2] or line, maxsplit=1)[0].rstrip(". ")
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text).replace("|", "\\|")


def memory(objective: Objective) -> str:
    """What grows with the batch: a chunk's logits [C, V], one number per token, or what the layers computed."""
    if objective.scope is Scope.LOGPROBS:
        return "one number per token"
    if objective.scope is Scope.STATES:
        return "states; C × V, recomputed" if objective.needs & Need.LOGITS else "states"
    return "C × V, closed form" if closed(objective) else "C × V, autograd"


def closed(objective: Objective) -> bool:
    """Whether an objective of scope CHUNK writes its gradient down for every kind of teacher that it takes."""
    results = [objective.closed_form(*example) for example in _chunks(objective)]
    return all(result is not None for result in results)


def _chunks(objective: Objective) -> Iterator[tuple[Batch, StudentOutput, TeacherSignal]]:
    """A chunk of three targets of seven ids, for each kind of teacher."""
    targets, ones = torch.tensor([[0, 1, 2]]), torch.ones(1, 3, dtype=torch.bool)
    batch = Batch(
        input_ids=targets,
        targets=targets,
        mask=ones,
        attention_mask=ones,
        segment=torch.zeros(1, 3, dtype=torch.long),
        weight=torch.ones(1),
        row=["example"],
        domain=["default"],
        group=[None],
        score=[None],
        rejected=torch.zeros(1, dtype=torch.bool),
    )
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 1, 3, 7, generator=generator)
    yield batch, StudentOutput(logits=student), TeacherSignal(logits=teacher)
    if Need.DISTRIBUTION in objective.needs:
        temperature = getattr(objective, "temperature", 1.0)
        top = (teacher / temperature).log_softmax(-1).topk(3)
        topk = TopK(
            ids=top.indices, logprobs=top.values, temperature=temperature, sampled=getattr(objective, "draws", False)
        )
        yield batch, StudentOutput(logits=student), TeacherSignal(topk=topk)


def main() -> None:
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
