"""Answers that a loss compares stay together, whatever the order of the data and the micro-batches."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcli.api import Example
from kdcli.errors import ConfigError
from kdcli.store.tokens import Row
from kdcli.text._workers import Outcome
from kdcli.text.bundle import bundle
from kdcli.text.collate import collate
from kdcli.text.tokenize import encode
from kdcli.train.loader import Loader
from tests.text.test_tokenize import Listed
from tests.text.tokenizers import FORGETS, byte_level, metaspace

PAIR = Example(prompt="a ", chosen="b b", rejected="c", weight=0.5, where="x:1")


def answers(**groups: list[float | None]) -> list[Example]:
    """Scored answers: group -> scores, their text being their place in it."""
    return [
        Example(prompt=f"{group} ", response=f"{group}{place}", group=group, score=score, where=f"x:{group}{place}")
        for group, scores in groups.items()
        for place, score in enumerate(scores)
    ]


def said(row: Row) -> list[str]:
    """The learned text of each sequence."""
    return [byte_level().decode(part.ids[part.mask]).removesuffix("</s>") for part in row.segments]


def bundled(examples: list[Example], columns: set[str], **settings: object) -> tuple[list[Row], object]:
    given_settings: dict = {"max_length": 32, **settings}
    rows, report = encode(Listed({"d": examples}), byte_level(), columns=columns, **given_settings)
    return list(rows["d"]), report.domains["d"]


# ----------------------------------------------------------------------------------------------------------- the plan

SEGMENTS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["a", "b", None]), st.sampled_from([0.0, 1.0, 2.0, None])).map(
            lambda s: [(False, *s)]
        ),
        st.sampled_from(["a", None]).map(lambda group: [(False, group, 1.0), (True, group, 1.0)]),  # a pair
    ),
    max_size=12,
).map(lambda parts: [segment for part in parts for segment in part])


@given(segments=SEGMENTS)
def test_each_segment_is_in_one_row_and_compared_answers_are_in_the_same(segments: list) -> None:
    rejected, groups, scores = ([segment[field] for segment in segments] for field in range(3))
    order, starts = bundle(rejected, groups, scores)
    assert sorted(order.tolist()) == list(range(len(segments)))
    rows = [order[a:b].tolist() for a, b in pairwise(starts)]
    seen = set()
    for row in rows:
        if any(rejected[i] for i in row):
            assert row == [row[0], row[0] + 1]
            assert not rejected[row[0]]
        elif len(row) > 1:
            assert len({groups[i] for i in row}) == 1
            keys = [(-scores[i], i) for i in row]
            assert keys == sorted(keys)
        paired = row[0] + 1 < len(segments) and rejected[row[0] + 1]
        if groups[row[0]] is not None and scores[row[0]] is not None and not paired:
            assert groups[row[0]] not in seen  # all answers of a group are in one row
            seen.add(groups[row[0]])
    assert [min(row) for row in rows] == sorted(min(row) for row in rows)


def test_a_plan_worked_out_by_hand() -> None:
    """A pair; the group a with scores 1, 3, 3; a row without a score; so rows 01 | 4 5 2 | 3."""
    order, starts = bundle(
        [False, True, False, False, False, False], ["a", "a", "a", "a", "a", "a"], [1.0, 1.0, 1.0, None, 3.0, 3.0]
    )
    assert order.tolist() == [0, 1, 4, 5, 2, 3]
    assert starts.tolist() == [0, 2, 5, 6]


# ----------------------------------------------------------------------------------------------------------- the rows


def test_a_pair_is_one_row_of_two_sequences_the_better_first() -> None:
    (row,), counts = bundled([PAIR], {"rejected"})
    assert said(row) == ["b b", "c"]
    assert [part.rejected for part in row.segments] == [False, True]
    assert len({part.key for part in row.segments}) == 2
    assert len(row) == max(len(part) for part in row.segments)
    assert (counts.examples, counts.rows, counts.pairs) == (1, 2, 1)


def test_the_worse_answer_costs_nothing_where_no_loss_wants_it() -> None:
    for columns in (set(), {"score"}, {"group", "score"}):
        (row,), counts = bundled([PAIR], columns)
        assert said(row) == ["b b"]
        assert (counts.rows, counts.pairs) == (1, 0)


@pytest.mark.parametrize(("chosen", "rejected"), [("a", " b" * 40), ("a" * 40, "b"), (" b" * 40, " b" * 39)])
def test_a_long_answer_of_a_pair_loses_its_end(chosen: str, rejected: str) -> None:
    (row,), counts = bundled([Example(prompt="a ", chosen=chosen, rejected=rejected)], {"rejected"}, max_length=8)
    assert max(len(part) for part in row.segments) == 8
    assert all(part.mask[1:].any() for part in row.segments)
    assert counts.truncated == sum(len(answer) > 8 for answer in (chosen, rejected))
    assert counts.dropped == {}


def test_a_pair_without_a_target_in_both_answers_is_dropped_with_a_reason() -> None:
    long = Example(prompt="a b c d " * 4, chosen="x", rejected="y", where="x:2")
    rows, counts = bundled([PAIR, long], {"rejected"}, max_length=8)
    assert (len(rows), counts.rows, counts.pairs) == (1, 2, 1)
    assert counts.named == {"x:2": Outcome.CUT}


@pytest.mark.parametrize(("chosen", "rejected"), [("e c", "xx"), ("xx", "e c")])
def test_a_pair_without_a_target_in_one_answer_is_dropped_with_a_reason(chosen: str, rejected: str) -> None:
    """This tokenizer cuts naï|ve c, and the second token counts as the answer's; it cuts naï|v|x|x, so that of two
    tokens none is."""
    lone = Example(prompt="naïv", chosen=chosen, rejected=rejected, where="x:2")
    short = Example(prompt="", chosen="a", rejected="b")
    rows, report = encode(Listed({"d": [lone, short]}), metaspace(), max_length=2, columns={"rejected"})
    assert len(rows["d"]) == 1
    assert report.domains["d"].named == {"x:2": Outcome.CUT_PAIR}
    rows, report = encode(Listed({"d": [lone, short]}), metaspace(), max_length=2)
    assert len(rows["d"]) == (2 if chosen == "e c" else 1)  # alone, the better answer decides


def test_scored_answers_to_one_prompt_are_one_row_the_best_first() -> None:
    examples = answers(a=[1.0, 3.0], b=[0.5, 0.5, 0.7])
    mixed = [examples[0], examples[2], Example(text="alone"), examples[3], examples[1], examples[4]]
    rows, counts = bundled(mixed, {"group", "score"})
    assert [said(row) for row in rows] == [["a1", "a0"], ["b2", "b0", "b1"], ["alone"]]
    assert (counts.groups, counts.alone, counts.rows) == (2, 0, 6)
    assert [part.score for part in rows[0].segments] == [3.0, 1.0]


def test_without_a_loss_on_groups_answers_are_rows_of_their_own() -> None:
    rows, counts = bundled(answers(a=[1.0, 3.0]), {"score"})
    assert [said(row) for row in rows] == [["a0"], ["a1"]]
    assert (counts.groups, counts.alone) == (0, 0)


def test_an_answer_alone_in_its_group_stays_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    rows, counts = bundled(answers(a=[1.0, 2.0], b=[1.0], c=[None, 1.0]), {"group"})
    assert [said(row) for row in rows] == [["a1", "a0"], ["b0"], ["c0"], ["c1"]]
    assert (counts.groups, counts.alone) == (1, 2)
    assert "2 scored answers are alone in their group" in caplog.text


def test_groups_of_equal_name_in_two_domains_are_two() -> None:
    data = Listed({name: answers(a=[1.0, 2.0]) for name in ("x", "y")})
    rows, _ = encode(data, byte_level(), max_length=32, columns={"group"})
    assert [len(row.segments) for part in rows.values() for row in part] == [2, 2]


def test_a_group_s_answer_is_one_sequence_even_where_others_would_be_several() -> None:
    """FORGETS gives a row per answer of a conversation; the score is of the last one. Long documents are cut."""
    turns = [("user", "Hi"), ("assistant", "one"), ("user", "And?"), ("assistant", "two")]
    talk = [{"role": role, "content": text} for role, text in turns]
    examples = [Example(messages=talk, group="a", score=float(score)) for score in range(2)]
    (row,), _ = bundled(examples, {"group"}, chat_template=FORGETS, max_length=64)
    assert [text.split("]")[1] for text in said(row)] == [" two<|im_end|>"] * 2
    documents = [Example(text="a b " * 40, group="a", score=float(score)) for score in range(2)]
    (row,), counts = bundled(documents, {"group"}, max_length=8)
    assert [len(part) for part in row.segments] == [8, 8]
    assert counts.truncated == 2


def test_what_is_compared_is_not_packed() -> None:
    for columns in ({"rejected"}, {"group"}):
        with pytest.raises(ConfigError, match=r"batch.packing: answers that are compared .* set it false"):
            bundled([PAIR], columns, packing=True)


def test_other_columns_are_other_tokens_on_disk() -> None:
    data = Listed({"d": [PAIR]})
    cached = [encode(data, byte_level(), max_length=32, columns=c)[1].cached for c in ((), {"rejected"}, {"group"}) * 2]
    assert cached == [False] * 3 + [True] * 3


# ---------------------------------------------------------------------------------------------------------- the batch


def test_a_batch_says_which_sequences_are_one_group() -> None:
    rows, _ = bundled(
        [Example(text="one"), PAIR, *answers(a=[1.0, 2.0, 3.0]), Example(text="two")], {"rejected", "group"}
    )
    batch = collate(rows, pad_id=0)
    assert batch.groups().tolist() == [0, 1, 1, 2, 2, 2, 3]
    assert batch.rejected is not None
    assert batch.rejected.tolist() == [False, False, True, False, False, False, False]
    assert batch.input_ids.shape[0] == batch.num_sequences == 7
    assert batch.position_ids is None
    assert batch.score == [None, None, None, 3.0, 2.0, 1.0, None]
    assert batch.weight.tolist() == [1.0, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0]
    texts = [byte_level().decode(batch.targets[b][batch.mask[b]]) for b in range(7)]
    assert texts[1:3] == ["b b</s>", "c</s>"]


def test_a_batch_without_bundles_has_no_groups() -> None:
    rows, _ = bundled([Example(text="one"), Example(text="two")], {"group"})
    batch = collate(rows, pad_id=0)
    assert batch.rejected is None
    assert batch.groups().tolist() == [0, 1]


def test_the_loader_draws_bundles_whole() -> None:
    examples = [*answers(**{f"g{n}": [float(s) for s in range(2 + n % 3)] for n in range(7)}), PAIR]
    rows, _ = encode(Listed({"d": examples}), byte_level(), max_length=32, columns={"rejected", "group"})
    sizes = {}
    for world_size in (1, 2):
        ranks = [
            Loader(
                rows, batch_size=8, micro_size=2, pad_id=0, seed=1, rank=rank, world_size=world_size, weights={"d": 1}
            )
            for rank in range(world_size)
        ]
        batches = [batch for loader in ranks for batch in loader.next(0)]
        assert [loader.drawn for loader in ranks] == [{"d": 8}] * world_size  # rows, not sequences
        for batch in batches:
            groups = batch.groups().tolist()
            for group in range(2):
                together = tuple(key for key, one in zip(batch.row, groups, strict=True) if one == group)
                assert together in {tuple(part.key for part in row.segments) for row in rows["d"]}
            assert set(groups) == {0, 1}
        sizes[world_size] = sorted(batch.num_sequences for batch in batches)
        assert sum(sizes[world_size]) == len(examples) + 1
    assert sizes[1] == sizes[2]
