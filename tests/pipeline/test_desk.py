"""What a run promises of its calls: none twice, none over the budget, failures counted, stops that keep everything."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from kdcli.api import Answer, Example, Request, Transform, Writer
from kdcli.errors import ConfigError, DataError, Interrupted, KDError
from kdcli.pipeline.budget import Budget, BudgetError
from kdcli.pipeline.desk import TOGETHER
from kdcli.pipeline.progress import Progress
from kdcli.store.examples import load_example
from tests.pipeline.parts import Label, Odd, files, pipeline, seeds


class Says(Writer):
    """Answers from a function of the prompt; notes its calls and how many there are at once."""

    endpoint = "local"
    model = "says"
    price_prompt = 1e6
    price_completion = 1e6

    def __init__(
        self, say: Callable[[str], Answer | str] = lambda text: f"9{crc32(text.encode()):x}", concurrency: int = 4
    ) -> None:
        self.say = say
        self.concurrency = concurrency
        self.calls: Counter[str] = Counter()
        self.closed = 0
        self.lock = threading.Lock()

    def write(self, requests: Sequence[Request]) -> list[Answer]:
        return [self._one(str(request.messages[0]["content"])) for request in requests]

    def _one(self, text: str) -> Answer:
        with self.lock:
            self.calls[text] += 1
        said = self.say(text)
        if isinstance(said, Answer):
            return said
        return Answer(texts=[said], finished=["stop"], prompt_tokens=1, completion_tokens=1)

    def identity(self) -> Mapping[str, Any]:
        return {"says": 1}

    def close(self) -> None:
        self.closed += 1


def label(folder: Path, writer: Writer, **more: Any) -> Any:
    """A pipeline of one step over 40 seeds, of which 35 are asked about, 33 of them different."""
    seeds(folder)
    return pipeline(folder, writer, **{"steps": {"label": Label()}, "settings": {}} | more)


def test_equal_questions_are_one_call_also_while_it_is_under_way(tmp_path: Path) -> None:
    writer = Says(lambda text: time.sleep(0.01) or "9")
    outcome = label(tmp_path, writer).run()
    (step,) = outcome.steps
    assert set(writer.calls.values()) == {1}
    assert step.asked == 37 and step.spent.calls == len(writer.calls) == step.asked - step.stored < 37
    assert step.rows_in == 40 and step.rows_out + sum(step.aside.values()) == 40
    assert writer.closed == 1 and not [one for one in threading.enumerate() if one.name.startswith("kdcli-")]


def test_a_finished_run_is_not_done_again_and_another_folder_is_answered_from_the_store(tmp_path: Path) -> None:
    writer = Says()
    first = label(tmp_path, writer).run()
    calls = writer.calls.total()
    before = files(tmp_path / "run")
    again = label(tmp_path, writer).run()
    other = label(tmp_path, writer, run="other").run()
    assert writer.calls.total() == calls
    assert again.steps[0].reused and not other.steps[0].reused
    assert files(tmp_path / "run") == files(tmp_path / "other") == before
    assert (again.spent, other.spent.calls) == (first.spent, 0)


def test_a_changed_setting_seed_or_file_does_the_step_again(tmp_path: Path) -> None:
    writer = Says()
    label(tmp_path, writer).run()
    assert label(tmp_path, writer).run().steps[0].reused
    assert not label(tmp_path, writer, seed=1).run().steps[0].reused
    assert not label(tmp_path, writer, settings={"label": {"n": 3}}, seed=1).run().steps[0].reused
    rows = tmp_path / "run" / "steps" / "01-label" / "rows.jsonl"
    expected = rows.read_bytes()
    rows.write_bytes(expected[:-20])
    assert not label(tmp_path, writer, settings={"label": {"n": 3}}, seed=1).run().steps[0].reused
    assert rows.read_bytes() == expected


def test_steps_after_a_changed_one_are_reused_where_their_rows_are_the_same(tmp_path: Path) -> None:
    seeds(tmp_path)
    pipeline(tmp_path, Says()).run()
    outcome = pipeline(tmp_path, Says(), settings={"label": {"n": 2, "note": 1}, "judge": {"say": "judge"}}).run()
    assert [step.reused for step in outcome.steps] == [False, True, True]


def test_a_budget_of_calls_is_never_passed_and_holds_over_restarts(tmp_path: Path) -> None:
    whole, writer = Says(), Says(lambda text: time.sleep(0.002) or f"9{text}")
    for limit in (10, 10, 25):
        with pytest.raises(BudgetError, match=f"budget.max_calls={limit} is reached"):
            label(tmp_path, writer, budget=Budget(max_calls=limit)).run()
        assert writer.calls.total() == limit
    outcome = label(tmp_path, writer, budget=Budget(max_calls=1000)).run()
    label(tmp_path, whole, run="whole", answers="other.sqlite").run()
    assert writer.calls == whole.calls and outcome.spent.calls == writer.calls.total()


@pytest.mark.parametrize(("budget", "most"), [(Budget(max_cost=20.0), 10), (Budget(max_tokens=20), 10)])
def test_a_budget_of_cost_or_tokens_is_not_passed_once_a_call_is_known(
    tmp_path: Path, budget: Budget, most: int
) -> None:
    writer = Says(concurrency=1)  # each call has 2 tokens and costs 2
    with pytest.raises(BudgetError):
        label(tmp_path, writer, budget=budget).run()
    assert writer.calls.total() == most


def test_a_spent_budget_does_not_stop_what_the_store_answers(tmp_path: Path) -> None:
    label(tmp_path, Says()).run()
    assert label(tmp_path, Says(), run="other", budget=Budget(max_calls=0)).run().count


def failing(share: int) -> Callable[[str], Answer | str]:
    """Every `share`-th question fails."""

    def say(text: str) -> Answer | str:
        number = int(text.split()[2])
        return Answer(failed="HTTP 500", detail="no") if number % share == 0 else "9"

    return say


def test_failed_calls_set_rows_aside_and_are_asked_again_by_another_run(tmp_path: Path) -> None:
    outcome = label(tmp_path, Says(failing(12)), max_failed_fraction=0.2).run()
    (step,) = outcome.steps
    assert step.failed == step.aside["HTTP 500"] == step.spent.failed == 5  # questions 0, 12, 24, 36, and 0 again
    mended = Says()
    whole = label(tmp_path, mended, run="other").run()
    assert mended.calls.total() == 4
    assert "HTTP 500" not in whole.steps[0].aside


def test_too_many_failed_calls_end_the_run_and_keep_the_answers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"label: 1\d of 37 questions failed \(\d+ x writer.teacher: HTTP 500\)"):
        label(tmp_path, Says(failing(3))).run()
    mended = Says()
    assert label(tmp_path, mended).run().count
    assert {int(text.split()[2]) % 3 for text in mended.calls} == {0}


def test_a_dead_server_ends_the_run_before_all_questions_are_asked(tmp_path: Path) -> None:
    seeds(tmp_path, 400)
    writer = Says(failing(1), concurrency=2)
    with pytest.raises(DataError, match="failed"):
        pipeline(tmp_path, writer, steps={"label": Label()}, settings={}).run()
    assert writer.calls.total() < 60


@pytest.mark.parametrize("error", [ConfigError("no key"), KDError("broken"), ZeroDivisionError()])
def test_what_a_writer_raises_ends_the_run(tmp_path: Path, error: Exception) -> None:
    def say(text: str) -> str:
        if text.split()[2] == "7":
            raise error
        return "9"

    with pytest.raises(type(error)):
        label(tmp_path, Says(say)).run()
    assert not (tmp_path / "run" / "rows.jsonl").exists()
    mended = Says()
    assert label(tmp_path, mended).run().count
    assert not any(text.split()[2] in {"0", "1", "2", "3"} for text in mended.calls)


def test_a_stop_comes_soon_and_loses_no_answer(tmp_path: Path) -> None:
    seen = threading.Event()

    def say(text: str) -> str:
        if writer.calls.total() > 5:
            assert seen.wait(20), "nobody asks whether to stop"
        time.sleep(0.03)
        return f"9{text}"

    def stopped() -> bool:
        if writer.calls.total() > 5:
            seen.set()
        return seen.is_set()

    writer = Says(say, concurrency=2)
    with pytest.raises(Interrupted):
        label(tmp_path, writer).run(stopped=stopped)
    made = Counter(writer.calls)
    assert made.total() < 20
    label(tmp_path, writer).run()
    assert set(writer.calls.values()) == {1} and writer.calls > made


def test_an_answer_of_nothing_is_a_failure_and_half_a_character_is_mended(tmp_path: Path) -> None:
    def say(text: str) -> Answer | str:
        return Answer(texts=[], finished=[]) if text.split()[2] == "3" else "9 \ud800"

    outcome = label(tmp_path, Says(say)).run()
    assert outcome.steps[0].aside["no answer"] == 1
    rows = [load_example(line) for line in outcome.rows.read_bytes().splitlines()]
    assert {row.response for row in rows} == {"9 ?"}


class Reader(Transform):
    """Notes how far questions are ahead of answers."""

    def __init__(self) -> None:
        self.ahead = 0

    def writers(self) -> Sequence[str]:
        return ("teacher",)

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        read = 0

        def questions() -> Iterator[tuple[int, Request]]:
            nonlocal read
            for number, _ in enumerate(examples):
                read += 1
                yield number, Request(messages=({"role": "user", "content": str(number)},))

        for number, _ in self.desk.ask("teacher", questions()):
            self.ahead = max(self.ahead, read - number)
            yield Example(prompt=str(number))


def test_rows_are_read_ahead_by_a_window_and_no_more(tmp_path: Path, window: int) -> None:
    seeds(tmp_path, 100)
    reader = Reader()
    outcome = pipeline(tmp_path, Says(), steps={"read": reader}, settings={}).run()
    assert window <= reader.ahead < window + TOGETHER and outcome.count == 100
    assert outcome.forms == {"prompt": 100} and outcome.unreadable == {"no response": 100}


class Enough(Label):
    """Ends after the first answers that it likes."""

    def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
        rows = super().__call__(examples)
        for _ in range(5):
            yield next(rows)


def test_a_step_that_has_enough_leaves_the_rest_unasked(tmp_path: Path, window: int) -> None:
    enough = {f"answer: question {number} None" for number in range(5)}
    writer = Says(lambda text: time.sleep(0.3 * (text.startswith("answer") and text not in enough)) or "9", 1)
    outcome = label(tmp_path, writer, steps={"label": Enough(), "again": Label(say="again")}).run()
    assert outcome.count == 5
    first = sum(text.startswith("answer") for text in writer.calls)
    assert 5 <= first < window and set(writer.calls.values()) == {1}


def test_seeds_differ_by_step_run_and_parts_and_by_nothing_else(tmp_path: Path) -> None:
    drawn: dict[tuple[int, str], list[int]] = {}

    class Draws(Odd):
        def __init__(self, seed: int, name: str) -> None:
            self.place = (seed, name)

        def __call__(self, examples: Iterable[Example]) -> Iterator[Example]:
            drawn[self.place] = [self.desk.seed("a", 1), self.desk.seed("a1"), self.desk.seed("a", "1")]
            yield from examples

    seeds(tmp_path)
    for seed in (0, 1):
        steps = {name: Draws(seed, name) for name in ("one", "two")}
        pipeline(tmp_path, Says(), steps=steps, settings={}, seed=seed, run=f"run{seed}").run()
    values = [value for some in drawn.values() for value in some]
    assert len(set(values)) == 12 and all(0 <= value < 2**31 for value in values)


def test_progress_tells_of_every_step_and_ends_where_the_outcome_does(tmp_path: Path) -> None:
    seeds(tmp_path)
    told: list[Progress] = []
    outcome = pipeline(tmp_path, Says()).run(told=told.append)
    last = {one.step: one for one in told if one.done}
    assert list(last) == ["label", "odd", "judge"]
    for step in outcome.steps:
        assert (last[step.name].rows_in, last[step.name].rows_out) == (step.rows_in, step.rows_out)
        assert last[step.name].aside == sum(step.aside.values())
    assert told[-1].spent == outcome.spent


@pytest.mark.parametrize("point", ["row:step=3", "commit_step", "final", "store", "answer:step=4"])
def test_a_full_disk_is_told_and_the_next_start_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    whole = label(tmp_path, Says(), run="whole", answers="other.sqlite").run()
    monkeypatch.setenv("KDCLI_TESTING", "1")
    monkeypatch.setenv("KDCLI_FAULT", f"augment.{point}:enospc")
    with pytest.raises(KDError, match=r"no space left .* MiB are free"):
        label(tmp_path, Says()).run()
    assert not (tmp_path / "run" / "rows.jsonl").exists()
    assert not list((tmp_path / "run").rglob("*.tmp"))
    monkeypatch.delenv("KDCLI_FAULT")
    assert label(tmp_path, Says()).run().rows.read_bytes() == whole.rows.read_bytes()


def test_what_cannot_run_is_told_before_it_does(tmp_path: Path) -> None:
    seeds(tmp_path)
    with pytest.raises(ConfigError, match="names no step"):
        pipeline(tmp_path, Says(), steps={})
    with pytest.raises(ConfigError, match=r"augmentation.a: asks the writer judge, .* names teacher"):
        pipeline(tmp_path, Says(), steps={"a": Label(writer="judge")})
    with pytest.raises(ConfigError, match="is no name for a step"):
        pipeline(tmp_path, Says(), steps={"../a": Odd()})
    with pytest.raises(ConfigError, match="max_failed_fraction"):
        label(tmp_path, Says(), max_failed_fraction=1.5)
    with pytest.raises(ConfigError, match=r"budget.max_cost: is -1"):
        Budget(max_cost=-1)
