"""The local writer: each text its own affair, answers that keep to forms and end, prompts that fit."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from kdcli.api import Answer, Request
from kdcli.errors import ConfigError
from kdcli.store.models import load_model, load_tokenizer
from kdcli.writer._forms import bounded_schema
from kdcli.writer._generation import Generator, Row
from kdcli.writer._patterns import bounded_regex
from kdcli.writer.hf import HFWriter
from tests.servers.chat import TINY

TAGS = {"regex": r"<reason>[^<\s]([^<]|<[^/]){0,4000}</reason>\n<score>(1|2|3|4|5)</score>"}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "score": {"type": "integer", "minimum": 1, "maximum": 10},
        "reason": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["score", "reason", "tags"],
}


@pytest.fixture(scope="module")
def tiny() -> HFWriter:
    return HFWriter(path=TINY)


@pytest.fixture(scope="module")
def closed(tiny: HFWriter) -> HFWriter:
    """The same model, whose forms always end."""
    writer = HFWriter(path=TINY, closed=True)
    one(tiny)
    writer.tokenizer, writer._generator, writer._guide, writer._context = (
        tiny.tokenizer,
        tiny._generator,
        tiny._guide,
        tiny._context,
    )
    return writer


def request(words: str = "Define the word lantern.", **settings: Any) -> Request:
    given: dict[str, Any] = {"messages": [{"role": "user", "content": words}], "max_tokens": 12}
    return Request(**(given | settings))


def one(writer: HFWriter, **settings: Any) -> Answer:
    return writer.write([request(**settings)])[0]


def test_a_text_does_not_depend_on_its_neighbours(tiny: HFWriter) -> None:
    """Of other lengths, that end earlier and later, with and without forms, in other places of the batch."""
    asked = [
        request("Short.", seed=1, n=2),
        request("A rather longer question about lanterns, " * 8, seed=2, max_tokens=20),
        request("Yes or no?", seed=3, form={"regex": "yes|no"}),
        request("Explain.", seed=4, form=TAGS, max_tokens=64),
        request("Greedy.", seed=5, temperature=0.0),
    ]
    together, reversed_ = tiny.write(asked), tiny.write(asked[::-1])[::-1]
    alone = [tiny.write([asking])[0] for asking in asked]
    assert together == alone == reversed_


def test_seeds_and_samples_tell_texts_apart(tiny: HFWriter) -> None:
    first, again, other = (one(tiny, n=3, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert len({*first.texts, *other.texts}) == 6
    assert tiny.write([request(n=1, seed=1)])[0].texts[0] == first.texts[0], (
        "a sample is the same however many there are"
    )


def test_without_heat_the_likeliest_tokens_are_written(tiny: HFWriter) -> None:
    """As transformers' own greedy search writes them."""
    model, tokenizer = load_model(TINY), load_tokenizer(TINY)
    ids = tokenizer("Define the word lantern.", return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.input_ids.shape[1] :]
    assert one(tiny, temperature=0.0).texts[0] == tokenizer.decode(expected, skip_special_tokens=True)


def test_tokens_are_drawn_from_the_models_distribution(tiny: HFWriter) -> None:
    """2,000 first tokens at temperature 1.5 and top_p 0.6 against softmax(logits / 1.5) cut there: total variation
    distance of what a sample of that size has from its own distribution."""
    one(tiny)
    generator = tiny._generator
    assert isinstance(generator, Generator)
    prompt = load_tokenizer(TINY)("The").input_ids
    rows = [Row(prompt=prompt, most=1, temperature=1.5, top_p=0.6, seed=(7, sample)) for sample in range(2000)]
    for start in range(0, 2000, 500):
        generator(rows[start : start + 500])
    with torch.no_grad():
        logits = generator.model(torch.tensor([prompt])).logits[0, -1].float()
    logits[list(generator.ends)] = -torch.inf
    p, order = torch.softmax(logits / 1.5, -1).sort(descending=True)
    kept = p.cumsum(-1) - p < 0.6
    expected = torch.zeros_like(p).scatter(0, order, torch.where(kept, p, 0.0))
    expected /= expected.sum()
    drawn = torch.bincount(torch.tensor([row.ids[0] for row in rows]), minlength=4096) / 2000
    assert bool((drawn[expected == 0] == 0).all())
    sampled = torch.distributions.Multinomial(2000, expected)
    torch.manual_seed(0)
    usual = max(float((sampled.sample() / 2000 - expected).abs().sum()) for _ in range(20))
    assert float((drawn - expected).abs().sum()) <= 1.1 * usual


