"""From a domain scheduler's weights to rows and losses, and from a step's sums to what a scheduler reads."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from kdcli.api import Batch, DomainLoss, DomainScheduler, Objective, Stateful
from kdcli.errors import ConfigError
from kdcli.train.loader import Loader, normalized
from kdcli.train.probe import Probe
from kdcli.train.shares import share_of

log = logging.getLogger(__name__)


class Domains(Stateful):
    """Weights, from the scheduler's `initial` on: `first` after the probe before step 1, if there is one, and `update`
    after each `interval` steps, before the checkpoint of that step.

    Actuator `resample`: the loader draws by the weights. `reweight`: it draws by the initial ones for the whole run,
    and a sequence's loss counts f = weight / initial weight, over the mean of f over all that the step's mean of a term
    is of (targets, sequences or groups, of all ranks). So the loss keeps its scale however long the rows of a domain
    are: domains of equal loss have that loss under any weights. A step of rows of one domain alone is not changed by
    them. The loader has given the rows of a step before the weights after it are known, so weights act on the very
    next step: their lag is none.

    A scheduler is shown what a probe finds, and what training did since the last update: `trained`, the mean of the
    steps' losses over the domain's targets (None where it had none), and `tokens`, its share of all targets.
    """

    def __init__(
        self, scheduler: DomainScheduler, loader: Loader, terms: Mapping[str, Objective], probe: Probe | None = None
    ) -> None:
        self.scheduler, self.loader, self.terms, self.probe = scheduler, loader, terms, probe
        self.initial = loader.weights
        self.weights = loader.weights  # of the steps to come
        self.updated = -1  # the step after which they were last made
        self.news: dict[str, float] = {}  # metrics of the last probe, until they are told
        self._since = self._nothing()
        self._drawn = dict(loader.drawn)

    def next(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step, as they are drawn."""
        self._drawn = dict(self.loader.drawn)
        return self.loader.next(step)

    def weigh(self, batches: Sequence[Batch]) -> tuple[list[Batch], dict[str, float]]:
        """Actuator `reweight`: each sequence's loss times its domain's f; and how much each term's units then count,
        and did before, as counts to add up over all ranks. Otherwise the batches and no counts."""
        if self.scheduler.actuator == "resample":
            return list(batches), {}
        factor = {name: self.weights[name] / share if share else 0.0 for name, share in self.initial.items()}
        weighed = [
            replace(b, weight=b.weight * b.weight.new_tensor([factor[name] for name in b.domain])) for b in batches
        ]
        amounts = {
            f"{kind}/{term}": math.fsum(float(share_of(batch, objective, 1.0).double().sum()) for batch in some)
            for kind, some in ((BEFORE, batches), (AFTER, weighed))
            for term, objective in self.terms.items()
        }
        return weighed, amounts

    def fair(self, counts: Mapping[str, float]) -> dict[str, float]:
        """The counts that terms' sums are divided by, times the mean of f; from the sums over all ranks of the plain
        ones and of what `weigh` gave."""
        fair = {name: value for name, value in counts.items() if not name.startswith((f"{BEFORE}/", f"{AFTER}/"))}
        for term in self.terms:
            if counts.get(f"{BEFORE}/{term}"):
                fair[term] *= counts[f"{AFTER}/{term}"] / counts[f"{BEFORE}/{term}"]
        return fair

    def observe(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Metrics per domain of a step, from the sums of its tallies over all ranks; none where there is one domain.

        `loss` is the sum over terms of weight x (mean over the domain's units), `gradient_share` the domain's share of
        the coefficients that the values of all terms have in the loss, `epoch` how often its rows have been gone
        through, and `average` the scheduler's mean of the weights after each update, where it keeps one.
        """
        names = list(self.weights)
        targets = {name: sums.get(f"domain/{name}/targets", 0.0) for name in names}
        coefficient, loss = dict.fromkeys(names, 0.0), {}
        for name in filter(targets.get, names):
            for term, objective in self.terms.items():
                share = sums.get(f"domain/{name}/share/{term}", 0.0)
                if share > 0:
                    coefficient[name] += objective.weight * share
                    mean = sums[f"domain/{name}/loss/{term}"] / share
                    loss[name] = loss.get(name, 0.0) + objective.weight * mean
            if name in loss:
                self._since[name]["loss"] += loss[name] * targets[name]
            self._since[name]["targets"] += targets[name]
        if len(names) == 1:
            return {}
        rows = {name: self.loader.drawn[name] - self._drawn[name] for name in names}
        shares = {"prompt_share": rows, "token_share": targets, "gradient_share": coefficient}
        totals = {key: math.fsum(values.values()) for key, values in shares.items()}
        metrics: dict[str, float] = {}
        epochs = self.loader.epochs
        for name in names:
            place = f"domain/{name}"
            metrics[f"{place}/weight"] = self.weights[name]
            if name in loss:
                metrics[f"{place}/loss"] = loss[name]
            for key, values in shares.items():
                metrics[f"{place}/{key}"] = values[name] / totals[key] if totals[key] else 0.0
            metrics[f"{place}/epoch"] = epochs[name]
        if averages := getattr(self.scheduler, "averages", None):
            metrics |= {f"domain/{name}/average": value for name, value in averages().items()}
        return metrics

    def update(self, step: int) -> None:
        """Measure and make new weights, if it is time to. A collective.

        Raises StopScoring, on every rank and with nothing changed, when a signal came during the probe.
        """
        if not self._due(step):
            return
        losses = self._measured(step)
        begin = step == 0
        weights = (self.scheduler.first if begin else self.scheduler.update)(self.weights, losses)
        self.weights = normalized(weights, self.loader.rows)
        if self.scheduler.actuator == "resample":
            self.loader.weights = self.weights
        self.updated, self._since = step, self._nothing()
        self.news = self._told(losses)

    def state_dict(self) -> dict[str, Any]:
        return {
            "scheduler": self.scheduler.state_dict(),
            "weights": self.weights,
            "updated": self.updated,
            "news": self.news,
            "since": self._since,
            "teacher": self.probe.teacher if self.probe else None,
            "held_out": self.probe.held_out.content if self.probe else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """After the loader's. Raises ConfigError where held-out rows are not those that were measured so far."""
        if self.probe and (then := state.get("held_out")) is not None:
            now = self.probe.held_out.content
            changed = [name for name in now if now[name] != then.get(name)]
            if changed:
                raise ConfigError(
                    f"probe.data: the held-out rows of domain {', '.join(changed)} have changed since the "
                    "checkpoint, so what was measured on them does not compare with what will be; put them back"
                )
        self.scheduler.load_state_dict(state["scheduler"])
        self.weights, self.updated, self.news = dict(state["weights"]), state["updated"], dict(state["news"])
        self._since = {name: dict(sums) for name, sums in state["since"].items()}
        if self.probe:
            self.probe.teacher = state["teacher"]

    def _due(self, step: int) -> bool:
        if step == 0:
            return self.probe is not None and self.updated < 0
        interval = self.scheduler.interval
        return interval > 0 and step % interval == 0 and self.updated < step

    def _measured(self, step: int) -> dict[str, DomainLoss]:
        found = self.probe(step) if self.probe else dict.fromkeys(self.weights, DomainLoss(student=math.nan))
        for name, loss in found.items() if self.probe and self.probe.scores_student else ():
            odd = [field for field, value in asdict(loss).items() if value is not None and not math.isfinite(value)]
            if odd:
                log.warning("step %d: the probe of domain %s is not finite (%s)", step, name, ", ".join(odd))
        total = math.fsum(sums["targets"] for sums in self._since.values())
        return {
            name: replace(
                found[name],
                trained=sums["loss"] / sums["targets"] if sums["targets"] else None,
                tokens=sums["targets"] / total if total else None,
            )
            for name, sums in self._since.items()
        }

    def _told(self, losses: Mapping[str, DomainLoss]) -> dict[str, float]:
        """Metrics of a probe."""
        if self.probe is None or not self.probe.scores_student:
            return {}
        metrics = {"probe/seconds": self.probe.seconds}
        for name, loss in losses.items():
            values = {field: value for field, value in asdict(loss).items() if value is not None}
            student, teacher = (values.get(f"{one}_per_byte", values.get(one)) for one in ("student", "teacher"))
            if teacher is not None:
                gap = student - teacher
                values |= {"gap": gap, "ppl_ratio": math.exp(gap) if gap < 700 else math.inf}
            metrics |= {f"probe/{name}/{key}": value for key, value in values.items() if key not in OF_TRAINING}
        return metrics

    def _nothing(self) -> dict[str, dict[str, float]]:
        """Since the last update: the sum of losses x targets, and of targets."""
        return {name: {"loss": 0.0, "targets": 0.0} for name in self.weights}


OF_TRAINING = ("trained", "tokens")
BEFORE, AFTER = "weight/before", "weight/after"
