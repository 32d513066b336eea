"""Rules: length, language, patterns, a JSON schema, refusals and repetition, as for Gopher (arXiv:2112.11446)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kdcli.api import Desk, Example
from kdcli.augmentation._sifting import Field, Filter, lacking, text_of, words
from kdcli.errors import ConfigError

NGRAM = 3  # words, of which `repeats` counts
OPENING = 240  # characters within which a refusal says that it is one
JUDGED = 20  # characters; of shorter texts the language is a guess, so they pass
FENCED = re.compile(r"^\s*```[\w-]*\n(.*?)\n?```\s*$", re.DOTALL)

# How assistants decline, said in several ways; looked for where an answer begins.
_CANNOT = r"(?:can ?not|can't|can not|am not able to|'m not able to|am unable to|'m unable to|won't|will not|must not)"
_I_CANNOT = rf"\b(?:i|we)(?: ?{_CANNOT}|'m sorry, but i {_CANNOT})"
_ACTS = (
    r"(?:help|assist|comply|fulfil|fulfill|provide|answer|do that|do this|support|create|write|generate|engage|discuss)"
)
REFUSALS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"{_I_CANNOT} (?:\w+ ){{0,3}}{_ACTS}",
        r"\bas an? (?:ai|artificial intelligence|(?:large )?language model|ai (?:language )?model|ai assistant)\b",
        r"\bi(?:'m| am) (?:just |only )?an? (?:ai|(?:large )?language model)(?: \w+){0,3}(?: and|, so| so|, and)",
        r"\b(?:i'm|i am|we are|we're) (?:very |really |so )?(?:sorry|afraid)\b.{0,60}\b(?:can't|cannot|can not|unable|"
        r"not able|won't|not possible)",
        r"\bi(?: must| have to| need to|'ll have to)? (?:respectfully |politely )?decline\b",
        r"\b(?:sorry|apologies|i apologi[sz]e)\b.{0,40}\b(?:not able to|unable to|can't|cannot) (?:help|assist|answer)",
        r"\b(?:goes|is|would be) against my (?:\w+ )?(?:guidelines|programming|policies|policy|principles)\b",
        r"\bnot (?:something|anything) (?:that )?i (?:can|am able to|could) (?:help|assist|do|provide)",
        r"\bi (?:do not|don't) have (?:access to|the ability to) (?:real-?time|the internet|external|browse)",
    )
)


class Rules(Filter):
    """Keeps rows whose `field` keeps every rule that is set; what breaks first names the reason.

    Rows are looked at one by one, whatever their group: an answer that breaks a rule leaves, its neighbours stay.
    `repeats` bounds 1 - (distinct word trigrams) / (word trigrams). Refusals are looked for at the beginning of the
    response, whatever `field` is. The language of a text of fewer than 20 characters is not judged.
    """

    def __init__(
        self,
        *,
        field: Field = "response",
        min_chars: int | None = None,
        max_chars: int | None = None,
        min_words: int | None = None,
        max_words: int | None = None,
        language: str | Sequence[str] | None = None,
        must_match: Sequence[str] = (),
        must_not_match: Sequence[str] = (),
        schema: Mapping[str, Any] | None = None,
        refusals: bool = True,
        repeats: float | None = None,
        same_as_prompt: bool = False,
    ) -> None:
        self.field: Field = field
        self.chars, self.words = (min_chars, max_chars), (min_words, max_words)
        for name, (low, high) in (("chars", self.chars), ("words", self.words)):
            if low is not None and high is not None and low > high:
                raise ConfigError(f"augmentation: rules.min_{name} is {low}, above max_{name}, {high}; swap them")
        if repeats is not None and not 0 <= repeats <= 1:
            raise ConfigError(f"augmentation: rules.repeats is {repeats}; give a share from 0 to 1, or null")
        self.languages = {language} if isinstance(language, str) else set(language or ())
        self.must = [_pattern(p, "must_match") for p in must_match]
        self.must_not = [_pattern(p, "must_not_match") for p in must_not_match]
        self.schema = schema
        self.refusals = refusals
        self.repeats = repeats
        self.same_as_prompt = same_as_prompt

    def open(self, desk: Desk) -> None:
        super().open(desk)
        if self.languages:
            self._classify = _classifier(self.languages)
        if self.schema is not None:
            self._validator = _validator(self.schema)

    def reason(self, example: Example) -> tuple[str, str] | None:
        text = text_of(example, self.field)
        if text is None:
            return lacking(self.field)
        return (
            _outside(len(text), self.chars, "characters")
            or (_outside(len(words(text)), self.words, "words") if self.words != (None, None) else None)
            or self._patterns(text)
            or self._answer(example)
            or self._repeated(text)
            or self._json(text)
            or self._language(text)
        )

    def _patterns(self, text: str) -> tuple[str, str] | None:
        for pattern in self.must:
            if not pattern.search(text):
                return "does not match", f"{self.field} has nothing that must_match {pattern.pattern} finds"
        for pattern in self.must_not:
            if pattern.search(text):
                return "matches", f"{self.field} has what must_not_match {pattern.pattern} finds"
        return None

    def _answer(self, example: Example) -> tuple[str, str] | None:
        if not self.refusals and not self.same_as_prompt:
            return None
        answer = text_of(example, "response")
        if answer is None:
            return None
        if self.refusals and refuses(answer):
            return "refusal", "the response begins as refusals do; keep such rows with refusals=false"
        if self.same_as_prompt and words(answer) == words(text_of(example, "prompt") or ""):
            return "same as prompt", "the response says what the prompt says"
        return None

    def _repeated(self, text: str) -> tuple[str, str] | None:
        if self.repeats is None:
            return None
        share = repeated(text)
        return ("repeats itself", f"{share:.3f} of its trigrams are repeats") if share > self.repeats else None

    def _json(self, text: str) -> tuple[str, str] | None:
        if self.schema is None:
            return None
        fenced = FENCED.match(text)
        try:
            value = json.loads(fenced[1] if fenced else text)
        except (ValueError, RecursionError):
            return "no JSON", f"{self.field} is no JSON document"
        error = next(self._validator.iter_errors(value), None)
        if error is None:
            return None
        place = "/".join(str(part) for part in error.absolute_path) or "the document"
        return "breaks the schema", f"{place} breaks the schema's {error.validator}"

    def _language(self, text: str) -> tuple[str, str] | None:
        if not self.languages or len(text) < JUDGED:
            return None
        found = self._classify(text)
        return None if found in self.languages else ("other language", f"{self.field} is in {found}")


def refuses(answer: str) -> bool:
    """Whether an answer begins as refusals do."""
    opening = answer[:OPENING].replace("\u2019", "'")
    return any(pattern.search(opening) for pattern in REFUSALS)


def repeated(text: str) -> float:
    """The share of word trigrams that stood before in the text; 0 for fewer than two."""
    found = words(text)
    trigrams = list(zip(*(found[i:] for i in range(NGRAM)), strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def _outside(size: int, bounds: tuple[int | None, int | None], unit: str) -> tuple[str, str] | None:
    low, high = bounds
    if low is not None and size < low:
        return "too short", f"{size} {unit}, fewer than {low}"
    if high is not None and size > high:
        return "too long", f"{size} {unit}, more than {high}"
    return None


def _pattern(pattern: str, setting: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"augmentation: rules.{setting}: {pattern} is no regular expression ({error})") from None


def _validator(schema: Mapping[str, Any]) -> Any:
    try:
        import jsonschema
        import jsonschema.validators
    except ImportError:
        raise ConfigError('augmentation: rules.schema needs jsonschema: `pip install "kdcli[augment]"`') from None
    cls = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        cls.check_schema(dict(schema))
    except jsonschema.SchemaError as error:
        raise ConfigError(f"augmentation: rules.schema: is no JSON schema ({error.message[:200]})") from None
    return cls(dict(schema))


def _classifier(languages: set[str]) -> Any:
    """Text -> its ISO 639-1 code."""
    try:
        import py3langid
    except ImportError:
        raise ConfigError('augmentation: rules.language needs py3langid: `pip install "kdcli[augment]"`') from None
    known = {str(label) for label, _ in py3langid.rank("")}
    if odd := sorted(languages - known):
        raise ConfigError(f"augmentation: rules.language: {odd[0]} is not known; give codes such as en, de, zh, fr")
    return lambda text: str(py3langid.classify(text)[0])
