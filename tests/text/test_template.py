"""What is learned is the answer and the token that closes it, whatever the template."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcli.api import Example
from kdcli.store.examples import BadRow
from kdcli.text.codec import Codec
from kdcli.text.template import Template
from tests.text.tokenizers import FORCES, FORGETS, INST, TEMPLATES, begins, byte_level, metaspace, shipped

TOKENIZERS = {"byte_level": byte_level, "begins": begins, "metaspace": metaspace}
# Answers that try to be found in the wrong place: they repeat the prompt, the roles and the line breaks.
WORDS = st.sampled_from(["cat", "user", "assistant", "assistant: ", "[INST]", " ", "\n", "\n\n", "naïve", "日本", "2"])
SAID = st.lists(WORDS, min_size=1, max_size=6).map("".join).filter(lambda text: text.strip() == text)


def encode(example: Example, tokenizer: Any, chat_template: str | None = None) -> list[Any]:
    return Codec(tokenizer).encode(Template(tokenizer, chat_template).drafts(example))


def learned(tokens: Any, tokenizer: Any) -> list[str]:
    """The stretches of learned tokens, decoded."""
    stretches, open_stretch = [], False
    for token, flag in zip(tokens.ids.tolist(), tokens.mask.tolist(), strict=True):
        if flag and not open_stretch:
            stretches.append([])
        if flag:
            stretches[-1].append(token)
        open_stretch = flag
    return [tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in stretches]


def conversation(*turns: str) -> Example:
    roles = ["user", "assistant"] * len(turns)
    return Example(messages=[{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)])


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATES)
@given(turns=st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3))
@settings(max_examples=15, deadline=None)
def test_each_answer_and_its_closing_is_learned_and_nothing_else(
    tokenizer: str, template: str, turns: list[tuple[str, str]]
) -> None:
    words, (source, closing) = TOKENIZERS[tokenizer](), TEMPLATES[template]
    (tokens,) = encode(conversation(*(text for turn in turns for text in turn)), words, source)
    found = learned(tokens, words)
    # A tokenizer that writes a space into a letter may give the answer the space in front of it.
    assert [text.lstrip(" ") for text in found] == [(answer + closing).lstrip(" ") for _, answer in turns]


@pytest.mark.parametrize("template", TEMPLATES)
@given(prompt=SAID, answer=SAID)
@settings(max_examples=15, deadline=None)
def test_a_row_begins_with_the_ids_that_its_prompt_has_alone(template: str, prompt: str, answer: str) -> None:
    words, source = byte_level(), TEMPLATES[template][0]
    (tokens,) = encode(conversation(prompt, answer), words, source)
    asked = words.apply_chat_template(
        [{"role": "user", "content": prompt}], chat_template=source, add_generation_prompt=True
    )["input_ids"]
    assert tokens.ids[: len(asked)].tolist() == asked
    assert not tokens.mask[: len(asked)].any()
    assert tokens.mask[len(asked)]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@given(prompt=st.one_of(SAID, st.just(""), st.just("Q: ")), answer=SAID)
@settings(max_examples=25, deadline=None)
def test_without_a_template_the_response_and_the_end_are_learned(tokenizer: str, prompt: str, answer: str) -> None:
    words = TOKENIZERS[tokenizer]()
    (tokens,) = encode(Example(prompt=prompt, response=answer), words)
    assert "".join(learned(tokens, words)).lstrip(" ") == answer.lstrip(" ") + "</s>"
    plain = tokens.ids.tolist()[1 if tokenizer == "begins" else 0 : -1]
    assert words.decode(plain, clean_up_tokenization_spaces=False).lstrip(" ") == (prompt + answer).lstrip(" ")
    assert tokens.ids[-1] == words.eos_token_id


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_document_is_learned_whole_and_ends(tokenizer: str) -> None:
    words = TOKENIZERS[tokenizer]()
    (tokens,) = encode(Example(text="The cat sat.\n"), words)
    begin = 1 if tokenizer == "begins" else 0
    assert tokens.ids.tolist() == [*words("The cat sat.\n")["input_ids"], words.eos_token_id]
    assert tokens.mask.tolist() == [False] * begin + [True] * (len(tokens.ids) - begin)


def test_only_a_tokenizer_that_marks_the_beginning_of_a_text_is_given_it_whole() -> None:
    assert Codec(byte_level()).joins
    assert Codec(begins()).joins
    assert not Codec(metaspace()).joins


def test_begin_and_end_tokens_are_not_written_twice() -> None:
    words = begins()
    (tokens,) = encode(Example(prompt="<s>Hello", response=" there</s>"), words)
    assert tokens.ids.tolist().count(words.bos_token_id) == 1
    assert tokens.ids.tolist().count(words.eos_token_id) == 1


def test_prompt_and_response_go_through_the_chat_template_where_there_is_one() -> None:
    words, source = byte_level(), TEMPLATES["chatml"][0]
    (one,) = encode(Example(prompt="Hello", response="there"), words, source)
    (other,) = encode(conversation("Hello", "there"), words, source)
    assert one.ids.tolist() == other.ids.tolist()
    (bare,) = encode(Example(prompt="Hello", response="there"), words, "none")
    assert words.decode(bare.ids) == "Hellothere</s>"


def test_a_preference_row_keeps_both_answers() -> None:
    words = byte_level()
    (draft,) = Template(words).drafts(Example(prompt="Hello ", chosen="there", rejected="cat"))
    assert draft.rejected is not None
    chosen, rejected = Codec(words).encode([draft, draft.rejected])
    assert learned(chosen, words) == ["there</s>"]
    assert learned(rejected, words) == ["cat</s>"]


def test_a_template_that_forgets_earlier_answers_gives_a_row_per_answer() -> None:
    """FORGETS shows `[think]` in the last answer only, so no single text shows each answer as it was given."""
    words = byte_level()
    rows = encode(conversation("Hi", "one", "And?", "two"), words, FORGETS)
    assert [learned(row, words) for row in rows] == [["[think] one<|im_end|>"], ["[think] two<|im_end|>"]]
    assert "[think] one" not in words.decode(rows[1].ids)


def test_a_conversation_that_the_user_ends_is_learned_up_to_its_last_answer() -> None:
    words, source = byte_level(), TEMPLATES["chatml"][0]
    (tokens,) = encode(conversation("Hi", "one", "Thanks"), words, source)
    assert learned(tokens, words) == ["one<|im_end|>"]
    assert words.decode(tokens.ids).endswith("Thanks<|im_end|>\n")


def test_a_template_whose_answer_does_not_follow_its_prompt_is_refused() -> None:
    with pytest.raises(BadRow, match="generation %"):
        encode(conversation("Hi", "one"), byte_level(), FORCES)


def test_a_conversation_that_the_template_refuses_says_why() -> None:
    example = Example(messages=[{"role": "system", "content": "Be kind"}, {"role": "assistant", "content": "I am"}])
    with pytest.raises(BadRow, match="only user and assistant"):
        encode(example, byte_level(), INST)


def test_a_template_runs_in_a_sandbox() -> None:
    with pytest.raises(BadRow, match="unsafe"):
        encode(conversation("Hi", "one"), byte_level(), "{{ messages.__class__.__mro__ }}")


def test_messages_need_a_chat_template() -> None:
    with pytest.raises(BadRow, match="no chat template"):
        encode(conversation("Hi", "one"), byte_level())


@pytest.mark.parametrize("form", [{"text": "a b"}, {"messages": conversation("Hi", "one").messages}])
def test_a_teacher_prompt_stands_for_a_prompt(form: dict[str, Any]) -> None:
    with pytest.raises(BadRow, match="teacher_prompt stands for the prompt"):
        encode(Example(**form, teacher_prompt="Hint"), byte_level(), TEMPLATES["chatml"][0])


@pytest.mark.parametrize("template", TEMPLATES)
def test_answers_can_be_had_one_by_one(template: str) -> None:
    """Each row ends with the answer that it is of, and learns only that."""
    words, source = byte_level(), TEMPLATES[template]
    drafts = Template(words, source[0]).drafts(conversation("Hi", "one", "And?", "two", "Bye"), apart=True)
    rows = Codec(words).encode(drafts)
    assert [learned(row, words)[0].strip() for row in rows] == [(a + source[1]).strip() for a in ("one", "two")]
    assert [len(learned(row, words)) for row in rows] == [1, 1]
    assert "two" not in words.decode(rows[0].ids)


def test_the_shipped_tokenizer_ends_a_row_with_its_separator() -> None:
    (tokens,) = encode(Example(prompt="Give a short definition.", response=" A cat."), shipped())
    assert tokens.ids[-1] == 0
    assert learned(tokens, shipped()) == [" A cat.<|endoftext|>"]
