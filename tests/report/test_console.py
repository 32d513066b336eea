"""What a user reads: one line per step or one that moves, and a table that says what the run changed."""

import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole

from kdcli.report._numbers import clock, number, percent, speed
from kdcli.report._progress import Progress
from kdcli.report._summary import Evaluation, gap_closed, summary
from kdcli.report.console import Console
from kdcli.store.metrics import MetricsLog

STEP = {"loss/total": 2.5, "loss/kd": 2.0, "loss/ce": 3.0, "lr": 1.2e-3, "grad_norm": 1.8, "tokens_per_second": 12345.0}


def _info(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"dir": folder, "name": "try", "steps": 50, "step": 0, "config": {"run": {"minutes": None}}} | changes


def _heldout(
    ppl: float, kl: float = 1.0, agree: float = 0.5, *, teacher: float | None = 20.0, domain: str = "code"
) -> dict:
    metrics = {}
    for name in (domain, "all"):
        metrics[f"eval/heldout/{name}/ppl"] = ppl
        if teacher is not None:
            values = {"teacher_ppl": teacher, "kl": kl, "agree": agree}
            metrics |= {f"eval/heldout/{name}/{key}": value for key, value in values.items()}
        metrics[f"eval/heldout/{name}/tokens"] = 100.0
    return metrics


def _rows(text: str) -> dict[str, list[str]]:
    """First word of each line -> the other words of it."""
    return {words[0]: words[1:] for line in text.splitlines() if (words := line.split())}


def _report(capsys: pytest.CaptureFixture[str], tmp_path: Path, *logged: tuple[int, dict[str, float]]) -> str:
    console = Console()
    console.start(_info(tmp_path))
    for step, metrics in logged:
        console.log(step, metrics)
    console.close()
    return capsys.readouterr().out


def test_a_step_is_one_plain_line_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = _report(capsys, tmp_path, (12, STEP))
    line, eta = out.split(" | ETA ")
    assert line == "step 12/50 | loss 2.500 | kd 2.000 | ce 3.000 | lr 1.2e-03 | grad 1.80 | 12.3k tok/s"
    assert re.fullmatch(r"\d:\d\d\n", eta)


def test_a_single_term_is_not_said_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = _report(capsys, tmp_path, (50, {"loss/total": 2.5, "loss/kd": 2.5}))
    assert out == "step 50/50 | loss 2.500\n"


