"""A reference model and a reward model beside the teacher: the numbers they give, and runs that learn from them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from kdcli.api import Batch, Need, TeacherSignal
from kdcli.errors import ConfigError
from kdcli.objective.dpo import DPO
from kdcli.objective.policy_gradient import PolicyGradient
from kdcli.store import paths
from kdcli.teacher.reward_model import RewardModelTeacher
from kdcli.teacher.with_reference import WithReference
from kdcli.train.distiller import Distiller
from tests import runs, toys

CPU = torch.device("cpu")
TINY = "recipes://data/tiny_teacher"


class Known(toys.ToyTeacher):
    """Gives log-probabilities too."""

    provides = toys.ToyTeacher.provides | Need.LOGPROBS

    def annotate(self, batch: Batch, needs: Need) -> TeacherSignal:
        self.saw, self.needs = batch, needs
        signal = super().annotate(batch, needs)
        return replace(signal, logprobs=logprobs(self.model, batch)) if Need.LOGPROBS in needs else signal


def logprobs(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        log_p = torch.log_softmax(model(**batch.model_inputs()).logits, -1)
    return log_p.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1) * batch.mask


def test_dpo_with_a_reference_is_its_formula_by_hand() -> None:
    """-log sigmoid(beta ((log pi - log pi_ref)(better) - (log pi - log pi_ref)(worse))), sums over answers. The
    reference is another model than the student began as, and reads what the student reads."""
    batch = toys.batch(rows=2)
    batch.group_index, batch.rejected = torch.tensor([0, 0]), torch.tensor([False, True])
    student, reference = toys.ToyStudent(toys.llama(1)), Known(toys.llama(2, width=24))
    distiller = Distiller(student, WithReference(reference=reference), {"dpo": DPO(beta=0.3)})
    loss, _ = distiller(batch, distiller.count(batch))
    ratio = (logprobs(student.model, batch) - logprobs(reference.model, batch)).sum(1)
    expected = -math.log(1 / (1 + math.exp(-0.3 * float(ratio[0] - ratio[1]))))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert abs(expected - math.log(2)) > 0.1, "which it would be with the student as its own reference"
    assert reference.saw.teacher is None


def test_the_teacher_beside_it_is_asked_for_the_rest() -> None:
    teacher, reference = Known(toys.llama(2)), Known(toys.llama(3))
    both = WithReference(reference=reference, teacher=teacher)
    assert both.provides == teacher.provides | Need.REFERENCE
    batch = toys.batch()
    signal = both.annotate(batch, Need.DISTRIBUTION | Need.LOGPROBS | Need.REFERENCE)
    assert teacher.needs == Need.DISTRIBUTION | Need.LOGPROBS
    assert signal.head is teacher.head
    torch.testing.assert_close(signal.logprobs, logprobs(teacher.model, batch))
    torch.testing.assert_close(signal.reference_logprobs, logprobs(reference.model, batch))


def test_a_reference_gives_log_probabilities() -> None:
    with pytest.raises(ConfigError, match=r"teacher\.reference: ToyTeacher gives no log-probabilities"):
        WithReference(reference=toys.ToyTeacher(toys.llama(1)))


# ------------------------------------------------------------------------------------------------ reward models


def judge(folder: Path, tokenizer: Any, *, labels: int = 1, pad: bool = True) -> str:
    torch.manual_seed(5)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=len(tokenizer),
            num_labels=labels,
            pad_token_id=tokenizer.pad_token_id if pad else None,
            initializer_range=0.3,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(paths.resolve(TINY))


def texts(tokenizer: Any) -> Batch:
    """Three sequences, packed into two rows, the first with padding behind it; targets after two tokens of prompt."""
    ids = [tokenizer(text)["input_ids"] for text in ("the cat sat on a mat", "a dog ran", "the sun was in the day")]
    rows = [ids[0], ids[1] + ids[2]]
    length = max(map(len, rows)) + 1
    segment = [[0] * len(ids[0]), [1] * len(ids[1]) + [2] * len(ids[2])]
    grid = torch.full((2, length), tokenizer.pad_token_id or 0)
    targets, number = grid.clone(), torch.full((2, length), -1)
    mask = torch.zeros(2, length, dtype=torch.bool)
    for b, row in enumerate(rows):
        grid[b, : len(row)], number[b, : len(row)] = torch.tensor(row), torch.tensor(segment[b])
        targets[b, : len(row) - 1] = torch.tensor(row[1:])
    for e in range(3):
        places = (number == e).nonzero()
        mask[places[1:-1, 0], places[1:-1, 1]] = True
    return Batch(
        input_ids=grid, targets=targets, mask=mask, attention_mask=number >= 0, segment=number, weight=torch.ones(3)
    )


class Pupil(toys.ToyStudent):
    def __init__(self, tokenizer: Any) -> None:
        super().__init__(toys.llama(1))
        self.tokenizer = tokenizer


def rewarding(tokenizer: Any, **settings: Any) -> RewardModelTeacher:
    teacher = RewardModelTeacher(dtype="float32", **settings)
    teacher.load(CPU)
    teacher.follow(Pupil(tokenizer))
    return teacher


def alone(teacher: RewardModelTeacher, ids: list[int]) -> float:
    with torch.no_grad():
        return float(teacher.judge(torch.tensor([ids])).logits[0, 0])


@pytest.mark.parametrize("pad", [True, False])
def test_each_sequence_is_judged_as_if_alone(pad: bool, tokenizer: Any, tmp_path: Path) -> None:
    """Its very tokens, however rows are packed and padded, also where the model names no padding token."""
    teacher = rewarding(tokenizer, path=judge(tmp_path, tokenizer, pad=pad), center=0.5, scale=2.0)
    batch = texts(tokenizer)
    reward = teacher.annotate(batch, Need.REWARD).reward
    assert reward is not None
    expected = [(alone(teacher, batch.input_ids[batch.segment == e].tolist()) - 0.5) / 2 for e in range(3)]
    torch.testing.assert_close(reward, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert len(set(expected)) == 3


def test_with_another_tokenizer_it_reads_the_text(tokenizer: Any, tmp_path: Path) -> None:
    """Without padding of its own, and cut where it can read no more."""
    known = ["<pad>", "<eos>", "the", "cat", "sat", "on", "a", "mat", "dog", "ran", "sun", "was", "in", "day"]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(known)}, unk_token="<pad>"))
    model.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    words = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", pad_token="<pad>")
    teacher = rewarding(tokenizer, path=judge(tmp_path, words), max_length=4)
    batch = texts(tokenizer)
    reward = teacher.annotate(batch, Need.REWARD).reward
    assert reward is not None
    for e in range(3):
        text = tokenizer.decode(batch.input_ids[batch.segment == e].tolist(), skip_special_tokens=True)
        told = words(text)["input_ids"][:4]
        assert len(set(told)) > 2
        assert float(reward[e]) == pytest.approx(alone(teacher, told), rel=1e-5, abs=1e-7)


def test_a_chat_template_wraps_prompt_and_answer(tokenizer: Any, tmp_path: Path) -> None:
    own = AutoTokenizer.from_pretrained(paths.resolve(TINY))
    own.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    teacher = rewarding(tokenizer, path=judge(tmp_path, own), chat=True)
    batch = texts(tokenizer)
    reward = teacher.annotate(batch, Need.REWARD).reward
    assert reward is not None
    for e in range(3):
        ids = batch.input_ids[batch.segment == e].tolist()
        prompt, answer = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:2], ids[2:]))
        told = own(f"user: {prompt} assistant: {answer} ", add_special_tokens=False)["input_ids"]
        assert float(reward[e]) == pytest.approx(alone(teacher, told), rel=1e-5)


def test_a_model_without_one_number_is_refused_before_its_weights_load(tokenizer: Any, tmp_path: Path) -> None:
    path = judge(tmp_path, tokenizer, labels=3)
    with pytest.raises(ConfigError, match="has 3 labels, but a reward model has one"):
        RewardModelTeacher(path=path).check()
    own = AutoTokenizer.from_pretrained(paths.resolve(TINY))
    own.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template"):
        RewardModelTeacher(path=judge(tmp_path / "plain", own), chat=True).check()


def test_a_reward_moves_the_students_answers(tokenizer: Any, tmp_path: Path) -> None:
    """-(reward_coef R) for each target at ratio 1: the gradient is that of -sum R log q / targets."""
    teacher = rewarding(tokenizer, path=judge(tmp_path, tokenizer))
    batch = texts(tokenizer)
    student = toys.ToyStudent(toys.llama(1, vocab=len(tokenizer)))
    distiller = Distiller(student, teacher, {"policy": PolicyGradient(coef=None, reward_coef=0.5)})
    loss, _ = distiller(batch, distiller.count(batch))
    loss.backward()
    found = {name: p.grad for name, p in student.named_parameters()}
    reward = teacher.rewards(batch)
    log_q = torch.log_softmax(student.model(**batch.model_inputs()).logits, -1)
    log_q = log_q.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)[batch.mask]
    expected = -(0.5 * reward[batch.segment[batch.mask]] * log_q).mean()
    parameters = dict(student.named_parameters())
    for name, gradient in zip(parameters, torch.autograd.grad(expected, list(parameters.values())), strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_run_learns_from_a_reward_and_a_teacher(tokenizer: Any, tmp_path: Path) -> None:
    path = judge(tmp_path / "judge", tokenizer)
    teacher = {
        "_target_": "kdcli.teacher.reward_model.RewardModelTeacher",
        "path": path,
        "dtype": "float32",
        "teacher": runs.config()["teacher"],
    }
    objective = {
        "policy": {"_target_": "kdcli.objective.policy_gradient.PolicyGradient", "reward_coef": 1.0},
        "kd": {"_target_": "kdcli.objective.forward_kl.ForwardKL"},
    }
    run_dir = runs.write_run(tmp_path, teacher=teacher, objective=objective, run__steps=2)
    assert runs.work(run_dir) == [0]
    assert all(math.isfinite(line["loss/policy"]) for line in runs.lines(run_dir))
    assert json.loads((run_dir / "status.json").read_text())["state"] == "done"
