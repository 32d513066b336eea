"""The command line itself: quick answers without torch, exit codes, errors, completion."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kdcli.cli import VERBS, main
from kdcli.errors import ConfigError, DataError, Interrupted, KDError, NumericsError

HEAVY = ("torch", "transformers", "deepspeed", "datasets", "hydra", "omegaconf", "numpy")


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["--version"], ["ls"], ["ls", "objective"], ["copy", "--help"], ["nope"]]
)
def test_quick_answers_import_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys; from kdcli.cli import main; main(sys.argv[1:]);"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_composing_a_config_imports_no_torch(tmp_path) -> None:
    script = (
        "import sys; from kdcli.cli import main; main(['distill', '+recipe=tiny', '--cfg', 'job']);"
        "main(['distill', '--help']);"
        "print([m for m in ('torch', 'transformers', 'deepspeed', 'datasets') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stderr.splitlines()[-1] == "[]"


def test_help_names_every_verb_and_five_examples(kdcli) -> None:
    page = kdcli("--help").out
    assert all(f"\n  {verb} " in page for verb in VERBS)
    assert page.count("\n  kdcli ") == 5


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(kdcli, verb: str) -> None:
    result = kdcli(verb, "--help")
    assert result.code == 0
    assert f"usage: kdcli {verb}" in result.out
    assert max(len(line) for line in result.out.splitlines()) <= 120


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KDError("x"), 1),
        (ConfigError("x"), 2),
        (DataError("x"), 3),
        (NumericsError("x"), 4),
        (Interrupted(15, "x"), 143),
    ],
)
def test_an_error_of_ours_is_one_line_and_its_exit_code(
    error: KDError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: object) -> int:
        raise error

    monkeypatch.setattr("kdcli.command.ls.main", fail)
    assert main(["ls"]) == code
    assert capsys.readouterr().err == "error: x\n"
    monkeypatch.setenv("KDCLI_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(["ls"])


def test_a_message_survives_an_ascii_terminal(tmp_path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "kdcli", "distill", "+recipe=tiny", "objective@objective.é=cross_entropy"]
    done = subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    done = subprocess.run([sys.executable, "-m", "kdcli", "ls"], capture_output=True, env=environment, check=False)
    assert done.returncode == 0
    assert b"\x1b" not in done.stdout


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m kdcli ls | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("line", "among"),
    [
        ("kdcli ", {"distill", "evaluate", "resume", "ls", "copy"}),
        ("kdcli di", {"distill"}),
        ("kdcli ls ", {"objective", "teacher", "recipe"}),
        ("kdcli copy ", {"tiny", "quickstart"}),
        ("kdcli distill +recipe=", {"+recipe=tiny", "+recipe=quickstart"}),
        ("kdcli distill +recipe=tiny engine=", {"engine=zero0", "engine=zero3"}),
        ("kdcli distill objective@objective.kd=", {"objective@objective.kd=reverse_kl"}),
        ("kdcli distill run.se", {"run.seed="}),
        ("kdcli evaluate teacher=", {"teacher=hf", "teacher=none"}),
    ],
)
def test_the_tab_key_offers_what_may_follow(kdcli, monkeypatch: pytest.MonkeyPatch, line: str, among: set[str]) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    result = kdcli("-sc", "query=bash")
    assert result.code == 0
    assert among <= set(result.out.split())


def test_completion_installs_for_a_shell_and_refuses_others(kdcli) -> None:
    assert "complete -o nospace" in kdcli("-sc", "install=bash").out
    assert kdcli("-sc", "install=tcsh").code == 2
