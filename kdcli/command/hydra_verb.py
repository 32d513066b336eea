"""What `distill` and `evaluate` share: Hydra after the verb, one run or a sweep, `--cfg`, `--help`, completion."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kdcli.command import control, help_page, runs, sweep
from kdcli.command.arguments import parse
from kdcli.command.compose import compose, explain, hydra, plain

Adjust = Callable[[dict[str, Any]], None]
Instead = Callable[[dict[str, Any]], int]


def unchanged(config: dict[str, Any]) -> None:
    """The adjustment of a verb that needs none."""


def main(verb: str, argv: Sequence[str], *, adjust: Adjust = unchanged, instead: Instead | None = None) -> int:
    """Do what the arguments ask for; returns the exit code. `adjust` changes the plain config before it is checked;
    `instead` gets it in place of a run."""
    arguments = parse(verb, argv)
    if arguments.help:
        return help_page.show(verb)
    asked = control.plan(verb, arguments.overrides)
    with hydra(arguments) as app:
        if arguments.cfg or arguments.info:
            arguments.overrides = asked.one
            return _show(app, verb, arguments)
        if (arguments.multirun or asked.swept) and instead is None:
            return sweep.run(app, verb, asked.overrides, adjust)
        config = compose(app, verb, arguments.overrides)
        timed = _named_after_the_time(config)
        values = plain(config, verb)
    adjust(values)
    if instead is not None:
        return instead(values)
    return runs.start(values, overrides=arguments.overrides, timed=timed)


def complete(verb: str, line: str, shell: str) -> int:
    """Print the words that may follow `kdcli VERB LINE`, for the shell."""
    with hydra() as app:
        os.environ["COMP_LINE"] = f"kdcli {line}"
        app.shell_completion(config_name=verb, overrides=[f"query={shell}"])
    return 0


def _show(app: Hydra, verb: str, arguments: Namespace) -> int:
    compose(app, verb, arguments.overrides, RunMode.RUN)
    try:
        if arguments.info:
            app.show_info(arguments.info, config_name=verb, overrides=arguments.overrides)
        else:
            app.show_cfg(
                config_name=verb,
                overrides=arguments.overrides,
                cfg_type=arguments.cfg,
                package=arguments.package,
                resolve=arguments.resolve,
            )
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, app, verb, arguments.overrides) from error
    sys.stdout.flush()
    return 0


def _named_after_the_time(config: DictConfig) -> bool:
    """Whether run.dir holds ${now:…}, so that it is meant to be a new folder each time."""
    raw: Any = OmegaConf.to_container(config, resolve=False)
    return "${now:" in str(raw["run"]["dir"])
