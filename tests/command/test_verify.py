"""`kdcli verify`: what it prints, its exit codes, and an objective of one's own."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

from kdcli.cli import main
from kdcli.command.catalog import options
from kdcli.train.conformance.suite import CHECKS

WRONG = """
    from torch import Tensor

    from kdcli.objective._divergence import Divergence


    class Reward(Divergence):
        def __init__(self, *, sign: str = "minus", factor: float = 0.5, **settings) -> None:
            super().__init__(**settings)
            self.factor = -factor if sign == "minus" else factor

        def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
            return self.factor * (log_p.exp() * (log_p - log_q)).sum(-1)
"""


PAIRS = """
    from torch import Tensor
    from torch.nn.functional import logsigmoid

    from kdcli.api import Objective, Scope, Unit


    class Margin(Objective):
        unit = Unit.GROUP
        scope = Scope.LOGPROBS
        columns = frozenset({"rejected"})

        def units(self, batch) -> Tensor:
            return batch.groups().bincount() > 1

        def forward(self, batch, student, teacher) -> Tensor:
            answers = batch.sum_by_sequence(student.logprobs)
            signs = 1.0 - 2.0 * batch.rejected
            return -logsigmoid(answers.new_zeros(len(self.units(batch))).index_add(0, batch.groups(), signs * answers))
"""
LAYERS = """
    from torch import Tensor

    from kdcli.api import Need, Objective, Scope
    from kdcli.errors import ConfigError


    class Norms(Objective):
        needs = Need.HIDDEN
        scope = Scope.STATES
        zero_at_teacher = True

        def __init__(self, *, layer: int = 1, **settings) -> None:
            super().__init__(**settings)
            self.layer = layer

        def fit(self, student, teacher) -> None:
            if self.layer > min(student.layers, teacher.layers):
                raise ConfigError(f"Norms: there is no layer {self.layer}; the student has {student.layers}")

        def forward(self, batch, student, teacher) -> Tensor:
            ours, theirs = (one.hidden_states[self.layer].float() for one in (student, teacher))
            return (ours.square().mean(-1) - theirs.square().mean(-1)).square()
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of the user's, with a loss whose sign is wrong, one of pairs and one of layers."""
    package = tmp_path / "losses_of_mine"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, source in (("wrong", WRONG), ("pairs", PAIRS), ("layers", LAYERS)):
        (package / f"{name}.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("KDCLI_PLUGINS", "losses_of_mine")
    return "losses_of_mine.wrong.Reward"


def test_one_objective_shows_every_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "objective=skew_kl"]) == 0
    output = capsys.readouterr().out
    assert all(check.__name__ in output for check in CHECKS)
    assert "- packing_is_padding: it sees one target at a time" in output
    assert f"{len(CHECKS) - 2} checks of 1 objective in" in output
    assert output.rstrip().endswith("all passed")


def test_several_objectives_show_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "objective=dkd,cross_entropy"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["dkd", "cross_entropy"]
    assert lines[1].split()[-1] == "ok"
    assert "2 objectives" in lines[-1]
    assert max(map(len, lines)) <= 80


def test_json_has_every_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "objective=dkd", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is True
    (one,) = found["objectives"]
    assert [check["check"] for check in one["checks"]] == [check.__name__ for check in CHECKS]
    for check in one["checks"]:
        if check["result"] == "not applicable":
            assert check["note"]
        else:
            assert check["error"] <= check["bound"]


def test_an_objective_of_ones_own_is_checked_and_fails_with_exit_code_1(
    plugin: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", f"objective={plugin}"]) == 1
    output = capsys.readouterr().out
    assert f"failed {plugin}: positive_elsewhere" in " ".join(output.split())
    assert "no second formula is known" in output
    assert main(["verify", f"objective={plugin}", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


@pytest.mark.parametrize("name", ["pairs.Margin", "layers.Norms"])
def test_a_loss_of_ones_own_gets_the_suite_whatever_it_sees(
    name: str, plugin: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", f"objective={plugin.split('.')[0]}.{name}", "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["objectives"]
    assert sum(check["result"] == "passed" for check in one["checks"]) >= 22


def test_what_fit_refuses_is_the_users_mistake(plugin: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", f"objective={plugin.split('.')[0]}.layers.Norms", "objective.layer=7"]) == 2
    assert "there is no layer 7; the student has 2" in capsys.readouterr().err


def test_settings_change_what_is_measured(plugin: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", f"objective={plugin}", "objective.sign=plus", "objective.factor=5e-1"]) == 0
    capsys.readouterr()


def test_an_option_in_a_folder_of_ones_own_is_found(
    plugin: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "conf/objective"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(f"# Mine\n_target_: {plugin}\nsign: plus\n")
    assert main(["verify", "objective=mine", "--config-dir", str(tmp_path / "conf")]) == 0
    assert "mine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["objective=forward_kk"], "did you mean forward_kl?"),
        (["objective=forward_kl", "objective.temprature=2"], "did you mean objective.temperature?"),
        (["objective=forward_kl", "objective.temperature=hot"], "must be a number"),
        (["objective=forward_kl", "objective.temperature=-1"], "set a number above 0"),
        (["objective.temperature=2"], "of which objective?"),
        (["objective=torch.nn.Linear"], "not allowed"),
        (["forward_kl"], "takes objective=NAME"),
        (["--jsn"], "did you mean --json?"),
        (["--config-dir"], "which folder?"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_without_a_name_every_option_is_verified(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kdcli.train.conformance import suite, values

    monkeypatch.setattr(suite, "CHECKS", (values.one_number_per_unit,))
    assert main(["verify", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["objectives"]
    assert [one["objective"] for one in found] == list(options("objective"))


def test_help_needs_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--help"]) == 0
    assert "usage: kdcli verify" in capsys.readouterr().out
