"""`kdcli augment … --dry-run`: calls, tokens, cost, hosts, budget and terms of an augmentation, before it asks."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdcli.command import warned
from kdcli.config import augmented
from kdcli.config.check import check
from kdcli.config.environment import expand
from kdcli.config.terms import declared_of
from kdcli.pipeline.plan import Estimate, Plan
from kdcli.report._numbers import count, money


def show(config: dict[str, Any]) -> int:
    """Print the plan; returns exit code 0. Raises ConfigError as a run would; makes no run folder and asks nobody."""
    check(config)
    warned.tell(config)
    pipeline = augmented.pipeline_of(config, Path(expand(config["run"]["dir"])).expanduser())
    plan = pipeline.plan(augmented.settings_of(config).plan_rows)
    priced = any(writer.price_prompt or writer.price_completion for writer in pipeline.writers.values())
    console = Console(highlight=False)
    console.print(_table(plan, priced))
    for line in _facts(config, pipeline, plan, priced):
        console.print(Text(line), soft_wrap=True)
    sys.stdout.flush()
    return 0


def _table(plan: Plan, priced: bool) -> Table:
    about = "" if plan.exact else f", estimated from {plan.tried:,} of {plan.seeds:,} rows"
    look: dict[str, Any] = {"box": None, "show_footer": True, "padding": (0, 2, 0, 0), "title_justify": "left"}
    table = Table(title=f"plan{about}", title_style="bold", header_style="bold", footer_style="bold", **look)
    table.add_column("step", footer="all", overflow="fold")
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("writer", overflow="fold")
    names = ("calls", "stored", "tokens", "written", "at most", *(("cost", "at most") if priced else ()))
    for name, total in zip(names, _cells(plan.total, priced), strict=True):
        table.add_column(name, footer=total, justify="right", no_wrap=True)
    for step in plan.steps:
        head = (step.name, f"{step.rows_in:,}")
        if step.done:
            table.add_row(*head, "(done)")
        elif not step.writers:
            table.add_row(*head)
        for name, one in step.writers.items():
            table.add_row(*head, name, *_cells(one, priced))
            head = ("", "")
    return table


def _cells(one: Estimate, priced: bool) -> list[str]:
    tokens = [one.prompt_tokens, one.completion_tokens, one.completion_tokens_most]
    cost = [one.cost, one.cost_most]
    return [
        f"{one.calls:,}",
        f"{one.stored:,}",
        *("no limit" if value is None else count(value) for value in tokens),
        *("no limit" if value is None else money(value) for value in (cost if priced else ())),
    ]


def _facts(config: Mapping[str, Any], pipeline: Any, plan: Plan, priced: bool) -> list[str]:
    asked = {name for step in plan.steps for name in step.writers}
    lines = []
    for step in plan.steps:
        if step.aside and not step.done:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in step.aside.items())
            lines.append(f"aside:  {step.name} would set aside of the {plan.tried:,} rows tried: {reasons}")
    hosts = [
        f"{name}: {writer.model} at {writer.endpoint}" for name, writer in pipeline.writers.items() if name in asked
    ]
    lines.append(f"asked:  {'; '.join(hosts) or 'nobody'}")
    if not priced and any(pipeline.writers[name].endpoint != "local" for name in asked):
        lines.append("cost:   no writer has a price; set writer.NAME.price_prompt and price_completion, of 1e6 tokens")
    lines.append(f"budget: {_budget(config, plan, priced)}")
    declared = declared_of(config)
    known = f", acknowledged {', '.join(declared.acknowledged)}" if declared.acknowledged else ""
    lines.append(
        f"terms:  use={declared.use}{known}: nothing conflicts"
        if declared.use
        else "terms:  no use is declared (terms.use), so nothing is refused"
    )
    lines.append("note:   filters keep every row in a plan, so what follows one will be asked less" if asked else "")
    return [line for line in lines if line]


def _budget(config: Mapping[str, Any], plan: Plan, priced: bool) -> str:
    """Whether the limits hold what is planned, with what the run folder has spent."""
    limits = {key: value for key, value in (config.get("budget") or {}).items() if value is not None}
    if not limits:
        return "no limit is set (budget.max_cost, max_calls, max_tokens)"
    total, spent = plan.total, plan.spent
    most = None if total.completion_tokens_most is None else total.prompt_tokens + total.completion_tokens_most
    planned: dict[str, tuple[float, float, float | None]] = {  # spent, expected, at most
        "max_calls": (spent.calls, total.calls, total.calls),
        "max_tokens": (spent.tokens, total.prompt_tokens + total.completion_tokens, most),
        "max_cost": (spent.cost, total.cost, total.cost_most),
    }
    told = []
    for key, limit in limits.items():
        told_as = money if key == "max_cost" else count
        before, expected, at_most = planned[key]
        if key == "max_cost" and not priced:
            verdict = "no limit, since no writer has a price"
        elif before + expected > limit:
            verdict = f"too little: {told_as(before + expected)} is expected, and the run stops at the limit"
        elif at_most is None or before + at_most > limit:
            verdict = "enough for what is expected, not for the longest answers"
        else:
            verdict = "enough"
        told.append(f"{key}={limit:,} is {verdict}")
    return "; ".join(told)
