"""Scores against what transformers itself computes, text by text and without padding."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdcli.api import Example
from kdcli.augmentation._lm import LM
from kdcli.augmentation.lm import Lm
from kdcli.errors import ConfigError
from kdcli.store import paths
from tests.desks import FakeDesk, run

TINY = "recipes://data/tiny_teacher"
ROWS = [
    Example(prompt="What is a dog?", response=" A dog is an animal that lives with people."),
    Example(prompt="Name a colour.\n", response="Blue"),
    Example(prompt="", response="Once upon a time there was a small house in a wood, and nobody lived in it at all."),
    Example(prompt="Say something long. " * 12, response="No."),
    Example(text="The sun is a star."),
]


@pytest.fixture(scope="module")
def direct():
    """Mean log-probability of a text after a prefix: the loss of transformers' own forward pass, one text at a time."""
    folder = str(paths.resolve(TINY))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def mean(prefix, text):
        before = [tokenizer.bos_token_id, *tokenizer(prefix, add_special_tokens=False)["input_ids"]]
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids, labels = torch.tensor([before + own]), torch.tensor([[-100] * len(before) + own])
        with torch.no_grad():
            return -float(model(input_ids=ids, labels=labels).loss)

    return mean


def numbers(rows=ROWS, **settings):
    return [row.meta["lm"] for row in run(Lm(model=TINY, mark=True, **settings), rows)]


def test_perplexity_and_logprob_are_those_of_transformers(direct):
    wanted = [direct(row.prompt or "", row.response or row.text) for row in ROWS]
    assert numbers(measure="logprob") == pytest.approx(wanted, abs=1e-5)
    assert numbers(measure="perplexity") == pytest.approx([math.exp(-one) for one in wanted], rel=1e-5)


def test_ifd_is_the_ratio_of_perplexities_with_and_without_the_prompt(direct):
    """Of a row without a prompt it is 1: nothing helps, nothing misleads."""
    wanted = [
        math.exp(-direct(row.prompt or "", row.response or row.text)) / math.exp(-direct("", row.response or row.text))
        for row in ROWS
    ]
    found = numbers(measure="ifd")
    assert found == pytest.approx(wanted, rel=1e-5)
    assert found[2] == found[4] == 1.0


def test_a_field_is_scored_alone(direct):
    assert numbers(ROWS[:1], measure="logprob", field="prompt") == pytest.approx([direct("", ROWS[0].prompt)], abs=1e-5)


def test_loss_reduction_is_with_minus_the_best_without(direct):
    row = Example(prompt="q", response=" is 14.", meta={"call": "7 * 2 = 14"})
    found = numbers(
        [row],
        measure="loss_reduction",
        given={"with_": "The result ({{ meta.call }})", "without": ["The result", "The result (7 * 2)"]},
    )
    without = max(direct("The result", " is 14."), direct("The result (7 * 2)", " is 14."))
    assert found == pytest.approx([direct("The result (7 * 2 = 14)", " is 14.") - without], abs=1e-5)


def test_gap_of_a_model_to_itself_is_zero_and_is_antisymmetric(tmp_path, direct):
    assert numbers(measure="gap", reference=TINY) == [0.0] * len(ROWS)
    model = AutoModelForCausalLM.from_pretrained(str(paths.resolve(TINY)), dtype=torch.float32)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(str(paths.resolve(TINY))).save_pretrained(tmp_path)
    forth = run(Lm(model=TINY, reference=str(tmp_path), measure="gap", mark=True), ROWS[:2])
    back = run(Lm(model=str(tmp_path), reference=TINY, measure="gap", mark=True), ROWS[:2])
    assert [row.meta["lm"] for row in forth] == pytest.approx([-row.meta["lm"] for row in back], abs=1e-7)
    assert all(abs(row.meta["lm"]) > 1e-3 for row in forth)
    lengths = len(AutoTokenizer.from_pretrained(str(tmp_path))(ROWS[1].response)["input_ids"]), len(b"Blue")
    by_hand = direct(ROWS[1].prompt, "Blue") * lengths[0] / lengths[1]
    other = run(Lm(model=str(tmp_path), measure="logprob", mark=True), ROWS[1:2])[0].meta["lm"]
    assert forth[1].meta["lm"] == pytest.approx(by_hand - other * lengths[0] / lengths[1], abs=1e-5)