def test_lines_are_not_wrapped(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    assert _report(capsys, tmp_path, (12, STEP)).count("\n") == 1


def test_an_evaluation_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = _report(capsys, tmp_path, (0, _heldout(348.2, 2.9, 0.14) | {"eval/mcq/accuracy": 0.25}))
    assert out.splitlines()[:2] == [
        "step 0 | heldout | perplexity 348 | KL 2.90 | agreement 14%",
        "step 0 | mcq | accuracy 0.25",
    ]


def test_the_table_shows_before_after_and_the_gap_closed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ln(320/80) / ln(320/20) = ln 4 / ln 16 = 1/2 of the gap in log perplexity; (3 - 1.2) / 3 = 60% of the KL."""
    before = _heldout(320, 3.0, 0.1) | _heldout(400, 3.0, 0.1, domain="math")
    after = _heldout(80, 1.2, 0.4) | _heldout(100, 1.2, 0.4, domain="math")
    out = _report(capsys, tmp_path, (0, before), (20, _heldout(200)), (50, after))
    assert "heldout, before (step 0) and after (step 50)" in out
    rows = _rows(out)
    assert rows["code"] == ["20.0", "320", "80.0", "50%", "3.00", "1.20", "60%", "10%", "40%"]
    assert list(rows).index("code") < list(rows).index("math") < list(rows).index("all")


def test_a_single_domain_is_not_pooled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = _rows(_report(capsys, tmp_path, (0, _heldout(320)), (50, _heldout(80))))
    assert "code" in rows
    assert "all" not in rows


def test_without_a_teacher_there_is_no_gap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = _report(capsys, tmp_path, (0, _heldout(320, teacher=None)), (50, _heldout(80, teacher=None)))
    assert _rows(out)["code"] == ["320", "80.0"]
    assert "closed" not in out
    assert "teacher" not in out


def test_a_student_that_got_worse_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ln(320/1280) / ln(320/20) = -1/2."""
    out = _report(capsys, tmp_path, (0, _heldout(320, 1.0)), (50, _heldout(1280, 1.5)))
    assert _rows(out)["code"][:7] == ["20.0", "320", "1,280", "-50%", "1.00", "1.50", "-50%"]


def test_where_there_was_no_gap_no_share_is_claimed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = _report(capsys, tmp_path, (0, _heldout(15, 0.0)), (50, _heldout(10, 0.0)))
    assert _rows(out)["code"][:7] == ["20.0", "15.0", "10.0", "-", "0.00", "0.00", "-"]


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_broken_numbers_are_shown_as_such(broken: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = _rows(_report(capsys, tmp_path, (0, _heldout(320)), (50, _heldout(broken, broken))))
    assert rows["code"][:7] == ["20.0", "320", str(broken), "-", "1.00", str(broken), "-"]


def test_one_evaluation_is_shown_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = _report(capsys, tmp_path, (0, _heldout(320, 3.0, 0.1)))
    assert "heldout, step 0" in out
    assert _rows(out)["code"] == ["20.0", "320", "3.00", "10%"]
    assert "before" not in out


def test_other_evaluations_have_a_row_per_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = _report(capsys, tmp_path, (0, {"eval/mcq/accuracy": 0.25}), (50, {"eval/mcq/accuracy": 0.5}))
    assert _rows(out)["accuracy"] == ["0.25", "0.50"]


def test_a_run_that_goes_on_remembers_how_it_began(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MetricsLog(tmp_path).append(0, _heldout(320))
    MetricsLog(tmp_path).append(1, STEP)
    console = Console()
    console.start(_info(tmp_path, step=1))
    console.log(50, _heldout(80))
    console.close()
    assert _rows(capsys.readouterr().out)["code"][:3] == ["20.0", "320", "80.0"]


def test_closing_what_never_started_is_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    Console().close()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("width", range(40, 140, 3))
def test_tables_fit_any_width(width: int) -> None:
    """No line is too long and no number is cut; narrow terminals lose whole groups of columns."""
    names = ("javascript", "prose", "all")
    sides = []
    for ppl in (12345.0, 50.0):
        values = {"ppl": ppl, "teacher_ppl": 20.0, "kl": 1.5, "agree": 0.5}
        sides.append({f"{name}/{key}": value for name in names for key, value in values.items()})
    console = RichConsole(width=width, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    console.print(summary("heldout", Evaluation(0, sides[0]), Evaluation(9, sides[1]), console))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert ("KL to teacher" in text, "agreement" in text) == (width >= 60, width >= 74)


@pytest.mark.parametrize("width", range(30, 200, 7))
def test_the_moving_line_is_one_line_of_any_width(width: int) -> None:
    progress = Progress(steps=50, step=0, minutes=None)
    progress.update(12, STEP)
    console = RichConsole(width=width, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    console.print(progress)
    (line,) = console.export_text().splitlines()
    assert line.startswith("step 12/50")
    assert line.rstrip().endswith("left")
    assert ("loss 2.500" in line) == (width >= 50)
    assert ("lr 1.2e-03" in line) <= ("kd 2.000" in line) <= ("tok/s" in line) <= ("loss 2.500" in line)


def test_time_left_follows_the_steps_and_the_cap_on_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("kdcli.report._progress.time.monotonic", lambda: now)
    progress, capped = (Progress(steps=10, step=0, minutes=minutes) for minutes in (None, 1))
    assert progress.seconds_left() is None
    now += 30  # an evaluation, which is not a step's time
    for each in (progress, capped):
        each.pause()
    now += 5
    for each in (progress, capped):
        each.update(1, STEP)
    assert progress.seconds_left() == pytest.approx(45)
    assert capped.seconds_left() == pytest.approx(25)
    now += 2
    assert progress.seconds_left() == pytest.approx(43)
    now += 100
    progress.update(2, STEP, timed=False)  # an evaluation was logged with it
    assert progress.seconds_left() == pytest.approx(40)
    progress.update(10, STEP)
    assert progress.seconds_left() == 0


def test_on_a_terminal_log_lines_stay_above_the_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that writes to the terminal is led through the bar while there is one, and given back after."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    handler = logging.StreamHandler(sys.__stderr__)
    logging.getLogger().addHandler(handler)
    try:
        console = Console()
        console.start(_info(tmp_path))
        assert handler.stream is sys.stderr
        assert handler.stream is not sys.__stderr__
        console.log(1, STEP)
        console.close()
        assert handler.stream is sys.__stderr__
    finally:
        logging.getLogger().removeHandler(handler)


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_any_locale_and_pipe_can_show_it(environment: dict[str, str], tmp_path: Path) -> None:
    code = (
        "from tests.report.test_console import *; from tests.report.test_console import _heldout, _info\n"
        f"console = Console(); console.start(_info(Path({str(tmp_path)!r})))\n"
        "for step, ppl in ((0, 320), (2, 80)): console.log(step, STEP | _heldout(ppl, domain='\\u4e2d\\u6587'))\n"
        "console.close()"
    )
    bare = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": ".", "PATH": "/usr/bin:/bin", "TZ": "Asia/Kathmandu"}
    result = subprocess.run([sys.executable, "-c", code], env=bare | environment, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr.decode()
    out = result.stdout.decode()
    assert "\x1b" not in out
    assert "320" in out
    assert "\\u4e2d" in out


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, None), ((4, 2, 0), 0.5), ((4, 5, 0), -0.25), ((4, 1, 2), 1.5), ((4, 3, 4), None), ((4, 3, 5), None)],
)
def test_gap_closed(given: tuple[float, float, float] | None, expected: float | None) -> None:
    assert gap_closed(*(given or (None, 1.0, 0.0))) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "-"),
        (0.123, "0.12"),
        (2.345, "2.35"),
        (47.51, "47.5"),
        (348.2, "348"),
        (12345, "12,345"),
        (1.3e6, "1.3M"),
        (2e12, "2.0e+12"),
        (-3.0, "-3.00"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_numbers_keep_the_digits_that_matter(value: float | None, expected: str) -> None:
    assert number(value) == expected


def test_other_formats() -> None:
    assert (percent(0.814), percent(-0.5), percent(None), percent(math.nan)) == ("81%", "-50%", "-", "-")
    assert (speed(233.4), speed(12345)) == ("233 tok/s", "12.3k tok/s")
    assert (clock(80), clock(3723), clock(-1)) == ("1:20", "1:02:03", "0:00")
