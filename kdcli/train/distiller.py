"""Student, teacher and objectives as one module: the only place that masks, sums, divides and weights losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.api import Batch, Need, Objective, Scores, Student, StudentOutput, Teacher, TeacherSignal, TopK, Unit
from kdcli.errors import ConfigError
from kdcli.ops import divergence
from kdcli.ops.chunked import chunk_size, compute_dtype, head_loss
from kdcli.ops.head import Head


class Distiller(nn.Module):
    """The loss of an optimizer step is the sum over terms of weight x (sum over the term's units / their global
    count in the step), so it does not depend on how the step is cut into micro-batches, ranks or packed rows.

    Supervised targets are gathered before the head, so masked ones cost no head FLOPs, and the head is applied to
    chunks of them (kdcli.ops.chunked). `chunk`: targets per chunk; by default what fits a fixed buffer.
    """

    def __init__(
        self, student: Student, teacher: Teacher, objectives: Mapping[str, Objective], chunk: int | None = None
    ) -> None:
        super().__init__()
        for name, objective in objectives.items():
            if objective.unit is not Unit.TOKEN or objective.needs & (Need.HIDDEN | Need.ATTENTION):
                raise ConfigError(
                    f"objective.{name}: {type(objective).__name__} is not a loss per target on the models' logits, "
                    "which is all this version trains; choose one of `kdcli ls objective`"
                )
        self.student = student
        # Neither are submodules. An engine that shards parameters (ZeRO-3) follows the order in which modules run, and
        # how often an objective runs depends on a rank's targets: ranks would wait for each other for ever. What
        # objectives learn belongs to the gathered head, which runs once.
        self._objectives = [dict(objectives)]
        self.gathered_head = _GatheredHead(student.head, objectives)
        self.chunk = chunk
        self._teacher = [teacher]

    @property
    def teacher(self) -> Teacher:
        return self._teacher[0]

    @property
    def terms(self) -> dict[str, Objective]:
        return self._objectives[0]

    @property
    def needs(self) -> Need:
        """All that the objectives need of the teacher."""
        needs = Need.NOTHING
        for objective in self.terms.values():
            needs |= objective.needs
        return needs

    def count(self, batch: Batch) -> dict[str, float]:
        """Units of each term in this micro-batch, and its supervised `tokens`."""
        counts = {name: float(_selected(batch, term).sum()) for name, term in self.terms.items()}
        return counts | {"tokens": float(batch.mask.sum())}

    def forward(self, batch: Batch, counts: Mapping[str, float] | None = None, mode: str = "train") -> Any:
        """`train`: (loss (), {metric: this micro-batch's share of the step's mean}), given the step's global
        `counts`. `score`: Scores, without gradients."""
        if mode == "score":
            with torch.no_grad():
                return self._score(batch)
        assert counts is not None, "training needs the step's global counts"
        return self._train(batch, counts)

    def _train(self, batch: Batch, counts: Mapping[str, float]) -> tuple[Tensor, dict[str, float]]:
        signal = self.teacher.annotate(batch, self.needs)
        hidden = self.student(batch)[batch.mask]  # [N, D]
        loss = _TermsLoss(self.terms, batch, signal, counts, self._shared(signal))

        def run(hidden: Tensor, head: Head) -> Tensor:
            chunk = self.chunk or chunk_size(head.vocab_size, hidden.device)
            return head_loss(hidden, head.cut(loss.vocab_size), loss, chunk, loss.parameters)

        total = self.gathered_head(hidden, run) / loss.unit_scale
        return total, loss.metrics() | {"loss/total": float(total.detach())}

    def _score(self, batch: Batch) -> Scores:
        dense = bool(self.teacher.provides & Need.DISTRIBUTION)
        signal = self.teacher.annotate(batch, Need.DISTRIBUTION) if dense else TeacherSignal()
        hidden = self.student(batch)[batch.mask]
        gathered, teacher = _gather(batch), _gather_signal(signal, batch.mask)
        vocab_size = self._shared(signal)
        columns: dict[str, list[Tensor]] = {"nll": [], "teacher_nll": [], "kl": [], "agree": []}

        def run(hidden: Tensor, head: Head) -> Tensor:
            head = head.cut(vocab_size).cast(compute_dtype(hidden, head.weight))
            size = self.chunk or chunk_size(vocab_size, hidden.device)
            for start in range(0, hidden.shape[0], size):
                window = slice(start, start + size)
                targets = gathered.targets[:, window].unsqueeze(-1)
                log_q = torch.log_softmax(head(hidden[window]), dim=-1)[None]
                columns["nll"].append(-log_q.gather(-1, targets)[0, :, 0])
                log_p = _window(teacher, window, vocab_size).log_p()
                if log_p is not None:
                    columns["teacher_nll"].append(-log_p.gather(-1, targets)[0, :, 0])
                    columns["kl"].append(divergence.forward_kl(log_p, log_q)[0])
                    columns["agree"].append((log_p.argmax(-1) == log_q.argmax(-1))[0].float())
            return hidden.new_zeros(())

        self.gathered_head(hidden, run)
        empty = [hidden.new_zeros(0, dtype=torch.float32)]  # a batch without a target still has scores

        def spread(values: list[Tensor]) -> Tensor:
            return torch.zeros(batch.mask.shape, device=hidden.device).masked_scatter(
                batch.mask, torch.cat(empty + values)
            )

        if signal.head is None:
            return Scores(nll=spread(columns["nll"]))
        return Scores(**{name: spread(values) for name, values in columns.items()})

    def _shared(self, signal: TeacherSignal) -> int:
        """The ids that both models have: vocabularies are cut to them before any softmax."""
        own = self.student.head.vocab_size
        return own if signal.head is None else min(own, signal.head.vocab_size)


class _GatheredHead(nn.Module):
    """Owns the parameters of the head and of the objectives, so that an engine that shards them (ZeRO-3) has them
    whole inside `forward`."""

    def __init__(self, head: Head, objectives: Mapping[str, Objective]) -> None:
        super().__init__()
        self.head = head
        self.weight = head.weight
        self.bias = head.bias
        for term, objective in objectives.items():
            for name, parameter in objective.named_parameters():
                self.register_parameter(f"{term}/{name}".replace(".", "/"), parameter)

    def forward(self, hidden: Tensor, run: Callable[[Tensor, Head], Tensor]) -> Tensor:
        return run(hidden, replace(self.head, weight=self.weight, bias=self.bias))


class _TermsLoss:
    """The summed loss of a chunk of targets over all terms, and its gradient (kdcli.ops.chunked.ChunkLoss).

    Sums are scaled by `unit_scale` (the step's supervised targets) / count, so that gradients inside are of order
    one (float16 underflows otherwise); the caller divides by `unit_scale`.
    """

    def __init__(
        self,
        terms: Mapping[str, Objective],
        batch: Batch,
        signal: TeacherSignal,
        counts: Mapping[str, float],
        vocab_size: int,
    ) -> None:
        self.terms = terms
        self.vocab_size = vocab_size
        self.unit_scale = max(1.0, counts["tokens"])
        self.batch = _gather(batch)
        self.signal = _gather_signal(signal, batch.mask)
        weight = batch.weight[self.batch.segment[0]]  # [N] of the target's example
        self.share = {  # [N] what one target's value adds to the step's mean
            name: weight * _selected(batch, term)[batch.mask] / max(1.0, counts[name]) for name, term in terms.items()
        }
        self.sums = torch.zeros(len(terms), device=batch.mask.device)
        self.parameters = tuple(p for term in terms.values() for p in term.parameters() if p.requires_grad)

    def __call__(self, logits: Tensor, window: slice) -> tuple[Tensor, Tensor, list[Tensor]]:
        batch = _window_batch(self.batch, window)
        student = StudentOutput(logits=logits[None])
        teacher = _window(self.signal, window, self.vocab_size)
        total, d_logits = logits.new_zeros(()), None
        d_parameters = [torch.zeros_like(p) for p in self.parameters]
        for index, (name, term) in enumerate(self.terms.items()):
            share = self.share[name][window]  # [C]
            coefficient = share * (term.weight * self.unit_scale)
            closed = term.closed_form(batch, student, teacher)
            if closed is not None:
                value, gradient = closed[0][0], closed[1][0].mul_(coefficient.unsqueeze(-1))
            else:
                value, gradient, extra = _autograd(term, batch, logits, teacher, coefficient, self.parameters)
                for buffer, part in zip(d_parameters, extra, strict=True):
                    buffer += part
            d_logits = gradient if d_logits is None else d_logits.add_(gradient)
            total += (coefficient * value).sum()
            self.sums[index] += (share * value).sum()
        assert d_logits is not None, "at least one objective"
        return total, d_logits, d_parameters

    def metrics(self) -> dict[str, float]:
        return {f"loss/{name}": value for name, value in zip(self.terms, self.sums.tolist(), strict=True)}


def _autograd(
    term: Objective,
    batch: Batch,
    logits: Tensor,
    teacher: TeacherSignal,
    coefficient: Tensor,
    parameters: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Values [C], gradient to the logits [C, V] and to `parameters`, of any objective."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        value = term.forward(batch, StudentOutput(logits=leaf[None]), teacher)[0]
        inputs = (leaf, *parameters)
        gradients = torch.autograd.grad((coefficient * value).sum(), inputs, allow_unused=True)
    filled = [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, gradients, strict=True)]
    return value.detach(), filled[0], filled[1:]


def _selected(batch: Batch, term: Objective) -> Tensor:
    """[B, T] bool: the targets a term counts and sums."""
    if not term.domains:
        return batch.mask
    allowed = torch.tensor([name in term.domains for name in batch.domain], device=batch.mask.device)
    return batch.mask & allowed[batch.segment.clamp(min=0)]


def _gather(batch: Batch) -> Batch:
    """The supervised targets alone, as B = 1, T = N."""
    mask = batch.mask
    return replace(
        batch,
        input_ids=batch.input_ids[mask][None],
        targets=batch.targets[mask][None],
        mask=mask[mask][None],
        attention_mask=mask[mask][None],
        segment=batch.segment[mask][None],
        position_ids=None,
        old_logprobs=None if batch.old_logprobs is None else batch.old_logprobs[mask][None],
        teacher=None,
    )


def _window_batch(batch: Batch, window: slice) -> Batch:
    """Targets `window` of a gathered batch."""
    cut = {
        name: getattr(batch, name)[:, window] for name in ("input_ids", "targets", "mask", "attention_mask", "segment")
    }
    old = None if batch.old_logprobs is None else batch.old_logprobs[:, window]
    return replace(batch, **cut, old_logprobs=old)


def _gather_signal(signal: TeacherSignal, mask: Tensor) -> TeacherSignal:
    """The teacher's signal at the supervised targets: every [B, T, ...] becomes [1, N, ...]."""

    def at(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[mask][None]

    topk = signal.topk
    return replace(
        signal,
        hidden=at(signal.hidden),
        logprobs=at(signal.logprobs),
        reference_logprobs=at(signal.reference_logprobs),
        hidden_states=None,
        topk=None if topk is None else replace(topk, ids=topk.ids[mask][None], logprobs=topk.logprobs[mask][None]),
    )


def _window(signal: TeacherSignal, window: slice, vocab_size: int) -> TeacherSignal:
    """Targets `window` of a gathered signal, with the chunk's logits where the teacher gives a distribution."""

    def at(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[:, window]

    logits = None
    if signal.head is not None and signal.hidden is not None:
        logits = signal.head.cut(vocab_size)(signal.hidden[:, window])
    topk = signal.topk
    return TeacherSignal(
        logits=logits,
        logprobs=at(signal.logprobs),
        reference_logprobs=at(signal.reference_logprobs),
        topk=None
        if topk is None
        else TopK(ids=topk.ids[:, window], logprobs=topk.logprobs[:, window], temperature=topk.temperature),
        reward=signal.reward,
    )