def test_what_stands_in_a_batch_together_does_not_matter():
    alone, all_at_once = numbers(measure="ifd", batch=1), numbers(measure="ifd", batch=5)
    assert alone == pytest.approx(all_at_once, rel=1e-5)


def test_a_text_is_computed_once_and_in_the_order_of_the_rows(monkeypatch):
    seen = []
    sums = LM._sums
    monkeypatch.setattr(LM, "_sums", lambda self, rows: seen.extend(rows) or sums(self, rows))
    first = Lm(model=TINY, mark=True)
    desk = FakeDesk()
    first.open(desk)
    found = list(first(ROWS * 2))
    assert len(seen) == len(ROWS) and [row.prompt for row in found] == [row.prompt for row in ROWS * 2]
    second = Lm(model=TINY, mark=True, batch=2)
    second.open(desk)
    assert list(second(ROWS)) == found[: len(ROWS)] and len(seen) == len(ROWS)


def test_the_prefix_is_cut_before_the_text(direct):
    """Of five tokens the first is the begin token, and the last of the prefix stay."""
    tokenizer = AutoTokenizer.from_pretrained(str(paths.resolve(TINY)))
    prefix, text = "one two three four five six", " seven"
    own = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    kept = tokenizer.decode(tokenizer(prefix, add_special_tokens=False)["input_ids"][-2:])
    found = numbers([Example(prompt=prefix, response=text)], measure="logprob", max_length=own + 3)
    assert found == pytest.approx([direct(kept, text)], abs=1e-5)


def test_bounds_and_shares_keep_the_rows_that_they_name():
    perplexity = numbers()
    middle = sorted(perplexity)[2]
    step = Lm(model=TINY, max=middle)
    assert run(step, ROWS) == [row for row, one in zip(ROWS, perplexity, strict=True) if one <= middle]
    assert step.desk.reasons == ["above the bound"] * 2


@pytest.mark.parametrize("lowest", [False, True])
def test_the_top_share_is_of_all_rows_and_in_their_order(lowest, tmp_path):
    perplexity = numbers()
    best = sorted(perplexity, reverse=not lowest)[:2]
    step = Lm(model=TINY, top_share=0.5, lowest=lowest)
    kept = run(step, ROWS, folder=tmp_path)
    assert kept == [row for row, one in zip(ROWS, perplexity, strict=True) if one in best]
    assert step.desk.reasons == ["below the top"] * 3 and not list(tmp_path.iterdir())


def test_a_rehearsal_keeps_all_and_loads_nothing(monkeypatch):
    monkeypatch.setattr(LM, "scores", None)
    assert run(Lm(model=TINY, top_share=0.1), ROWS, rehearsal=True) == ROWS


def test_rows_without_a_response_are_set_aside():
    step = Lm(model=TINY)
    assert run(step, [Example(prompt="a")]) == [] and step.desk.reasons == ["lacks a field"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"measure": "loss"}, "measure"),
        ({"measure": "gap"}, "reference"),
        ({"reference": TINY}, "reference"),
        ({"measure": "loss_reduction"}, "given"),
        ({"measure": "loss_reduction", "given": {"with": "a"}}, "with_ and without"),
        ({"measure": "ifd", "field": "prompt"}, "field"),
        ({"top_share": 0.0}, "top_share"),
        ({"min": 2.0, "max": 1.0}, "above max"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, named):
    with pytest.raises(ConfigError, match=named):
        Lm(model=TINY, **settings)


def test_a_missing_model_is_named_before_rows_are_read():
    with pytest.raises(ConfigError, match="no such model"):
        Lm(model="./nowhere").open(FakeDesk())
