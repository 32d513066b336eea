"""Deduplication: the first of similar rows stays, nothing else is lost, and later rows change nothing."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from kdcli.api import Example
from kdcli.augmentation._minhash import HASHES, MinHash, jaccard, rows_of_a_band
from kdcli.augmentation._rouge import longest_common_subsequence, rouge_l
from kdcli.augmentation._sifting import words
from kdcli.augmentation._table import Records, Tags
from kdcli.augmentation.dedup import METHODS, Dedup
from kdcli.errors import ConfigError
from tests.desks import FakeDesk, run

VOCABULARY = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in ("", "lm", "rst")]


def text(draw: random.Random, count: int) -> str:
    return " ".join(draw.choice(VOCABULARY) for _ in range(count))


def changed(draw: random.Random, source: str, count: int) -> str:
    parts = source.split()
    for place in draw.sample(range(len(parts)), count):
        parts[place] = draw.choice(VOCABULARY)
    return " ".join(parts)


def some_rows(seed: int, count: int = 80) -> list[Example]:
    """Prompts, every third near to one before it."""
    draw = random.Random(seed)
    found: list[str] = []
    for i in range(count):
        if i % 3 == 2:
            found.append(changed(draw, draw.choice(found), draw.randrange(0, 9)))
        else:
            found.append(text(draw, draw.randrange(4, 30)) + " " + text(draw, 9))
    return [Example(prompt=one, response="x", meta={"id": i}) for i, one in enumerate(found)]


def sift(folder: Path, rows: list[Example], **settings: Any) -> tuple[list[Example], FakeDesk]:
    step = Dedup(**settings)
    folder.mkdir(exist_ok=True)
    kept = run(step, rows, folder=folder)
    assert isinstance(step.desk, FakeDesk)
    return kept, step.desk


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_kept_or_set_aside_in_order_once_and_a_second_time_nothing_is(method: Any, tmp_path: Path) -> None:
    rows = some_rows(1)
    rows[10] = replace(rows[10], prompt=rows[4].prompt)  # a plain repetition, which each method finds
    kept, desk = sift(tmp_path / "1", rows, method=method)
    ids = [row.meta["id"] for row in kept]
    assert kept == [rows[i] for i in ids]
    gone = [row.meta["id"] for row, _ in desk.set_aside]
    assert ids[0] == 0 and ids == sorted(ids)
    assert sorted(ids + gone) == list(range(len(rows)))
    assert 10 in gone
    again, desk = sift(tmp_path / "2", kept, method=method)
    assert again == kept
    assert desk.set_aside == []


@pytest.mark.parametrize("method", METHODS)
def test_later_rows_change_nothing_for_earlier_ones(method: Any, tmp_path: Path) -> None:
    rows = some_rows(2)
    whole, _ = sift(tmp_path / "whole", rows, method=method)
    for count in (1, 37, 79):
        part, _ = sift(tmp_path / str(count), rows[:count], method=method)
        assert part == [row for row in whole if row.meta["id"] < count]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 1.0])
def test_rouge_l_keeps_no_similar_pair_and_sets_none_aside_without_cause(threshold: float, tmp_path: Path) -> None:
    """By brute force with the library that the papers use."""
    scorer = RougeScorer(["rougeL"])
    rows = some_rows(3, 60)
    kept, _ = sift(tmp_path, rows, method="rouge_l", threshold=threshold)
    expected: list[Example] = []
    for row in rows:
        assert row.prompt is not None
        scores = [scorer.score(other.prompt, row.prompt)["rougeL"].fmeasure for other in expected]
        if all(score < threshold - 1e-12 for score in scores):
            expected.append(row)
    assert kept == expected
    assert threshold == 0.3 or len(kept) < len(rows)


def test_rouge_l_is_the_library_s() -> None:
    scorer, draw = RougeScorer(["rougeL"]), random.Random(0)
    for _ in range(200):
        one, other = (" ".join(draw.choice("ab,c D-e_f") for _ in range(draw.randrange(0, 25))) for _ in range(2))
        assert rouge_l(words(one), words(other)) == pytest.approx(scorer.score(one, other)["rougeL"].fmeasure)


def test_longest_common_subsequence_by_hand() -> None:
    """A B C B D A B and B D C A B A have B C B A, of 4 (Cormen et al., 15.4)."""
    assert longest_common_subsequence("ABCBDAB", "BDCABA") == 4


def test_words_of_other_alphabets_count() -> None:
    """The library's tokenizer knows a-z and 0-9 alone: to it all Chinese texts are empty."""
    assert words("四川大学, Straße_2") == ["四", "川", "大", "学", "straße", "2"]
    assert words("ภาษา") == list("ภาษา")


def test_minhash_finds_planted_near_duplicates_and_nothing_else(tmp_path: Path) -> None:
    """Pairs of similarity s share a band with probability 1 - (1 - s^6)^21: at 0.85, all but 4e-5."""
    draw = random.Random(5)
    wide = [f"w{i}" for i in range(4000)]
    rows, planted = [], set()
    for i in range(600):
        prompt = " ".join(draw.choice(wide) for _ in range(80))
        if i % 5 == 4:  # one word of 80: similarity 75 / 81 or more
            parts = rows[i - 3].prompt.split()
            parts[draw.randrange(80)] = "planted"
            prompt = " ".join(parts)
            planted.add(i)
        rows.append(Example(prompt=prompt, response="x", meta={"id": i}))
    kept, desk = sift(tmp_path, rows, method="minhash")
    assert {row.meta["id"] for row, _ in desk.set_aside} == planted
    assert len(kept) == 600 - len(planted)


