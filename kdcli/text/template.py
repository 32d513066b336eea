"""Examples as text with the stretches to be learned marked, by the chat template's own boundaries."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kdcli.api import Example
from kdcli.store.examples import NO_PROMPT, BadRow

Span = tuple[int, int]  # characters [start, end)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
UNSTABLE = (
    "the chat template writes the start of an answer differently from what it asks the model to continue, so where the "
    "answer begins is unknown; mark answers in the template with {% generation %} ... {% endgeneration %}"
)


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A text, and which of it is learned. `bare` text gets the tokenizer's begin token and an end token."""

    text: str
    spans: Sequence[Span]
    bare: bool = False
    answers: Sequence[str] = ()  # of each span what the example says, before the template; () where that is unknown
    closing: Sequence[str] = ()  # special tokens, one of which may close an answer
    rejected: Draft | None = None  # prompt + rejected of a preference row

    def content(self, answer: int, *, stripped: bool) -> Span | None:
        """Where the text says what the example says, without what a template puts in front and behind; None where it
        says something else. `stripped`: without the white space around it."""
        start, end = self.spans[answer]
        body, said = self.text[start:end], self.answers[answer]
        while not self.bare and (token := next((c for c in self.closing if body.rstrip().endswith(c)), "")):
            body = body.rstrip().removesuffix(token)
        if stripped:
            body, said = body.rstrip(), said.strip()
        end = start + len(body)
        return (end - len(said), end) if body.endswith(said) else None

    def bytes_before(self, character: int) -> int:
        """How many bytes of the text stand before a character."""
        return len(self.text[:character].encode())


class Template:
    """Turns examples into drafts.

    A document is learned whole. Conversations go through the chat template, and so do prompt and response where the
    tokenizer has one; without, the response follows the prompt and ends with the end token. Only what the assistant
    says is learned, with the token that closes its turn. `chat_template`: Jinja source instead of the tokenizer's
    own, or "none" to use none.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        own = chat_template is None and tokenizer.chat_template is not None
        self.source: str | None = tokenizer.get_chat_template() if own else chat_template
        if chat_template == "none":
            self.source = None
        self.marked = self.source is not None and GENERATION.search(self.source) is not None
        self.variables = dict(tokenizer.special_tokens_map)
        self.closing = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())

    def drafts(self, example: Example, *, apart: bool = False) -> list[Draft]:
        """One draft, or one per answer: if `apart`, or where the template shows earlier answers differently from the
        last one (such as without their thinking). Raises BadRow when the template cannot say this example."""
        if example.teacher_prompt is not None and example.prompt is None:
            raise BadRow("teacher_prompt", NO_PROMPT)
        if example.text is not None:
            return [Draft(text=example.text, spans=((0, len(example.text)),), bare=True, answers=(example.text,))]
        if example.messages is not None:
            return self._conversation(example.messages, apart)
        prompt = example.prompt or ""
        if example.rejected is None:
            return self._answer(prompt, example.response or "")
        (chosen,), (rejected,) = self._answer(prompt, example.chosen or ""), self._answer(prompt, example.rejected)
        return [replace(chosen, rejected=rejected)]

    def _answer(self, prompt: str, response: str) -> list[Draft]:
        if self.source is None:
            text = prompt + response
            return [Draft(text=text, spans=((len(prompt), len(text)),), bare=True, answers=(response,))]
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return self._conversation(messages)

    def _conversation(self, messages: Sequence[Mapping[str, str]], apart: bool = False) -> list[Draft]:
        if self.source is None:
            raise BadRow(
                "no chat template",
                "the tokenizer has no chat template, which `messages` need; take an instruct model's tokenizer, or "
                "write rows of prompt + response",
            )
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        said = [messages[turn]["content"] for turn in turns]
        if self.marked:
            parts = [(messages[: turn + 1], [messages[turn]["content"]]) for turn in turns]
            return self._marked(parts if apart else [(messages, said)])
        whole, _ = self._render(messages)
        answers = [self._last_answer(messages[: turn + 1]) for turn in turns]
        if not apart and all(whole.startswith(text[:end]) for text, (_, end) in answers):
            return [Draft(text=whole, spans=[span for _, span in answers], answers=said, closing=self.closing)]
        return [
            Draft(text=text, spans=(span,), answers=(answer,), closing=self.closing)
            for answer, (text, span) in zip(said, answers, strict=True)
        ]

    def _marked(self, parts: Sequence[tuple[Sequence[Mapping[str, str]], Sequence[str]]]) -> list[Draft]:
        """By the template's own marks, of each part (a conversation and what is answered in it) what it adds."""
        drafts, earlier = [], 0
        for messages, said in parts:
            text, marks = self._render(messages, track=True)
            if not marks:
                raise BadRow("no response", "the chat template marks nothing of this conversation as generated")
            spans = marks[earlier:] or marks[-1:]
            answers = said if len(spans) == len(said) else ()
            drafts.append(Draft(text=text, spans=spans, answers=answers, closing=self.closing))
            earlier = len(marks)
        return drafts

    def _last_answer(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, Span]:
        """The conversation so far, and where its last message's answer stands: from what the model is asked to
        continue to the token that closes the turn (without the line break that many templates put behind it)."""
        prompt = self._render(messages[:-1], ask=True)[0] if len(messages) > 1 else ""
        text, _ = self._render(messages)
        if not text.startswith(prompt):
            raise BadRow("template", UNSTABLE)
        end = len(text.rstrip())
        closed = end > len(prompt) and text[:end].endswith(self.closing)
        return text, (len(prompt), end if closed else len(text))

    def _render(
        self, messages: Sequence[Mapping[str, str]], *, ask: bool = False, track: bool = False
    ) -> tuple[str, list[Span]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                chat_template=self.source,
                add_generation_prompt=ask,
                return_assistant_tokens_mask=track,
                **self.variables,
            )
        except (TemplateError, TypeError, ValueError) as error:
            reason = str(error) or type(error).__name__
            raise BadRow("template", f"the chat template refuses this conversation ({reason})") from error
        return texts[0], [(int(start), int(end)) for start, end in spans[0]] if track else []
