"""Keeps rows by what a language model thinks of them: perplexity, instruction-following difficulty, what an annotation
is worth, or how much better a teacher knows the text than a reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import jinja2
import xxhash

from kdcli.api import Desk, Example
from kdcli.augmentation._lm import LM, Scored, Text
from kdcli.augmentation._ranked import Ranked
from kdcli.augmentation._sifting import Field, lacking, text_of
from kdcli.errors import ConfigError
from kdcli.store.examples import BadRow
from kdcli.text.prompt import rendered, template, variables

MEASURES = ("perplexity", "logprob", "ifd", "loss_reduction", "gap")


class Lm(Ranked):
    """The number of a row, with l(y | x) the mean log-probability of y's tokens after x, in nats:

        logprob         l(y | x)                                        InPars, arXiv:2202.05144
        perplexity      exp(-l(y | x))
        ifd             exp(l(y) - l(y | x))                            Cherry LLM, arXiv:2308.12032
        loss_reduction  l(y | with) - max l(y | without)                Toolformer, arXiv:2302.04761
        gap             (log p_model(y | x) - log p_reference(y | x)) / bytes of y      MiniPLM, arXiv:2410.17215

    y is the response and x the prompt in the model's chat template; perplexity and logprob of another `field` have no
    x. `given` has Jinja templates of prefixes: `with_`, and `without`, one or several of which the best counts.

    ifd is Superfiltering's ratio of perplexities (arXiv:2402.00530), the exponential of the difference where Cherry LLM
    divides means. Departs from Toolformer: tokens weigh alike, however far behind the annotation. gap is per byte, so
    that the models may have different tokenizers.

    Rows from `min` to `max` are kept, then `top_share` of these with the largest numbers (`lowest`: the smallest);
    `mark` writes the number to meta.lm. Raises ConfigError for settings that the measure does not have.
    """

    def __init__(
        self,
        *,
        model: str,
        measure: Literal["perplexity", "logprob", "ifd", "loss_reduction", "gap"] = "perplexity",
        reference: str | None = None,
        field: Field = "response",
        given: Mapping[str, Any] | None = None,
        min: float | None = None,
        max: float | None = None,
        top_share: float | None = None,
        lowest: bool = False,
        mark: bool = False,
        revision: str | None = None,
        reference_revision: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        device: str | None = None,
        batch: int = 8,
        max_length: int = 1024,
    ) -> None:
        where = "augmentation: lm"
        super().__init__(where=where, top_share=top_share, lowest=lowest)
        if measure not in MEASURES:
            raise ConfigError(f"{where}.measure: is {measure!r}; choose one of {', '.join(MEASURES)}")
        if (reference is not None) != (measure == "gap"):
            raise ConfigError(f"{where}.reference: gap needs a second model, and no other measure has one")
        if (given is not None) != (measure == "loss_reduction"):
            raise ConfigError(f"{where}.given: loss_reduction needs with_ and without, and no other measure has them")
        if field != "response" and measure not in ("perplexity", "logprob"):
            raise ConfigError(f"{where}.field: {measure} is of the response")
        if batch < 1 or max_length < 2:
            raise ConfigError(f"{where}: batch must be at least 1, max_length at least 2")
        if min is not None and max is not None and min > max:
            raise ConfigError(f"{where}: min {min} is above max {max}, so no row would be kept")
        settings: dict[str, Any] = dict(dtype=dtype, device=device, batch=batch, max_length=max_length)
        self.model = LM(model, revision=revision, **settings)
        self.reference = None if reference is None else LM(reference, revision=reference_revision, **settings)
        self.measure = measure
        self.field: Field = field
        self.given = _templates(given, where)
        self.min = min
        self.max = max
        self.mark = mark

    def open(self, desk: Desk) -> None:
        super().open(desk)
        for model in (self.model, self.reference):
            if model is not None:
                model.check()

    def fingerprint(self) -> str:
        parts = [model.fingerprint() for model in (self.model, self.reference) if model is not None]
        return xxhash.xxh3_128_hexdigest("\n".join(parts).encode())

    def numbers(self, block: Sequence[Example]) -> Sequence[float | tuple[str, str]]:
        """All texts of the block in one go; the texts of a row stand together."""
        asked: list[list[Text] | BadRow] = []
        for example in block:
            try:
                asked.append(self._texts(example))
            except BadRow as error:
                asked.append(error)
        texts = [text for one in asked if isinstance(one, list) for text in one]
        scores = iter(self.model.scores(self.desk, texts))
        others = iter([] if self.reference is None else self._by_reference(block, asked))
        found: list[float | tuple[str, str]] = []
        for one in asked:
            if isinstance(one, BadRow):
                found.append((one.reason, str(one)))
                continue
            scored = [next(scores) for _ in one] + ([next(others)] if self.reference is not None else [])
            found.append(self._number(one, scored))
        return found

    def outside(self, example: Example, number: float) -> tuple[str, str] | None:
        for bound, beyond, word in ((self.min, -1, "below"), (self.max, 1, "above")):
            if bound is not None and (number - bound) * beyond > 0:
                return f"{word} the bound", f"{self.measure} is {number:.6g}, and the bound is {bound:g}"
        return None

    def marked(self, example: Example, number: float) -> Example:
        return replace(example, meta={**example.meta, "lm": number}) if self.mark else example

    def _texts(self, example: Example) -> list[Text]:
        if self.field != "response":
            text = text_of(example, self.field)
            if text is None:
                raise BadRow(*lacking(self.field))
            return [("", text)]
        if self.measure == "loss_reduction":
            _, response = self.model.texts(example)
            values = variables(example)
            return [(rendered(one, values, "lm.given"), response) for one in self.given]
        prefix, response = self.model.texts(example)
        return [(prefix, response), ("", response)] if self.measure == "ifd" else [(prefix, response)]

    def _by_reference(self, block: Sequence[Example], asked: Sequence[object]) -> list[Scored | None]:
        """What the reference says of the rows that can be scored, in its own chat template."""
        assert self.reference is not None
        held = [
            self.reference.texts(example) for example, one in zip(block, asked, strict=True) if isinstance(one, list)
        ]
        return self.reference.scores(self.desk, held)

    def _number(self, texts: Sequence[Text], scored: Sequence[Scored | None]) -> float | tuple[str, str]:
        known = [one for one in scored if one is not None]
        if len(known) < len(scored):
            return "cannot be scored", "the text has no token, or the model gives it no finite number"
        first = known[0]
        if self.measure == "logprob":
            return first.mean
        if self.measure == "perplexity":
            return _exp(-first.mean)
        if self.measure == "ifd":
            return _exp(known[1].mean - first.mean)
        if self.measure == "loss_reduction":
            return first.mean - max(one.mean for one in known[1:])
        return (first.logprob - known[1].logprob) / len(texts[0][1].encode())


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # a float's largest: such a text is as unlikely as it gets


def _templates(given: Mapping[str, Any] | None, where: str) -> list[jinja2.Template]:
    """`with_`, then those of `without`."""
    if given is None:
        return []
    if set(given) != {"with_", "without"}:
        raise ConfigError(f"{where}.given: has {', '.join(map(str, given)) or 'nothing'}; give with_ and without")
    without = given["without"]
    others = [without] if isinstance(without, str) else list(without or ())
    if not others:
        raise ConfigError(f"{where}.given.without: give a template, or several")
    return [template(one, where=f"{where}.given") for one in (given["with_"], *others)]
