"""`kdcli distill` with steps of augmentation: rows are made once, found again, and refused where they do not fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kdcli.worker
from kdcli.command import rows as rows_of
from kdcli.store import status
from tests.command.test_augment import ROWS, command
from tests.servers.chat import ChatServer, serving


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with serving() as made:
        yield made


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    file = tmp_path / "seeds.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Question {i}?", "domain": "quiz"}) + "\n" for i in range(ROWS)))
    return file


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are made in this process: what starts another is tried once, below."""

    class Here:
        def __call__(self, run_dir: Path, *, isolate: bool) -> int:
            assert isolate
            return kdcli.worker.main(run_dir)

    monkeypatch.setattr(rows_of, "Torchrun", Here)


def distill(server: ChatServer, pretend: list[str], *more: str) -> list[str]:
    own = [one for one in pretend if not one.startswith("data.path=")]
    return [*command(server, verb="distill"), *own, *more]


def manifest(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "manifest.json").read_text())


def test_rows_are_made_once_in_a_process_of_their_own_and_trained_on(
    kdcli, server: ChatServer, seeds: Path, tmp_path: Path
) -> None:
    """A real run, with nothing replaced."""
    small = ["+recipe=tiny", "run.steps=1", "~evaluation@evaluation.heldout", "batch.micro_size=1", "batch.size=1"]
    done = kdcli(*command(server, *small, verb="distill"))
    assert done.code == 0, done.err
    assert server.asked == ROWS
    note = json.loads((tmp_path / "run/augmented.json").read_text())
    assert len(Path(note["rows"]).read_text().splitlines()) == ROWS
    report = json.loads((tmp_path / "run/data_report.json").read_text())
    assert list(report) == ["quiz"]
    about = manifest(tmp_path / "run")["augmentation"]
    assert about["rows"] == ROWS and about["folder"] == str(Path(note["rows"]).parent)
    card = (tmp_path / "run/student/README.md").read_text()
    assert "## Data and terms" in card and f"{ROWS:,} rows by small at 127.0.0.1" in card


def test_the_same_rows_are_found_by_another_run(
    kdcli, server: ChatServer, seeds: Path, pretend: list[str], here: None, tmp_path: Path
) -> None:
    first = kdcli(*distill(server, pretend))
    assert first.code == 0, first.err
    other = kdcli(*distill(server, pretend, "run.dir=other", "objective@objective.kd=reverse_kl", "optimizer.lr=0.1"))
    assert other.code == 0 and "made before" in other.out
    assert server.asked == ROWS
    assert manifest(tmp_path / "run")["augmentation"]["key"] == manifest(tmp_path / "other")["augmentation"]["key"]
    rows = Path(json.loads((tmp_path / "run/augmented.json").read_text())["rows"])
    whole = rows.read_text()
    rows.write_text(whole[: len(whole) // 2])  # damaged: made again of what is stored
    third = kdcli(*distill(server, pretend, "run.dir=third"))
    assert third.code == 0 and "made before" not in third.out
    assert rows.read_text() == whole and server.asked == ROWS


def test_rows_that_cannot_be_trained_on_are_told_with_the_step_to_add(
    kdcli, server: ChatServer, seeds: Path, pretend: list[str], here: None, tmp_path: Path
) -> None:
    arguments = [one for one in distill(server, pretend) if "augmentation.answer" not in one and "writer" not in one]
    found = kdcli(*arguments, "augmentation.keep.field=prompt")
    assert found.code == 3
    assert f"{ROWS} of {ROWS} rows that it makes cannot be trained on ({ROWS} no response)" in found.err
    assert "add a step that answers prompts" in found.err
    assert not (tmp_path / "launched").exists()


def test_what_only_the_rows_show_is_checked_when_they_are_there(
    kdcli, server: ChatServer, seeds: Path, pretend: list[str], here: None, tmp_path: Path
) -> None:
    found = kdcli(*distill(server, pretend, "objective@objective.kd=dpo", "batch.packing=false"))
    assert found.code == 2
    assert "DPO needs rows with chosen and rejected, of which the data" in found.err
    assert server.asked == ROWS and not (tmp_path / "launched").exists()
    domain = kdcli(*distill(server, pretend, "run.dir=other", "objective.kd.domains=[quizz]"))
    assert domain.code == 2 and "the data have no domain quizz; did you mean quiz?" in domain.err


def test_a_run_goes_on_where_its_rows_stopped(
    kdcli, server: ChatServer, seeds: Path, pretend: list[str], here: None, tmp_path: Path
) -> None:
    stopped = kdcli(*distill(server, pretend, "budget.max_calls=4"))
    assert stopped.code == 1
    assert "go on with: kdcli resume run budget.max_calls=MORE" in stopped.err
    assert status.read(tmp_path / "run")["reason"].startswith("no rows to train on: budget.max_calls=4 is reached")
    assert not (tmp_path / "launched").exists()
    done = kdcli("resume", "run", "budget.max_calls=null")
    assert done.code == 0, done.err
    assert server.asked == ROWS and (tmp_path / "launched").exists()


def test_a_run_with_results_does_not_go_on_with_other_rows(
    kdcli, server: ChatServer, seeds: Path, pretend: list[str], here: None, tmp_path: Path
) -> None:
    assert kdcli(*distill(server, pretend)).code == 0
    seeds.write_text(json.dumps({"prompt": "Another question?"}) + "\n")
    kept = kdcli("resume", "run", "run.steps=4")
    assert kept.code == 0 and server.asked == ROWS  # it has the rows it began with
    Path(json.loads((tmp_path / "run/augmented.json").read_text())["rows"]).unlink()
    gone = kdcli("resume", "run", "run.steps=6")
    assert gone.code == 2 and "was trained on rows that are gone" in gone.err and "start another run" in gone.err


def written(file: Path, **entry: str) -> None:
    row = {"prompt": "a", "response": "b", "meta": {"written": [{"step": "x", "by": "teacher", **entry}]}}
    file.write_text(json.dumps(row) + "\n")


def test_rows_that_others_wrote_are_held_to_the_declared_use(kdcli, pretend: list[str], tmp_path: Path) -> None:
    """Whatever made them: the rows say who wrote them."""
    written(tmp_path / "theirs.jsonl", teacher="gpt-4o", endpoint="api.openai.com:443", terms="openai")
    base = ["distill", *pretend, "data.path=theirs.jsonl", "run.dir=run"]
    found = kdcli(*base, "terms.use=competing")
    assert found.code == 2
    assert "teacher gpt-4o at api.openai.com:443: openai" in found.err and "for use=competing" in found.err
    assert not (tmp_path / "run").exists()
    assert kdcli(*base, "terms.use=competing", "terms.acknowledged=[openai]").code == 0
    loud = kdcli(*base, "run.dir=other")
    assert loud.code == 0
    assert "warning: terms.use is not declared" in loud.err and "gpt-4o at api.openai.com:443 (openai)" in loud.err
    about = manifest(tmp_path / "other")["provenance"]
    assert about["written"][0]["terms_row"]["competing_models"] == "no"


def test_rows_without_provenance_warn_about_nothing(kdcli, pretend: list[str], tmp_path: Path) -> None:
    quiet = kdcli("distill", *pretend, "run.dir=run")
    assert quiet.code == 0 and "warning" not in quiet.err
