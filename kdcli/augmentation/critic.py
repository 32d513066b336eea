"""A critic keeps the best rows: West et al. 2022 (symbolic knowledge distillation), arXiv:2110.07178; with rising
thresholds Gulcehre et al. 2023 (ReST), arXiv:2308.08998."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from kdcli.api import Desk, Example
from kdcli.augmentation._ranked import Ranked, number_of
from kdcli.augmentation._sequences import Classifier
from kdcli.errors import ConfigError
from kdcli.store.examples import BadRow
from kdcli.store.weights import model_fingerprint
from kdcli.text.prompt import ROW, Expression, rendered, template, variables

TEXT = "{{ text if text is defined else prompt ~ '\\n' ~ response }}"


class Critic(Ranked):
    """Keeps rows whose number is at least `threshold`, then `top_share` of these; with neither it only scores.

    `score`: the number is `number`, a Jinja expression such as `score` or `meta.share`.
    `classifier`: P(`label`) of a sequence classifier of transformers, `reward_model`: the logit of one with one label.
    Both read `text`, a Jinja template, and `pair` where the model compares two texts; without `text` a reward model
    with a chat template reads prompt and response as a chat. Their number becomes the row's score.

    `rising`: thresholds of the rounds 0, 1, …; the last one holds from then on. The round is meta.round, or `round`.
    """

    def __init__(
        self,
        *,
        scorer: Literal["score", "classifier", "reward_model"] = "score",
        number: str = "score",
        model: str | None = None,
        revision: str | None = None,
        label: str | None = None,
        text: str | None = None,
        pair: str | None = None,
        threshold: float | None = None,
        rising: Sequence[float] = (),
        round: int = 0,
        top_share: float | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        device: str | None = None,
        batch: int = 16,
        max_length: int = 512,
    ) -> None:
        where = "augmentation: critic"
        super().__init__(where=where, top_share=top_share, lowest=False)
        if scorer not in ("score", "classifier", "reward_model"):
            raise ConfigError(f"{where}.scorer: is {scorer!r}; choose score, classifier or reward_model")
        if (scorer == "score") != (model is None):
            raise ConfigError(f"{where}.model: is for classifier and reward_model, which need one")
        if scorer == "classifier" and label is None:
            raise ConfigError(f"{where}.label: name the label whose probability is the score")
        if threshold is not None and rising:
            raise ConfigError(f"{where}.threshold: give it or rising, not both")
        if round < 0 or batch < 1 or max_length < 1:
            raise ConfigError(f"{where}: round must be at least 0, batch and max_length at least 1")
        self.scorer = scorer
        self.number = Expression(number, where=f"{where}.number", names=ROW)
        self.chat = scorer == "reward_model" and text is None
        self.text = template(text or TEXT, where=f"{where}.text")
        self.pair = None if pair is None else template(pair, where=f"{where}.pair")
        self.thresholds = list(rising) or ([] if threshold is None else [threshold])
        self.round = round
        self.label = label
        self.source = (model, dtype, revision)
        self.model = None
        if model is not None:
            self.model = Classifier(
                model,
                revision=revision,
                label=label if scorer == "classifier" else None,
                dtype=dtype,
                device=device,
                batch=batch,
                max_length=max_length,
                where=where,
            )

    def open(self, desk: Desk) -> None:
        super().open(desk)
        if self.model is not None:
            self.model.check()

    def fingerprint(self) -> str:
        model, dtype, revision = self.source
        return "" if model is None else model_fingerprint(model, dtype, revision)

    def numbers(self, block: Sequence[Example]) -> Sequence[float | tuple[str, str]]:
        found: list[float | tuple[str, str]] = []
        asked: list[tuple[str, ...]] = []
        for example in block:
            try:
                if self.model is None:
                    found.append(self._given(example))
                else:
                    asked.append(self._texts(example))
                    found.append(math.nan)
            except BadRow as error:
                found.append((error.reason, str(error)))
        if self.model is None:
            return found
        scores = iter(self.model.scores(self.desk, asked))
        none = ("cannot be scored", "the critic gives no finite number")
        return [one if isinstance(one, tuple) else none if (score := next(scores)) is None else score for one in found]

    def outside(self, example: Example, number: float) -> tuple[str, str] | None:
        if not self.thresholds:
            return None
        turn = number_of(example.meta.get("round"))
        last = len(self.thresholds) - 1
        threshold = self.thresholds[min(max(0, self.round if turn is None else int(turn)), last)]
        if number >= threshold:
            return None
        return "below the threshold", f"the critic gives {number:.4g}, and {threshold:g} is wanted"

    def marked(self, example: Example, number: float) -> Example:
        return example if self.model is None else replace(example, score=number)

    def _given(self, example: Example) -> float:
        found = number_of(self.number(variables(example)))
        if found is None or not math.isfinite(found):
            raise BadRow("no score", f"{self.number.source} is no number in this row")
        return found

    def _texts(self, example: Example) -> tuple[str, ...]:
        """What the model reads of a row: one text, or two."""
        assert self.model is not None
        if self.chat and (chat := self.model.chat(example)) is not None:
            return (chat,)
        values = variables(example)
        first = rendered(self.text, values, "critic.text")
        return (first,) if self.pair is None else (first, rendered(self.pair, values, "critic.pair"))
