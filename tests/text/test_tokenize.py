"""Tokens on disk: by content, whole or not at all, nothing lost without a reason."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from kdcli.api import Data, Example
from kdcli.data.jsonl import Jsonl
from kdcli.errors import ConfigError, DataError, KDError
from kdcli.store import paths
from kdcli.store.tokens import Segment, Segments, SegmentWriter
from kdcli.text import _workers, tokenize
from kdcli.text.tokenize import encode, tokenizer_fingerprint
from tests.text.tokenizers import CHATML, INST, byte_level, metaspace


class Listed(Data):
    """Examples from memory."""

    def __init__(self, examples: dict[str, list[Example]], max_bad_fraction: float = 0.0) -> None:
        self.examples = examples
        self.max_bad_fraction = max_bad_fraction

    def domains(self) -> dict[str, Iterable[Example]]:
        return dict(self.examples)

    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(repr(self.examples).encode())


def texts(*lengths: int) -> Listed:
    return Listed({"prose": [Example(text="a b " * length, domain="prose", where=f"x:{length}") for length in lengths]})


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def token_lists(rows: Any) -> list[list[int]]:
    return [segment.ids.tolist() for row in rows for segment in row.segments]


@pytest.mark.parametrize("max_length", [2, 3, 7, 64])
def test_a_split_document_is_predicted_token_by_token_exactly_once(max_length: int) -> None:
    words = byte_level()
    whole = [*words("a b " * 20)["input_ids"], words.eos_token_id]
    rows, report = encode(texts(20), words, max_length=max_length)
    targets = [
        token for row in rows["prose"] for part in row.segments for token in part.ids[1:][part.mask[1:]].tolist()
    ]
    assert targets == whole[1:]
    assert all(2 <= len(row) <= max_length for row in rows["prose"])
    assert report.total.supervised == len(targets)


def test_a_document_is_truncated_where_that_is_asked_for_and_counted() -> None:
    rows, report = encode(texts(1, 20), byte_level(), max_length=8, overflow="truncate")
    assert [len(row) for row in rows["prose"]] == [len(byte_level()("a b ")["input_ids"]) + 1, 8]
    assert report.domains["prose"].truncated == 1


def test_a_response_is_cut_at_its_end_and_a_row_without_one_is_dropped_and_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [
        Example(prompt="a", response=" b" * 50, where="x:1"),
        Example(prompt="a b " * 50, response="c", where="x:2"),
        Example(prompt="a", response="b", where="x:3"),
    ]
    found, report = encode(Listed({"code": rows}), byte_level(), max_length=10)
    counts = report.domains["code"]
    assert [len(row) for row in found["code"]] == [10, 3]
    assert (counts.examples, counts.rows, counts.truncated) == (3, 2, 2)
    assert counts.dropped == {_workers.Outcome.CUT: 1}
    assert counts.named == {"x:2": _workers.Outcome.CUT}
    assert "1 of 3 examples lost every supervised token" in caplog.text


def test_a_domain_without_a_target_is_an_error_that_says_why() -> None:
    data = Listed({"fine": [Example(text="a b c")], "code": [Example(prompt="a b " * 50, response="c")] * 3})
    for _ in range(2):  # the second time from the cache
        with pytest.raises(
            ConfigError, match=r"domain code: 0 of 3 examples .*batch.max_length=10 .*before the response"
        ):
            encode(data, byte_level(), max_length=10)


def test_packing_keeps_every_token_in_rows_that_are_full() -> None:
    data = texts(*range(1, 30))
    single, _ = encode(data, byte_level(), max_length=64)
    packed, report = encode(data, byte_level(), max_length=64, packing=True)
    assert sorted(token_lists(single["prose"])) == sorted(token_lists(packed["prose"]))
    assert all(len(row) <= 64 for row in packed["prose"])
    assert len(packed["prose"]) < len(single["prose"])
    assert report.cached


def test_what_an_example_carries_reaches_its_row() -> None:
    example = Example(prompt="a", response="b", domain="code", group="7", score=2.5, weight=0.5)
    rows, _ = encode(Listed({"code": [example, Example(text="a b c", domain="code")]}), byte_level(), max_length=16)
    (part,), (text,) = rows["code"][0].segments, rows["code"][1].segments
    assert (part.domain, part.group, part.score, part.weight) == ("code", "7", 2.5, 0.5)
    assert (text.group, text.score, text.weight, text.rejected, text.teacher) == (None, None, 1.0, False, None)
    assert len({part.key, text.key}) == 2


def test_the_key_of_a_row_is_its_content_and_its_part() -> None:
    one, _ = encode(texts(20), byte_level(), max_length=16)
    other = Listed({"other": [Example(text="a b " * 20, domain="other", weight=3.0, meta={"id": 1})]})
    two, _ = encode(other, byte_level(), max_length=16)
    keys = [row.segments[0].key for row in one["prose"]]
    assert keys == [row.segments[0].key for row in two["other"]]
    assert keys[1:] == [f"{keys[0]}#{number}" for number in range(1, len(keys))]


def test_the_second_call_reads_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    first, report = encode(texts(3, 4), byte_level(), max_length=16)
    monkeypatch.setattr(tokenize, "outcomes", None)  # whoever tokenizes now fails
    second, again = encode(texts(3, 4), byte_level(), max_length=16)
    assert not report.cached
    assert again.cached
    assert again.domains == report.domains
    assert token_lists(first["prose"]) == token_lists(second["prose"])


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (metaspace, {}),
        (byte_level, {"max_length": 17}),
        (byte_level, {"overflow": "truncate"}),
        (byte_level, {"chat_template": CHATML}),
    ],
)
def test_another_tokenizer_or_setting_tokenizes_again(words: Any, settings: dict[str, Any]) -> None:
    encode(texts(3), byte_level(), max_length=16)
    assert not encode(texts(3), words(), **{"max_length": 16, **settings})[1].cached


def test_changed_content_tokenizes_again_and_a_moved_file_does_not(tmp_path: Path) -> None:
    file = write(tmp_path / "code.jsonl", {"text": "a b c"})
    encode(Jsonl(path=str(file)), byte_level(), max_length=16)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    file.rename(moved / "code.jsonl")
    assert encode(Jsonl(path=str(moved)), byte_level(), max_length=16)[1].cached
    write(moved / "code.jsonl", {"text": "a b d"})
    assert not encode(Jsonl(path=str(moved)), byte_level(), max_length=16)[1].cached


def test_a_damaged_cache_is_made_again() -> None:
    first, _ = encode(texts(3, 4), byte_level(), max_length=16)
    expected = token_lists(first["prose"])
    (file,) = (paths.cache() / "tokens").glob("*/0.arrow")
    file.unlink()
    file.write_bytes(b"torn")
    second, report = encode(texts(3, 4), byte_level(), max_length=16)
    assert not report.cached
    assert token_lists(second["prose"]) == expected


def test_what_a_killed_process_left_is_no_obstacle() -> None:
    encode(texts(3), byte_level(), max_length=16)
    (folder,) = (path for path in (paths.cache() / "tokens").iterdir() if path.is_dir())
    folder.rename(folder.with_name(f".tmp-{folder.name}"))
    rows, report = encode(texts(3), byte_level(), max_length=16)
    assert not report.cached
    assert len(rows["prose"]) == 1
    assert not folder.with_name(f".tmp-{folder.name}").exists()


def test_nothing_is_drawn_where_nobody_looks(capfd: pytest.CaptureFixture[str]) -> None:
    encode(texts(3), byte_level(), max_length=16)
    assert capfd.readouterr() == ("", "")


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    file = write(tmp_path / "code.jsonl", {"text": "a b c"}, {"text": ""})
    with pytest.raises(ConfigError, match=r"code.jsonl:2: text is empty"):
        encode(Jsonl(path=str(file)), byte_level(), max_length=16)
    assert [path.suffix for path in (paths.cache() / "tokens").iterdir()] == [".lock"]


def test_a_full_disk_is_a_message_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SegmentWriter, "_flush", full)
    with pytest.raises(KDError, match=r"no space left .*KDCLI_CACHE"):
        encode(texts(3), byte_level(), max_length=16)
    assert [path.suffix for path in (paths.cache() / "tokens").iterdir()] == [".lock"]


def test_callers_at_the_same_time_tokenize_once(monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[int] = []
    write_all = tokenize._write_all
    monkeypatch.setattr(tokenize, "_write_all", lambda *args: (builds.append(1), write_all(*args))[1])
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(encode(texts(3, 9), byte_level(), max_length=16, packing=True)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert len(found) == 4
    assert len({str(token_lists(rows["prose"])) for rows, _ in found}) == 1


def test_dropped_rows_are_counted_by_reason_with_their_place(tmp_path: Path) -> None:
    good = [{"text": "a b c"}] * 8
    file = write(tmp_path / "code.jsonl", {"prompt": "a"}, *good, {"text": " "})
    _, report = encode(Jsonl(path=str(file), max_bad_fraction=0.5), byte_level(), max_length=16)
    counts = report.domains["code"]
    assert counts.examples == 10
    assert counts.dropped == {"no response": 1, "empty text": 1}
    assert list(counts.named) == [f"{file}:1", f"{file}:10"]
    assert "1 no response" in str(report)


def test_an_example_that_the_template_refuses_is_named_or_within_bounds_dropped() -> None:
    system = Example(messages=[{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}], where="x:1")
    rows = {"chat": [system, *[Example(prompt="a", response="b")] * 9]}
    with pytest.raises(ConfigError, match="x:1: the chat template refuses"):
        encode(Listed(rows), byte_level(), max_length=32, chat_template=INST)
    _, report = encode(Listed(rows, max_bad_fraction=0.2), byte_level(), max_length=32, chat_template=INST)
    assert report.domains["chat"].dropped == {"template": 1}
    with pytest.raises(DataError, match="1 of 10 examples"):
        encode(Listed(rows, max_bad_fraction=0.05), byte_level(), max_length=32, chat_template=INST)


@pytest.mark.slow
def test_processes_give_the_same_tokens_in_the_same_order() -> None:
    examples = [Example(text=f"{number} cat " * (number % 7 + 1), where=str(number)) for number in range(700)]
    worker = _workers.Worker(byte_level(), _workers.Settings(max_length=12, split=True), metaspace())
    alone, several = (
        [
            (o.where, [(s.ids.tolist(), s.teacher.ids.tolist()) for s in o.segments if s.teacher])
            for o in _workers.outcomes(examples, worker, n)
        ]
        for n in (1, 2)
    )
    assert alone == several


def test_processes_are_for_large_data_or_for_who_asks() -> None:
    cores = len(os.sched_getaffinity(0))
    assert tokenize._processes(None, range(tokenize.LARGE)) == cores
    assert tokenize._processes(None, range(1000)) == 1
    assert tokenize._processes(3, range(1000)) == 3


def test_a_fingerprint_is_of_what_a_tokenizer_does() -> None:
    words = byte_level()
    before = tokenizer_fingerprint(words)
    words("a b c", truncation=True, max_length=2)  # leaves a setting behind that is no part of the tokenizer
    assert tokenizer_fingerprint(words) == before
    assert tokenizer_fingerprint(metaspace()) != before
    words.chat_template = CHATML
    try:
        assert tokenizer_fingerprint(words) != before
    finally:
        words.chat_template = None


def test_segments_are_found_across_blocks(tmp_path: Path) -> None:
    file = tmp_path / "0.arrow"
    count = 2 * 1024 + 3
    with SegmentWriter(file) as writer:
        for number in range(count):
            ids = np.arange(number % 5 + 1, dtype=np.int32) + number
            writer.add(Segment(ids=ids, mask=ids % 2 == 0, key=str(number)))
    segments = Segments(file, "code")
    assert len(segments) == count
    for number in (0, 1, 1023, 1024, 2047, 2048, count - 1):
        assert segments[number].key == str(number)
        assert segments[number].ids.tolist() == [number + i for i in range(number % 5 + 1)]
        assert segments[number].mask.tolist() == [(number + i) % 2 == 0 for i in range(number % 5 + 1)]
    assert segments.lengths().tolist() == [number % 5 + 1 for number in range(count)]
    with pytest.raises(IndexError):
        segments[count]


def test_a_tokenizer_that_is_told_a_short_length_does_not_complain(caplog: pytest.LogCaptureFixture) -> None:
    words = byte_level()
    words.model_max_length, before = 4, words.model_max_length
    try:
        with caplog.at_level(logging.WARNING):
            encode(texts(50), words, max_length=16)
    finally:
        words.model_max_length = before
    assert not caplog.records
