"""domains.png: there when the run ends, at most once a minute before, readable with 2 to 20 domains."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kdcli.errors import ConfigError
from kdcli.report import _tracked, domains_plot
from kdcli.report.domains_plot import MOST_POINTS, DomainsPlot, Line, picture
from kdcli.store.metrics import MetricsLog

needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
PNG = b"\x89PNG"


def metrics(step: int, names: list[str]) -> dict[str, float]:
    found = {f"domain/{name}/weight": 1 / len(names) for name in names}
    found |= {f"domain/{name}/token_share": 1 / len(names) for name in names}
    return found | ({f"probe/{name}/gap": 1.0 / (1 + step) for name in names} if step % 2 == 0 else {})


def run(folder: Path, steps: int, names: list[str], **settings: Any) -> DomainsPlot:
    plot = DomainsPlot(**settings)
    plot.start({"dir": folder, "name": "try", "steps": steps, "step": 0, "config": {}})
    for step in range(1, steps + 1):
        plot.log(step, metrics(step, names) | {"loss/total": 1.0})
    return plot


def test_a_missing_library_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tracked.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'report=domains_plot needs matplotlib.*pip install "kdcli\[plot\]"'):
        DomainsPlot()


@needs_matplotlib
def test_the_picture_is_there_when_the_run_ends_and_not_in_its_first_minute(tmp_path: Path) -> None:
    plot = run(tmp_path, 5, ["a", "b"])
    assert not (tmp_path / "domains.png").exists()
    plot.close()
    assert (tmp_path / "domains.png").read_bytes().startswith(PNG)


@needs_matplotlib
def test_it_is_drawn_again_once_a_minute_and_rarely_where_drawing_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawing takes 3 seconds here, so that the next one is 150 later; the clock goes on by 20 per step."""
    clock = [0.0]
    times: list[float] = []
    monkeypatch.setattr(domains_plot.time, "monotonic", lambda: clock[0])

    def draw(self: DomainsPlot) -> None:
        times.append(clock[0])
        clock[0] += 3

    monkeypatch.setattr(DomainsPlot, "_draw", draw)
    plot = DomainsPlot()
    plot.start({"dir": tmp_path, "name": "try", "steps": 20, "step": 0, "config": {}})
    for step in range(1, 21):
        clock[0] += 20
        plot.log(step, metrics(step, ["a", "b"]))
    assert times == [60.0, 223.0, 386.0]


@needs_matplotlib
def test_a_run_that_goes_on_keeps_what_was_before_its_checkpoint(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.append(step, metrics(step, ["a", "b"]))
    plot = DomainsPlot()
    plot.start({"dir": tmp_path, "name": "try", "steps": 5, "step": 2, "config": {}})
    plot.log(3, metrics(3, ["a", "b"]))
    assert [step for step, _ in plot._lines["domain/*/weight"]["a"].points()] == [1, 2, 3]
    assert [step for step, _ in plot._lines["probe/*/gap"]["a"].points()] == [2]


@needs_matplotlib
@pytest.mark.parametrize("names", [[], ["only"]])
def test_a_run_of_one_domain_has_no_picture(tmp_path: Path, names: list[str]) -> None:
    plot = DomainsPlot()
    plot.start({"dir": tmp_path, "name": "try", "steps": 1, "step": 0, "config": {}})
    plot.log(1, {"loss/total": 1.0} | (metrics(1, names) if names else {}))
    plot.close()
    assert list(tmp_path.iterdir()) == []


@needs_matplotlib
@pytest.mark.parametrize("number", [2, 10, 20])
def test_the_legend_names_all_domains_beside_the_panels(number: int) -> None:
    """No overlap: every panel ends left of the legend, the legend lies in the picture and its lines are apart."""
    names = [f"_domain_{i}$" + "x" * (20 if i == 3 else 0) for i in range(number)]
    panels = {label: {name: [(1.0, 0.1), (2.0, 0.2)] for name in names} for label in ("weight", "gap", "share")}
    figure = picture("a $ title", panels)
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    texts = [text.get_window_extent() for text in legend.get_texts()]
    assert len(texts) == number
    assert all(axis.get_tightbbox().x1 <= box.x0 for axis in figure.axes)
    assert box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in pairwise(texts))
    tight = [axis.get_tightbbox() for axis in figure.axes]
    assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(tight))
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == number


@needs_matplotlib
def test_of_more_domains_the_twenty_largest_are_shown(tmp_path: Path) -> None:
    plot = DomainsPlot()
    plot.start({"dir": tmp_path, "name": "try", "steps": 1, "step": 0, "config": {}})
    plot.log(1, {f"domain/d{i}/weight": i / 300 for i in range(25)})
    assert plot._shown() == [f"d{i}" for i in range(5, 25)]


def test_a_long_line_keeps_its_shape_in_bounded_memory() -> None:
    """A ramp stays a ramp: equal strides, each the mean of what it stands for."""
    line = Line()
    for step in range(1, 30001):
        line.add(step, float(step))
    points = line.points()
    assert len(points) <= MOST_POINTS
    strides = {b[0] - a[0] for a, b in pairwise(points[:-1])}
    assert len(strides) == 1
    assert all(abs(value - step) <= line.stride / 2 for step, value in points)


def test_parts_are_means_of_equally_many_steps() -> None:
    line = Line()
    for step in range(1, 21):
        line.add(step, float(step % 2))
    assert line.parts(10) == [(float(step), 0.5) for step in range(2, 21, 2)]
