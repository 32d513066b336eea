"""Writes docs/systems.md from docs/systems.yaml and from what configs/ and recipes/ hold: `make docs`.

What a row of the page says of a system is looked up, and a row that is not true ends the command: a recipe must be a
file, every block of what is called expressible must lead to options that exist, and what is said to stand for a block
must be in the recipe.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "docs/systems.yaml"
PAGE = ROOT / "docs/systems.md"
ROWS = 136  # rows of the surveys' tables, each of which may name several systems of equal blocks

# Block -> (what it is, patterns of files in configs/ that must all exist; GROUP/OPTION:SETTING names a setting).
BLOCKS: Mapping[str, Mapping[str, tuple[str, Sequence[str]]]] = {
    "seed": {
        "rows": ("prompts, with or without answers", ["data/jsonl", "data/hub"]),
        "instr": ("a small pool of instructions as demonstrations", ["data/jsonl", "augmentation/expand"]),
        "topics": ("topics, entities, names of labels, triples", ["data/jsonl", "augmentation/curate"]),
        "docs": ("documents, code, tables, descriptions of tools", ["data/jsonl", "data/hub"]),
        "chats": ("logged conversations", ["data/jsonl", "data/hub"]),
        "rules": ("principles, rubrics, roles", ["data/jsonl", "data/mixture"]),
        "env": ("tools or a task that tells success", ["augmentation/trajectory"]),
        "none": ("nothing but the rows that say how often to ask", ["data/jsonl", "augmentation/curate"]),
    },
    "teacher": {
        "api": ("a model behind HTTP, text alone", ["writer/chat", "writer/anthropic"]),
        "open": ("an open model on this machine, text", ["writer/hf", "writer/vllm"]),
        "logits": ("a local model: logits and states", ["teacher/hf"]),
        "cache": ("what was stored of a teacher: its texts or its likeliest tokens", ["data/jsonl", "teacher/cached"]),
        "self": ("the student, or a snapshot of it", ["writer/hf", "augmentation/rollout"]),
        "multi": ("several teachers", ["writer/chat", "teacher/ensemble"]),
        "rm": ("a scorer: classifier, entailment, reward, reranker", ["augmentation/critic"]),
        "tool": (
            "what computes: code, search, arithmetic, algorithms",
            ["augmentation/execute", "augmentation/retrieve"],
        ),
    },
    "elicit": {
        "label": ("answers to given prompts", ["augmentation/label"]),
        "expand": ("new prompts after the pattern of some", ["augmentation/expand"]),
        "evolve": ("harder, rarer or joined prompts", ["augmentation/evolve"]),
        "curate": ("prompt and answer from a topic or document", ["augmentation/curate"]),
        "chat": ("conversations of two roles, debates", ["augmentation/chat"]),
        "rewrite": ("paraphrases and better versions", ["augmentation/rewrite"]),
        "annotate": ("calls, tags and marks inside a text", ["augmentation/annotate"]),
        "rollout": ("the student answers", ["augmentation/rollout"]),
        "judge": ("scores, comparisons, rankings", ["augmentation/judge", "augmentation/compare", "augmentation/rank"]),
        "critique": ("feedback and revision", ["augmentation/critique"]),
        "contrast": ("a better and a worse answer without a judge", ["augmentation/contrast"]),
        "traj": ("an agent's steps with tools", ["augmentation/trajectory"]),
        "retrieve": ("passages or demonstrations beside a prompt", ["augmentation/retrieve"]),
        "feat": ("logits, states, attention while training", ["teacher/hf", "cache"]),
    },
    "filter": {
        "dedup": ("near-duplicates out", ["augmentation/dedup"]),
        "rule": ("length, language, patterns, schema, refusals", ["augmentation/rules"]),
        "verify": ("gold answer, unit tests, reward of a task", ["augmentation/verify"]),
        "vote": ("agreement of several samples", ["augmentation/vote"]),
        "critic": ("a score above a threshold", ["augmentation/critic"]),
        "lm": ("perplexity, IFD, reduction of loss", ["augmentation/lm"]),
        "diverse": ("k-centre and clusters", ["augmentation/diverse"]),
        "student": ("what the student fails", ["augmentation/student"]),
        "decon": ("no overlap with evaluation sets", ["augmentation/decontaminate"]),
        "licence": ("terms of use", ["augmentation/licence"]),
    },
    "objective": {
        "ce": ("cross-entropy", ["objective/cross_entropy"]),
        "mtce": ("labels and rationales as two tasks", ["objective/step_by_step"]),
        "div": (
            "divergence of distributions",
            ["objective/forward_kl", "objective/reverse_kl", "objective/total_variation"],
        ),
        "xtok": ("across tokenizers", ["objective/uld", "objective/mined"]),
        "hid": ("states, attention, relations", ["objective/hidden_mse", "objective/attention", "objective/minilm"]),
        "rmloss": ("a reward model", ["objective/reward_model"]),
        "pg": ("policy gradient", ["objective/policy_gradient", "rollout/[!d]*"]),
        "pref": ("preference pairs", ["objective/dpo", "objective/ipo"]),
        "rank": ("scored lists", ["objective/rrhf", "objective/pro", "objective/listwise"]),
        "embed": ("embeddings apart and together", ["objective/contrastive"]),
    },
    "other": {
        "policy.mix": ("batches that the student writes", ["rollout/[!d]*"]),
        "policy.tmix": ("batches that student and teacher write together", ["rollout/[!d]*"]),
        "policy.adapt": ("such batches by need, from a buffer", ["rollout/[!d]*"]),
        "mix.static": ("fixed shares of sources", ["domain_scheduler/static"]),
        "mix.dynamic": ("shares that follow losses", ["domain_scheduler/ddk"]),
        "mix.curric": ("stages of sources", ["domain_scheduler/curriculum"]),
        "student.cfg": ("random weights", ["student_init/from_config"]),
        "student.prune": ("a cut teacher", ["student_init/keep_layers", "student_init/prune_width"]),
        "student.lora": ("adapters", ["student/lora"]),
        "student.tokens": ("new special tokens", ["student/hf:new_tokens"]),
        "student.enc": ("a classifier or encoder", ["student/classifier", "student/encoder"]),
        "student.quant": ("a student that is quantised while it learns", ["student/*quantised*"]),
        "student.vlm": ("a student that sees", ["student/*vision*"]),
        "loop.rounds": ("the same again with the new student: a run each", ["distill", "student/hf:path"]),
        "loop.stages": ("runs one after another", ["distill", "student/hf:path"]),
    },
}
REASONS = {  # a block without an option -> what is missing
    "pg": "answers that the student writes and a reward sees while it trains",
    "policy.mix": "batches that the student writes while it trains",
    "policy.tmix": "batches that the student writes while it trains",
    "policy.adapt": "batches that the student writes while it trains",
    "student.quant": "quantisation-aware training",
    "student.vlm": "a student that sees images, sound or molecules",
}
ELICITATION = {  # leaf of the first survey's sections 3.1 and 3.2 -> whether a system is of it
    "Labeling": lambda b: "label" in b["elicit"],
    "Expansion": lambda b: {"expand", "evolve", "rewrite"} & b["elicit"],
    "Curation": lambda b: "curate" in b["elicit"],
    "Feature": lambda b: "feat" in b["elicit"],
    "Feedback": lambda b: {"judge", "critique"} & b["elicit"] or {"rollout", "feat"} <= b["elicit"],
    "Self-knowledge": lambda b: "self" in b["teacher"],
    "Supervised fine-tuning": lambda b: {"ce", "mtce"} & b["objective"],
    "Divergence": lambda b: {"div", "xtok"} & b["objective"],
    "Similarity": lambda b: {"hid", "embed"} & b["objective"],
    "Reinforcement": lambda b: {"rmloss", "pg"} & b["objective"],
    "Ranking": lambda b: {"pref", "rank"} & b["objective"],
}
ALSO = {  # block -> other options that do its work
    "label": {"rollout"},  # of the student itself
    "rewrite": {"critique"},  # its revision
    "critique": {"judge"},  # prompts that say why
    "chat": {"chat_debate"},
    "verify": {"trajectory"},  # which keeps what succeeded
}
CHOSEN = re.compile(r"^  - /(augmentation|objective)@\w+\.\w+: (\w+)$", re.MULTILINE)
BLACK_BOX = "override /teacher: none"
WITHOUT_KD = "  kd: null"
STATES = ("runs", "expressible", "needs")
INTRODUCTION = """\
# Which published systems can be written as a recipe?

