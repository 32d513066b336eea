"""Relational knowledge distillation: Park et al. 2019, arXiv:1904.05068. Letters: n points of a sequence."""

from __future__ import annotations

from typing import ClassVar, Unpack

import torch
from torch import Tensor

from kdcli.api import Batch, Settings, StudentOutput, TeacherSignal, Unit
from kdcli.errors import ConfigError
from kdcli.objective._layers import Layered, Layers, by_sequence, counts

LEAST = 3  # points that have an angle


class RKD(Layered):
    """distance_weight L_D + angle_weight L_A per sequence (the paper's lambda_RKD-D 25 and lambda_RKD-A 50):

        L_D = mean_{i != j}      huber(|s_i - s_j| / mu_s - |t_i - t_j| / mu_t),  mu = mean_{i != j} |x_i - x_j|
        L_A = mean_{i, j, k}     huber(cos angle(s_i, s_j, s_k) - cos angle(t_i, t_j, t_k)),  all different, at j

    over the states x of a pair of layers, mean over pairs; huber is 1/2 d^2 up to 1, then d - 1/2. No projector: the
    widths may differ. The angles cost n^3, so at most `points` targets of a sequence are compared, evenly spaced with
    the first and the last. Sequences with fewer than three targets are no units.

    Departs from the paper, whose points are the examples of a batch (here: targets of one sequence, so that a step may
    be cut anyhow), and from the official code in that a point is not compared with itself.
    """

    unit: ClassVar[Unit] = Unit.SEQUENCE

    def __init__(
        self,
        *,
        layers: Layers = "last",
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        points: int = 32,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(layers=layers, **settings)
        if points < LEAST:
            raise ConfigError(f"RKD: points is {points}; an angle has {LEAST}, so set at least {LEAST}")
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight
        self.points = points

    def units(self, batch: Batch) -> Tensor:
        return super().units(batch) & (counts(batch) >= LEAST)

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        ours, theirs = student.hidden_states, teacher.hidden_states
        assert ours is not None and theirs is not None, "it needs HIDDEN"
        pairs = self.pairs(len(ours) - 1, len(theirs) - 1)
        total = sum(
            torch.stack([self._sequence(*both) for both in zip(*_both(batch, ours[s], theirs[t]), strict=True)])
            for s, t in pairs
        )
        assert isinstance(total, Tensor), "there is at least one pair"
        return total / len(pairs)

    def _sequence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """States [n, D_s] and [n, D_t] of one sequence -> ()."""
        if len(student) < LEAST:
            return student.sum() * 0.0
        chosen = spaced(len(student), self.points).to(student.device)
        apart_s, apart_t = (_differences(states[chosen]) for states in (student, teacher))
        value = self.distance_weight * _huber(_distances(apart_s) - _distances(apart_t))
        return value + self.angle_weight * _huber(_angles(apart_s) - _angles(apart_t))


def spaced(count: int, points: int) -> Tensor:
    """At most `points` of 0 … count - 1, evenly spaced with both ends."""
    if count <= points:
        return torch.arange(count)
    return torch.arange(points) * (count - 1) // (points - 1)


def _both(batch: Batch, student: Tensor, teacher: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    return by_sequence(batch, student), by_sequence(batch, teacher)


def _differences(points: Tensor) -> Tensor:
    """x_i - x_j of [n, D]: [j, i of the others, D], [n, n - 1, D]."""
    return _others(points.unsqueeze(0) - points.unsqueeze(1))


def _distances(apart: Tensor) -> Tensor:
    """|x_i - x_j| over their mean, [n, n - 1]."""
    lengths = _lengths(apart)
    return lengths / lengths.mean()


def _angles(apart: Tensor) -> Tensor:
    """Cosine at j between i and k, i != k: [n, n - 1, n - 2]."""
    unit = apart / _lengths(apart).unsqueeze(-1)
    return _others((unit @ unit.transpose(1, 2)).permute(1, 2, 0)).permute(2, 0, 1)


def _lengths(apart: Tensor) -> Tensor:
    return apart.square().sum(-1).clamp(min=1e-12).sqrt()  # 1e-12 as in the official code: of equal points no slope


def _others(square: Tensor) -> Tensor:
    """[m, m, …] without its diagonal: [m, m - 1, …]."""
    size = len(square)
    flat = square.flatten(0, 1)[1:]  # the diagonal is now the last of each m + 1
    return flat.unflatten(0, (size - 1, size + 1))[:, :-1].flatten(0, 1).unflatten(0, (size, size - 1))


def _huber(difference: Tensor) -> Tensor:
    return torch.nn.functional.smooth_l1_loss(difference, torch.zeros_like(difference))
