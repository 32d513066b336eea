"""Student, teacher and objectives as one module: the only place that masks, sums, divides and weights losses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.api import (
    Batch,
    Need,
    Objective,
    Relations,
    Scope,
    Scores,
    Student,
    StudentOutput,
    Teacher,
    TeacherSignal,
    Voice,
)
from kdcli.errors import ConfigError
from kdcli.ops import divergence
from kdcli.ops.chunked import chunk_size, compute_dtype, head_loss, rows_at_once, target_logprobs
from kdcli.ops.head import Head
from kdcli.ops.mixture import Pool, mixed
from kdcli.ops.support import cut_topk
from kdcli.train.shares import counts_of, sequences_of, share_of
from kdcli.train.tally import Tally

OF_BOTH = ("teacher_nll", "teacher_correct", "kl", "agree")  # scores that need a teacher
OF_IDS = ~(Need.REWARD | Need.REFERENCE)  # what a teacher says of the very ids that the student reads
LAYERS = Need.HIDDEN | Need.ATTENTION | Need.RELATIONS  # what is asked of the student's layers too


class Distiller(nn.Module):
    """The loss of an optimizer step is the sum over terms of weight x (sum over the term's units / their global
    count in the step), so it does not depend on how the step is cut into micro-batches, ranks or packed rows.

    Supervised targets are gathered before the head, so masked ones cost no head FLOPs, and the head is applied to
    chunks of them (kdcli.ops.chunked). `chunk`: targets per chunk; by default what fits a fixed buffer.
    `foreign`: the teacher has another tokenizer, so its logits are not compared id by id.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        objectives: Mapping[str, Objective],
        chunk: int | None = None,
        *,
        foreign: bool = False,
    ) -> None:
        super().__init__()
        _fit(objectives, student, teacher)
        self.student = student
        # Neither are submodules. An engine that shards parameters (ZeRO-3) follows the order in which modules run, and
        # how often an objective runs depends on a rank's targets: ranks would wait for each other for ever. What
        # objectives learn belongs to the gathered head, which runs once.
        self._objectives = [dict(objectives)]
        self.chunk = chunk
        self.foreign = foreign
        self._teacher = [teacher]
        self.gathered_head = _GatheredHead(student, self.needs, objectives)
        shape = teacher.shape() if self.needs & OF_IDS and not foreign else None
        fewer = shape is not None and shape.vocab_size < student.head.vocab_size
        self._readable = shape.vocab_size if shape is not None and fewer else None  # ids of a teacher that knows fewer
        # As the student begins: a checkpoint is loaded after this, and must not change what it is compared with.
        own = Need.REFERENCE in self.needs & ~teacher.provides
        self._reference = [copy.deepcopy(student).eval().requires_grad_(False) if own else None]

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
        """What each term's sum is divided by, of this micro-batch, and its supervised `tokens`."""
        counts = {name: counts_of(batch, term) for name, term in self.terms.items()}
        return counts | {"tokens": float(batch.mask.sum())}

    def forward(
        self, batch: Batch, counts: Mapping[str, float] | None = None, mode: str = "train", teacher: bool = True
    ) -> Any:
        """`train`: (loss (), {metric: this micro-batch's share of the step's mean}), given the step's global
        `counts`. `score`: Scores, without gradients, and of the student alone unless `teacher`."""
        if mode == "score":
            with torch.no_grad():
                return self._score(batch, teacher)
        assert counts is not None, "training needs the step's global counts"
        return self._train(batch, counts)

    def _train(self, batch: Batch, counts: Mapping[str, float]) -> tuple[Tensor, dict[str, float]]:
        signal = self._annotated(batch)
        states = self.student.states(batch, self.needs & LAYERS)
        chunked = {name: term for name, term in self.terms.items() if term.scope is Scope.CHUNK}
        whole = {name: term for name, term in self.terms.items() if term.scope is not Scope.CHUNK}
        tally = Tally(batch, self.terms)
        loss = _ChunkTerms(chunked, batch, signal, counts, self._shared(batch, signal))

        def run(head: Head, embedding: Tensor | None, states: StudentOutput) -> Tensor:
            assert states.hidden is not None, "a student gives its last hidden states"
            size = self.chunk or chunk_size(head.vocab_size, states.hidden.device)
            # Without a chunked term the head's part is 0 with a graph: all ranks and stages see the same gradients.
            hidden = states.hidden[batch.mask] if chunked else states.hidden.flatten(0, 1)[:0]
            total = head_loss(hidden, head.cut(loss.vocab_size), loss, size, loss.parameters) / loss.unit_scale
            if whole:
                student = _seen(whole, batch, states, head, embedding, size)
                for name, term in whole.items():
                    values, shares, sequences = _units(term, counts[name], batch, student, signal)
                    tally.add(name, values, shares, sequences)
                    total = total + term.weight * (values * shares).sum()
            return total

        total = self.gathered_head(run, states, *_tensors(states))
        for name in chunked:
            tally.add(name, loss.values[name], loss.share[name], loss.batch.segment[0])
        return total, tally.metrics() | {"loss/total": float(total.detach())}

    def _annotated(self, batch: Batch) -> TeacherSignal:
        """The teacher's signal, with the reference's log-probabilities where a term needs them."""
        reference = self._reference[0]
        self._refuse_unknown(batch)
        signal = self.teacher.annotate(batch, self.needs if reference is None else self.needs & ~Need.REFERENCE)
        if reference is None:
            return signal
        with torch.no_grad():
            hidden, head = reference(batch)[batch.mask], reference.head
            size = self.chunk or chunk_size(head.vocab_size, hidden.device)
            values = target_logprobs(hidden, head, batch.targets[batch.mask], size)
        return replace(signal, reference_logprobs=_spread(values, batch.mask))

    def _refuse_unknown(self, batch: Batch) -> None:
        """Raise ConfigError where the teacher is to read an id that only the student has, such as a new token."""
        if self._readable is None:
            return
        view = batch.teacher
        ids = [batch.input_ids if view is None else view.input_ids, batch.targets[batch.mask]]
        highest = max(int(one.max()) for one in ids if one.numel())
        if highest >= self._readable:
            tokenizer = getattr(self.student, "tokenizer", None)
            word = f" ({tokenizer.convert_ids_to_tokens(highest)})" if tokenizer is not None else ""
            raise ConfigError(
                f"teacher: a row has the id {highest}{word}, which only the student knows, so the teacher can neither "
                "read nor predict it; learn such rows from their text alone (teacher=none, objective=cross_entropy), "
                "or leave the token out of them"
            )

    def _score(self, batch: Batch, with_teacher: bool) -> Scores:
        dense = with_teacher and Need.LOGITS in self.teacher.provides and not self.foreign
        signal = self.teacher.annotate(batch, Need.DISTRIBUTION) if dense else TeacherSignal()
        hidden = self.student(batch)[batch.mask]
        gathered, teacher = _gather(batch), _gather_signal(signal, batch.mask)
        vocab_size = self._shared(batch, signal)
        columns: dict[str, list[Tensor]] = {"nll": [], "correct": [], **{name: [] for name in OF_BOTH}}

        def run(head: Head, embedding: Tensor | None, states: StudentOutput) -> Tensor:
            head = head.cut(vocab_size).cast(compute_dtype(hidden, head.weight))
            size = self.chunk or chunk_size(head.vocab_size, hidden.device)
            for start in range(0, hidden.shape[0], size):
                window = slice(start, start + size)
                targets = gathered.targets[:, window].unsqueeze(-1)
                log_q = torch.log_softmax(head(hidden[window]), dim=-1)[None]
                columns["nll"].append(-log_q.gather(-1, targets)[0, :, 0])
                columns["correct"].append((log_q.argmax(-1) == targets[..., 0])[0].float())
                log_p = _window(teacher, window, vocab_size).log_p()
                if log_p is not None:
                    columns["teacher_nll"].append(-log_p.gather(-1, targets)[0, :, 0])
                    columns["kl"].append(divergence.forward_kl(log_p, log_q)[0])
                    columns["teacher_correct"].append((log_p.argmax(-1) == targets[..., 0])[0].float())
                    columns["agree"].append((log_p.argmax(-1) == log_q.argmax(-1))[0].float())
            return hidden.new_zeros(())

        self.gathered_head(run, StudentOutput(hidden=hidden), hidden)
        empty = [hidden.new_zeros(0, dtype=torch.float32)]  # a batch without a target still has scores
        compared = signal.head is not None or signal.voices is not None
        known = {name: values for name, values in columns.items() if compared or name not in OF_BOTH}
        return Scores(**{name: _spread(torch.cat(empty + values), batch.mask) for name, values in known.items()})

    def _shared(self, batch: Batch, signal: TeacherSignal) -> int | None:
        """The ids that both models have: vocabularies are cut to them before any softmax. None: each its own."""
        if self.foreign or (batch.teacher is not None and batch.teacher.foreign):
            return None
        heads = [signal.head, *(voice.head for voice in signal.voices or ())]
        return min(head.vocab_size for head in [self.student.head, *heads] if head is not None)