def test_minhash_estimates_within_its_error(tmp_path: Path) -> None:
    """The estimate of 128 hashes has mean J and variance J (1 - J) / 128; z of 300 pairs must look standard normal."""
    draw, found = random.Random(6), []
    minhash = MinHash(tmp_path, 0.7)
    wide = [f"w{i}" for i in range(4000)]
    for _ in range(300):
        one = [draw.choice(wide) for _ in range(150)]
        other = list(one)
        for place in draw.sample(range(150), draw.randrange(2, 40)):
            other[place] = draw.choice(wide)
        first, second = " ".join(one), " ".join(other)
        signatures = minhash.signatures([first, second])
        true = jaccard(first, second)
        estimate = float(np.mean(signatures[0] == signatures[1]))
        found.append((estimate - true) / (true * (1 - true) / HASHES) ** 0.5)
    minhash.close()
    assert abs(np.mean(found)) < 0.25
    assert 0.8 < np.std(found) < 1.2


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_bands_bring_together_what_is_at_the_threshold(threshold: float) -> None:
    rows = rows_of_a_band(threshold)
    assert 1 - (1 - threshold**rows) ** (HASHES // rows) >= 0.9
    longer = rows + 1
    assert 1 - (1 - threshold**longer) ** (HASHES // longer) < 0.9


def test_tags_are_found_after_the_table_has_grown(tmp_path: Path) -> None:
    """Against a dictionary; clustered tags make long runs of taken slots, also at the end of the table."""
    draw = random.Random(7)
    table, known = Tags(tmp_path / "tags", bits=6), {}
    tags = [draw.getrandbits(32) for _ in range(1500)]
    tags += [0xFFFFFFF0 + draw.randrange(16) for _ in range(60)] + [draw.randrange(40) for _ in range(60)]
    for row, tag in enumerate(tags):
        table.add(tag, row)
        known.setdefault(tag, []).append(row)
    assert table.bits > 10
    assert {tag: table.find(tag) for tag in known} == known
    assert table.find(12345) == known.get(12345, [])
    table.close()


def test_records_come_back(tmp_path: Path) -> None:
    records = Records(tmp_path / "records", 3)
    assert [records.add(value) for value in (b"abc", b"def")] == [0, 1]
    assert [records.get(1), records.get(0)] == [b"def", b"abc"]
    records.close()


def test_exact_is_blind_to_case_space_and_form_alone(tmp_path: Path) -> None:
    prompts = ["Naïve  CAFÉ?", "nai\u0308ve\n cafe\u0301?", "naive cafe?", "Naïve CAFÉ"]
    kept, _ = sift(tmp_path, [Example(prompt=prompt) for prompt in prompts])
    assert [row.prompt for row in kept] == [prompts[0], prompts[2], prompts[3]]


@pytest.mark.parametrize("method", METHODS)
def test_domains_are_apart_where_it_is_asked(method: Any, tmp_path: Path) -> None:
    prompt = "one two three four five six seven"
    rows = [Example(prompt=prompt, domain=domain) for domain in ("a", "b", "a")]
    assert len(sift(tmp_path / "1", rows, method=method)[0]) == 1
    kept, _ = sift(tmp_path / "2", rows, method=method, within="domain")
    assert [row.domain for row in kept] == ["a", "b"]


@pytest.mark.parametrize("method", METHODS)
def test_answers_to_one_prompt_stay_or_leave_together(method: Any, tmp_path: Path) -> None:
    rows = [
        Example(prompt=prompt, response=answer, group=group)
        for group, prompt in (("1", "what is the tide today"), ("2", "name a river"), ("3", "What is the tide today"))
        for answer in ("first answer", "second answer")
    ]
    kept, desk = sift(tmp_path / "prompt", rows, method=method)
    assert [row.group for row in kept] == ["1", "1", "2", "2"]
    assert desk.reasons == ["duplicate"] * 2
    kept, _ = sift(tmp_path / "response", rows, method=method, field="response", threshold=0.9)
    assert [(row.group, row.response) for row in kept] == [("1", "first answer"), ("1", "second answer")]


def test_what_a_row_lacks_is_said_in_its_place(tmp_path: Path) -> None:
    rows = [Example(prompt="a b c"), Example(text="a b c"), Example(prompt="d e f")]
    kept, desk = sift(tmp_path, rows, method="minhash")
    assert kept == [rows[0], rows[2]]
    assert desk.reasons == ["lacks a field"]


def test_a_rehearsal_keeps_all(tmp_path: Path) -> None:
    rows = [Example(prompt="a")] * 3
    assert run(Dedup(), rows, folder=tmp_path, rehearsal=True) == rows


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(method="simhash"), "choose one of exact"),
        (dict(threshold=0.0), "above 0"),
        (dict(model="x"), "method=embedding"),
        (dict(method="embedding", model="tfidf"), "later rows"),
    ],
)
def test_bad_settings_name_the_way_out(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Dedup(**settings)
