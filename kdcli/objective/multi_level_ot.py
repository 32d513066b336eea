"""Multi-level optimal transport: Cui et al. 2024 (MultiLevelOT), arXiv:2412.14528."""

from __future__ import annotations

from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from kdcli.api import Batch, Need, Objective, Scope, Settings, StudentOutput, TeacherSignal, Unit
from kdcli.errors import ConfigError
from kdcli.objective._spans import compared, heads
from kdcli.ops.chunked import chunk_size, map_chunks
from kdcli.ops.head import Head
from kdcli.ops.optimal_transport import sinkhorn_cost

_PAIRS = 2**22  # pairs of targets whose plans are held at once: some 400 MB with ten iterations


class MultiLevelOT(Objective):
    """Per sequence of N targets, with q_i, p_i the K likeliest columns of softmax(z_i / (std(z_i) T)):

        1/N sum_i |q_i - p_i|  +  a 1/N sum_i sum_k -p_ik log q_ik  +  s sum_ij P_ij |u_i - v_j|

    Columns are ranked, on each side by itself, by their probability summed over the sequence, so that rank k is one
    token throughout it; K = `top_k`, at most either vocabulary. u_i and v_j are the softmax of the K columns' logits
    over `sinkhorn_temperature`, and P Sinkhorn's plan for the cost |u_i - v_j|. a = `log_weight` (0.1), s =
    `sinkhorn_weight` (0.1 x 0.001 in the official code), `sinkhorn_epsilon` 0.1, `sinkhorn_iterations` 10.

    Departs from the official code: targets are those at which both models predict what begins at the same byte, and
    not the i-th of each; the second and third part are of the logits and not of a softmax of probabilities (a second
    softmax); the second is -sum p log q of the student as in the paper, with its two sides exchanged there; padding,
    prompts and other sequences take no part, in ranks neither; std is sqrt(variance + 1e-8), for which equal logits
    have a gradient, in place of std + 1e-4. The paper's cross-entropy is another term. Raises ConfigError for a
    number out of range, or a teacher that gives top-k only.
    """

    needs = Need.LOGITS
    unit = Unit.SEQUENCE
    scope = Scope.STATES
    cross_tokenizer = True

    def __init__(
        self,
        *,
        top_k: int = 50,
        temperature: float = 1.0,
        log_weight: float = 0.1,
        sinkhorn_weight: float = 1e-4,
        sinkhorn_temperature: float = 2.0,
        sinkhorn_epsilon: float = 0.1,
        sinkhorn_iterations: int = 10,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(**settings)
        above = {
            "top_k": top_k,
            "temperature": temperature,
            "sinkhorn_temperature": sinkhorn_temperature,
            "sinkhorn_epsilon": sinkhorn_epsilon,
            "sinkhorn_iterations": sinkhorn_iterations,
        }
        for name, value in above.items():
            if not value > 0:
                raise ConfigError(f"MultiLevelOT: {name} is {value}; set a number above 0")
        self.top_k = top_k
        self.temperature = temperature
        self.log_weight = log_weight
        self.sinkhorn_weight = sinkhorn_weight
        self.sinkhorn_temperature = sinkhorn_temperature
        self.sinkhorn_epsilon = sinkhorn_epsilon
        self.sinkhorn_iterations = sinkhorn_iterations

    def units(self, batch: Batch) -> Tensor:
        known = super().units(batch) & (batch.sum_by_sequence(compared(batch).float()) > 0)
        return known if batch.rejected is None else known & ~batch.rejected

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        head, teacher_head = heads(batch, student, teacher, "MultiLevelOT")
        assert student.hidden is not None and teacher.hidden is not None, "scope STATES sees hidden states"
        both = batch.mask & compared(batch)
        of = batch.segment[both]  # [N]
        count = min(self.top_k, head.vocab_size, teacher_head.vocab_size)
        q = self._columns(student.hidden[both], head, of, batch.num_sequences, count)
        p = self._columns(teacher.hidden[both], teacher_head, of, batch.num_sequences, count)

        per_target = (q.logprobs.exp() - p.logprobs.exp()).abs().sum(-1)
        per_target = per_target - self.log_weight * (p.logprobs.exp() * q.logprobs).sum(-1)
        number = torch.bincount(of, minlength=batch.num_sequences).clamp(min=1)
        means = per_target.new_zeros(batch.num_sequences).index_add(0, of, per_target) / number
        if self.sinkhorn_weight == 0:
            return means
        u, v = ((one.logits / self.sinkhorn_temperature).softmax(-1) for one in (q, p))
        return means + self.sinkhorn_weight * self._transport(u, v, of, batch.num_sequences)

    def _transport(self, u: Tensor, v: Tensor, of: Tensor, number: int) -> Tensor:
        """Sinkhorn's distance [E] between each sequence's rows of u and of v, [N, K], a few sequences at a time."""
        counts = torch.bincount(of, minlength=number)
        order = of.argsort(stable=True)
        place = torch.empty_like(of)
        place[order] = torch.arange(len(of), device=of.device) - (counts.cumsum(0) - counts)[of[order]]
        longest = int(counts.max())
        real = torch.arange(longest, device=of.device) < counts.unsqueeze(-1)
        padded = [rows.new_zeros(number, longest, rows.shape[-1]).index_put((of, place), rows) for rows in (u, v)]
        cost = torch.cdist(*padded, p=1)
        # A plan's iterations are computed again in the backward: each would keep two numbers per pair of targets.
        size = max(1, _PAIRS // max(1, longest**2))
        settings = self.sinkhorn_epsilon, self.sinkhorn_iterations
        return map_chunks(lambda pairs, kept: sinkhorn_cost(pairs, kept, *settings), size, cost, real)

    def _columns(self, hidden: Tensor, head: Head, of: Tensor, number: int, count: int) -> _Columns:
        """The `count` likeliest columns [N, K] of each target's sequence."""

        def standardized(h: Tensor) -> Tensor:
            logits = head(h)
            squares = (logits - logits.mean(-1, keepdim=True)).square().sum(-1, keepdim=True)
            return logits * (squares / (head.vocab_size - 1) + 1e-8).rsqrt()

        def pick(h: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
            logits = standardized(h)
            return torch.log_softmax(logits / self.temperature, -1).gather(-1, columns), logits.gather(-1, columns)

        size = chunk_size(head.vocab_size, hidden.device)
        with torch.no_grad():
            mass = torch.zeros(number, head.vocab_size, device=hidden.device)
            for h, sequence in zip(hidden.split(size), of.split(size), strict=True):
                mass.index_add_(0, sequence, (standardized(h) / self.temperature).softmax(-1).to(mass.dtype))
            ranked = mass.sort(dim=-1, descending=True, stable=True).indices[:, :count]
        return _Columns(*map_chunks(pick, size, hidden, ranked[of]))


class _Columns(NamedTuple):
    logprobs: Tensor  # [N, K] of the whole vocabulary's softmax
    logits: Tensor  # [N, K] divided by their standard deviation