def _fit(objectives: Mapping[str, Objective], student: Student, teacher: Teacher) -> None:
    """Let objectives see the models' shapes and tokenizers."""
    shape = student.shape()
    tokenizers = getattr(student, "tokenizer", None), teacher.tokenizer
    for objective in objectives.values():
        if shape is not None:
            objective.fit(shape, teacher.shape())
        if None not in tokenizers:
            objective.match(*tokenizers)


class _GatheredHead(nn.Module):
    """Owns the parameters of the head and of the objectives, so that an engine that shards them (ZeRO-3) has them
    whole inside `forward`; and again in the backward, until every tensor of `states` has its gradient, which is why
    all are handed over one by one."""

    def __init__(self, student: Student, needs: Need, objectives: Mapping[str, Objective]) -> None:
        super().__init__()
        self.head = student.head
        self.weight = student.head.weight
        self.bias = student.head.bias
        model = getattr(student, "model", None)
        self.embedding = model.get_input_embeddings().weight if model is not None and Need.HIDDEN in needs else None
        for term, objective in objectives.items():
            for name, parameter in objective.named_parameters():
                self.register_parameter(f"{term}/{name}".replace(".", "/"), parameter)

    def forward(
        self,
        run: Callable[[Head, Tensor | None, StudentOutput], Tensor],
        states: StudentOutput,
        *tensors: Tensor,
    ) -> Tensor:
        head = replace(self.head, weight=self.weight, bias=self.bias)
        embedding = states.embedding if self.embedding is None else self.embedding
        given = iter(tensors)
        return run(head, embedding, _mapped(states, lambda _: next(given)))


