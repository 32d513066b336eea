"""domains.png: weights, the gap to the teacher and token shares of each domain over steps."""

from __future__ import annotations

import io
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcli.api import Reporter
from kdcli.report._tracked import library, require
from kdcli.store import atomic
from kdcli.store import metrics as metrics_log

FILE = "domains.png"
PANELS = {  # metric -> axis label, in the order of panels
    "domain/*/weight": "weight",
    "probe/*/gap": "gap to the teacher\n(nats per {unit})",
    "domain/*/token_share": "share of tokens",
}
MOST_DOMAINS = 20
MOST_POINTS = 1000  # of a line; beyond, neighbours are averaged, two into one
PARTS = 10  # of the run, over each of which token shares are a mean, because a step draws few rows
FROM_ZERO = ("weight", "share of tokens")
STYLES = ("-", "--")  # the second for what repeats a colour
COLOURS = (
    "#4269d0", "#ff725c", "#3ca951", "#a463f2", "#efb118", "#6cc5b0", "#9c6b4e", "#ff8ab7", "#56616f", "#97bbf5",
)  # fmt: skip

Points = list[tuple[float, float]]  # step, value


class Line:
    """Values over steps, each the mean of `stride` of them, at the last one's step; `stride` doubles as they grow."""

    def __init__(self) -> None:
        self.stride = 1
        self._sums: list[tuple[float, float, int]] = []  # last step, sum of values, how many

    def add(self, step: float, value: float) -> None:
        if self._sums and self._sums[-1][2] < self.stride:
            _, total, count = self._sums.pop()
            self._sums.append((step, total + value, count + 1))
        else:
            self._sums.append((step, value, 1))
        if len(self._sums) > MOST_POINTS:
            self._sums, self.stride = _merged(self._sums, 2), 2 * self.stride

    def points(self) -> Points:
        return [(step, total / count) for step, total, count in self._sums]

    def parts(self, number: int) -> Points:
        """Means over at most `number` parts of about equally many values."""
        sums = _merged(self._sums, math.ceil(len(self._sums) / number))
        return [(step, total / count) for step, total, count in sums]


class DomainsPlot(Reporter):
    """Draws `RUN_DIR/domains.png` when the run ends, and while it lasts every `minutes` at most (more rarely where
    drawing is slow: never more than one part in fifty of the time). A run of one domain has no picture.

    Of more than 20 domains those 20 are shown whose weight is largest in the end. Token shares are means over tenths
    of the steps so far. Raises ConfigError if matplotlib is not installed.
    """

    def __init__(self, *, minutes: float = 1.0) -> None:
        require("domains_plot", "matplotlib", extra="plot")
        self.minutes = minutes
        self._folder: Path | None = None
        self._name = ""
        self._lines: dict[str, dict[str, Line]] = {panel: defaultdict(Line) for panel in PANELS}
        self._per_byte = False
        self._next = math.inf  # monotonic seconds
        self._drawn = True

    def start(self, info: Mapping[str, Any]) -> None:
        self._folder, self._name = Path(info["dir"]), str(info["name"])
        for line in metrics_log.read(self._folder):  # of a run that goes on
            if line["step"] <= info["step"]:
                self._remember(line["step"], line)
        self._next = time.monotonic() + 60 * self.minutes

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._remember(step, metrics)
        began = time.monotonic()
        if began >= self._next:
            self._draw()
            now = time.monotonic()
            self._next = now + max(60 * self.minutes, 50 * (now - began))

    def close(self) -> None:
        if not self._drawn:
            self._draw()

    def _remember(self, step: int, metrics: Mapping[str, Any]) -> None:
        for panel, lines in self._lines.items():
            begin, end = panel.split("*")
            for key, value in metrics.items():
                if key.startswith(begin) and key.endswith(end) and value is not None and math.isfinite(value):
                    name = key[len(begin) : -len(end)]
                    lines[name].add(step, value)
                    self._drawn = False
        self._per_byte = self._per_byte or any(key.endswith("/teacher_per_byte") for key in metrics)

    def _draw(self) -> None:
        names = self._shown()
        if self._folder is None or len(names) < 2:
            return
        unit = "byte" if self._per_byte else "target"
        lines = {
            label.format(unit=unit): {name: self._points(panel, name) for name in names}
            for panel, label in PANELS.items()
            if self._lines[panel]
        }
        more = len(self._lines["domain/*/weight"]) - len(names)
        title = f"{self._name}: {len(names)} of {len(names) + more} domains" if more else self._name
        file = io.BytesIO()
        picture(title, lines).savefig(file, format="png", metadata={"Software": None})
        atomic.write_bytes(self._folder / FILE, file.getvalue())
        self._drawn = True

    def _shown(self) -> list[str]:
        """At most 20 domains, in the data's order."""
        weights = self._lines["domain/*/weight"]
        largest = sorted(weights, key=lambda name: -weights[name].points()[-1][1])[:MOST_DOMAINS]
        return [name for name in weights if name in largest]

    def _points(self, panel: str, name: str) -> Points:
        line = self._lines[panel].get(name, Line())
        return line.parts(PARTS) if panel.endswith("token_share") else line.points()


def picture(title: str, panels: Mapping[str, Mapping[str, Points]]) -> Any:
    """A matplotlib figure: one panel above the other with a line per name, and one legend beside them."""
    figure_of, canvas_of = library("matplotlib.figure").Figure, library("matplotlib.backends.backend_agg")
    names = list(next(iter(panels.values())))
    figure = figure_of(figsize=(9, 0.6 + 2.3 * len(panels)), dpi=120, layout="constrained")
    canvas_of.FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (label, lines) in zip(axes, panels.items(), strict=True):
        for number, name in enumerate(names):
            _plot(axis, lines.get(name, []), number, steps=label == "weight")
        axis.set_ylabel(label, fontsize=9)
        axis.set_ylim(bottom=0 if label in FROM_ZERO else None)
        axis.grid(color="0.9", linewidth=0.7)
        axis.tick_params(labelsize=8, length=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.01)
    axes[-1].set_xlabel("step", fontsize=9)
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(_plain(title), fontsize=11, x=0.01, ha="left")
    labels = [_plain(_short(name)) for name in names]
    figure.legend(axes[0].lines, labels, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _plot(axis: Any, points: Points, number: int, *, steps: bool) -> None:
    axis.plot(
        [step for step, _ in points],
        [value for _, value in points],
        linestyle=STYLES[number // len(COLOURS) % len(STYLES)],
        color=COLOURS[number % len(COLOURS)],
        linewidth=1.4,
        marker="o" if len(points) <= 40 and not steps else None,
        markersize=2.5,
        drawstyle="steps-pre" if steps else "default",  # the weight of step s is that of the time before s
    )


def _merged(sums: Sequence[tuple[float, float, int]], size: int) -> list[tuple[float, float, int]]:
    """`size` neighbours into one."""
    groups = [sums[start : start + size] for start in range(0, len(sums), max(1, size))]
    return [(group[-1][0], math.fsum(s[1] for s in group), sum(s[2] for s in group)) for group in groups]


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"


def _plain(text: str) -> str:
    """Dollar signs are no formula."""
    return text.replace("$", r"\$")