def test_stop_strings_end_a_text_and_are_left_out(tiny: HFWriter) -> None:
    whole = one(tiny, seed=3, max_tokens=40)
    stop = whole.texts[0].strip()[6:9]
    cut = one(tiny, seed=3, max_tokens=40, stop=[stop])
    assert cut.texts[0] == whole.texts[0][: whole.texts[0].index(stop)]
    assert list(cut.finished) == ["stop"] and cut.completion_tokens < whole.completion_tokens


def test_a_text_that_was_not_ended_is_told(tiny: HFWriter) -> None:
    answer = one(tiny, max_tokens=3)
    assert list(answer.finished) == ["length"] and answer.completion_tokens == 3


LINES = {"regex": r"(\d+\. [^\n]+\n)+"}


@pytest.mark.parametrize(
    ("form", "budget"),
    [
        *((TAGS, budget) for budget in (48, 96, 256)),
        *(({"json": SCHEMA}, budget) for budget in (48, 96)),
        *((LINES, 64), ({"json": {"type": "number"}}, 16)),
    ],
)
def test_closed_even_a_poor_model_ends_and_keeps_to_its_form(
    form: dict[str, Any], budget: int, closed: HFWriter
) -> None:
    for answer in closed.write([request(f"Question {i}", seed=i, form=form, max_tokens=budget) for i in range(4)]):
        assert list(answer.finished) == ["stop"], answer
        assert answer.completion_tokens <= budget
        if "regex" in form:
            assert re.fullmatch(form["regex"], answer.texts[0])
        else:
            jsonschema.validate(json.loads(answer.texts[0]), form["json"])


def test_a_form_never_makes_a_part_look_whole(tiny: HFWriter) -> None:
    """What the model did not end itself is cut off, and told: its beginning is what it would have written anyway."""
    short, long = ([request(seed=i, form=TAGS, max_tokens=most) for i in range(6)] for most in (24, 120))
    for cut, whole in zip(tiny.write(short), tiny.write(long), strict=True):
        if cut.finished[0] == "length":
            assert whole.texts[0].startswith(cut.texts[0].rstrip("\ufffd"))
            assert not re.fullmatch(TAGS["regex"], cut.texts[0])
        else:
            assert cut.texts == whole.texts and re.fullmatch(TAGS["regex"], cut.texts[0])
    assert any(answer.finished[0] == "length" for answer in tiny.write(short))


def test_without_constrain_forms_are_left_to_the_model(tiny: HFWriter) -> None:
    free = HFWriter(path=TINY, constrain=False)
    assert one(free, form=TAGS, seed=4).texts == one(tiny, seed=4).texts


def test_a_form_that_cannot_be_held_to_is_told_and_left_to_the_model(
    tiny: HFWriter, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        answers = [one(tiny, form={"regex": "a(?=b)"}, seed=4) for _ in range(2)]
    assert answers[0].texts == one(tiny, seed=4).texts
    assert sum("cannot be held to" in line for line in caplog.messages) == 1


def test_a_prompt_too_long_fails_alone_and_an_answer_ends_with_the_context(tiny: HFWriter) -> None:
    """The model's context is 512 tokens."""
    long, near = "lantern " * 600, "a " * 505
    tokens = tiny.count_tokens([{"role": "user", "content": near}])
    assert 500 <= tokens < 512
    failed, cut, whole = tiny.write([request(long), request(near, max_tokens=64), request()])
    assert failed.failed == "context too long" and "lantern" not in failed.detail
    assert not cut.failed and cut.completion_tokens <= 512 - tokens
    assert not whole.failed


def test_contents_are_joined_where_there_is_no_template_and_go_through_it_where_there_is_one() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
    tokenizer = load_tokenizer(TINY)
    assert tokenizer.decode(HFWriter(path=TINY)._prompt(messages)) == "Be brief.\n\nHi."
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}[me]{% endif %}"
    templated = HFWriter(path=TINY, chat_template=template)
    assert tokenizer.decode(templated._prompt(messages)) == "[system]Be brief.\n[user]Hi.\n[me]"
    refusing = HFWriter(path=TINY, chat_template="{{ raise_exception('no system, please') }}")
    assert one(refusing).failed == "chat template"