def _tensors(states: StudentOutput) -> list[Tensor]:
    """What the layers computed, in the order in which `_mapped` comes to it."""
    found: list[Tensor] = []
    _mapped(states, lambda tensor: (found.append(tensor), tensor)[1])
    return found


def _mapped(states: StudentOutput, change: Callable[[Tensor], Tensor]) -> StudentOutput:
    """The same states with each tensor that a layer computed changed."""

    def each(tensors: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
        return None if tensors is None else tuple(map(change, tensors))

    def related(one: Relations) -> Relations:
        return Relations(queries=change(one.queries), keys=change(one.keys), values=change(one.values))

    return replace(
        states,
        hidden=None if states.hidden is None else change(states.hidden),
        hidden_states=each(states.hidden_states),
        attentions=each(states.attentions),
        relations=None if states.relations is None else tuple(map(related, states.relations)),
    )


def _seen(
    terms: Mapping[str, Objective],
    batch: Batch,
    states: StudentOutput,
    head: Head,
    embedding: Tensor | None,
    size: int,
) -> StudentOutput:
    """What terms of a whole micro-batch see of the student. The head is in the type that matmuls run in."""
    hidden, logprobs = states.hidden, None
    assert hidden is not None, "a student gives its last hidden states"
    if any(term.scope is Scope.LOGPROBS for term in terms.values()):
        values = target_logprobs(hidden[batch.mask], head, batch.targets[batch.mask], size)
        logprobs = _spread(values, batch.mask)
    cast = replace(head, weight=head.weight.to(compute_dtype(hidden, head.weight)))
    return replace(states, head=cast, embedding=embedding, logprobs=logprobs)


def _units(
    term: Objective, count: float, batch: Batch, student: StudentOutput, signal: TeacherSignal
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a term of scope LOGPROBS or STATES the values that count, their shares in the step's mean, and which sequence
    each is of, [U] each."""
    with torch.autocast(batch.mask.device.type, enabled=False):
        values = term.forward(batch, student, signal)
    share = share_of(batch, term, count)
    kept = share > 0  # elsewhere a value may be anything, so it is left out and not multiplied by zero
    return values[kept], share[kept], sequences_of(batch, term)[kept]


class _ChunkTerms:
    """The summed loss of a chunk of targets over all terms of scope CHUNK, and its gradient
    (kdcli.ops.chunked.ChunkLoss).

    Sums are scaled by `unit_scale` (the step's supervised targets) / count, so that gradients inside are of order
    one (float16 underflows otherwise); the caller divides by `unit_scale`.
    """

    def __init__(
        self,
        terms: Mapping[str, Objective],
        batch: Batch,
        signal: TeacherSignal,
        counts: Mapping[str, float],
        vocab_size: int | None,
    ) -> None:
        self.terms = terms
        self.vocab_size = vocab_size
        self.unit_scale = max(1.0, counts["tokens"])
        self.batch = _gather(batch)
        self.signal = _gather_signal(signal, batch.mask)
        # [N] what one target's value adds to the step's mean
        self.share = {name: share_of(batch, term, counts[name])[batch.mask] for name, term in terms.items()}
        self.values = {name: torch.zeros_like(share) for name, share in self.share.items()}  # [N]
        self.parameters = tuple(p for term in terms.values() for p in term.parameters() if p.requires_grad)

    def __call__(self, logits: Tensor, window: slice) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The gradient takes the place of `logits`, some rows after the other, so that a chunk costs two buffers
        [C, V] and not as many as the terms need in between."""
        teacher = _window(self.signal, window, self.vocab_size)
        total = logits.new_zeros(())
        d_parameters = [torch.zeros_like(p) for p in self.parameters]
        rows = rows_at_once(logits)
        for start in range(0, logits.shape[0], rows):
            part = slice(start, min(start + rows, logits.shape[0]))
            among_all = slice(window.start + part.start, window.start + part.stop)
            value, gradient = self._rows(logits[part], among_all, _cut(teacher, part), d_parameters)
            total += value
            logits[part] = gradient
        return total, logits, d_parameters

    def _rows(
        self, logits: Tensor, window: slice, teacher: TeacherSignal, d_parameters: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The summed loss () of some rows of a chunk and its gradient to their logits; adds to `d_parameters`."""
        batch = _window_batch(self.batch, window)
        student = StudentOutput(logits=logits[None])
        total, d_logits = logits.new_zeros(()), None
        for name, term in self.terms.items():
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
            self.values[name][window] = value
        assert d_logits is not None, "at least one objective"
        return total, d_logits


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


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """[N] of the supervised targets -> [B, T], 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


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
        voices=None
        if signal.voices is None
        else tuple(replace(v, weight=v.weight[mask][None], hidden=v.hidden[mask][None]) for v in signal.voices),
        logprobs=at(signal.logprobs),
        reference_logprobs=at(signal.reference_logprobs),
        hidden_states=None,
        attentions=None,
        relations=None,
        topk=None if topk is None else replace(topk, ids=topk.ids[mask][None], logprobs=topk.logprobs[mask][None]),
    )


def _window(signal: TeacherSignal, window: slice, vocab_size: int | None) -> TeacherSignal:
    """Targets `window` of a gathered signal, with the chunk's logits where the teacher gives a distribution."""
    cut = _cut(signal, window)
    if signal.head is not None and signal.hidden is not None:
        cut.logits = signal.head.cut(vocab_size)(signal.hidden[:, window])
    elif signal.voices is not None:
        cut.logits = _mixed(signal.voices, signal.pool, window, vocab_size)
    elif cut.topk is not None:
        cut.topk = cut_topk(cut.topk, vocab_size)
    return cut


def _mixed(voices: Sequence[Voice], pool: Pool, window: slice, vocab_size: int | None) -> Tensor:
    """Logits [1, C, V] of several models' mixture."""
    cut = [(v.weight[:, window], v.hidden[:, window], v.head.cut(vocab_size)) for v in voices]
    return mixed(cut, pool)


def _cut(signal: TeacherSignal, window: slice) -> TeacherSignal:
    """What a gathered signal, or a chunk's, says of the targets `window` of its own."""

    def at(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[:, window]

    topk = signal.topk
    return TeacherSignal(
        logits=at(signal.logits),
        logprobs=at(signal.logprobs),
        reference_logprobs=at(signal.reference_logprobs),
        topk=None if topk is None else replace(topk, ids=topk.ids[:, window], logprobs=topk.logprobs[:, window]),
        reward=signal.reward,
    )
