"""The terminal: how far the run is, and at its end what it changed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console as RichConsole
from rich.live import Live
from rich.text import Text

from kdcli.api import Reporter
from kdcli.report._numbers import number, percent
from kdcli.report._progress import Progress
from kdcli.report._summary import POOL, Evaluation, Metrics, summary
from kdcli.store import metrics as metrics_log

MOST = 6  # metrics that an evaluation's line shows


class Console(Reporter):
    """On a terminal one line with a bar that stays at the bottom, else one plain line per logged step; a line per
    evaluation; at the end a table per evaluation of the first against the last.

    `live` forces the bar on or off; null: on for a terminal that can redraw a line.
    """

    def __init__(self, *, live: bool | None = None) -> None:
        self.live = live
        self._console = RichConsole(highlight=False)
        self._progress = Progress(steps=0, step=0, minutes=None)
        self._bar: Live | None = None
        self._handlers: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._first: dict[str, Evaluation] = {}
        self._last: dict[str, Evaluation] = {}

    def start(self, info: Mapping[str, Any]) -> None:
        reconfigure = getattr(sys.stdout, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")  # a domain's name must not end a run in an ASCII locale
        self._console = RichConsole(highlight=False)
        minutes = info.get("config", {}).get("run", {}).get("minutes")
        self._progress = Progress(steps=info["steps"], step=info["step"], minutes=minutes)
        for line in metrics_log.read(info["dir"]):  # of a run that goes on
            self._remember(line["step"], line)
        draws = self._console.is_terminal and not self._console.is_dumb_terminal
        if self.live or (self.live is None and draws):
            self._bar = Live(self._progress, console=self._console, refresh_per_second=2, transient=True)
            self._bar.start()
            self._lead_logs_above_the_bar()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        evaluations = self._remember(step, metrics)
        if any(name.startswith("loss/") for name in metrics):
            self._progress.update(step, metrics, timed=not evaluations)
            if self._bar is None:
                self._print(self._progress.line())
        for name in evaluations:
            self._progress.pause()
            self._print(f"step {step} | {name} | {_highlights(self._last[name].metrics)}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            for handler, stream in self._handlers:
                handler.setStream(stream)
            if self._progress.metrics:
                self._console.print(self._progress)  # as it was last
        for name, last in self._last.items():
            self._console.print()
            self._console.print(summary(name, self._first[name], last, self._console))

    def _remember(self, step: int, metrics: Metrics) -> list[str]:
        """Keep the first and the latest metrics of each evaluation; the names of those that `metrics` has."""
        found: dict[str, dict[str, float | None]] = {}
        for path, value in metrics.items():
            if path.startswith("eval/") and path.count("/") >= 2:
                name, key = path.removeprefix("eval/").split("/", 1)
                found.setdefault(name, {})[key] = value
        for name, values in found.items():
            self._last[name] = Evaluation(step, values)
            self._first.setdefault(name, self._last[name])
        return list(found)

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)

    def _lead_logs_above_the_bar(self) -> None:
        """Loggers hold the stderr of before; the one that `Live` has put in its place knows about the bar."""
        for handler in logging.getLogger().handlers:
            if type(handler) is logging.StreamHandler and handler.stream in (sys.__stderr__, sys.__stdout__):
                self._handlers.append((handler, handler.stream))
                handler.setStream(sys.stderr)


def _highlights(metrics: Metrics) -> str:
    """The pool of all domains where there is one, else the first few metrics."""
    pool = {key.removeprefix(f"{POOL}/"): value for key, value in metrics.items() if key.startswith(f"{POOL}/")}
    if "ppl" in pool:
        named = [f"perplexity {number(pool['ppl'])}"]
        named += [f"KL {number(pool['kl'])}"] if "kl" in pool else []
        return " | ".join(named + ([f"agreement {percent(pool['agree'])}"] if "agree" in pool else []))
    return " | ".join(f"{key} {number(value)}" for key, value in list((pool or metrics).items())[:MOST])
