"""The licence gate: what conflicts with the declared use leaves, or ends the run, and says that it is no advice."""

from __future__ import annotations

from typing import Any

import pytest

from kdcli.api import Example
from kdcli.augmentation.licence import Licence
from kdcli.errors import ConfigError, DataError
from tests.desks import FakeDesk, run


def row(name: str, licence: Any = None, **written: str) -> Example:
    meta: dict[str, Any] = {"id": name}
    if licence:
        meta["license"] = licence
    if written:
        meta["written"] = [{"step": "label", **written}]
    return Example(prompt=name, response="x", meta=meta)


ROWS = [
    row("free", "MIT"),
    row("nc", "cc-by-nc-4.0"),
    row("openai", "MIT", teacher="gpt-4o", endpoint="api.openai.com:443", terms="openai"),
    row("llama2", None, teacher="meta-llama/Llama-2-7b-chat-hf", endpoint="127.0.0.1:8000"),
    row("none"),
    row("tagged", "MIT", teacher="mine", endpoint="local", terms="unknown"),
]


def kept(**settings: Any) -> tuple[list[str], list[str]]:
    step = Licence(**settings)
    found = run(step, ROWS)
    assert isinstance(step.desk, FakeDesk)
    return [str(one.prompt) for one in found], step.desk.reasons


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(use="research"), ["free", "nc", "openai", "none", "tagged"]),
        (dict(use="commercial"), ["free", "openai", "none", "tagged"]),
        (dict(use="competing"), ["free", "none", "tagged"]),
        (dict(use="competing", acknowledged=["openai", "llama2"]), ["free", "openai", "llama2", "none", "tagged"]),
        (dict(use="competing", on_unknown="drop"), ["free"]),
        (dict(use="research", on_unknown="drop", acknowledged=["llama2"]), ["free", "nc", "openai", "llama2"]),
    ],
)
def test_rows_that_conflict_with_the_use_leave(settings: dict[str, Any], expected: list[str]) -> None:
    found, reasons = kept(**settings)
    assert found == expected
    assert set(reasons) <= {"conflict of terms", "unknown terms"}


def test_a_run_can_be_stopped_and_is_told_why() -> None:
    with pytest.raises(DataError, match=r"data of the user: CC-BY-NC .* forbids commercial use.*no legal advice"):
        kept(use="commercial", on_conflict="stop")
    with pytest.raises(DataError, match=r"not known.*terms\.yaml"):
        run(Licence(on_unknown="stop"), [row("none")])


def test_a_tag_of_another_table_is_unknown() -> None:
    foreign = row("foreign", "MIT", teacher="x", endpoint="local", terms="their-own-row")
    assert run(Licence(), [foreign]) == [foreign]
    assert run(Licence(on_unknown="drop"), [foreign]) == []


def test_a_rehearsal_keeps_all() -> None:
    assert run(Licence(use="competing", on_conflict="stop"), ROWS, rehearsal=True) == ROWS


def test_bad_settings_name_the_way_out() -> None:
    with pytest.raises(ConfigError, match="declare one of"):
        Licence(use="war")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="did you mean openai"):
        Licence(acknowledged=["opnai"])
