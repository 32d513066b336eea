"""The command `kdcli`: one verb, then what the verb takes. Imports nothing heavy; a verb's module does."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence

from kdcli import __version__
from kdcli.errors import KDError

VERBS = {  # verb -> what it does; its module is kdcli.command.VERB
    "distill": "train a student from a teacher, evaluate and export it",
    "augment": "make training rows with steps that ask models and filter",
    "evaluate": "score a model or the student of a run",
    "cache": "write what a teacher says of a data set, to be read by teacher=cached",
    "resume": "go on with a run from its own config",
    "export": "a checkpoint of a run as a folder for from_pretrained, adapters merged",
    "verify": "test objectives against their formulas, and print what was measured",
    "ls": "list recipes, config groups and their options",
    "copy": "copy a recipe to a file of your own",
}
COMPOSED = ("distill", "augment", "evaluate", "cache")  # verbs that take Hydra's overrides

HELP = """\
kdcli distills language models: a small student learns from a large teacher.

usage: kdcli VERB [arguments]

{verbs}

Examples
  kdcli distill +recipe=quickstart                     distill a real model on this machine, in minutes
  kdcli distill +recipe=quickstart run.steps=20 objective@objective.kd=reverse_kl
  kdcli distill +recipe=quickstart optimizer.lr=1e-4,1e-3 -m        a sweep, with a table at the end
  kdcli evaluate student.path=RUN_DIR evaluation.heldout.data.path=recipes://data/mini/valid
  kdcli copy quickstart mine.yaml && kdcli distill +recipe=mine.yaml

`kdcli VERB --help` explains a verb, `kdcli ls` lists what there is to choose from.
Exit codes: 0 done, 1 failed, 2 wrong input, 3 data refused, 4 numbers broke down, 130/143 interrupted after saving.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. A user's error is one paragraph on stderr, a bug is a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Read when torch loads. Threads that spin while they wait for each other cost a busy machine three times the CPU.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of kernels it would rather have, when it is imported
    try:
        return _dispatch(arguments)
    except KDError as error:
        if os.environ.get("KDCLI_TRACEBACK") == "1":
            raise
        _complain(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `kdcli ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, VERBS))
        print(HELP.format(verbs="\n".join(f"  {verb.ljust(width)}  {about}" for verb, about in VERBS.items())), end="")
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"kdcli {__version__}")
        return 0
    if arguments[0] in ("-sc", "--shell-completion", "--shell_completion"):
        return importlib.import_module("kdcli.command.completion").main(arguments[1:], VERBS, COMPOSED)
    verb, *rest = arguments
    if verb not in VERBS:
        from kdcli.config.nearest import suggest
        from kdcli.errors import ConfigError

        raise ConfigError(f"{verb}: kdcli has no such verb; {suggest(verb, VERBS)}")
    return importlib.import_module(f"kdcli.command.{verb}").main(rest)


def _complain(error: KDError) -> None:
    """One paragraph; several problems as a list, so that none is read as part of another."""
    problems = getattr(error, "problems", ()) or (str(error),)
    if len(problems) == 1:
        text = f"error: {problems[0]}"
    else:
        text = f"error: {len(problems)} problems\n" + "\n".join(f"  - {problem}" for problem in problems)
    encoding = sys.stderr.encoding or "ascii"
    print(text.encode(encoding, "replace").decode(encoding), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
