"""Which divergence an objective puts between two distributions that it has made comparable."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from kdcli.errors import ConfigError
from kdcli.ops import divergence

Between = Literal["forward_kl", "reverse_kl", "generalized_jsd", "total_variation"]


def between(which: Between, log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    """The divergence of this name: log-probabilities [..., S] of teacher and student -> nats [...]."""
    if which == "generalized_jsd":
        return divergence.generalized_jsd(log_p, log_q, beta)
    return {
        "forward_kl": divergence.forward_kl,
        "reverse_kl": divergence.reverse_kl,
        "total_variation": divergence.total_variation,
    }[which](log_p, log_q)


def check_beta(what: str, beta: float) -> None:
    """Raises ConfigError unless 0 < beta < 1, outside of which generalized_jsd is no divergence."""
    if not 0 < beta < 1:
        raise ConfigError(f"{what}: beta is {beta}; set a share strictly between 0 and 1, or divergence=forward_kl")
