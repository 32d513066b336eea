"""What `kdcli verify` found, as tables for people and as JSON for machines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from kdcli.train.conformance.suite import Outcome, Verdict


SHOWN = {  # checks whose measured error stands in the summary
    "equals_oracle": "formula",
    "finite_differences": "gradient",
    "closed_form_is_autograd": "closed",
    "loss_falls": "left",
}
SHOWN_WIDE = {
    **SHOWN,
    "chunked_is_dense": "dense",
    "micro_batches_do_not_matter": "cuts",
    "two_processes_are_one": "2 ranks",
    "packing_does_not_matter": "packed",
}
LEGEND = (
    "largest errors: formula against a second one, gradient against finite differences, closed form against autograd; "
    "left: share of the loss after 20 steps"
)
WIDE = 110  # columns of a terminal


def show(verdicts: Sequence[Verdict], *, full: bool) -> None:
    """One line per objective with its main errors, or with `full` one line per check; then what failed and why."""
    console = Console(highlight=False)
    if full:
        for verdict in verdicts:
            console.print(_checks(verdict, claims=console.width >= WIDE))
            for reason, checks in _not_applicable(verdict).items():
                console.print(f"[dim]- {', '.join(checks)}: {escape(reason)}[/]")
    else:
        console.print(_summary(verdicts, SHOWN_WIDE if console.width >= WIDE else SHOWN))
        console.print(f"[dim]{LEGEND}[/]")
    failures = [(verdict, outcome) for verdict in verdicts for outcome in verdict.failures]
    for verdict, outcome in failures:
        why = outcome.note or f"measured {_number(outcome.error)}, at most {_number(outcome.bound)}"
        console.print(f"[red]failed[/] {verdict.objective}: {outcome.check}: {escape(outcome.claim)} ({escape(why)})")
    count = sum(outcome.applies for verdict in verdicts for outcome in verdict.outcomes)
    seconds = sum(verdict.seconds for verdict in verdicts)
    result = f"{len(failures)} failed" if failures else "all passed"
    noun = "objective" if len(verdicts) == 1 else "objectives"
    console.print(f"{count} checks of {len(verdicts)} {noun} in {seconds:.1f} s: {result}")


def as_json(verdicts: Sequence[Verdict]) -> str:
    """Everything measured; what is not finite is null."""
    objectives = [
        {
            "objective": verdict.objective,
            "passed": not verdict.failures,
            "seconds": round(verdict.seconds, 3),
            "checks": [_plain(outcome) for outcome in verdict.outcomes],
        }
        for verdict in verdicts
    ]
    return json.dumps({"passed": all(one["passed"] for one in objectives), "objectives": objectives}, indent=2)


def _summary(verdicts: Sequence[Verdict], shown: Mapping[str, str]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("objective", no_wrap=True)
    for name in ("passed", *shown.values()):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for verdict in verdicts:
        outcomes = {outcome.check: outcome for outcome in verdict.outcomes if outcome.applies}
        if not outcomes:
            table.add_row(verdict.objective, "-", *[""] * len(shown), "[yellow]not checked[/]")
            continue
        table.add_row(
            verdict.objective,
            f"{len(outcomes) - len(verdict.failures)}/{len(outcomes)}",
            *(_number(outcomes[check].error) if check in outcomes else "-" for check in shown),
            "[red]failed[/]" if verdict.failures else "[green]ok[/]",
        )
    return table


def _checks(verdict: Verdict, *, claims: bool) -> Table:
    table = Table(title=verdict.objective, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column("check", no_wrap=True)
    for name in ("measured", "at most"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    if claims:
        table.add_column("claim")
    for outcome in verdict.outcomes:
        mark = "-" if not outcome.applies else "[green]ok[/]" if outcome.passed else "[red]failed[/]"
        numbers = (_number(outcome.error), _number(outcome.bound)) if outcome.applies else ("", "")
        table.add_row(outcome.check, *numbers, mark, *([escape(outcome.claim)] if claims else []))
    return table


def _plain(outcome: Outcome) -> dict[str, Any]:
    result = "not applicable" if not outcome.applies else "passed" if outcome.passed else "failed"
    plain: dict[str, Any] = {"check": outcome.check, "claim": outcome.claim, "result": result, "note": outcome.note}
    if outcome.applies:
        plain["error"] = outcome.error if math.isfinite(outcome.error) else None
        plain["bound"] = outcome.bound
    return plain


def _not_applicable(verdict: Verdict) -> dict[str, list[str]]:
    """Reason -> checks."""
    reasons: dict[str, list[str]] = {}
    for outcome in verdict.outcomes:
        if not outcome.applies:
            reasons.setdefault(outcome.note, []).append(outcome.check)
    return reasons


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}" if math.isfinite(value) else str(value)
