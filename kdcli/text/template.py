"""Examples as text with the stretches to be learned marked, by the chat template's own boundaries."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdcli.api import Example
from kdcli.store.examples import BadRow

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
    rejected: Draft | None = None  # prompt + rejected of a preference row


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

    def drafts(self, example: Example) -> list[Draft]:
        """One draft, or one per answer where the template shows earlier answers differently from the last one
        (such as without their thinking). Raises BadRow when the template cannot say this example."""
        if example.teacher_prompt is not None:
            raise BadRow("teacher_prompt", "teacher_prompt is not supported: teacher and student see the same prompt")
        if example.text is not None:
            return [Draft(text=example.text, spans=((0, len(example.text)),), bare=True)]
        if example.messages is not None:
            return self._conversation(example.messages)
        prompt = example.prompt or ""
        if example.rejected is None:
            return self._answer(prompt, example.response or "")
        (chosen,), (rejected,) = self._answer(prompt, example.chosen or ""), self._answer(prompt, example.rejected)
        return [Draft(text=chosen.text, spans=chosen.spans, bare=chosen.bare, rejected=rejected)]

    def _answer(self, prompt: str, response: str) -> list[Draft]:
        if self.source is None:
            text = prompt + response
            return [Draft(text=text, spans=((len(prompt), len(text)),), bare=True)]
        return self._conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": response}])

    def _conversation(self, messages: Sequence[Mapping[str, str]]) -> list[Draft]:
        if self.source is None:
            raise BadRow(
                "no chat template",
                "the tokenizer has no chat template, which `messages` need; take an instruct model's tokenizer, or "
                "write rows of prompt + response",
            )
        whole, spans = self._render(messages, track=self.marked)
        if self.marked:
            if not spans:
                raise BadRow("no response", "the chat template marks nothing of this conversation as generated")
            return [Draft(text=whole, spans=spans)]
        answers = [self._last_answer(messages[: i + 1]) for i, m in enumerate(messages) if m["role"] == "assistant"]
        if all(whole.startswith(text[:end]) for text, (_, end) in answers):
            return [Draft(text=whole, spans=[span for _, span in answers])]
        return [Draft(text=text, spans=(span,)) for text, span in answers]

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
