"""Kill -9 at each point and at random moments: the next start ends in the same files, and repeats no stored call."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kdcli.api import Answer, Request
from tests.pipeline.parts import Asks, Label, committed, ended, files, forked, noted, pipeline, seeds, server

POINTS = ("answer:step=9", "stored:step=2", "row:step=13", "commit_step:step=1", "commit_step:step=3", "final")


@dataclass(frozen=True)
class Whole:
    """A server, and a run that nothing stopped."""

    port: int
    notes: Path
    files: dict[str, bytes]
    questions: list[str]
    seconds: float


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    folder = tmp_path_factory.mktemp("whole")
    notes = folder / "notes"
    seeds(folder)
    with server(notes) as port:
        begun = time.monotonic()
        assert ended(lambda: run(folder, port)) == 0
        yield Whole(port, notes, files(folder / "run"), noted(notes), time.monotonic() - begun)


def run(folder: Path, port: int, concurrency: int = 8) -> None:
    pipeline(folder, Asks(port, concurrency)).run()


def finish(folder: Path, whole: Whole, **killed: Any) -> bool:
    """Kill once, start again to the end. Returns whether the kill came before the end."""
    port, notes = whole.port, whole.notes
    code = ended(lambda: run(folder, port), **killed)
    assert code in (0, -signal.SIGKILL)
    known, begun = committed(folder / "answers.sqlite"), len(noted(notes))
    assert ended(lambda: run(folder, port)) == 0
    again = noted(notes)[begun:]
    assert not known.intersection(again), "a committed call was repeated"
    assert len(again) == len(set(again))
    return code != 0


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_ends_in_the_same_files_and_repeats_no_stored_call(
    whole: Whole, tmp_path: Path, point: str
) -> None:
    seeds(tmp_path)
    begun = len(noted(whole.notes))
    fault = {"KDCLI_TESTING": "1", "KDCLI_FAULT": f"augment.{point}:kill"}
    assert finish(tmp_path, whole, environment=fault)
    assert files(tmp_path / "run") == whole.files
    assert set(noted(whole.notes)[begun:]) == set(whole.questions)


def test_kills_at_random_moments_end_in_the_same_files(whole: Whole, tmp_path: Path) -> None:
    draw = random.Random(6)
    hits = 0
    for number in range(6):
        folder = tmp_path / str(number)
        folder.mkdir()
        seeds(folder)
        hits += finish(folder, whole, kill_after=draw.uniform(0, whole.seconds))
        assert files(folder / "run") == whole.files
    assert hits >= 3, "the kills came too late to mean anything"


@pytest.mark.parametrize("concurrency", [1, 3, 32])
def test_files_do_not_depend_on_concurrency(whole: Whole, tmp_path: Path, concurrency: int) -> None:
    seeds(tmp_path)
    pipeline(tmp_path, Asks(whole.port, concurrency)).run()
    assert files(tmp_path / "run") == whole.files
    assert committed(tmp_path / "answers.sqlite") == set(whole.questions)


def test_two_runs_at_once_share_a_store_and_end_alike(whole: Whole, tmp_path: Path) -> None:
    seeds(tmp_path)

    def one(name: str) -> None:
        pipeline(tmp_path, Asks(whole.port), run=name).run()

    with forked(lambda: one("other")) as other:
        one("run")
        assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 0
    assert files(tmp_path / "run") == files(tmp_path / "other") == whole.files


class Together(Asks):
    """A local model: an answer depends on the whole batch, as padding makes it do."""

    batch = 4

    def __init__(self) -> None:
        super().__init__(0, 1)

    def write(self, requests: list[Request]) -> list[Answer]:
        time.sleep(0.03)  # longer than the store gathers answers for a commit
        told = [str(request.messages[0]["content"]) for request in requests]
        return [Answer(texts=[f"9 {told}"], finished=["stop"], model="m") for _ in requests]


def batches(folder: Path) -> None:
    pipeline(folder, Together(), steps={"label": Label(), "judge": Label(say="judge")}, settings={}).run()


@pytest.fixture(scope="module")
def batched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("batched")
    seeds(folder)
    assert ended(lambda: batches(folder)) == 0
    return files(folder / "run")


@pytest.mark.parametrize("point", ["answer:step=3", "stored:step=1", "stored:step=3", "row:step=11"])
def test_batches_of_a_local_writer_are_formed_anew_as_they_were(
    batched: dict[str, bytes], tmp_path: Path, point: str
) -> None:
    seeds(tmp_path)
    fault = {"KDCLI_TESTING": "1", "KDCLI_FAULT": f"augment.{point}:kill"}
    assert ended(lambda: batches(tmp_path), fault) == -signal.SIGKILL
    assert ended(lambda: batches(tmp_path)) == 0
    assert files(tmp_path / "run") == batched