def test_the_identity_is_of_the_weights_and_not_of_their_place(tmp_path: Path) -> None:
    same = HFWriter(path=TINY).identity()
    load_model(TINY, dtype="float16").save_pretrained(tmp_path)
    changes: list[dict[str, Any]] = [{"temperature": 0.5}, {"dtype": "bfloat16"}, {"constrain": False}, {"top_p": 0.5}]
    assert same == HFWriter(path=TINY, batch=2, device="cpu").identity()
    assert all(HFWriter(path=TINY, **change).identity() != same for change in changes)
    assert str(tmp_path) not in json.dumps(HFWriter(path=str(tmp_path)).identity())


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# Model\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: llama3.1\n---\n", "llama3.1"),
        ("---\nlicense: [mit\n---\n", None),
        ("# Model\n", None),
    ],
)
def test_the_license_is_read_from_the_card_beside_the_model(card: str, license: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    assert HFWriter(path=str(tmp_path)).license == license
    assert HFWriter(path=str(tmp_path), license="mit").license == "mit"


@pytest.mark.parametrize("settings", [{"batch": 0}, {"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}])
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"writer.{next(iter(settings))}"):
        HFWriter(path=TINY, **settings)


def test_a_missing_model_is_told() -> None:
    with pytest.raises(ConfigError, match="no-such-folder"):
        HFWriter(path="./no-such-folder").write([request()])


# ------------------------------------------------------------------------------------------------------ bounded forms


@pytest.mark.parametrize(
    ("pattern", "bounded"),
    [
        ("a+", "a{1,20}"),
        ("[^<]*</x>", "[^<]{0,16}</x>"),
        (r"\s*a\s+", r"\s{0,1}a\s"),
        ("x{3,}", "x{3,20}"),
        ("x{2,900}y{4}", "x{2,16}y{4,4}"),
        (r"[\]+*]\+\{(yes|no)", r"[\]+*]\+\{(yes|no)"),
        ("(?:ab|c){0,900}d?", "(?:ab|c){0,9}d{0,1}"),
        ("(- [^\n]+\n){1,10}", "(- [^\n]{1,17}\n)"),
        ("a(b", "a(b"),
    ],
)
def test_every_repeat_comes_to_an_end(pattern: str, bounded: str) -> None:
    assert bounded_regex(pattern, 20) == bounded


def test_a_bounded_schema_allows_nothing_new_and_needs_no_more_than_it_may() -> None:
    made = bounded_schema(SCHEMA, 100, ascii_only=True)
    assert made["additionalProperties"] is False and made["properties"]["tags"]["maxItems"] == 1
    longest = int(re.search(r"\{0,(\d+)\}\$", made["properties"]["reason"]["pattern"])[1])  # type: ignore[index]
    widest = {"score": 10, "reason": "x" * longest, "tags": ["x" * longest]}
    jsonschema.validate(widest, made)
    jsonschema.validate(widest, SCHEMA)
    assert len(json.dumps(widest, separators=(",", ":"))) <= 100
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(widest | {"reason": "x" * (longest + 1)}, made)


def test_what_is_asked_does_not_change_what_was_asked() -> None:
    asked = replace(request(), form={"json": SCHEMA})
    before = json.dumps(SCHEMA)
    bounded_schema(asked.form["json"], 50, ascii_only=False) if asked.form else None
    assert json.dumps(SCHEMA) == before
