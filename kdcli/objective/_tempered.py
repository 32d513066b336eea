"""The interface of token objectives that read two distributions at a temperature: T and T squared, once."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Unpack

from torch import Tensor

from kdcli.api import Need, Objective, TeacherSignal, TokenSettings
from kdcli.errors import ConfigError

TemperatureScale = Literal["none", "t2"]
Vocabulary = Literal["shared", "error"]


class TemperedSettings(TokenSettings, total=False):
    """Settings of every loss of two distributions at a temperature."""

    temperature: float
    temperature_scale: TemperatureScale
    vocabulary: Vocabulary


class Tempered(Objective):
    """A loss of p = softmax(y / T) and q = softmax(z / T).

    `temperature_scale`: `t2` multiplies value and gradient by T squared (Hinton et al. 2015, so that the gradient's
    size does not depend on T); `none` leaves both alone. `vocabulary`, of models that have unequally many real ids
    (padded rows of an embedding are none): `shared` cuts both to the ids that both have, before any softmax; `error`
    refuses them. The Distiller cuts: an objective sees equal vocabularies. Raises ConfigError if the temperature is
    not positive.

    What a subclass says of itself here, `kdcli verify` holds it to.
    """

    needs = Need.DISTRIBUTION
    zero_at_teacher: ClassVar[bool] = True  # value and gradient vanish at q = p, and no value is below 0
    f_divergence: ClassVar[bool] = False  # sum q f(p / q): merging ids never raises it, so top-k bounds it from below
    stops_gradient: bool = False  # detached parts inside: the gradient is that of the value with those held fixed

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        temperature_scale: TemperatureScale = "none",
        vocabulary: Vocabulary = "shared",
        **settings: Unpack[TokenSettings],
    ) -> None:
        super().__init__(**settings)
        if not temperature > 0:
            raise ConfigError(f"{type(self).__name__}: temperature is {temperature}; set a number above 0")
        self.temperature = temperature
        self.temperature_scale = temperature_scale
        self.vocabulary = vocabulary

    def match(self, student: Any, teacher: Any) -> None:
        if self.vocabulary == "error":
            refuse_other_vocabulary(type(self).__name__, student, teacher)

    @property
    def scale(self) -> float:
        """What multiplies the value: T squared, or 1."""
        return self.temperature**2 if self.temperature_scale == "t2" else 1.0

    def dense_log_p(self, teacher: TeacherSignal) -> Tensor:
        """log p over the whole vocabulary, [1, C, V]. Raises ConfigError for a teacher that gives top-k only."""
        log_p = teacher.log_p(self.temperature)
        if log_p is None:
            raise ConfigError(
                f"{type(self).__name__} needs the teacher's logits of the whole vocabulary, but this teacher gives "
                "its top-k only; set teacher=hf, or choose forward_kl"
            )
        return log_p

    def scaled(self, value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Value and gradient with respect to z / T -> value and gradient with respect to z, with T squared if asked.

        `gradient` is changed in place.
        """
        if self.scale == 1.0 and self.temperature == 1.0:
            return value, gradient
        return value * self.scale, gradient.mul_(self.scale / self.temperature)


def refuse_other_vocabulary(name: str, student: Any, teacher: Any) -> None:
    """Raises ConfigError where two tokenizers do not have equally many ids."""
    own, theirs = (1 + max(tokenizer.get_vocab().values()) for tokenizer in (student, teacher))
    if own != theirs:
        raise ConfigError(
            f"{name}: vocabulary is error, and the student has {own:,} ids but the teacher {theirs:,}; set "
            "vocabulary=shared to cut both to the ids they share, or choose a student with the teacher's vocabulary"
        )
