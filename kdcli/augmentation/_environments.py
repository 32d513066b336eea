"""What an agent acts in: a task with tools and a gold answer, or a bandit (EVOLvE, arXiv:2410.06238)."""

from __future__ import annotations

import math
import random
import re
import string
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Literal

from kdcli.augmentation import _react
from kdcli.augmentation._tools import Tool, called

NAMES = string.ascii_uppercase  # of the arms of a bandit


class Call:
    """An action that somebody else has to answer: the writer that plays the tools."""

    def __init__(self, tool: Mapping[str, Any], given: str) -> None:
        self.tool, self.input = tool, given


class Episode(ABC):
    """One attempt. `take` is told what the agent wrote, and says what it observes; None: the episode has ended."""

    finished: bool = False
    success: bool | None = None  # None: nobody can tell
    score: float | None = None
    stop: Sequence[str] = ()
    form: Mapping[str, Any] | None = None

    @abstractmethod
    def take(self, text: str) -> tuple[str, str | Call | None]:
        """What of the text counts, and the observation."""

    def latest(self, observation: str) -> str | None:
        """What stands for all that came before, where the agent need not see the rest; None: it sees everything."""
        del observation
        return None

    def facts(self) -> dict[str, Any]:
        """What is told of the episode in `meta`."""
        return {}


class ToolTask(Episode):
    """Thoughts, actions and observations until a final answer; the answer is right where `same` says so of `gold`."""

    stop = _react.STOP

    def __init__(
        self,
        tools: Mapping[str, Tool],
        simulated: Sequence[Mapping[str, Any]],
        gold: str | None,
        same: Callable[[str, str], bool],
    ) -> None:
        self.tools = tools
        self.simulated = {str(tool["name"]).strip().lower(): tool for tool in simulated}
        self.gold, self.same = gold, same
        self.state: MutableMapping[str, Any] = {}
        self.answer: str | None = None
        self.form = _react.form([*tools, *(str(tool["name"]) for tool in simulated)])

    def take(self, text: str) -> tuple[str, str | Call | None]:
        act = _react.read(text)
        if act.answer is not None:
            self.answer, self.finished = act.answer, True
            if self.gold is not None:
                self.success = self.same(self.gold, act.answer)
                self.score = float(self.success)
            return act.text, None
        if not act.name:
            return act.text or text.strip(), _react.MALFORMED
        if tool := self.simulated.get(act.name.lower()):
            return act.text, Call(tool, act.input)
        return act.text, called(self.tools, act.name, act.input, self.state, names=[*self.tools, *self.simulated])

    def facts(self) -> dict[str, Any]:
        return {} if self.answer is None else {"predicted": self.answer}


class Bandit(Episode):
    """`horizon` pulls of arms that pay at random. One arm, drawn by `seed`, pays gap more on average than the others:

        mean reward 0.5 + gap / 2 of the best arm, 0.5 - gap / 2 of the others
        regret = sum over pulls of (best mean - mean of the arm pulled)       0 is best

    Rewards are Bernoulli, or Gaussian of standard deviation 1. What is no arm costs a step and pays nothing. Success:
    the best arm was pulled most often. The score is the mean reward.
    """

    def __init__(
        self,
        *,
        arms: int,
        rewards: Literal["bernoulli", "gaussian"],
        gap: float,
        horizon: int,
        history: Literal["raw", "summary"],
        seed: int,
        free: bool = False,
    ) -> None:
        self._random = random.Random(seed)
        self.names = list(NAMES[:arms])
        best = self._random.randrange(arms)
        self.means = [0.5 + gap / 2 if arm == best else 0.5 - gap / 2 for arm in range(arms)]
        self.best, self.rewards, self.horizon, self.history = best, rewards, horizon, history
        self.pulls: list[tuple[int, float]] = []
        self.steps = 0
        self.form = None if free else {"regex": "(" + "|".join(self.names) + ")"}

    def take(self, text: str) -> tuple[str, str | Call | None]:
        self.steps += 1
        arm = self._arm(text)
        if arm is None:
            told = f"This names no arm. The arms are {', '.join(self.names)}"
        else:
            told = f"Arm {self.names[arm]} paid {self._paid(arm)}."
        if self.steps >= self.horizon:
            self._end()
            return text.strip(), None
        return text.strip(), f"{told}\n{self._summary()}" if self.history == "summary" else told

    def latest(self, observation: str) -> str | None:
        return observation if self.history == "summary" else None

    def ucb(self) -> int:
        """The arm of UCB1 (Auer et al. 2002): argmax mean + sqrt(2 ln t / pulls); arms never pulled come first."""
        counts = [sum(1 for arm, _ in self.pulls if arm == a) for a in range(len(self.names))]
        if 0 in counts:
            return counts.index(0)
        sums = [sum(reward for arm, reward in self.pulls if arm == a) for a in range(len(self.names))]
        t = len(self.pulls)
        values = [s / n + math.sqrt(2 * math.log(t) / n) for s, n in zip(sums, counts, strict=True)]
        return values.index(max(values))

    def facts(self) -> dict[str, Any]:
        return {
            "reward": sum(reward for _, reward in self.pulls),
            "regret": sum(self.means[self.best] - self.means[arm] for arm, _ in self.pulls),
            "best_arm": self.names[self.best],
            "pulls": [self.names[arm] for arm, _ in self.pulls],
        }

    def _arm(self, text: str) -> int | None:
        """The last arm that is named."""
        found = re.findall(rf"(?<![\w'])[{self.names[0]}-{self.names[-1]}](?![\w'])", text)
        return NAMES.index(found[-1]) if found else None

    def _paid(self, arm: int) -> str:
        mean = self.means[arm]
        if self.rewards == "gaussian":
            reward = round(self._random.gauss(mean, 1.0), 3)
        else:
            reward = float(self._random.random() < mean)
        self.pulls.append((arm, reward))
        return f"{reward:g}"

    def _summary(self) -> str:
        lines = []
        for arm, name in enumerate(self.names):
            got = [reward for pulled, reward in self.pulls if pulled == arm]
            mean = f", mean reward {sum(got) / len(got):.3g}" if got else ""
            lines.append(f"Arm {name}: pulled {len(got)} times{mean}")
        return "\n".join(lines)

    def _end(self) -> None:
        counts = [sum(1 for arm, _ in self.pulls if arm == a) for a in range(len(self.names))]
        self.finished = True
        self.success = counts[self.best] == max(counts) and counts.count(max(counts)) == 1
        self.score = sum(reward for _, reward in self.pulls) / self.horizon


def same_text(gold: str, said: str) -> bool:
    """Whether two answers agree without case, punctuation and articles (SQuAD, arXiv:1606.05250), or as numbers."""
    a, b = _plain(gold), _plain(said)
    if a and a == b:
        return True
    try:
        return math.isclose(_number(gold), _number(said), rel_tol=1e-6, abs_tol=1e-9)
    except ValueError:
        return False


def _plain(text: str) -> str:
    text = re.sub(r"(?<=\d)\.(?=\d)", "\0", text.lower())  # the point of 3.5 says something
    text = re.sub(r"[^\w\s\0+-]|(?<!\d)-(?!\d)", " ", text).replace("\0", ".")
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def _number(text: str) -> float:
    return float(text.strip().rstrip(".").replace(",", "").lstrip("$€£").rstrip("%"))
