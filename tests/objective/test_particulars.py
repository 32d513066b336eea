"""What is particular to one objective."""

from __future__ import annotations

import pytest
import torch

from kdcli.api import Objective, StudentOutput, TeacherSignal, TopK
from kdcli.errors import ConfigError
from kdcli.objective.adaptive_kl import AdaptiveKL
from kdcli.objective.alpha_beta import AlphaBeta
from kdcli.objective.cross_entropy import CrossEntropy
from kdcli.objective.dkd import DKD
from kdcli.objective.forward_kl import ForwardKL
from kdcli.objective.generalized_jsd import GeneralizedJSD
from kdcli.objective.hinton import Hinton
from kdcli.objective.logit_mse import LogitMSE
from kdcli.objective.skew_kl import SkewKL
from kdcli.objective.skew_reverse_kl import SkewReverseKL
from kdcli.objective.symmetric_kl import SymmetricKL
from tests.objective.test_family import V, chunk


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_cross_entropy_is_torchs(smoothing: float) -> None:
    batch, _, z = chunk()
    ours = CrossEntropy(label_smoothing=smoothing)(batch, StudentOutput(logits=z), TeacherSignal())
    reference = torch.nn.functional.cross_entropy(z[0], batch.targets[0], label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(ours[0], reference)


def test_forward_kl_minus_cross_entropy_is_minus_the_teachers_entropy() -> None:
    """A one-hot teacher has no entropy: KL(onehot || q) is the cross-entropy with its token (METHODS D3)."""
    batch, _, z = chunk()
    y = torch.full((1, batch.targets.shape[1], V), -40.0, dtype=torch.float64)
    y.scatter_(-1, batch.targets.unsqueeze(-1), 40.0)
    kl = ForwardKL()(batch, StudentOutput(logits=z), TeacherSignal(logits=y))
    torch.testing.assert_close(kl, CrossEntropy()(batch, StudentOutput(logits=z), TeacherSignal()))


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 2.0])
def test_the_ends_of_beta_are_refused_and_the_way_out_named(beta: float) -> None:
    with pytest.raises(ConfigError, match="forward_kl or reverse_kl"):
        GeneralizedJSD(beta=beta)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_label_smoothing_is_a_share(smoothing: float) -> None:
    with pytest.raises(ConfigError, match="label_smoothing"):
        CrossEntropy(label_smoothing=smoothing)


def test_log_probabilities_of_another_temperature_are_refused() -> None:
    batch, y, z = chunk()
    logprobs, ids = torch.log_softmax(y, -1).topk(4)
    with pytest.raises(ConfigError, match=r"stored at 1\.0"):
        ForwardKL(temperature=2.0)(batch, StudentOutput(logits=z), TeacherSignal(topk=TopK(ids=ids, logprobs=logprobs)))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (SymmetricKL, {"forward_weight": 1.1}, "forward_weight is 1.1; set a share"),
        (SkewKL, {"alpha": 1.0}, "teacher's share"),
        (SkewReverseKL, {"alpha": -0.1}, "student's share"),
        (AdaptiveKL, {"mu": 1.0}, "head's probability"),
        (AlphaBeta, {"alpha": float("nan")}, "finite numbers"),
        (DKD, {"beta": -1.0}, "at least 0"),
    ],
)
def test_settings_outside_the_formula_are_refused(kind: type[Objective], settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**settings)


@pytest.mark.parametrize("objective", [LogitMSE(), DKD(temperature=1.0)])
def test_what_needs_the_whole_vocabulary_refuses_a_top_k_teacher(objective: Objective) -> None:
    batch, y, z = chunk()
    logprobs, ids = torch.log_softmax(y, -1).topk(4)
    with pytest.raises(ConfigError, match="whole vocabulary"):
        objective(batch, StudentOutput(logits=z), TeacherSignal(topk=TopK(ids=ids, logprobs=logprobs)))


def test_hinton_is_sixteen_times_the_forward_kl_at_temperature_four() -> None:
    batch, y, z = chunk()
    plain = ForwardKL(temperature=4.0)(batch, StudentOutput(logits=z), TeacherSignal(logits=y))
    torch.testing.assert_close(Hinton()(batch, StudentOutput(logits=z), TeacherSignal(logits=y)), 16 * plain)


def test_t2_makes_the_temperature_cancel_in_the_logit_mse() -> None:
    batch, y, z = chunk()
    one, other = (LogitMSE(temperature=t, temperature_scale="t2") for t in (1.0, 7.0))
    values = [o(batch, StudentOutput(logits=z), TeacherSignal(logits=y)) for o in (one, other)]
    torch.testing.assert_close(*values)
    centred = (z - z.mean(-1, keepdim=True)) - (y - y.mean(-1, keepdim=True))
    torch.testing.assert_close(values[0], centred.square().mean(-1))
