"""What a `_target_` may name."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcli.config.schema import COMPONENTS, THIRD_PARTY
from kdcli.config.target import locate, problem_of, problems_in
from kdcli.errors import ConfigError

HOSTILE = [
    "os.system",
    "subprocess.Popen",
    "builtins.eval",
    "kdcli.cli.main",
    "kdcli.store.atomic.write_bytes",
    "kdcli.objective.forward_kl.divergence",
    "kdcli.objective._divergence.Divergence",
    "kdcli.objective.forward_kl.ForwardKL.__init__",
    "kdcli.objective..os.System",
    "torch.load",
    "torch.optim.lr_scheduler.warnings.warn",
    "transformers.AutoModel.from_pretrained",
    "hydra.utils.get_method",
    "",
    None,
    7,
]


@pytest.mark.parametrize("target", HOSTILE)
@pytest.mark.parametrize("group", [*COMPONENTS, *THIRD_PARTY])
def test_what_is_no_component_is_refused_everywhere(target: object, group: str) -> None:
    if target is not None and problem_of(target, group) is None:
        assert group == "objective"  # the name is well formed ...
        with pytest.raises(ConfigError):
            locate(str(target), group)  # ... but it is not an objective
    else:
        assert problem_of(target, group)


def test_a_component_fits_its_own_group_only() -> None:
    for group in COMPONENTS:
        fits = problem_of("kdcli.objective.forward_kl.ForwardKL", group) is None
        assert fits == (group == "objective")


def test_an_imported_name_of_a_module_is_not_its_component() -> None:
    with pytest.raises(ConfigError, match="no Objective"):
        locate("kdcli.objective.forward_kl.Tensor", "objective")


def test_an_abstract_class_is_refused() -> None:
    with pytest.raises(ConfigError, match="ForwardKL"):
        locate("kdcli.objective.forward_kl.Objektive", "objective")


def test_every_way_to_run_code_in_a_tree_is_named() -> None:
    tree = {"a": {"_target_": "os.system", "_args_": ["x"]}, "b": [{"_partial_": True}], "c": {"()": "x.Y"}}
    assert [p.partition(":")[0] for p in problems_in(tree)] == ["a._target_", "a._args_", "b.0._partial_", "c.()"]


def test_a_plugin_is_allowed_by_the_environment_and_never_by_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mylosses.py").write_text(
        "from kdcli.objective.forward_kl import ForwardKL\nclass Mine(ForwardKL): pass\nclass Other: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "KDCLI_PLUGINS" in str(problem_of("mylosses.Mine", "objective"))
    monkeypatch.setenv("KDCLI_PLUGINS", "mylosses")
    assert locate("mylosses.Mine", "objective").__name__ == "Mine"
    with pytest.raises(ConfigError, match="is no Objective"):
        locate("mylosses.Other", "objective")
    assert problem_of("mylosses2.Mine", "objective")
