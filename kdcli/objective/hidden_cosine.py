"""Angle of hidden states: Sanh et al. 2019 (DistilBERT), arXiv:1910.01108."""

from __future__ import annotations

from torch import Tensor, nn

from kdcli.objective._projected import Projected


class HiddenCosine(Projected):
    """1 - cos(W h_s, h_t) per target, mean over pairs of layers; W only as `project` says.

    DistilBERT has the last layers only (`layers: last`) and equal widths. Computed as 1/2 |a - b|^2 of the states at
    length one, which is the same and is exact where they agree. A state of length 0 has no direction: its value is 1/2.
    """

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        one, other = (nn.functional.normalize(states, dim=-1, eps=1e-6) for states in (student, teacher))
        return 0.5 * (one - other).square().sum(-1)
