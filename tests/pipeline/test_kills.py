"""Kill -9 at each point and at random moments: the next start ends in the same files, and repeats no stored call."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kdcli.api import Answer, Request
from kdcli.pipeline import desk
from tests.distributed import run_ranks
from tests.pipeline.parts import Asks, Label, committed, ended, files, noted, pipeline, seeds, server, within

POINTS = ("answer:step=9", "stored:step=2", "row:step=13", "commit_step:step=1", "commit_step:step=3", "final")


@dataclass(frozen=True)
class Whole:
    """A server, and a run that nothing stopped."""

    port: int
    notes: Path
    files: dict[str, bytes]
    questions: list[str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    folder = tmp_path_factory.mktemp("whole")
    notes = folder / "notes"
    seeds(folder)
    with server(notes) as port:
        assert ended(run, folder, port) == 0
        yield Whole(port, notes, files(folder / "run"), noted(notes))


def run(folder: Path, port: int) -> None:
    pipeline(folder, Asks(port)).run()


class Killed(Asks):
    """Some time after so many answers, the process is killed, whatever its other threads do then."""

    def __init__(self, port: int, answers: int, seconds: float) -> None:
        super().__init__(port)
        self.seconds = seconds
        self.left = iter(range(answers - 1, -1, -1))  # next() of it is atomic

    def write(self, requests: Sequence[Request]) -> list[Answer]:
        answers = super().write(requests)
        if next(self.left, None) == 0:
            threading.Timer(self.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return answers


def killed(folder: Path, port: int, answers: int, seconds: float) -> None:
    pipeline(folder, Killed(port, answers, seconds)).run()


def finish(folder: Path, whole: Whole, work: Callable[..., None], *arguments: Any, **more: Any) -> bool:
    """Kill once, start again to the end. Returns whether the kill came before the end."""
    port, notes = whole.port, whole.notes
    code = ended(work, folder, port, *arguments, **more)
    assert code in (0, -signal.SIGKILL)
    known, begun = committed(folder / "answers.sqlite"), len(noted(notes))
    assert ended(run, folder, port) == 0
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
    assert finish(tmp_path, whole, run, environment=fault)
    assert files(tmp_path / "run") == whole.files
    assert set(noted(whole.notes)[begun:]) == set(whole.questions)


def test_kills_at_random_moments_end_in_the_same_files(whole: Whole, tmp_path: Path) -> None:
    draw = random.Random(6)
    hits = 0
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        seeds(folder)
        answers = draw.randint(1, len(whole.questions))
        hits += finish(folder, whole, killed, answers, draw.uniform(0, 0.02))
        assert files(folder / "run") == whole.files
        if hits == 5:
            return
    pytest.fail(f"{20 - hits} of 20 kills came too late")


@pytest.mark.parametrize("concurrency", [1, 3, 32])
def test_files_do_not_depend_on_concurrency(whole: Whole, tmp_path: Path, concurrency: int) -> None:
    seeds(tmp_path)
    pipeline(tmp_path, Asks(whole.port, concurrency)).run()
    assert files(tmp_path / "run") == whole.files
    assert committed(tmp_path / "answers.sqlite") == set(whole.questions)


def test_two_runs_at_once_share_a_store_and_end_alike(whole: Whole, tmp_path: Path) -> None:
    seeds(tmp_path)

    run_ranks(2, within, desk.WINDOW, run_beside, tmp_path, whole.port, join=False)
    assert files(tmp_path / "run0") == files(tmp_path / "run1") == whole.files


def run_beside(folder: Path, port: int) -> None:
    pipeline(folder, Asks(port), run=f"run{os.environ['RANK']}").run()


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
    assert ended(batches, folder) == 0
    return files(folder / "run")


@pytest.mark.parametrize("point", ["answer:step=3", "stored:step=1", "stored:step=3", "row:step=11"])
def test_batches_of_a_local_writer_are_formed_anew_as_they_were(
    batched: dict[str, bytes], tmp_path: Path, point: str
) -> None:
    seeds(tmp_path)
    fault = {"KDCLI_TESTING": "1", "KDCLI_FAULT": f"augment.{point}:kill"}
    assert ended(batches, tmp_path, environment=fault) == -signal.SIGKILL
    assert ended(batches, tmp_path) == 0
    assert files(tmp_path / "run") == batched
