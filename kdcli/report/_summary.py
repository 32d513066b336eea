"""What a run changed: evaluation metrics before and after, as a table that fits the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from kdcli.report._numbers import number, percent

Metrics = Mapping[str, float | None]
POOL = "all"


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one evaluation at one step."""

    step: int
    metrics: Metrics


@dataclass(frozen=True)
class _Column:
    heading: str
    value: Callable[[str], str | Text]  # of a domain
    style: str = ""


def summary(name: str, first: Evaluation, last: Evaluation, console: Console) -> RenderableType:
    """Perplexity, KL and agreement per domain where the evaluation has them, else a row per metric.

    `first is last` where there was only one. Where the terminal is narrow, agreement goes first and KL second.
    """
    when = f"step {last.step}" if first is last else f"before (step {first.step}) and after (step {last.step})"
    title = Text.assemble((name, "bold"), f", {when}")
    domains = [key.removesuffix("/ppl") for key in last.metrics if key.endswith("/ppl")]
    if not domains:
        return Group(title, _metric_table(first, last))
    if POOL in domains:
        domains.remove(POOL)
        domains += [POOL] if len(domains) > 1 else []  # it would repeat the only domain
    groups = _groups(first, last)
    for count, space in [(len(groups), 1), *((count, 0) for count in range(len(groups), 0, -1))]:
        table = _beside(domains, dict(list(groups.items())[:count]), space)
        if Measurement.get(console, console.options.update_width(500), table).maximum <= console.width:
            break
    note = "closed: share of the gap to the teacher that is gone (log perplexity, KL)"
    return Group(title, Text(), table, *([Text(note, style="dim")] if len(groups) > 1 and first is not last else []))


def gap_closed(before: float | None, after: float | None, goal: float | None) -> float | None:
    """(before - after) / (before - goal); None where there was no gap: the goal is not below `before`."""
    if before is None or after is None or goal is None or not goal < before:
        return None
    return (before - after) / (before - goal)


def log_gap_closed(before: float | None, after: float | None, goal: float | None) -> float | None:
    """`gap_closed` of the logarithms of three perplexities."""
    return gap_closed(_log(before), _log(after), _log(goal))


def _groups(first: Evaluation, last: Evaluation) -> dict[str, list[_Column]]:
    """Heading of a group -> its columns, the most wanted group first."""
    old, new = first.metrics, last.metrics

    def shown(metrics: Metrics, key: str, form: Callable[[float | None], str] = number) -> Callable[[str], str]:
        return lambda domain: form(metrics.get(f"{domain}/{key}"))

    def pair(key: str, form: Callable[[float | None], str] = number) -> list[_Column]:
        if first is last:
            return [_Column("student", shown(new, key, form), "bold")]
        return [_Column("before", shown(old, key, form)), _Column("after", shown(new, key, form), "bold")]

    def log_gap(domain: str) -> Text:
        before, after = old.get(f"{domain}/ppl"), new.get(f"{domain}/ppl")
        return _share(log_gap_closed(before, after, new.get(f"{domain}/teacher_ppl")))

    def kl_gap(domain: str) -> Text:
        return _share(gap_closed(old.get(f"{domain}/kl"), new.get(f"{domain}/kl"), 0.0))

    if not any(key.endswith("/teacher_ppl") for key in new):
        return {"perplexity": pair("ppl")}
    teacher = _Column("teacher", shown(new, "teacher_ppl"))
    closed = [] if first is last else [_Column("closed", log_gap)], [] if first is last else [_Column("closed", kl_gap)]
    return {
        "perplexity": [teacher, *pair("ppl"), *closed[0]],
        "KL to teacher": [*pair("kl"), *closed[1]],
        "agreement": pair("agree", percent),
    }


def _beside(domains: list[str], groups: Mapping[str, list[_Column]], space: int) -> Table:
    """The domains' names and the groups side by side, each a table of its own under its heading."""
    whole = Table.grid(padding=(0, 2 + space))
    names = _empty(" ", space)
    names.add_column("domain", no_wrap=True)
    tables = [names]
    above_pool = domains[-2] if POOL in domains else None
    for domain in domains:
        names.add_row(Text(domain, style="bold" if domain == POOL else ""), end_section=domain == above_pool)
    for heading, columns in groups.items():
        table = _empty(heading, space)
        for column in columns:
            table.add_column(column.heading, justify="right", style=column.style, no_wrap=True)
        for domain in domains:
            table.add_row(*(column.value(domain) for column in columns), end_section=domain == above_pool)
        tables.append(table)
    whole.add_row(*tables)
    return whole


def _metric_table(first: Evaluation, last: Evaluation) -> Table:
    table = _empty(None, 1)
    table.add_column("metric", overflow="fold")
    for heading in ("before", "after") if first is not last else ("value",):
        table.add_column(heading, justify="right", style="" if heading == "before" else "bold")
    for key, value in last.metrics.items():
        numbers = [value] if first is last else [first.metrics.get(key), value]
        table.add_row(Text(key), *map(number, numbers))
    return table


def _empty(heading: str | None, space: int) -> Table:
    return Table(
        title=heading,
        title_style="",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, space, 0, 0),
        header_style="dim",
        min_width=len(heading or ""),
    )


def _share(value: float | None) -> Text:
    return Text(percent(value), style="" if value is None else "green" if value > 0 else "red")


def _log(value: float | None) -> float | None:
    return math.log(value) if value is not None and 0 < value < math.inf else None
