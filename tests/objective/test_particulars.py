"""What is particular to one objective."""

from __future__ import annotations

import pytest
import torch

from kdcli.api import StudentOutput, TeacherSignal, TopK
from kdcli.errors import ConfigError
from kdcli.objective.cross_entropy import CrossEntropy
from kdcli.objective.forward_kl import ForwardKL
from kdcli.objective.generalized_jsd import GeneralizedJSD
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
    with pytest.raises(ConfigError, match="stored at 1.0"):
        ForwardKL(temperature=2.0)(batch, StudentOutput(logits=z), TeacherSignal(topk=TopK(ids=ids, logprobs=logprobs)))
