"""Schedules at work: the objectives' numbers before each optimizer step, the losses of it after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kdcli.api import Objective, Stateful
from kdcli.errors import ConfigError
from kdcli.train.schedule import Progress, Schedule


class Schedules(Stateful):
    """All schedules of a run: sets the objectives' numbers before each optimizer step, tells them its losses after.

    `schedules`: (term, setting) -> schedule. `epoch`: optimizer steps done -> passes over the rows that are complete.
    Every rank is told the same losses, so all have the same values.
    """

    def __init__(
        self,
        schedules: Mapping[tuple[str, str], Schedule] | None = None,
        terms: Mapping[str, Objective] | None = None,
        *,
        steps: int = 1,
        epoch: Callable[[int], int] = lambda done: 0,
    ) -> None:
        self.schedules = dict(schedules or {})
        self.terms = dict(terms or {})
        self.steps = steps
        self.epoch = epoch

    def apply(self, step: int) -> dict[str, float]:
        """Set the values for optimizer step `step` (1 is the first); returns them as metrics."""
        progress = self._progress(step - 1)
        values = {place: schedule.value(progress) for place, schedule in self.schedules.items()}
        for (term, setting), value in values.items():
            setattr(self.terms[term], setting, value)
        return {f"objective/{term}/{setting}": value for (term, setting), value in values.items()}

    def observe(self, step: int, totals: Mapping[str, float], counts: Mapping[str, float]) -> None:
        """Tell each schedule the mean loss of its term in the finished step, if the step had units of it."""
        progress = self._progress(step)
        for (term, _), schedule in self.schedules.items():
            if counts[term]:
                schedule.after_step(totals[f"loss/{term}"], progress)

    def state_dict(self) -> dict[str, Any]:
        return {f"{term}.{setting}": schedule.state_dict() for (term, setting), schedule in self.schedules.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ConfigError when the state is of other schedules."""
        if state.keys() != self.state_dict().keys():
            then, now = (", ".join(names) or "none" for names in (state, self.state_dict()))
            raise ConfigError(f"objective: the checkpoint was saved with the schedules {then}, but there are {now}")
        for (term, setting), schedule in self.schedules.items():
            schedule.load_state_dict(state[f"{term}.{setting}"])

    def _progress(self, done: int) -> Progress:
        return Progress(done, self.steps, self.epoch(done))
