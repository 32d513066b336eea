"""The store of answers: what was committed is found, by anyone, later; what is no store is refused by name."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcli.api import Answer, Request
from kdcli.errors import ConfigError, KDError
from kdcli.store.responses import Account, Responses, Spent, purge, request_key, stats

ACCOUNT = Account(run="run", step="step", writer="teacher")
ONE = Spent(calls=1, prompt_tokens=2, completion_tokens=3, cost=0.5)
REQUEST = Request(messages=({"role": "user", "content": "what?"},), seed=3)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Responses]:
    opened = Responses(tmp_path / "caches" / "answers.sqlite")
    yield opened
    opened.close()


def keep(store: Responses, key: bytes, answer: Answer, spent: Spent = ONE) -> Answer:
    """Hand an answer over and wait until it is committed; as it is stored."""
    done: list[Answer | BaseException] = []
    told = threading.Event()

    def tell(value: Answer | BaseException) -> None:
        done.append(value)
        told.set()

    store.keep([key], [answer], account=ACCOUNT, spent=spent, done=lambda found: tell(found[0]), failed=tell)
    assert told.wait(20)
    if isinstance(done[0], BaseException):
        raise done[0]
    return done[0]


def answer(text: str = "yes", day: str = "2026-11-22") -> Answer:
    return Answer(texts=[text], finished=["stop"], prompt_tokens=2, completion_tokens=3, model="m", date=day)


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
@settings(max_examples=10, deadline=None)
def test_an_answer_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    store = Responses(tmp_path_factory.mktemp("store") / "answers.sqlite")
    keep(store, b"k", answer(text))
    assert store.find(b"k") == answer(text) and store.find(b"other") is None
    store.close()


def test_an_answer_is_committed_before_it_is_told(store: Responses) -> None:
    seen: list[int] = []
    told = threading.Event()

    def done(found: object) -> None:
        other = sqlite3.connect(store.path)
        seen.append(other.execute("SELECT count(*) FROM answers").fetchone()[0])
        other.close()
        told.set()

    store.keep([b"k"], [answer()], account=ACCOUNT, spent=ONE, done=done, failed=lambda error: None)
    assert told.wait(20) and seen == [1]


def test_many_threads_hand_answers_to_one_that_commits_and_ends(tmp_path: Path) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for number in range(20):
            store = Responses(tmp_path / f"{number}.sqlite")
            begin = threading.Barrier(8)

            def hand(thread: int, store: Responses = store, begin: threading.Barrier = begin) -> None:
                begin.wait()
                keep(store, bytes([thread]), answer())

            threads = [threading.Thread(target=hand, args=(thread,)) for thread in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sum(one.name == "kdcli-answers" for one in threading.enumerate()) == 1
            store.close()
            assert not [one for one in threading.enumerate() if one.name == "kdcli-answers"]
    finally:
        sys.setswitchinterval(interval)


def test_the_first_answer_stays_and_failures_only_cost(store: Responses) -> None:
    other = Responses(store.path)
    assert keep(store, b"k", answer("first")) == keep(other, b"k", answer("second")) == answer("first")
    failed = Answer(failed="HTTP 500")
    assert keep(other, b"f", failed, replace(ONE, failed=1)) == failed and store.find(b"f") is None
    other.close()
    assert store.spent("run") == {("step", "teacher"): ONE + ONE + replace(ONE, failed=1)}
    assert store.spent("another") == {}


@pytest.mark.parametrize(
    "other",
    [
        replace(REQUEST, n=2),
        replace(REQUEST, seed=4),
        replace(REQUEST, temperature=0.0),
        replace(REQUEST, max_tokens=5),
        replace(REQUEST, stop=("x",)),
        replace(REQUEST, form={"regex": "a"}),
        replace(REQUEST, messages=({"role": "system", "content": "what?"},)),
        replace(REQUEST, messages=({"role": "user", "content": "what? "},)),
    ],
)
def test_all_of_a_request_but_its_rehearsal_makes_its_key(other: Request) -> None:
    key = request_key("writer", REQUEST)
    assert request_key("writer", other) != key != request_key("another", REQUEST)
    assert request_key("writer", replace(REQUEST, rehearsal="x")) == key


def test_what_was_dear_is_remembered_by_kind(store: Responses) -> None:
    store.remember("ppl", {"a": 1.5, "b": {"x": [1]}})
    store.remember("ppl", {"a": 9})
    assert store.recall("ppl", ["a", "b", "c"]) == {"a": 1.5, "b": {"x": [1]}}
    assert store.recall("other", ["a"]) == {}


def test_the_file_is_for_the_user_alone(store: Responses) -> None:
    keep(store, b"k", answer())
    modes = {
        file.name: stat.S_IMODE(file.stat().st_mode) for file in store.path.parent.iterdir() if "spare" not in file.name
    }
    assert set(modes.values()) == {0o600} and f"{store.path.name}-wal" in modes
    assert stat.S_IMODE(store.path.parent.stat().st_mode) == 0o700


def test_nothing_but_json_is_in_the_file(store: Responses) -> None:
    keep(store, b"k" * 16, answer())
    store.remember("kind", {"a": 1})
    connection = sqlite3.connect(store.path)
    types = set()
    for table, columns in (("answers", ("answer", "model", "date")), ("memory", ("kind", "key", "value", "date"))):
        for column in columns:
            types |= {row[0] for row in connection.execute(f"SELECT typeof({column}) FROM {table}")}
    connection.close()
    assert types == {"text"}


def noise(file: Path) -> None:
    file.write_bytes(b"SQLite format 3\x00" + os.urandom(8192))


def text(file: Path) -> None:
    file.write_text("these are my notes\n" * 100)


def foreign(file: Path) -> None:
    connection = sqlite3.connect(file)
    connection.execute("CREATE TABLE answers (x)")
    connection.commit()
    connection.close()


@pytest.mark.parametrize("spoil", [noise, text, foreign])
def test_a_file_that_is_no_store_is_refused_by_name_and_left_as_it_is(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    file = tmp_path / "answers.sqlite"
    spoil(file)
    before = file.read_bytes()
    with pytest.raises(ConfigError, match=r"answers\.sqlite: is (no store of answers|a database of another program)"):
        Responses(file)
    assert file.read_bytes() == before


def test_a_store_that_is_damaged_inside_is_refused_by_name(store: Responses) -> None:
    keys = [str(number).encode() for number in range(200)]
    told = threading.Event()
    store.keep(
        keys,
        [answer("x" * 500) for _ in keys],
        account=ACCOUNT,
        spent=ONE,
        done=lambda found: told.set(),
        failed=lambda error: None,
    )
    assert told.wait(20)
    store.close()
    with open(store.path, "r+b") as file:
        file.seek(4096 * 4)
        file.write(os.urandom(store.path.stat().st_size - 4096 * 5))
    damaged = Responses(store.path)
    with pytest.raises(ConfigError, match=r"answers\.sqlite: is no store of answers, or a damaged one"):
        [damaged.find(key) for key in keys]
    damaged.close()


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        Responses(tmp_path / "file" / "answers.sqlite")


def test_answers_that_were_paid_for_still_fit_on_a_full_disk(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", place], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        store = Responses(place / "answers.sqlite")
        keep(store, b"a", answer())
        with suppress(OSError), open(place / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        errors: list[BaseException] = []
        told = threading.Event()
        store.keep(
            [b"b"],
            [answer("z" * 9000)],
            account=ACCOUNT,
            spent=ONE,
            done=lambda found: told.set(),
            failed=errors.append,
        )
        assert told.wait(20)
        store.close()
        assert isinstance(errors[0], KDError) and "no space left" in str(errors[0]) and "MiB are free" in str(errors[0])
        again = Responses(place / "answers.sqlite")
        assert again.find(b"a") and again.find(b"b")
        again.close()
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_stats_count_and_purge_deletes_what_is_older(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    with pytest.raises(ConfigError, match="there is no store"):
        stats(path)
    store = Responses(path)
    for number, day in enumerate(("2026-01-01", "2026-02-01", "2026-03-01")):
        keep(store, bytes([number]), answer(day=day))
    store.close()
    found = stats(path)
    assert (found["answers"], found["models"], found["oldest"], found["newest"]) == (
        3, {"m": 3}, "2026-01-01", "2026-03-01"
    )  # fmt: skip
    assert found["cost"] == 1.5 and found["bytes"] > 0
    assert purge(path, "2026-02-01") == 1 and stats(path)["oldest"] == "2026-02-01"
    assert purge(path) == 2
    assert stats(path)["answers"] == 0 and stats(path)["cost"] == 1.5
