"""Policy gradient of reverse KL: Gu et al. 2023 (MiniLLM), arXiv:2306.08543; on-policy distillation (tinker)."""

from __future__ import annotations

import math
from typing import Literal, Unpack

import torch
from torch import Tensor

from kdcli.api import Batch, Need, Objective, Scope, StudentOutput, TeacherSignal, TokenSettings
from kdcli.errors import ConfigError
from kdcli.ops.logprob import discounted_sums

Normalize = Literal["none", "center", "whiten"]


class PolicyGradient(Objective):
    """-A_t rho_t per target: reinforcement of the sampled tokens that the teacher finds likelier than the student.

        r_t = coef (log p - log q), held within +- reward_clip
        A_t = sum_{i >= t} discount^(i - t) r_i, divided by the number of its terms with length_norm, then normalized,
              + reward_coef R, where the teacher gives a reward R of the whole sequence (teacher=reward_model)
        rho_t = exp(log q - log q_old), q_old the policy that wrote the text (1 where the batch does not say)

    Over text that the student writes, the expected gradient is that of KL(q || p): of each target's at discount 0, of
    the sequence's at discount 1. A is always held fixed. The value is a surrogate, and need not fall.

    As on-policy distillation (the defaults): `coef` is tinker's `kl_penalty_coef`, `discount` its
    `kl_discount_factor`; `is_clip` bounds rho from above, held fixed as a weight of log q (TRL's SDPO has 2).
    As MiniLLM (policy_gradient_minillm): `coef` 2 is its `reward_scaling` .5, `discount` its gamma, `reward_clip` its
    `cliprange_reward`, `clip` PPO's range, max(-A rho, -A clip(rho, 1 - clip, 1 + clip)). With text of the mixture
    (1 - a) q + a p (`teacher_mixed_alpha`), q_old is the mixture, so that rho has its importance weight w in it.
    The exact single-step part is another term, objective reverse_kl; `own_reward: false` then leaves r_t out of A_t,
    as in the paper's decomposition (the official code counts it in both). Its pre-training loss is cross_entropy.

    With `coef` null R alone counts, as in REINFORCE (Williams 1992), and log p is not asked for.

    Departs from MiniLLM: `normalize` is within a sequence, since the mean and deviation of a batch would couple
    micro-batches (`whiten`: the official code's; `center`: tinker's); q in the reward is the present student's and not
    that of the rollout, which differ only when text is used twice; log rho is held within +-20.
    Raises ConfigError for settings out of range, or for both clips.
    """

    needs = Need.LOGPROBS
    scope = Scope.LOGPROBS
    stops_gradient = True
    falls = False

    def __init__(
        self,
        *,
        coef: float | None = 1.0,
        reward_coef: float | None = None,
        discount: float = 0.0,
        own_reward: bool = True,
        length_norm: bool = False,
        reward_clip: float | None = None,
        normalize: Normalize = "none",
        clip: float | None = None,
        is_clip: float | None = None,
        **settings: Unpack[TokenSettings],
    ) -> None:
        super().__init__(**settings)
        if coef is not None and not coef > 0:
            raise ConfigError(f"PolicyGradient: coef is {coef}; set a factor of the reward above 0, or null for none")
        if reward_coef is not None and not reward_coef >= 0:
            raise ConfigError(f"PolicyGradient: reward_coef is {reward_coef}; set a factor of at least 0, or null")
        if coef is None and reward_coef is None:
            raise ConfigError("PolicyGradient: coef and reward_coef are null, which leaves no reward; set one of them")
        if not 0 <= discount <= 1:
            raise ConfigError(f"PolicyGradient: discount is {discount}; set a factor in [0, 1]")
        if discount == 0 and not own_reward:
            raise ConfigError(
                "PolicyGradient: own_reward is false and discount is 0, which leaves no reward; set discount above 0"
            )
        if normalize not in ("none", "center", "whiten"):
            raise ConfigError(f"PolicyGradient: normalize is {normalize!r}; set none, center or whiten")
        for name, value in (("reward_clip", reward_clip), ("clip", clip), ("is_clip", is_clip)):
            if value is not None and not value > 0:
                raise ConfigError(f"PolicyGradient: {name} is {value}; set a number above 0, or null for no bound")
        if clip is not None and is_clip is not None:
            raise ConfigError(
                f"PolicyGradient: clip is {clip} and is_clip is {is_clip}, which bound the same ratio; set one to null"
            )
        self.coef = coef
        self.reward_coef = reward_coef
        self.discount = discount
        self.own_reward = own_reward
        self.length_norm = length_norm
        self.reward_clip = reward_clip
        self.normalize: Normalize = normalize
        self.clip = clip
        self.is_clip = is_clip
        self.needs = Need.NOTHING if coef is None else Need.LOGPROBS
        self.needs |= Need.NOTHING if reward_coef is None else Need.REWARD

    def forward(self, batch: Batch, student: StudentOutput, teacher: TeacherSignal) -> Tensor:
        assert student.logprobs is not None, "the student's log-probabilities were not asked for"
        log_q = student.logprobs[batch.mask]  # [N] of the supervised targets, as all below
        advantage = torch.zeros_like(log_q)
        if self.coef is not None:
            assert teacher.logprobs is not None, "the teacher's log-probabilities were not asked for"
            advantage = self._advantage(batch, self.coef * (teacher.logprobs[batch.mask] - log_q.detach()))
        if self.reward_coef is not None:
            assert teacher.reward is not None, "the teacher's rewards were not asked for"
            advantage = advantage + self.reward_coef * teacher.reward.to(log_q.dtype)[batch.segment[batch.mask]]
        old = log_q.detach() if batch.old_logprobs is None else batch.old_logprobs[batch.mask].to(log_q.dtype)
        value = self._surrogate(advantage, log_q, old)
        return torch.zeros_like(student.logprobs).masked_scatter(batch.mask, value)

    def _advantage(self, batch: Batch, reward: Tensor) -> Tensor:
        """A [N] of coef (log p - log q) [N]."""
        if self.reward_clip is not None:
            reward = reward.clamp(-self.reward_clip, self.reward_clip)
        sequence, place = _places(batch)
        counts = batch.targets_by_sequence()  # [E]
        rewards = reward.new_zeros(len(counts), int(counts.max())).index_put((sequence, place), reward)  # [E, L]
        sums = discounted_sums(rewards, self.discount)[sequence, place]
        left = counts[sequence] - place  # terms of the sum
        if not self.own_reward:
            sums, left = sums - reward, left - 1
        if self.length_norm:
            sums = sums / left.clamp(min=1).to(sums.dtype)
        return self._normalized(sums, sequence, counts.clamp(min=1).to(sums.dtype))

    def _normalized(self, values: Tensor, sequence: Tensor, counts: Tensor) -> Tensor:
        if self.normalize == "none":
            return values
        mean = torch.zeros_like(counts).index_add(0, sequence, values) / counts
        centered = values - mean[sequence]
        if self.normalize == "center":
            return centered
        variance = torch.zeros_like(counts).index_add(0, sequence, centered.square()) / counts
        return centered * (variance[sequence] + 1e-8).rsqrt()  # MiniLLM's utils.whiten

    def _surrogate(self, advantage: Tensor, log_q: Tensor, old: Tensor) -> Tensor:
        """-A rho [N], with rho's bounds."""
        log_rho = (log_q - old).clamp(-_LOG_RATIO, _LOG_RATIO)
        if self.clip is not None:
            rho = log_rho.exp()
            return torch.maximum(-advantage * rho, -advantage * rho.clamp(1 - self.clip, 1 + self.clip))
        if self.is_clip is not None:
            weight = log_rho.detach().clamp(max=math.log(self.is_clip)).exp()
            return -advantage * weight * (log_q - log_q.detach()).exp()  # its gradient is -A weight d log q
        return -advantage * log_rho.exp()


_LOG_RATIO = 20.0  # as verl's and TRL's policy losses: exp(20) times any advantage is finite in float32


def _places(batch: Batch) -> tuple[Tensor, Tensor]:
    """(sequence, place in the sequence) of each supervised target, both [N]: a sequence's targets are neighbours."""
    sequence = batch.segment[batch.mask]
    index = torch.arange(len(sequence), device=sequence.device)
    first = index.new_full((batch.num_sequences,), len(sequence)).scatter_reduce(0, sequence, index, "amin")
    return sequence, index - first[sequence]
