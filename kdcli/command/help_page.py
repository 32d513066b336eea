"""`kdcli VERB --help`: how to say it, groups and options, keys, flags; all read from the files."""

from __future__ import annotations

import sys
import textwrap

from kdcli.command.arguments import parser
from kdcli.command.catalog import GROUPS, first_comment, options, recipes
from kdcli.config.schema import SECTIONS, TERMS
from kdcli.store import paths

EXAMPLES = {
    "distill": """\
  kdcli distill +recipe=quickstart                         a recipe as it is
  kdcli distill +recipe=quickstart run.steps=20            one key changed
  kdcli distill +recipe=quickstart objective@objective.kd=reverse_kl objective.kd.temperature=2
  kdcli distill +recipe=quickstart optimizer.lr=1e-4,1e-3 -m          a sweep of two jobs, with a table
  kdcli distill +recipe=quickstart +control=sft run.seeds=[0,1,2]     beside plain fine-tuning, with mean and spread
  kdcli distill +recipe=quickstart launch.processes=2 engine=zero3    two processes, everything sharded
  kdcli distill +recipe=quickstart --cfg job               the composed config, without running it""",
    "augment": """\
  kdcli augment +recipe=NAME --dry-run                     what it would ask: calls, tokens, cost, hosts and terms
  kdcli augment +recipe=NAME budget.max_cost=5             rows in runs/NAME/TIME/rows.jsonl, for 5 at most
  kdcli augment data.path=seeds.jsonl +augmentation@augmentation.answer=label +augmentation@augmentation.unlike=dedup \\
    +writer@writer.teacher=chat writer.teacher.url=URL writer.teacher.model=MODEL
  kdcli resume RUN_DIR budget.max_cost=10                  go on with more money, asking nothing twice
  kdcli distill data.path=RUN_DIR/rows.jsonl …             learn from the rows
  kdcli distill +recipe=NAME                               both at once
  kdcli augment --stats caches/answers.sqlite              what is stored, and what it cost""",
    "evaluate": """\
  kdcli evaluate student.path=runs/quickstart/TIME evaluation.heldout.data.path=recipes://data/mini/valid
  kdcli evaluate student.path=MODEL teacher=hf teacher.path=MODEL evaluation.heldout.data.path=valid/""",
    "cache": """\
  kdcli cache teacher.path=MODEL data.path=train/ cache.path=caches/mine        the 64 likeliest ids of each target
  kdcli cache teacher.path=MODEL data.path=train/ cache.codec=sampled           50 drawn ones, for objective=sampled
  kdcli cache --stats caches/mine data.path=train/                              what is there, and how well it is kept
  kdcli cache --verify caches/mine                                              only compare the checksums
  kdcli distill teacher=cached teacher.path=caches/mine data.path=train/ …      learn from it""",
}


def show(verb: str) -> int:
    """Print the page; returns exit code 0."""
    known = {name: first_comment(file) for name, file in recipes().items()}
    about = first_comment(paths.configs() / f"{verb}.yaml")
    flags = (
        parser(verb).format_help().split("\n\n", 1)[1].replace("options:\n", "").replace("optional arguments:\n", "")
    )
    print(
        f"kdcli {verb}: {about}\n\n"
        f"usage: kdcli {verb} [+recipe=NAME] [KEY=VALUE ...] [GROUP=OPTION ...] [flags]\n\n"
        f"Examples\n{EXAMPLES[verb]}\n\n"
        f"Recipes (+recipe=NAME, or +recipe=FILE.yaml)\n{_rows(known)}\n\n"
        f"Groups (GROUP=OPTION; `kdcli ls GROUP` explains)\n{_rows(_groups(verb))}\n\n"
        f"Keys\n{_keys(verb)}\n\n"
        f"Flags\n{flags.rstrip()}\n"
        f'  Tab completion: eval "$(kdcli -sc install=bash)"'
    )
    sys.stdout.flush()
    return 0


def _groups(verb: str) -> dict[str, str]:
    named = {g: f"{g}@{g}.NAME" if g in TERMS else g for g in GROUPS if g in SECTIONS[verb]}
    if verb == "distill":
        named["control"] = "control"
    return {named[group]: ", ".join(options(group)) for group in named}


def _keys(verb: str) -> str:
    """The root config's own keys with their comments, as they stand in the file."""
    text = (paths.configs() / f"{verb}.yaml").read_text("utf-8")
    return "\n".join(f"  {line}".rstrip() for line in text[text.index("run:") :].rstrip().splitlines())


def _rows(rows: dict[str, str]) -> str:
    width = max(map(len, rows), default=0)
    return "\n".join(
        textwrap.fill(
            text or " ", 118, initial_indent=f"  {name.ljust(width)}  ", subsequent_indent=" " * (width + 4)
        ).rstrip()
        for name, text in rows.items()
    )
