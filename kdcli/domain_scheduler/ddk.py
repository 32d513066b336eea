"""DDK, domain-knowledge-guided sampling: Liu et al. 2024, arXiv:2407.16154, eq. 1, eq. 2 and Algorithm 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Unpack

from kdcli.api import DomainLoss
from kdcli.domain_scheduler._adaptive import Adaptive, Settings
from kdcli.domain_scheduler._floors import mix
from kdcli.domain_scheduler._signals import perplexity_ratio
from kdcli.domain_scheduler._updates import multiplicative, softmax
from kdcli.errors import ConfigError


class DDK(Adaptive):
    """Domains where the student is further behind the teacher are drawn more often:

        rho_i   = perplexity_student_i / perplexity_teacher_i, on held-out rows
        r_0     = softmax(rho), eq. 1, from the probe before the first step
        r_{t+1} = smoothing softmax(log r_t + rho) + (1 - smoothing) / N, eq. 2, every `interval` steps

    so every weight lies between (1 - smoothing) / N and smoothing + (1 - smoothing) / N. The first interval is a plain
    random sample, `natural`, in Algorithm 1; `r0` draws it by eq. 1, and `uniform` equally often from each domain.

    Departs from the paper in two places: in log space, because exp of a perplexity ratio overflows (where both are
    finite, the numbers are the same); and with other tokenizers rho is the ratio of perplexities per byte, because
    perplexities per token cannot be compared. It is the update of DoReMi with another signal, step size 1 and
    c = 1 - smoothing.

    Raises ConfigError if `smoothing` is not between 0 and 1, a domain has no held-out rows, or there is no teacher.
    """

    signals = frozenset({"student", "teacher"})

    def __init__(
        self,
        *,
        smoothing: float = 0.5,
        interval: int = 1000,
        first_interval: Literal["natural", "r0", "uniform"] = "natural",
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(interval=interval, first_interval=first_interval, **settings)
        if not 0 <= smoothing <= 1:
            raise ConfigError(f"domain_scheduler.smoothing is {smoothing}; give a share between 0 and 1")
        self.smoothing = smoothing  # alpha

    def first(self, weights: Mapping[str, float], losses: Mapping[str, DomainLoss]) -> dict[str, float]:
        self.weights = softmax(self._ratio(losses))
        return self.complete(self.weights) if self.first_interval == "r0" else dict(weights)

    def next(self, losses: Mapping[str, DomainLoss]) -> dict[str, float]:
        return mix(multiplicative(self.weights, self._ratio(losses)), 1 - self.smoothing)

    def _ratio(self, losses: Mapping[str, DomainLoss]) -> dict[str, float]:
        return perplexity_ratio(self.read(losses, "student"), self.read(losses, "teacher"))
