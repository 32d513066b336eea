"""Several teachers as one: mixed with fixed weights (Hinton et al. 2015, arXiv:1503.02531), or chosen per sample by
their loss (FuseLLM's MinCE and AvgCE, arXiv:2401.10491; CA-MKD, arXiv:2201.00007), confidence or domain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor

from kdcli.api import Batch, Engine, ModelShape, Need, Task, Teacher, TeacherSignal, Voice
from kdcli.errors import ConfigError
from kdcli.ops.mixture import Pool
from kdcli.teacher._composite import Composite, asks_for_all_ranks
from kdcli.teacher._voices import entropies, target_logprobs, voices_of
from kdcli.text.vocabulary import share_ids

Choice = Literal["all", "domain", "name", "loss", "confidence"]
DENSE = Need.DISTRIBUTION | Need.LOGITS


class Ensemble(Composite):
    """Members i with weights w_i, which sum to 1 for each target:

        pool probabilities   p = sum_i w_i p_i
        pool logits          p proportional to prod_i p_i^w_i

    `choose` says what the weights are:

        all          `weights` (equal ones by default)
        domain       the row of the table `domains`: {code: coder, math: {coder: 1, prover: 3}}; where a domain is not
                     in it, `weights` if they are given
        name         1 for the member with the name of the example's domain
        loss         1 for the member with the lowest mean -log p_i(target) of the sequence (of the target, with
                     `per=target`); with `sharpness` s, weights proportional to `weights` exp(-s loss_i)
        confidence   the same with the mean entropy of p_i in place of the loss

    `loss` alone is FuseLLM's MinCE. CA-MKD's weights are (1 - softmax(loss)) / (M - 1), which spread more evenly.

    Members are mixed at temperature 1: an objective's temperature T softens the mixture, so that it compares with
    (sum_i w_i p_i)^(1/T) and not with the mixture of softened members; with pool logits both are the same.
    Vocabularies are cut to the ids that all have. All members must have one tokenizer, and give logits.

    A member that no row of a micro-batch chooses by domain or name is not run, unless ranks must run it together (it
    asked for the engine in `place`). Raises ConfigError for names that do not exist, and settings without effect.
    """

    def __init__(
        self,
        *,
        teachers: Mapping[str, Teacher],
        weights: Mapping[str, float] | None = None,
        pool: Pool = "probabilities",
        choose: Choice = "all",
        domains: Mapping[str, str | Mapping[str, float]] | None = None,
        sharpness: float | None = None,
        per: Literal["sequence", "target"] = "sequence",
    ) -> None:
        self.teachers = dict(teachers)
        self.weights = None if weights is None else dict(weights)
        self.pool: Pool = pool
        self.choose: Choice = choose
        self.domains = dict(domains or {})
        self.sharpness = sharpness
        self.per = per
        self._refuse()
        self.parts = {f"teachers.{name}": one for name, one in self.teachers.items()}
        self.bound = {"": self}  # by its place: whose tokens must be the student's
        self.together: set[str] = set()  # members that all ranks run at once
        self.provides = DENSE | Need.LOGPROBS
        equal = dict.fromkeys(self.teachers, 1.0)
        self._given = self._row(equal if weights is None else weights)
        self._table = {domain: self._row(self._named(of)) for domain, of in self.domains.items()}

    # --------------------------------------------------------------------------------------- all members alike

    def load_tokenizer(self) -> Any:
        """Raises ConfigError where members have not the same ids."""
        if self.tokenizer is None:
            first, *others = tokenizers = {name: one.load_tokenizer() for name, one in self.teachers.items()}
            for other in others:
                a, b = tokenizers[first], tokenizers[other]
                if a is not None and b is not None and not share_ids(a.get_vocab(), b.get_vocab()):
                    raise ConfigError(
                        f"teacher.teachers: {first} and {other} have different tokenizers, so their distributions are "
                        "over different tokens and cannot be mixed; choose teachers of one tokenizer"
                    )
            known = [one for one in tokenizers.values() if one is not None]
            self.tokenizer = min(known, key=lambda one: len(one.get_vocab()), default=None)
        return self.tokenizer

    def load_task(self) -> Task | None:
        tasks = [task for one in self.teachers.values() if (task := one.load_task()) is not None]
        if any(task != tasks[0] for task in tasks):
            raise ConfigError("teacher.teachers: they do different tasks, or name labels differently; mix equals only")
        return tasks[0] if tasks else None

    def place(self, engine: Engine) -> None:
        if engine.world_size > 1:
            self.together = {name for name, one in self.teachers.items() if asks_for_all_ranks(one)}
        super().place(engine)

    def fingerprint(self) -> str:
        of = [(name, one.fingerprint()) for name, one in self.teachers.items()]
        settings = [self.weights, self.pool, self.choose, self.domains, self.sharpness, self.per]
        return xxhash.xxh3_128_hexdigest(repr(["ensemble", of, settings]).encode())

    def shape(self) -> ModelShape | None:
        """None: a mixture has no layers."""
        return None

    def check_domains(self, names: Iterable[str]) -> None:
        """Raise ConfigError for a domain of the data that no member would teach."""
        for name in names:
            self._of_domain(name)

    # ------------------------------------------------------------------------------------------------- a batch

    @torch.no_grad()
    def annotate(self, batch: Batch, needs: Need) -> TeacherSignal:
        """Raises ConfigError for a student with another tokenizer, and for a domain without a teacher."""
        if not needs & (DENSE | Need.LOGPROBS):
            return TeacherSignal()
        if batch.teacher is not None and batch.teacher.foreign:
            raise ConfigError("teacher=ensemble: the student has another tokenizer; choose one with the teachers'")
        routes = None if self.choose in ("loss", "confidence") else self._routes(batch)
        heard = {
            name: one.annotate(batch, Need.DISTRIBUTION)
            for place, (name, one) in enumerate(self.teachers.items())
            if routes is None or name in self.together or bool(routes[place].any())
        }
        parts = {name: voices_of(signal, self.pool) for name, signal in heard.items()}
        if routes is None:
            routes = self._by_merit(batch, parts)
        weight = dict(zip(self.teachers, routes, strict=True))  # [E], or [B, T]
        if routes.dim() == 2:  # [M, E]: of the padding too, which is of no sequence
            weight = {name: w[batch.segment.clamp(min=0)] for name, w in weight.items()}
        voices = tuple(
            replace(voice, weight=voice.weight * weight[name])
            for name, voices in parts.items()
            for voice in voices
            if bool(weight[name].any())
        )
        signal = TeacherSignal(voices=voices, pool=self.pool)
        if Need.LOGPROBS in needs:
            values = target_logprobs(voices, self.pool, batch).float()
            signal.logprobs = torch.zeros(batch.mask.shape, device=values.device).masked_scatter(batch.mask, values)
        return signal

    def _routes(self, batch: Batch) -> Tensor:
        """[M, E] float64: what each sequence gives each member."""
        rows = [self._given if self.choose == "all" else self._of_domain(domain) for domain in batch.domain]
        rows = rows or [self._given] * batch.num_sequences
        return torch.tensor(rows, dtype=torch.float64, device=batch.mask.device).T

    def _by_merit(self, batch: Batch, parts: Mapping[str, tuple[Voice, ...]]) -> Tensor:
        """[M, E], or [M, B, T] with `per=target`, float64."""
        costs = torch.stack([self._cost(batch, voices) for voices in parts.values()])
        if self.sharpness is not None:
            prior = torch.tensor(self._given, dtype=torch.float64, device=costs.device).log()
            return torch.softmax(prior.view(-1, *[1] * (costs.dim() - 1)) - self.sharpness * costs, dim=0)
        return torch.zeros_like(costs).scatter_(0, costs.argmin(0, keepdim=True), 1.0)

    def _cost(self, batch: Batch, voices: tuple[Voice, ...]) -> Tensor:
        """[E], or [B, T], float64: the loss or the entropy; 0 where there is no target."""
        if self.choose == "loss":
            values = -target_logprobs(voices, self.pool, batch)
        else:
            values = entropies(voices, self.pool, batch)
        spread = torch.zeros(batch.mask.shape, dtype=torch.float64, device=values.device)
        spread.masked_scatter_(batch.mask, values.double())
        if self.per == "target":
            return spread
        return batch.sum_by_sequence(spread) / batch.targets_by_sequence().clamp(min=1)

    # ------------------------------------------------------------------------------------------------ settings

    def _refuse(self) -> None:
        if len(self.teachers) < 2:
            raise ConfigError(
                f"teacher.teachers: an ensemble has two or more, not {len(self.teachers)}; add some with "
                "+teacher@teacher.teachers.NAME=hf, or set teacher=hf"
            )
        for name, one in self.teachers.items():
            lacking = DENSE & ~one.provides
            if lacking:
                words = " and ".join(str(flag.name).lower() for flag in lacking)
                raise ConfigError(
                    f"teacher.teachers.{name}: {type(one).__name__} gives no {words}, so it cannot be mixed with "
                    "others; choose one that runs here, such as hf"
                )
        merit = self.choose in ("loss", "confidence")
        if self.choose == "domain" and not self.domains:
            raise ConfigError("teacher.domains: choose=domain needs a table, such as {code: NAME, math: {NAME: 2}}")
        if self.choose != "domain" and self.domains:
            raise ConfigError(f"teacher.domains: has no effect with choose={self.choose}; set teacher.choose=domain")
        if not merit and (self.sharpness is not None or self.per != "sequence"):
            raise ConfigError("teacher.sharpness, teacher.per: have an effect with choose=loss or confidence only")
        if self.sharpness is not None and not self.sharpness > 0:
            raise ConfigError(
                f"teacher.sharpness: is {self.sharpness}; give a number above 0, or null for the best alone"
            )
        if self.weights is not None and (self.choose == "name" or (merit and self.sharpness is None)):
            raise ConfigError(
                f"teacher.weights: have no effect with choose={self.choose}, which hears one teacher alone; leave them "
                "out" + (", or set teacher.sharpness" if merit else "")
            )

    def _named(self, of: str | Mapping[str, float]) -> Mapping[str, float]:
        return {of: 1.0} if isinstance(of, str) else of

    def _row(self, weights: Mapping[str, float]) -> list[float]:
        """Weights in the order of the members, summing to 1. Raises ConfigError."""
        for name, weight in weights.items():
            if name not in self.teachers:
                raise ConfigError(f"teacher: there is no teacher {name}; there are {', '.join(self.teachers)}")
            if not weight >= 0 or weight == float("inf"):
                raise ConfigError(f"teacher: {name} has weight {weight}; give a number of at least 0")
        total = sum(weights.values())
        if not total > 0:
            raise ConfigError("teacher: no teacher has a weight above 0")
        return [weights.get(name, 0.0) / total for name in self.teachers]

    def _of_domain(self, domain: str) -> list[float]:
        if self.choose == "name":
            if domain in self.teachers:
                return self._row({domain: 1.0})
            raise ConfigError(
                f"teacher.teachers: no teacher has the name of domain {domain}; name one so, or set "
                "teacher.choose=domain with a table"
            )
        if self.choose != "domain" or domain in self._table or self.weights is not None:
            return self._table.get(domain, self._given)
        raise ConfigError(
            f"teacher.domains: says nothing of domain {domain}; add teacher.domains.{domain}=NAME, or teacher.weights "
            "for all that the table lacks"
        )