{rows} rows of the tables of two surveys ([arXiv:2402.13116](https://arxiv.org/abs/2402.13116),
[arXiv:2407.01885](https://arxiv.org/abs/2407.01885)) and of related papers, each encoded as blocks. A table's row
counts once, however many systems of equal blocks it names. Of the {rows}, **{runs} run**, {expressible} are
expressible, and {needs} need something that is not here ({partly} of these run without it).
{recipes} recipes are tested.

* **runs**: the linked recipe exists, and CI runs it end to end: its whole pipeline with a small real model as every
  writer, and training steps of its objective on the rows that come out. *One round*: the system repeats it with the
  student of the round before; here a round is a run (`student.path=runs/…/student`, and a writer `hf` with that path).
  Every elicitor, filter and objective of the row, and all behind its *+* but the loops, is in one of its recipes, or
  *OPTION for BLOCK* says which other step or objective does its work, and why. Of several systems it is those named.
* **expressible**: every block stands for options that exist (the table at the end), but nobody wrote or ran all
  of it{in_part}.
* **needs**: what is missing. A recipe beside it is the part that runs without.

```
kdcli augment +recipe=systems/alpaca writer.teacher.url=URL writer.teacher.model=MODEL --dry-run   # what it would cost
kdcli distill +recipe=systems/alpaca writer.teacher.url=URL writer.teacher.model=MODEL student.path=STUDENT
```

A recipe has the steps of its paper, our own prompts, and a few rows of seeds
([recipes/data](../recipes/data/README.md)) in place of the paper's data: give yours with `data.path`. None has been run
at its paper's size, and none is claimed to reach its numbers. Values behind `paper:` in a recipe are from knowledge of
the paper, and quoted where they were looked up. † marks rows of which something was written from memory.

This page is generated (`make docs`) from [systems.yaml](systems.yaml), and a test holds it to what exists.
"""


class NotTrue(Exception):
    """Something in systems.yaml that the repository does not bear out."""


@dataclass(frozen=True, kw_only=True)
class System:
    """One row."""

    name: str
    leaf: str
    paper: Sequence[str]
    blocks: Mapping[str, Sequence[str]]
    citation: str = ""
    unverified: bool = False
    recipe: Sequence[str] = field(default_factory=tuple)
    part: str = ""
    needs: str = ""
    stands_for: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        """What is not here, as reasons without repeats."""
        missing = [
            REASONS.get(one, one) for kind, names in self.blocks.items() for one in names if not found(kind, one)
        ]
        return list(dict.fromkeys([*missing, *([self.needs] if self.needs else [])]))

    @property
    def chosen(self) -> set[str]:
        """Steps and objectives that its recipes choose."""
        return {option for text in self.texts for _, option in CHOSEN.findall(text)}

    @property
    def texts(self) -> list[str]:
        """Its recipes."""
        files = [ROOT / "recipes" / path(one) for one in self.recipe]
        return [file.read_text("utf-8") for file in files if file.is_file()]

    @property
    def lacking(self) -> list[str]:
        """Blocks that exist, and that none of its recipes has."""
        kinds = ("elicit", "filter", "objective", "other") if self.recipe else ()
        blocks = [(kind, name) for kind in kinds for name in self.blocks.get(kind, ())]
        return [name for kind, name in blocks if found(kind, name) and not any(has(t, kind, name) for t in self.texts)]

    @property
    def without(self) -> list[str]:
        """What it lacks, and nothing stands for."""
        return [name for name in self.lacking if name not in self.stands_for]

    @property
    def state(self) -> str:
        """`runs`, `expressible` or `needs`."""
        if self.missing:
            return "needs"
        return "runs" if self.recipe and not self.without else "expressible"

    @property
    def of(self) -> dict[str, set[str]]:
        """All kinds of blocks, also those that it has none of."""
        return {kind: set(self.blocks.get(kind, ())) for kind in BLOCKS}


def has(recipe: str, kind: str, block: str) -> bool:
    """Whether the text of a recipe has a step, an objective or an option for a block."""
    chosen = CHOSEN.findall(recipe)
    options = {Path(one.partition(":")[0]).name for one in BLOCKS[kind][block][1]} | ALSO.get(block, set())
    if kind in ("elicit", "filter") and block != "feat":
        return any(group == "augmentation" and option in options for group, option in chosen)
    if kind == "objective" and any(group == "objective" and option in options for group, option in chosen):
        return True
    if block in ("feat", "div"):  # a teacher whose logits are read; the default objective is a divergence
        return BLACK_BOX not in recipe and WITHOUT_KD not in recipe
    if block in ("loop.rounds", "loop.stages"):  # each is a run
        return True
    settings = {one.partition(":")[2] for one in BLOCKS[kind][block][1]} - {""}
    if settings:
        return any(f"  {setting}:" in recipe for setting in settings)
    return kind == "other" and any(re.search(rf"override /\w+: {option}$", recipe, re.MULTILINE) for option in options)


def found(kind: str, block: str) -> bool:
    """Whether every option that a block stands for exists."""
    return all(any(matches(pattern)) for pattern in BLOCKS[kind][block][1])


def matches(pattern: str) -> Iterator[Path]:
    """Files of configs/ that a pattern of BLOCKS names."""
    path, _, setting = pattern.partition(":")
    for file in sorted((ROOT / "configs").glob(f"{path}.yaml")):
        if not setting or setting in yaml.safe_load(file.read_text("utf-8")):
            yield file


def systems() -> list[System]:
    """The rows of systems.yaml. Raises NotTrue for what contradicts the repository, or itself."""
    rows = [System(**row) for row in yaml.safe_load(SOURCE.read_text("utf-8"))]
    problems = [f"{SOURCE.name}: {len(rows)} rows, not {ROWS}"] if len(rows) != ROWS else []
    names = Counter(row.name for row in rows)
    problems += [f"{name} stands {count} times" for name, count in names.items() if count > 1]
    for row in rows:
        problems += [f"{row.name}: {one}" for one in wrong(row)]
    if problems:
        raise NotTrue("\n".join(problems))
    return rows


def wrong(row: System) -> Iterator[str]:
    """What is not true of a row."""
    for kind, names in row.blocks.items():
        yield from (f"there is no {kind} {name}" for name in names if name not in BLOCKS.get(kind, {}))
        for name in names:
            if name in BLOCKS.get(kind, {}) and not found(kind, name) and name not in REASONS:
                yield f"{kind} {name} leads to {', '.join(BLOCKS[kind][name][1])}, of which something does not exist"
    yield from (
        f"recipes/{path(one)} does not exist" for one in row.recipe if not (ROOT / "recipes" / path(one)).is_file()
    )
    for block, told in row.stands_for.items():
        if set(told) != {"by", "why"}:
            yield f"stands_for {block} has {', '.join(told)}; give by and why"
        elif block not in row.lacking:
            yield f"{told['by']} stands for {block}, which is no block that its recipes lack"
        elif told["by"] not in row.chosen:
            yield f"{told['by']} stands for {block}, and its recipes do not choose it"
    if row.recipe and "loop.stages" in row.blocks.get("other", ()) and not row.part:
        yield "has several stages and a recipe; say in `part` which of them it is"


def path(recipe: str) -> str:
    """Of a recipe's name: those of systems stand without their folder."""
    return f"{recipe}.yaml" if "/" in recipe else f"systems/{recipe}.yaml"


def page() -> str:
    """docs/systems.md."""
    rows = systems()
    counts = Counter(row.state for row in rows)
    in_part = sum(1 for row in rows if row.state == "expressible" and row.recipe)
    parts = [
        INTRODUCTION.format(
            rows=len(rows),
            runs=counts["runs"],
            expressible=counts["expressible"],
            needs=counts["needs"],
            in_part=f"; *in part* links a tested recipe without the blocks it names ({in_part} such)"
            if in_part
            else "",
            partly=sum(1 for row in rows if row.state == "needs" and row.recipe),
            recipes=len({one for row in rows for one in row.recipe}),
        ),
        "## How much of each leaf\n\n" + coverage(rows),
    ]
    for leaf in dict.fromkeys(row.leaf for row in rows):
        lines = ["| system | paper | blocks | here |", "|---|---|---|---|"]
        lines += [line(row) for row in rows if row.leaf == leaf]
        parts.append(f"## {leaf}\n\n" + "\n".join(lines) + "\n")
    parts.append("## What the blocks stand for\n\n" + vocabulary(rows))
    return "\n".join(parts)


def coverage(rows: Sequence[System]) -> str:
    """Per leaf how many systems there are, in which state, and which blocks they use."""
    kinds = ("elicit", "filter", "objective")
    lines = ["| leaf | rows | run | expressible | need | " + " | ".join(kinds) + " |", "|---" * 8 + "|"]
    for leaf in dict.fromkeys(row.leaf for row in rows):
        lines.append(covered(leaf, [row for row in rows if row.leaf == leaf], kinds))
    lines.append("| *by knowledge and algorithm (3.1, 3.2 of the first survey)* | | | | | | | |")
    for leaf, belongs in ELICITATION.items():
        lines.append(covered(leaf, [row for row in rows if belongs(row.of)], ()))
    return "\n".join(lines) + "\n"


def covered(leaf: str, rows: Sequence[System], kinds: Sequence[str]) -> str:
    states = Counter(row.state for row in rows)
    uses = [Counter(block for row in rows for block in row.blocks.get(kind, ())) for kind in kinds]
    cells = [", ".join(name if n == 1 else f"{name} {n}" for name, n in use.most_common()) or "–" for use in uses]
    cells += [""] * (3 - len(cells))
    return f"| {leaf} | {len(rows)} | {' | '.join(str(states[s]) for s in STATES)} | {' | '.join(cells)} |"


def line(row: System) -> str:
    """A system's row."""
    links = [f"[{one}](https://arxiv.org/abs/{one})" for one in row.paper]
    paper = ", ".join(links) or row.citation or "–"
    parts = [", ".join(row.blocks.get(kind, ())) or "–" for kind in BLOCKS if kind != "other"]
    blocks = " · ".join(parts) + (f" + {', '.join(row.blocks['other'])}" if row.blocks.get("other") else "")
    return f"| {row.name}{' †' if row.unverified else ''} | {paper} | {blocks} | {here(row)} |"


def here(row: System) -> str:
    """What there is of a system, in words."""
    links = ", ".join(f"[{one}](../recipes/{path(one)})" for one in row.recipe)
    rounds = "one round" if "loop.rounds" in row.blocks.get("other", ()) else ""
    instead = "; ".join(f"{told['by']} for {block}: {told['why']}" for block, told in row.stands_for.items())
    without = f"without {', '.join(row.without)}" if row.without else ""
    notes = "; ".join(one for one in (rounds, row.part, instead, without) if one)
    told = f"{links} ({notes})" if links and notes else links
    if row.state == "needs":
        return f"needs {'; '.join(row.missing)}" + (f". Without it: {told}" if told else "")
    if row.state == "runs":
        return f"**runs**: {told}"
    if row.recipe:
        return f"expressible; in part: {told}"
    return "expressible" + (f" ({notes})" if notes else "")


def vocabulary(rows: Sequence[System]) -> str:
    """Every block, what it stands for, and how many systems use it."""
    lines = ["| block | is | options | rows |", "|---|---|---|---|"]
    for kind, members in BLOCKS.items():
        uses = Counter(block for row in rows for block in row.blocks.get(kind, ()))
        for name, (meaning, patterns) in members.items():
            files = [file for pattern in patterns for file in matches(pattern)]
            links = ", ".join(link(file) for file in dict.fromkeys(files))
            cell = links if found(kind, name) else f"not here{f' (only {links})' if links else ''}"
            lines.append(f"| {kind}: {name} | {meaning} | {cell} | {uses[name]} |")
    return "\n".join(lines) + "\n"


def link(file: Path) -> str:
    place = file.relative_to(ROOT / "configs").with_suffix("").as_posix()
    return f"[{re.sub('/', ' ', place)}](../configs/{place}.yaml)"


if __name__ == "__main__":
    try:
        PAGE.write_text(page(), "utf-8")
    except NotTrue as error:
        sys.exit(str(error))
