"""What a run may spend, and what it has spent: over threads and over restarts."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from kdcli.errors import ConfigError, KDError
from kdcli.store.responses import Spent


class BudgetError(KDError):
    """The budget is spent. All that was answered is stored, and a run with a larger budget goes on from there."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits of what one run folder spends; None is no limit. Answers from the store cost nothing.

    Calls are never more than `max_calls`. Cost and tokens of a call are known when it is answered, so calls in flight
    are counted as the mean call so far; what is spent may pass the limit by as much as they differ from it.
    """

    max_cost: float | None = None  # in the currency of the writers' prices
    max_calls: int | None = None
    max_tokens: int | None = None  # of prompts and answers together

    def __post_init__(self) -> None:
        for name in ("max_cost", "max_calls", "max_tokens"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"budget.{name}: is {value}; set at least 0, or null for no limit")


NO_LIMIT = Budget()


class Meter:
    """Counts what a run spends against its budget."""

    def __init__(self, budget: Budget, spent: Iterable[Spent] = ()) -> None:
        self.budget = budget
        self.spent = sum(spent, Spent())
        self.in_flight = 0
        self._lock = threading.Lock()

    def start(self, calls: int) -> None:
        """Before calls are made. Raises BudgetError where they would pass the limit."""
        with self._lock:
            self._check(calls)
            self.in_flight += calls

    def end(self, calls: int, spent: Spent) -> None:
        """After they were made, or came to nothing."""
        with self._lock:
            self.in_flight -= calls
            self.spent += spent

    def _check(self, calls: int) -> None:
        spent, budget = self.spent, self.budget
        expected = 1 + self.in_flight / max(1, spent.calls)  # with the calls in flight like the mean of those made
        limits = (
            ("max_calls", budget.max_calls, spent.calls + self.in_flight + calls, f"{spent.calls} calls"),
            ("max_tokens", budget.max_tokens, spent.tokens * expected + 1, f"{spent.tokens:,} tokens"),
            ("max_cost", budget.max_cost, spent.cost * expected + 1e-12, f"{spent.cost:.4f}"),
        )
        for name, limit, would, told in limits:
            if limit is not None and would > limit:
                raise BudgetError(
                    f"budget.{name}={limit} is reached: this run folder spent {told} so far, which is stored; raise "
                    f"budget.{name} and start the same command again to go on"
                )
